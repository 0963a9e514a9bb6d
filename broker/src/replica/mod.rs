//! Consensus: the only module that names openraft. What is proposed here comes back applied, in one
//! order, durable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::ids::{QueueKey, QueueOffset, TopicId};
use drumlin_proto::record::Run;
use openraft::ReadPolicy;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::RaftError;
use parking_lot::{Mutex, RwLockReadGuard};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::command::{self, Command, Outcome, Refusal};
use crate::fault::{Fault, injected};
use crate::log::{Log, ReadError};
use crate::position::{EntryId, EntryIndex, LogOffset, Term};
use crate::queue::index::{Index, Line};
use crate::seed::SeedProgress;
use crate::seed::donor::Sending;

pub(crate) mod bootstrap;
pub mod changing;
pub mod checkpoint;
pub mod clock;
pub mod elect;
pub mod gate;
pub mod leadership;
pub mod membership;
pub mod peer_service;
pub mod peers;
pub mod start;
pub mod state;
pub mod witness;

mod checkpointing;
mod clock_source;
mod committed_hint;
mod digests;
mod doubt;
mod fence;
mod gating;
mod log_store;
mod network;
mod own_state;
mod proposer;
mod published;
mod raft_types;
pub(crate) mod repairing;
mod restore;
mod seeding;
mod state_machine;
mod status;
mod succession;
mod trimming;
mod uncommitted;
mod wire;

use checkpointing::Checkpoints;
use clock_source::ClockSource;
pub(crate) use committed_hint::committed_hint;
use digests::Digests;
use doubt::Doubt;
use fence::Fence;
use gate::GateView;
use membership::BrokerNode;
use own_state::OwnState;
use peer_service::Member;
use peer_service::raft_member::{MemberParts, RaftMember};
use peers::PeerStates;
pub use proposer::Chain;
use proposer::{ProposerHandle, RunsRefused};
use published::Published;
use raft_types::{Raft, entry_id};
use seeding::Seeding;
use start::Ended;
use state::State;

/// One thing to be ordered.
#[derive(Clone, Debug)]
pub enum Item {
    Run { queue: QueueKey, run: Run },
    Command(Command),
}

/// What became of an item; told once it is applied and durable here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// `degraded`: the other data node of the pair had not synced it.
    Run {
        base_offset: QueueOffset,
        store_time_ms: u64,
        degraded: bool,
    },
    Command(Outcome),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Apply refused it; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Not proposed: too many bytes wait already.
    #[error("{waiting_bytes} bytes wait already, {bytes_max} are allowed")]
    Busy { waiting_bytes: u64, bytes_max: u64 },
    /// Not proposed: no space for users' data.
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// Not proposed: this node does not lead.
    #[error("this node does not lead the broker group")]
    NotLeader { leader: Option<u64> },
    /// Not proposed: its deadline passed while it waited.
    #[error("the deadline passed before it was proposed")]
    Expired,
    /// Not proposed: an earlier item of its chain was not.
    #[error("an earlier run of this queue was not stored")]
    OutOfOrder,
    /// Not proposed: its topic needs two copies, and there is one data node only now.
    #[error("the topic needs two copies, and one node only can keep one now")]
    TooFewCopies,
    /// It may or may not have been stored.
    #[error("leadership was lost before the outcome was known")]
    UnknownOutcome,
    /// Not proposed: not every node may know it.
    #[error(
        "this needs feature level {needed}, the broker group has {level}: raise it with `drumlin \
         cluster upgrade` once all its nodes run this release"
    )]
    FeatureLevel { needed: u32, level: u32 },
    /// Not proposed: the node is stopping.
    #[error("the node is stopping: {0}")]
    Stopped(String),
}

/// Role and term as Raft sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftStatus {
    pub term: Term,
    /// Not this node while no quorum answers it.
    pub leader: Option<u64>,
    /// Leads, and has applied the first entry of its term.
    pub serving: bool,
}

/// How far consumers may read: `min(applied, settled_end)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReadableEnd {
    /// Exclusive.
    pub index: EntryIndex,
    pub position: LogOffset,
}

