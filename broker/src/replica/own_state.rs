//! What this node says of itself to other members, and answers them as a member.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use drumlin_proto::native::{Listener, StateResponse};
use openraft::async_runtime::WatchReceiver;

use super::Replica;
use super::clock_source::wall_ms;
use super::membership::Role;
use super::peer_service::raft_member::MemberParts;
use super::peer_service::{Member, MemberIdentity};
use crate::command::level::FEATURE_LEVEL_MAX;
use crate::data_dir::Identity;
use crate::position::{EntryId, EntryIndex};
use crate::retention::disk_space;
use crate::seed::SeedProgress;

/// What does not come from Raft or the log.
#[derive(Debug)]
pub(crate) struct OwnState {
    pub(crate) identity: Identity,
    data_dir: PathBuf,
    listeners: OnceLock<Vec<Listener>>,
    stopping: AtomicBool,
    yields: AtomicBool,
}

impl OwnState {
    pub(crate) fn new(identity: Identity, data_dir: PathBuf) -> Self {
        let (stopping, yields) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { identity, data_dir, listeners: OnceLock::new(), stopping, yields }
    }
}

/// The identity as calls between members carry it.
pub(crate) fn member_identity(identity: &Identity) -> MemberIdentity {
    MemberIdentity {
        cluster: identity.cluster.clone(),
        broker_group: identity.broker_group.to_string(),
        group_uuid: identity.group_uuid,
        node_id: identity.node_id,
    }
}

fn index_end(id: Option<EntryId>) -> u64 {
    id.map_or(EntryIndex::ZERO, |id| id.index.next()).get()
}

impl Replica {
    pub fn identity(&self) -> &Identity {
        &self.shared.own.identity
    }

    /// Where clients reach this node, to be told to other members; the first call counts.
    pub fn tell_listeners(&self, listeners: Vec<Listener>) {
        // A second call could only tell the same.
        self.shared.own.listeners.set(listeners).ok();
    }

    /// Tells the other members from now on that this node is about to stop.
    pub fn tell_stopping(&self) {
        self.shared.own.stopping.store(true, Ordering::Relaxed);
    }

    /// Tells the other members whether an operator has moved leadership away from this node: then
    /// it does not come back only because it is preferred here. Until the next start.
    pub fn tell_yields(&self, yields: bool) {
        self.shared.own.yields.store(yields, Ordering::Relaxed);
    }

    /// This node as its service of members needs it.
    pub(crate) fn member(&self) -> Arc<dyn Member> {
        let replica = self.clone();
        let said = Arc::new(move || replica.own_state());
        let doubt = Arc::clone(&self.shared.doubt);
        let parts = MemberParts::new(member_identity(self.identity()), Role::Data, said, doubt);
        self.member_of(parts)
    }

    /// How far this node has come with copying another one's files, while it does.
    pub fn seed_progress(&self) -> Option<SeedProgress> {
        *self.shared.seeding.receiving().borrow()
    }

    /// What this node says of itself now. Asks the file system how full it is.
    pub fn own_state(&self) -> StateResponse {
        let own = &self.shared.own;
        let metrics = self.shared.raft.metrics().borrow_watched().clone();
        let durable = *self.shared.log.durable_end().borrow();
        let (trimmed_below, applied_clock_ms) = {
            let applying = self.view();
            (applying.state.trimmed().below.get(), applying.state.clock_ms())
        };
        let (disk_percent, disk_free_bytes) = match disk_space(&own.data_dir) {
            Ok(space) => {
                let filled = u128::from(space.used_bytes) * 100;
                let percent = filled / u128::from(space.total_bytes.max(1));
                let free_bytes = space.total_bytes.saturating_sub(space.used_bytes);
                (u32::try_from(percent).unwrap_or(100), free_bytes)
            }
            Err(error) => {
                tracing::warn!(%error, "the fill of the data disk is not known");
                (0, 0)
            }
        };
        let digest = self.shared.digests.newest();
        let seed = self.seed_progress();
        StateResponse {
            node: own.identity.node.clone(),
            node_id: own.identity.node_id,
            witness: false,
            term: metrics.current_term,
            leader: self.raft_status().borrow().leader.unwrap_or_default(),
            appended_end: index_end(self.shared.log.last()),
            durable_end: durable.index.get(),
            durable_end_bytes: durable.position.get(),
            committed_end: index_end(
                metrics.local_committed.as_ref().map(super::raft_types::entry_id),
            ),
            applied_end: index_end(self.shared.published.applied().borrow().id),
            trimmed_below,
            applied_clock_ms,
            digest_end: digest.as_ref().map_or(0, |digest| digest.end.get()),
            digest: digest.map(|digest| digest.digest).unwrap_or_default(),
            disk_percent,
            disk_free_bytes,
            disk_full: *self.shared.log.disk_full().borrow(),
            stopping: own.stopping.load(Ordering::Relaxed),
            feature_level_max: FEATURE_LEVEL_MAX,
            listeners: own.listeners.get().cloned().unwrap_or_default(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            wall_ms: wall_ms(),
            defers_syncs: self.shared.log.defers_syncs(),
            fenced: self.shared.fence.is_closed() || self.shared.doubt.reason().is_some(),
            seed_done_bytes: seed.map_or(0, |seed| seed.done_bytes),
            seed_all_bytes: seed.map_or(0, |seed| seed.all_bytes),
            yields: own.yields.load(Ordering::Relaxed),
        }
    }
}
