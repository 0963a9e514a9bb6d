//! When checkpoints are taken and published: captured by the state machine, written by a task of
//! their own, and only once everything they hold is durable in the log.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::checkpoint::{CheckpointMeta, Checkpointer};
use super::membership::{self, MembershipBytesError};
use super::published::Published;
use super::raft_types::{StoredMembership, log_id};
use super::start::Ended;
use super::state::State;
use crate::log::Log;
use crate::position::{EntryId, EntryIndex, LogOffset};
use crate::queue::index;
use crate::seed::donor::Donor;

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
    pub(crate) index: index::Capture,
}

/// A checkpoint that is durable.
#[derive(Clone, Debug)]
pub(crate) struct KeptCheckpoint {
    pub(crate) generation: u64,
    pub(crate) applied: EntryId,
    pub(crate) membership: StoredMembership,
}

/// What is known of the durable checkpoints.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept {
    pub(crate) newest: Option<KeptCheckpoint>,
    /// What the older of both has applied: nothing behind it may be forgotten.
    pub(crate) limit: Option<EntryIndex>,
}

/// What others see of the checkpoints; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    kept: watch::Receiver<Kept>,
    /// One capture at a time.
    room: Arc<Semaphore>,
    /// What a re-seed is made of, as long as its files are held.
    pinned: Arc<Mutex<Option<(KeptCheckpoint, Donor)>>>,
}

impl Checkpoints {
    pub(crate) fn limit(&self) -> Option<EntryIndex> {
        self.kept.borrow().limit
    }

    pub(crate) fn changes(&self) -> watch::Receiver<Kept> {
        self.kept.clone()
    }

    pub(crate) fn newest(&self) -> Option<KeptCheckpoint> {
        self.kept.borrow().newest.clone()
    }

    /// Offers no newer one to other members until the donor lets go of its files.
    pub(crate) fn pin(&self, kept: KeptCheckpoint, donor: Donor) {
        *self.pinned.lock() = Some((kept, donor));
    }

    /// The one that other members are offered: they need some time to take it.
    pub(crate) fn offered(&self) -> Option<KeptCheckpoint> {
        let mut pinned = self.pinned.lock();
        match &*pinned {
            Some((kept, donor)) if donor.is_open() => Some(kept.clone()),
            Some(_) | None => {
                *pinned = None;
                self.newest()
            }
        }
    }

    /// Waits until nobody else has a capture.
    pub(crate) async fn room(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.room).acquire_owned().await.ok()
    }
}

/// The state machine's end.
#[derive(Debug)]
pub(crate) struct CheckpointHandle {
    requests: mpsc::Sender<Request>,
    checkpoints: Checkpoints,
    interval_bytes: u64,
    /// Where the last capture was taken.
    last: LogOffset,
}

#[derive(Debug)]
struct Request {
    capture: Capture,
    /// Told once it is durable; dropped if it cannot be written.
    written: oneshot::Sender<()>,
    room: OwnedSemaphorePermit,
}

impl CheckpointHandle {
    /// Room for a capture, if one should be taken at `end`.
    pub(crate) fn due(&self, end: LogOffset) -> Option<OwnedSemaphorePermit> {
        let bytes = end.bytes_since(self.last)?;
        if bytes < self.interval_bytes {
            return None;
        }
        Arc::clone(&self.checkpoints.room).try_acquire_owned().ok()
    }

    /// Hands a capture over to be written; the answer comes once it is durable.
    pub(crate) fn write(
        &mut self,
        capture: Capture,
        room: OwnedSemaphorePermit,
    ) -> oneshot::Receiver<()> {
        let (written, answer) = oneshot::channel();
        self.last = capture.end;
        // The permit keeps the queue empty; it is closed only once the writing task has ended.
        self.requests.try_send(Request { capture, written, room }).ok();
        answer
    }

    pub(crate) fn newest(&self) -> Option<KeptCheckpoint> {
        self.checkpoints.newest()
    }

    pub(crate) fn offered(&self) -> Option<KeptCheckpoint> {
        self.checkpoints.offered()
    }
}

