//! Applies committed entries to the state and the indexes, in order, and says what came of them.
//!
//! Memory work only: checkpoints are captured here and written elsewhere. An entry that cannot be
//! applied stops the node: it is never passed over.

use std::io;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use super::Applying;
use super::checkpointing::{Capture, CheckpointHandle, KeptCheckpoint};
use super::digests::Samples;
use super::membership;
use super::published::{AppliedEnd, Published};
use super::raft_types::{
    LogId, Outcomes, RaftEntry, SnapshotMeta, StoredMembership, TypeConfig, entry_id, log_id,
    to_log,
};
use super::state::{Limits, TrimPoint};

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Manifest>;

/// What a snapshot names: a checkpoint of this node. Its files are copied beside Raft.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manifest;

/// The write side of the applied state.
#[derive(Debug)]
pub(crate) struct StateMachine {
    published: Arc<Published>,
    limits: Limits,
    applied: AppliedEnd,
    membership: StoredMembership,
    trimmed: watch::Sender<TrimPoint>,
    checkpoints: CheckpointHandle,
    samples: Samples,
}

impl StateMachine {
    pub(crate) fn new(
        published: Arc<Published>,
        limits: Limits,
        membership: StoredMembership,
        trimmed: watch::Sender<TrimPoint>,
        checkpoints: CheckpointHandle,
        samples: Samples,
    ) -> Self {
        let applied = *published.applied().borrow();
        Self { published, limits, applied, membership, trimmed, checkpoints, samples }
    }

    fn apply_entry(&mut self, entry: RaftEntry) -> io::Result<Outcomes> {
        let id = entry_id(&entry.log_id);
        if let EntryPayload::Membership(members) = &entry.payload {
            self.membership = StoredMembership::new(Some(entry.log_id), members.clone());
        }
        let (entry, _) = to_log(entry);
        let (effects, end) = {
            let mut applying = self.published.applying.write();
            let Applying { state, index } = &mut *applying;
            let effects = state.apply(&entry, state.end(), index, &self.limits);
            self.published.note_feature_level(state.feature_level());
            self.samples.applied(id.index, state);
            (effects, state.end())
        };
        let effects = effects.map_err(|error| {
            tracing::error!(entry = %id, %error, "an entry cannot be applied; stopping");
            io::Error::new(io::ErrorKind::InvalidData, error)
        })?;
        self.applied = AppliedEnd { id: Some(id), position: end };
        self.published.advance(self.applied, effects.touched);
        if let Some(trim) = effects.trim {
            self.trimmed.send_replace(trim);
        }
        if effects.expired_count > 0 {
            tracing::warn!(
                expired_count = effects.expired_count,
                "messages were trimmed before they were acknowledged"
            );
        }
        if let Some(room) = self.checkpoints.due(end) {
            drop(self.checkpoint(room));
        }
        Ok(Outcomes(effects.outcomes))
    }

    /// Everything as of the last applied entry; `None` before the first.
    fn capture(&self) -> Option<Capture> {
        let applying = self.published.applying.read();
        Some(Capture {
            applied: self.applied.id?,
            end: self.applied.position,
            membership_at: self.membership.log_id().as_ref().map(entry_id),
            membership: membership::encode(self.membership.membership()),
            state: applying.state.clone(),
            index: applying.index.capture(),
        })
    }

    /// Hands a capture of now to the checkpointer; the answer comes once it is durable.
    pub(crate) fn checkpoint(
        &mut self,
        room: OwnedSemaphorePermit,
    ) -> Option<oneshot::Receiver<()>> {
        let capture = self.capture()?;
        Some(self.checkpoints.write(capture, room))
    }

    fn snapshot(kept: KeptCheckpoint) -> Snapshot {
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(kept.applied)),
            last_membership: kept.membership,
        };
        Snapshot { meta, snapshot: Manifest }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Manifest;
    type SnapshotBuilder = NewestCheckpoint;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied.id.map(log_id), self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let outcomes = self.apply_entry(entry)?;
            if let Some(responder) = responder {
                responder.send(outcomes);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> NewestCheckpoint {
        NewestCheckpoint { snapshot: self.checkpoints.newest().map(Self::snapshot) }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _: Manifest) -> io::Result<()> {
        if meta.last_log_id <= self.applied.id.map(log_id) {
            return Ok(());
        }
        // A re-seed is put in place before the log is opened, see `crate::seed`.
        let reason = "a checkpoint of another member cannot be taken over while this one runs";
        Err(io::Error::new(io::ErrorKind::Unsupported, reason))
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        Ok(self.checkpoints.offered().map(Self::snapshot))
    }
}

/// Answers with the newest durable checkpoint; builds nothing.
#[derive(Debug)]
pub(crate) struct NewestCheckpoint {
    snapshot: Option<Snapshot>,
}

impl RaftSnapshotBuilder<TypeConfig> for NewestCheckpoint {
    type SnapshotData = Manifest;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        self.snapshot.clone().ok_or_else(|| io::Error::other("there is no checkpoint yet"))
    }
}
