//! Consensus: the only module that names openraft. What is proposed here comes back applied, in one
//! order, durable.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use drumlin_proto::ids::{QueueKey, QueueOffset};
use drumlin_proto::record::Run;
use parking_lot::RwLockReadGuard;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::command::{Command, Outcome, Refusal};
use crate::log::{Log, ReadError};
use crate::position::{EntryIndex, LogOffset, Term};
use crate::queue::index::{Index, Line};

pub mod state;

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
    Run { base_offset: QueueOffset, store_time_ms: u64 },
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
    /// It may or may not have been stored.
    #[error("leadership was lost before the outcome was known")]
    UnknownOutcome,
    /// Not proposed: the node is stopping.
    #[error("the node is stopping: {0}")]
    Stopped(String),
}

/// Role and term as Raft sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftStatus {
    pub term: Term,
    pub leader: Option<u64>,
    /// Leads, and has applied the first entry of its term.
    pub serving: bool,
}

/// How far consumers may read: `min(applied, durable_end)`.
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
pub struct Replica {}

impl Replica {
    /// Queues an item in the order of the calls and answers once it is applied and durable here.
    ///
    /// The order of calls is the order in the log, also where the futures are awaited later.
    pub fn propose(
        &self,
        _item: Item,
        _deadline: Option<Instant>,
    ) -> impl Future<Output = Result<Applied, ProposeError>> + Send + 'static {
        std::future::ready(Err(ProposeError::Expired))
    }

    /// The applied state, for short reads: holding it delays apply. Never across an await.
    pub fn view(&self) -> RwLockReadGuard<'_, Applying> {
        unimplemented!()
    }

    pub fn raft_status(&self) -> watch::Receiver<RaftStatus> {
        unimplemented!()
    }

    pub fn readable_end(&self) -> watch::Receiver<ReadableEnd> {
        unimplemented!()
    }

    /// Oldest and behind the newest readable offset; `None` if there is no such queue.
    pub fn queue_range(&self, _queue: QueueKey) -> Option<(QueueOffset, QueueOffset)> {
        unimplemented!()
    }

    /// Readable lines of a queue from `from` on.
    pub fn lines_from(
        &self,
        _queue: QueueKey,
        _from: QueueOffset,
        _lines_max: usize,
    ) -> Result<Vec<Line>, ReadError> {
        unimplemented!()
    }

    /// The run of a line, as stored.
    pub fn read_run(&self, _line: &Line) -> Result<Bytes, ReadError> {
        unimplemented!()
    }

    /// Told whenever something of the topic became readable or due: new runs, leases that changed.
    /// Register before looking, then wait.
    pub fn topic_wakes(&self, _topic: drumlin_proto::ids::TopicId) -> Arc<Notify> {
        unimplemented!()
    }

    /// The leader clock now, ms since the epoch.
    pub fn clock_ms(&self) -> u64 {
        unimplemented!()
    }

    /// Waits until this node leads and has applied all that was committed before the call.
    pub async fn read_barrier(&self) -> Result<(), ProposeError> {
        unimplemented!()
    }

    pub fn log(&self) -> &Log {
        unimplemented!()
    }
}

/// Waiters by topic.
pub type Wakes = BTreeMap<u32, Arc<Notify>>;