/// What writes checkpoints.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) checkpointer: Checkpointer,
    pub(crate) group_uuid: Uuid,
    pub(crate) log: Log,
    pub(crate) published: Arc<Published>,
    /// Told if no checkpoint can be written any more: the node must end.
    pub(crate) ended: watch::Sender<Option<Ended>>,
}

/// Starts the task that writes captures in order; it ends with the state machine.
pub(crate) fn start(
    newest: Option<KeptCheckpoint>,
    interval_bytes: u64,
    last: LogOffset,
    writing: Writing,
) -> (CheckpointHandle, Checkpoints, JoinHandle<()>) {
    let (requests, waiting) = mpsc::channel(1);
    let (kept, seen) = watch::channel(Kept { newest, limit: writing.limit() });
    let checkpoints =
        Checkpoints { kept: seen, room: Arc::new(Semaphore::new(1)), pinned: Arc::default() };
    let handle =
        CheckpointHandle { requests, checkpoints: checkpoints.clone(), interval_bytes, last };
    (handle, checkpoints, tokio::spawn(writing.run(waiting, kept)))
}

impl Writing {
    fn limit(&self) -> Option<EntryIndex> {
        self.checkpointer.forget_limit().map(|mark| mark.applied.index)
    }

    async fn run(mut self, mut requests: mpsc::Receiver<Request>, kept: watch::Sender<Kept>) {
        let mut durable = self.log.durable_end();
        let mut closed = self.log.closed();
        while let Some(Request { capture, written, room }) = requests.recv().await {
            let applied = capture.applied;
            if kept.borrow().newest.as_ref().is_some_and(|newest| newest.applied >= applied) {
                written.send(()).ok();
                continue;
            }
            let covered = tokio::select! {
                biased;
                covered = durable.wait_for(|durable| durable.index > applied.index) => {
                    covered.map(|durable| durable.index)
                }
                // Nothing more becomes durable.
                _ = closed.wait_for(Option::is_some) => break,
            };
            let Ok(durable_end) = covered else { break };
            let ended = self.ended.clone();
            let work = move || {
                let newest = self.write(capture, durable_end);
                (self, newest)
            };
            let Ok((writing, newest)) = tokio::task::spawn_blocking(work).await else {
                let reason = "the checkpointer has panicked".to_owned();
                ended.send_replace(Some(Ended::Failed(reason)));
                break;
            };
            self = writing;
            match newest {
                Ok(newest) => {
                    kept.send_replace(Kept { newest: Some(newest), limit: self.limit() });
                    written.send(()).ok();
                }
                Err(error) => {
                    tracing::error!(%applied, %error, "a checkpoint was not written");
                    if self.checkpointer.has_failed() {
                        // Without checkpoints nothing is trimmed, until the disk is full.
                        let reason = format!("no checkpoint can be written: {error}");
                        self.ended.send_replace(Some(Ended::Failed(reason)));
                    }
                }
            }
            drop(room);
        }
    }

    fn write(&mut self, capture: Capture, durable_end: EntryIndex) -> io::Result<KeptCheckpoint> {
        let meta = CheckpointMeta {
            group_uuid: self.group_uuid,
            applied: capture.applied,
            end: capture.end,
            gate: capture.state.gate(),
            trimmed: capture.state.trimmed(),
            purged: self.log.purged(),
            membership_at: capture.membership_at,
            membership: capture.membership.to_vec(),
        };
        let mut newest = kept(0, &meta).map_err(io::Error::other)?;
        let state = capture.state.encode().map_err(io::Error::other)?;
        let written = self.checkpointer.write(&capture.index, &meta, &state, durable_end)?;
        newest.generation = self.checkpointer.newest().map_or(0, |kept| kept.generation);
        drop(capture);
        self.published.applying.write().index.settle(written);
        tracing::info!(applied = %meta.applied, bytes = state.len(), "wrote a checkpoint");
        Ok(newest)
    }
}

/// What Raft needs to know of a checkpoint.
pub(crate) fn kept(
    generation: u64,
    meta: &CheckpointMeta,
) -> Result<KeptCheckpoint, MembershipBytesError> {
    let members = membership::decode(&meta.membership)?;
    let membership = StoredMembership::new(meta.membership_at.map(log_id), members);
    Ok(KeptCheckpoint { generation, applied: meta.applied, membership })
}