/// The state and the indexes at one applied index.
#[derive(Debug)]
pub struct Applying {
    pub state: State,
    pub index: Index,
}

/// Handle of this node's replica; clones share it.
#[derive(Clone, Debug)]
pub struct Replica {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    published: Arc<Published>,
    log: Log,
    raft: Raft,
    proposer: ProposerHandle,
    clock: Arc<ClockSource>,
    status: watch::Receiver<RaftStatus>,
    refused: watch::Sender<RunsRefused>,
    checkpoints: Checkpoints,
    clock_jump_ms: watch::Receiver<u64>,
    /// Told when a stream of the leader broke.
    broken: Arc<Notify>,
    fence: Fence,
    seeding: Arc<Seeding>,
    gate: watch::Receiver<GateView>,
    peers: watch::Receiver<PeerStates>,
    ended: watch::Sender<Option<Ended>>,
    own: OwnState,
    digests: Digests,
    doubt: Arc<Doubt>,
    /// Held while the membership changes.
    changing: tokio::sync::Mutex<()>,
    /// The last term that this node was told to give away, and until when another may take it.
    given_away: Mutex<Option<(Term, Instant)>>,
    /// The longest.
    election_timeout: Duration,
}

/// How far this node has come, as operators see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub term: Term,
    pub leads: bool,
    /// Behind the last entry, synced or not.
    pub appended_end: EntryIndex,
    pub durable_end: EntryIndex,
    pub committed_end: EntryIndex,
    pub applied_end: EntryIndex,
}

impl Replica {
    /// Queues an item in the order of the calls and answers once it is applied and durable here.
    ///
    /// The order of calls is the order in the log, also where the futures are awaited later.
    pub fn propose(
        &self,
        item: Item,
        deadline: Option<Instant>,
    ) -> impl Future<Output = Result<Applied, ProposeError>> + Send + use<> {
        let known = self.check_level(&item);
        let proposed = known.map(|()| self.shared.proposer.propose(item, deadline, None));
        async move { proposed?.await }
    }

    /// As [`Replica::propose`], but not once an earlier item of the chain was refused.
    pub fn propose_in_order(
        &self,
        item: Item,
        deadline: Option<Instant>,
        chain: &Chain,
    ) -> impl Future<Output = Result<Applied, ProposeError>> + Send + use<> {
        self.shared.proposer.propose(item, deadline, Some(chain))
    }

    /// What the group's nodes are known to understand.
    pub fn feature_level(&self) -> u32 {
        self.shared.published.feature_level()
    }

    fn check_level(&self, item: &Item) -> Result<(), ProposeError> {
        let Item::Command(command) = item else { return Ok(()) };
        let (needed, level) = (command::level::needed(command), self.feature_level());
        if needed > level { Err(ProposeError::FeatureLevel { needed, level }) } else { Ok(()) }
    }

    /// Rises with every change of the catalog, once that is readable.
    pub fn catalog_version(&self) -> watch::Receiver<u64> {
        self.shared.published.catalog_version()
    }

