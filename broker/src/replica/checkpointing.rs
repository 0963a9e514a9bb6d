//! When checkpoints are taken and published: captured by the state machine, written by a task of
//! their own, and only once everything they hold is durable in the log.

use std::io;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::membership;
use super::raft_types::{StoredMembership, log_id};
use super::state::State;
use crate::log::DurableEnd;
use crate::position::{EntryId, EntryIndex, LogOffset};

/// Everything at one applied index, shared with the tables that go on changing.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) applied: EntryId,
    /// Behind the applied entry's frame.
    pub(crate) end: LogOffset,
    pub(crate) membership_at: Option<EntryId>,
    /// Encoded; see [`membership`].
    pub(crate) membership: Bytes,
    pub(crate) state: State,
}

/// A checkpoint that is durable.
#[derive(Clone, Debug)]
pub(crate) struct KeptCheckpoint {
    pub(crate) applied: EntryId,
    pub(crate) membership: StoredMembership,
}

/// The two newest durable checkpoints.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept {
    pub(crate) newest: Option<KeptCheckpoint>,
    pub(crate) older: Option<EntryId>,
}

/// What others see of the checkpoints; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    kept: watch::Receiver<Kept>,
}

impl Checkpoints {
    /// Behind the last entry that both checkpoints hold; nothing from there on may be forgotten.
    pub(crate) fn covered_end(&self) -> EntryIndex {
        self.kept.borrow().older.map_or(EntryIndex::ZERO, |id| id.index.next())
    }

    pub(crate) fn changes(&self) -> watch::Receiver<Kept> {
        self.kept.clone()
    }
}

/// The state machine's end.
#[derive(Debug)]
pub(crate) struct CheckpointHandle {
    captures: mpsc::Sender<Request>,
    kept: watch::Receiver<Kept>,
    interval_bytes: u64,
    /// Where the last capture was taken.
    last: LogOffset,
}

#[derive(Debug)]
struct Request {
    capture: Capture,
    /// Told once it is durable, or not told at all.
    written: Option<oneshot::Sender<()>>,
}

impl CheckpointHandle {
    /// Whether so much was applied since the last one that another should be taken.
    pub(crate) fn is_due(&self, end: LogOffset) -> bool {
        end.bytes_since(self.last).is_some_and(|bytes| bytes >= self.interval_bytes)
    }

    /// False while the capture before still waits to be written.
    pub(crate) fn has_room(&self) -> bool {
        self.captures.capacity() > 0
    }

    /// Hands a capture to the checkpointer, if it has room.
    pub(crate) fn offer(&mut self, capture: Capture) {
        let end = capture.end;
        if self.captures.try_send(Request { capture, written: None }).is_ok() {
            self.last = end;
        }
    }

    /// Takes a capture whatever waits; answers once it is durable.
    pub(crate) fn demand(&mut self, capture: Capture) -> oneshot::Receiver<()> {
        let (written, answer) = oneshot::channel();
        self.last = capture.end;
        let captures = self.captures.clone();
        let request = Request { capture, written: Some(written) };
        tokio::spawn(async move { captures.send(request).await.ok() });
        answer
    }

    pub(crate) fn newest(&self) -> Option<KeptCheckpoint> {
        self.kept.borrow().newest.clone()
    }
}

/// Writes one checkpoint durably; blocks.
pub(crate) type WriteCheckpoint = Box<dyn FnMut(&Capture) -> io::Result<()> + Send>;

/// Starts the task that writes captures in order; it ends with the state machine.
pub(crate) fn start(
    kept: Kept,
    interval_bytes: u64,
    last: LogOffset,
    durable: watch::Receiver<DurableEnd>,
    write: WriteCheckpoint,
) -> (CheckpointHandle, Checkpoints, JoinHandle<()>) {
    let (captures, requests) = mpsc::channel(1);
    let (kept, seen) = watch::channel(kept);
    let handle = CheckpointHandle { captures, kept: seen.clone(), interval_bytes, last };
    let writing = tokio::spawn(write_all(requests, durable, write, kept));
    (handle, Checkpoints { kept: seen }, writing)
}

async fn write_all(
    mut requests: mpsc::Receiver<Request>,
    mut durable: watch::Receiver<DurableEnd>,
    mut write: WriteCheckpoint,
    kept: watch::Sender<Kept>,
) {
    while let Some(Request { capture, written }) = requests.recv().await {
        let applied = capture.applied;
        if kept.borrow().newest.as_ref().is_some_and(|newest| newest.applied >= applied) {
            written.map(|written| written.send(()));
            continue;
        }
        if durable.wait_for(|durable| durable.index > applied.index).await.is_err() {
            break;
        }
        let writing = tokio::task::spawn_blocking(move || {
            let result = write(&capture);
            (result, capture, write)
        });
        let Ok((result, capture, returned)) = writing.await else {
            tracing::error!("the checkpointer has panicked; no more checkpoints are written");
            break;
        };
        write = returned;
        match result {
            Ok(()) => {
                publish(&kept, &capture);
                written.map(|written| written.send(()));
            }
            Err(error) => tracing::error!(%applied, %error, "a checkpoint cannot be written"),
        }
    }
}

fn publish(kept: &watch::Sender<Kept>, capture: &Capture) {
    let membership = match membership::decode(&capture.membership) {
        Ok(membership) => StoredMembership::new(capture.membership_at.map(log_id), membership),
        Err(error) => unreachable!("a membership just encoded cannot be read: {error}"),
    };
    kept.send_modify(|kept| {
        kept.older = kept.newest.as_ref().map(|newest| newest.applied);
        kept.newest = Some(KeptCheckpoint { applied: capture.applied, membership });
    });
}
