//! What the writer is asked to do, in the order of the log, and who waits for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam_channel::Receiver;
use tokio::sync::oneshot;

use super::segment::Segment;
use super::storage::copy_error;
use super::unsynced::UNSYNCED_BYTES_MAX;
use super::{Flushed, Vote};
use crate::entry::Entry;
use crate::position::{EntryIndex, LogOffset, Term};

/// What the writer is asked to do, in the order of the log.
pub(super) enum Command {
    Append {
        entries: Vec<Entry>,
        waiting: Waiting,
    },
    Cut(Cut),
    Vote {
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Syncs what precedes it, and says for good that nothing is missing here.
    LiftFence {
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Syncs what precedes it, marks the log cleanly closed, and ends the writer.
    Close,
}

/// Everything from `from` on is dropped, and the log goes on there.
pub(super) struct Cut {
    pub(super) from: EntryIndex,
    pub(super) position: LogOffset,
    /// Of the entry before `from`; 0 if there is none.
    pub(super) base_term: Term,
    pub(super) epoch: u64,
    /// Settled segments with entries to drop, ascending.
    pub(super) segments: Vec<Arc<Segment>>,
    /// Incarnation of the settled segment that holds the entry before `from`.
    pub(super) previous: u64,
    /// The log begins anew behind a snapshot: nothing is kept, nor put into quarantine.
    pub(super) anew: bool,
}

/// Who waits for entries to be kept. Is told of a failure if it is dropped, whatever became of the writer.
pub(super) struct Waiting {
    /// None once it was called.
    flushed: Option<Flushed>,
    pub(super) queued: Instant,
    bytes: u64,
    /// Bytes of all who wait.
    total_bytes: Arc<AtomicU64>,
}

impl Waiting {
    pub(super) fn new(flushed: Flushed, bytes: u64, total_bytes: &Arc<AtomicU64>) -> Self {
        total_bytes.fetch_add(bytes, Ordering::Relaxed);
        let total_bytes = Arc::clone(total_bytes);
        Self { flushed: Some(flushed), queued: Instant::now(), bytes, total_bytes }
    }

    pub(super) fn tell(mut self, result: io::Result<()>) {
        if let Some(flushed) = self.flushed.take() {
            flushed(result);
        }
    }

    /// Nobody is told: the append itself was refused.
    pub(super) fn forget(mut self) {
        self.flushed = None;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.total_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(flushed) = self.flushed.take() {
            flushed(Err(io::Error::other("the log's writer has ended")));
        }
    }
}

/// What waits now, up to what one sync may cover. No timer.
pub(super) fn drain(first: Command, commands: &Receiver<Command>) -> Vec<Command> {
    let mut bytes = command_bytes(&first);
    let mut group = vec![first];
    while bytes < UNSYNCED_BYTES_MAX {
        let Ok(next) = commands.try_recv() else { break };
        bytes += command_bytes(&next);
        group.push(next);
    }
    group
}

fn command_bytes(command: &Command) -> u64 {
    match command {
        Command::Append { entries, .. } => entries.iter().map(Entry::frame_bytes).sum(),
        Command::Cut(_) | Command::Vote { .. } | Command::LiftFence { .. } | Command::Close => 0,
    }
}

/// Tells who waits for a command that it was not done.
pub(super) fn refuse(command: Command, error: &io::Error) {
    match command {
        Command::Append { waiting, .. } => waiting.tell(Err(copy_error(error))),
        Command::Vote { done, .. } | Command::LiftFence { done } => {
            if done.send(Err(copy_error(error))).is_err() {
                tracing::debug!("nobody waits for the sync any more");
            }
        }
        Command::Cut(_) | Command::Close => {}
    }
}

/// The log is closed, so nothing more is queued, and nobody may be left waiting.
pub(super) fn refuse_all(commands: &Receiver<Command>) {
    while let Ok(command) = commands.try_recv() {
        refuse(command, &closed());
    }
}

pub(super) fn closed() -> io::Error {
    io::Error::other("the log is closed")
}

/// Tells who waits what became of it; a failure is the writer's too.
pub(super) fn answer(
    done: oneshot::Sender<io::Result<()>>,
    result: io::Result<()>,
) -> io::Result<()> {
    let failed = result.as_ref().err().map(copy_error);
    if done.send(result).is_err() {
        tracing::debug!("nobody waits for the sync any more");
    }
    failed.map_or(Ok(()), Err)
}