    /// The applied state, for short reads: holding it delays apply. Never across an await.
    pub fn view(&self) -> RwLockReadGuard<'_, Applying> {
        self.shared.published.applying.read()
    }

    pub fn raft_status(&self) -> watch::Receiver<RaftStatus> {
        self.shared.status.clone()
    }

    pub fn readable_end(&self) -> watch::Receiver<ReadableEnd> {
        self.shared.published.readable()
    }

    /// Oldest and behind the newest readable offset; `None` if there is no such queue.
    pub fn queue_range(&self, queue: QueueKey) -> Option<(QueueOffset, QueueOffset)> {
        let readable = *self.shared.published.readable().borrow();
        let applying = self.view();
        let range = applying.state.queue_range(queue)?;
        let (min, applied_end) = (range.min, range.end);
        // What the state holds, not what was told of it: that comes later.
        if applying.state.end() <= readable.position {
            drop(applying);
            if let Some(line) = self.uncommitted_lines(queue).last() {
                return Some((min, line.end_offset()));
            }
            return Some((min, applied_end));
        }
        match applying.index.first_from(queue, readable.position) {
            Ok(unreadable) => Some((min, unreadable.map_or(applied_end, |line| line.base_offset))),
            Err(error) => {
                tracing::error!(?queue, %error, "the queue index cannot be read");
                Some((min, min))
            }
        }
    }

    /// Readable lines of a queue from `from` on.
    pub fn lines_from(
        &self,
        queue: QueueKey,
        from: QueueOffset,
        lines_max: usize,
    ) -> Result<Vec<Line>, ReadError> {
        let readable = *self.shared.published.readable().borrow();
        let mut lines = self.view().index.lines_from(queue, from, lines_max)?;
        lines.retain(|line| line.position < readable.position);
        if injected(Fault::ReadUncommitted) && lines.len() < lines_max {
            let more = self.uncommitted_lines(queue).into_iter();
            lines.extend(more.filter(|line| line.end_offset() > from));
        }
        Ok(lines)
    }

    /// The run of a line, as stored.
    pub fn read_run(&self, line: &Line) -> Result<Bytes, ReadError> {
        self.shared.log.read(line.position, line.bytes)
    }

    /// Told whenever something of the topic became readable or due: new runs, leases that changed.
    /// Register before looking, then wait.
    pub fn topic_wakes(&self, topic: TopicId) -> Arc<Notify> {
        self.shared.published.waiters(topic)
    }

    /// The leader clock now, ms since the epoch.
    pub fn clock_ms(&self) -> u64 {
        self.shared.clock.entry_ms()
    }

    /// By how many ms the last election moved the clock past the log's highest; 0 for a new log.
    pub fn clock_jump_ms(&self) -> u64 {
        *self.shared.clock_jump_ms.borrow()
    }

    /// Waits until this node leads and has applied all that was committed before the call.
    pub async fn read_barrier(&self) -> Result<(), ProposeError> {
        let mut status = self.shared.status.clone();
        let me = *self.shared.raft.node_id();
        let decided =
            |status: &RaftStatus| status.serving || status.leader.is_some_and(|id| id != me);
        let decided = tokio::time::timeout(proposer::ELECTION_PATIENCE, status.wait_for(decided));
        match decided.await {
            Ok(Ok(status)) if status.serving => {}
            Ok(Ok(status)) => return Err(ProposeError::NotLeader { leader: status.leader }),
            Ok(Err(_)) => return Err(ProposeError::Stopped("the replica has ended".into())),
            Err(_) => return Err(ProposeError::NotLeader { leader: None }),
        }
        let read = self.shared.raft.ensure_linearizable(ReadPolicy::LeaseRead).await;
        let upto = match read {
            Ok(read) => entry_id(read.log_id()).index,
            Err(RaftError::Fatal(fatal)) => return Err(ProposeError::Stopped(fatal.to_string())),
            // Or no quorum has answered for a moment, so that another one may lead.
            Err(error) => {
                let leader = error.forward_to_leader().and_then(|to| to.leader_id);
                return Err(ProposeError::NotLeader { leader });
            }
        };
        let mut readable = self.readable_end();
        match readable.wait_for(|end| end.index > upto).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ProposeError::Stopped("the replica has ended".into())),
        }
    }

    /// Refuses runs with this reason from now on; `None` takes them again. Commands always pass.
    pub fn refuse_runs(&self, reason: Option<String>) {
        self.shared.refused.send_if_modified(|refused| {
            let changes = refused.as_deref() != reason.as_deref();
            if changes {
                *refused = reason.map(Arc::from);
            }
            changes
        });
    }

    /// Why runs are refused now, if they are.
    pub fn runs_refused(&self) -> Option<String> {
        self.shared.refused.borrow().as_deref().map(str::to_owned)
    }

    /// Bytes of items whose outcome is not known yet.
    pub fn in_flight_bytes(&self) -> u64 {
        self.shared.proposer.in_flight_bytes()
    }

    pub fn progress(&self) -> Progress {
        let metrics = self.shared.raft.metrics().borrow_watched().clone();
        let end = |id: Option<EntryId>| id.map_or(EntryIndex::ZERO, |id| id.index.next());
        Progress {
            term: Term::new(metrics.current_term),
            leads: self.shared.status.borrow().leader == Some(metrics.id),
            appended_end: end(self.shared.log.last()),
            durable_end: self.shared.log.durable_end().borrow().index,
            committed_end: end(metrics.local_committed.as_ref().map(entry_id)),
            applied_end: end(self.shared.published.applied().borrow().id),
        }
    }

    /// Takes a checkpoint of what is applied now; returns once it is durable.
    pub async fn checkpoint(&self) -> Result<(), ProposeError> {
        let stopped = || ProposeError::Stopped("no checkpoint can be written".into());
        let room = self.shared.checkpoints.room().await.ok_or_else(stopped)?;
        let taken = self.shared.raft.with_state_machine(|machine| {
            let written = machine.checkpoint(room);
            Box::pin(std::future::ready(written))
        });
        match taken.await.map_err(|_| stopped())? {
            Some(written) => written.await.map_err(|_| stopped()),
            None => Ok(()),
        }
    }

    /// What the older of this node's checkpoints has applied: trims may go up to it.
    pub fn trim_limit(&self) -> Option<EntryIndex> {
        self.shared.checkpoints.limit()
    }

    /// All members of the group, as this node knows them, and whether each votes.
    pub fn members(&self) -> BTreeMap<u64, (BrokerNode, bool)> {
        let metrics = self.shared.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let nodes = membership.nodes();
        nodes.map(|(id, node)| (*id, (node.clone(), voters.contains(id)))).collect()
    }

    /// Asks for this broker to end its run and begin anew on what lies on its disk. Nothing changes
    /// that is over already.
    pub fn request_restart(&self, reason: &str) {
        self.shared.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(Ended::Restart(reason.to_owned()));
            }
            first
        });
    }

    /// Whether each other member's state is equal to this node's, where that is known: only a
    /// leader compares.
    pub fn equal_states(&self) -> BTreeMap<u64, bool> {
        self.shared.digests.equal()
    }

    /// States of other members that were found to differ.
    pub fn state_mismatches(&self) -> Counter {
        self.shared.digests.mismatches()
    }

    pub fn log(&self) -> &Log {
        &self.shared.log
    }

    /// Where the witness gate stands, by which acks are degraded or not.
    pub fn gate(&self) -> watch::Receiver<GateView> {
        self.shared.gate.clone()
    }

    /// What the other members say of themselves.
    pub fn peers(&self) -> watch::Receiver<PeerStates> {
        self.shared.peers.clone()
    }

    /// What other members take of this one's files, by their Raft ids.
    pub fn seeds_given(&self) -> watch::Receiver<Sending> {
        self.shared.seeding.giving().sending()
    }

    /// How much this node has of the files that make it whole; `None`: it takes none.
    pub fn seed_taken(&self) -> watch::Receiver<Option<SeedProgress>> {
        self.shared.seeding.receiving()
    }

    /// Whether nothing may be trimmed now: a member takes files and would then lack what comes
    /// behind them. Asks the file system how full it is.
    pub fn trims_wait(&self) -> bool {
        let own = self.own_state().disk_percent;
        let peers = self.shared.peers.borrow();
        let others = peers.values().filter(|peer| peer.fresh).map(|peer| peer.state.disk_percent);
        let fullest = others.fold(own, u32::max);
        let fullest = u8::try_from(fullest).unwrap_or(u8::MAX);
        !self.shared.seeding.giving().allows_trims(fullest)
    }

    /// This replica as other members call it.
    pub(crate) fn member_of(&self, mut parts: MemberParts) -> Arc<dyn Member> {
        let seeding = Arc::clone(&self.shared.seeding);
        parts.seeding.get_or_insert(seeding);
        parts.broken = Arc::clone(&self.shared.broken);
        parts.fence = self.shared.fence.clone();
        Arc::new(RaftMember::new(self.shared.raft.clone(), parts))
    }
}

#[cfg(test)]
mod tests;
