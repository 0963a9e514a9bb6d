//! The replicated state as a whole: pure, fed with committed entries.

use std::collections::BTreeSet;

use drumlin_proto::ids::TopicId;

use crate::command::Refusal;
use crate::position::{EntryIndex, LogOffset};
use crate::replica::Applied;

/// Catalog, queues, groups and clock at one applied index.
#[derive(Clone, Debug, Default)]
pub struct State {}

/// How much the catalog may hold; the same on all replicas.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub topics_max: u32,
    pub groups_max: u32,
}

/// What follows from an applied entry.
#[derive(Debug, Default)]
pub struct Effects {
    /// One per item, in order.
    pub outcomes: Vec<Result<Applied, Refusal>>,
    /// Topics with new records, or with leases whose ends changed.
    pub touched: BTreeSet<TopicId>,
    /// Everything below may be forgotten.
    pub trim: Option<TrimPoint>,
    /// Deliveries not yet acknowledged whose records were trimmed.
    pub expired_count: u64,
}

/// Where the log begins, logically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrimPoint {
    pub below: EntryIndex,
    /// Where the frame of the entry `below` begins.
    pub position: LogOffset,
}
