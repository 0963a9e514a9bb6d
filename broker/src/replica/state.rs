//! The replicated state as a whole: pure, fed with committed entries.
//!
//! Gives runs their queue offsets and feeds the index with their lines, hands commands to catalog
//! and groups, keeps the clock. Time and choices are in the entries, so the same entries give the
//! same state on each replica. Knows no Raft, no files, no clients.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use drumlin_proto::ids::{BrokerGroupName, QueueId, QueueKey, QueueOffset, TopicId};

use crate::catalog::{Catalog, ConsumerGroup};
use crate::command::level::FEATURE_LEVEL_MIN;
use crate::command::{CommandError, GroupId, GroupStart, Refusal};
use crate::entry::{Entry, EntryKind};
use crate::group::Groups;
use crate::group::leases::QueueLeases;
use crate::item::ItemError;
use crate::position::{EntryId, EntryIndex, LogOffset};
use crate::queue::index::Index;
use crate::replica::Applied;

mod archive;
mod batch;
mod reindex;

pub use crate::catalog::Limits;
pub use archive::StateError;
pub use reindex::ReindexError;

/// Whether the witness may be sent what only one data replica has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GateMode {
    #[default]
    Paired = 1,
    Alone = 2,
}

/// Offsets of a queue that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueRange {
    /// Oldest record that was not trimmed.
    pub min: QueueOffset,
    /// Behind the newest record.
    pub end: QueueOffset,
}

/// Where the log begins, logically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrimPoint {
    pub below: EntryIndex,
    /// Where the frame of the entry `below` begins.
    pub position: LogOffset,
}

/// Catalog, queues, groups and clock at one applied index. Clones share what does not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    broker_group: BrokerGroupName,
    clock_ms: u64,
    applied: Option<EntryId>,
    end: LogOffset,
    trimmed: TrimPoint,
    gate: GateMode,
    feature_level: u32,
    catalog: Catalog,
    groups: Groups,
    /// Of this broker group's share of each topic, by queue id.
    queues: BTreeMap<TopicId, Arc<Vec<QueueRange>>>,
    /// Where runs lie that took no offset, though their topic was not deleted: a scan of the log
    /// cannot tell. Not those below the trim point.
    void_runs: Arc<BTreeSet<LogOffset>>,
}

/// What follows from an applied entry.
#[derive(Debug, Default)]
pub struct Effects {
    /// One per item, in order.
    pub outcomes: Vec<Result<Applied, Refusal>>,
    /// Topics with new records, with leases whose ends changed, with room for new deliveries where
    /// there was none, or that are gone.
    pub touched: BTreeSet<TopicId>,
    /// Everything below may be forgotten.
    pub trim: Option<TrimPoint>,
    /// Records that were trimmed while in flight.
    pub expired_count: u64,
}

/// Why apply cannot go on. The state may be changed in part and must not be used any more.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("entry {id} has an invalid payload")]
    Item { id: EntryId, source: ItemError },
    #[error("item {ordinal} of entry {id} is no command that can be applied")]
    Command { id: EntryId, ordinal: usize, source: CommandError },
    #[error("item {ordinal} of entry {id} is guarded by no command before it")]
    Guard { id: EntryId, ordinal: usize },
    #[error(
        "entry {id} raises the group to feature level {level}, which needs release {release} or \
         newer"
    )]
    Release { id: EntryId, level: u32, release: String },
    #[error("the queue index failed at entry {id}")]
    Index { id: EntryId, source: io::Error },
}

impl State {
    /// The state of an empty log.
    pub fn new(broker_group: BrokerGroupName) -> Self {
        Self {
            broker_group,
            clock_ms: 0,
            applied: None,
            end: LogOffset::ZERO,
            trimmed: TrimPoint::default(),
            gate: GateMode::default(),
            feature_level: FEATURE_LEVEL_MIN,
            catalog: Catalog::default(),
            groups: Groups::default(),
            queues: BTreeMap::new(),
            void_runs: Arc::default(),
        }
    }

    /// Applies the entry behind the last applied one; its frame begins at `at`.
    pub fn apply(
        &mut self,
        entry: &Entry,
        at: LogOffset,
        index: &mut Index,
        limits: &Limits,
    ) -> Result<Effects, ApplyError> {
        let expected = self.applied.map_or(EntryIndex::ZERO, |id| id.index.next());
        assert!(entry.id.index == expected, "entry {} applied in place of {expected}", entry.id);
        assert!(
            at == self.end,
            "entry {} lies at {at}, the last one ends at {}",
            entry.id,
            self.end
        );
        self.clock_ms = self.clock_ms.max(entry.clock_ms);
        let effects = match entry.kind {
            EntryKind::Blank | EntryKind::Membership => Effects::default(),
            EntryKind::Paired => {
                self.gate = GateMode::Paired;
                Effects::default()
            }
            EntryKind::Alone => {
                self.gate = GateMode::Alone;
                Effects::default()
            }
            EntryKind::Batch => batch::apply(self, entry, at, index, limits)?,
        };
        self.applied = Some(entry.id);
        self.end = at.advance(entry.frame_bytes());
        Ok(effects)
    }

    pub fn broker_group(&self) -> &BrokerGroupName {
        &self.broker_group
    }

    /// The store clock: the highest leader clock so far, ms since the epoch.
    pub fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    pub fn applied(&self) -> Option<EntryId> {
        self.applied
    }

    /// Behind the frame of the last applied entry.
    pub fn end(&self) -> LogOffset {
        self.end
    }

    pub fn trimmed(&self) -> TrimPoint {
        self.trimmed
    }

    pub fn gate(&self) -> GateMode {
        self.gate
    }

    /// Commands that a higher level introduced may not be proposed.
    pub fn feature_level(&self) -> u32 {
        self.feature_level
    }

    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Copies that an acknowledged message of a topic must have; 1 if there is no such topic.
    pub fn min_copies(&self, topic: TopicId) -> u8 {
        self.catalog.topic(topic).map_or(1, |topic| topic.min_copies)
    }

    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// `None`: there is no such queue on this broker group.
    pub fn queue_range(&self, queue: QueueKey) -> Option<QueueRange> {
        self.queues.get(&queue.topic)?.get(usize::from(queue.queue.get())).copied()
    }

    /// All queues of this broker group, ascending.
    pub fn queue_ranges(&self) -> impl Iterator<Item = (QueueKey, QueueRange)> {
        self.queues.iter().flat_map(|(topic, ranges)| {
            (0..).map(QueueId::new).zip(ranges.iter()).map(|(queue, range)| {
                let topic = *topic;
                (QueueKey { topic, queue }, *range)
            })
        })
    }

    /// Whether apply refused the run at `position`, which is not trimmed and whose topic exists.
    pub fn is_void(&self, position: LogOffset) -> bool {
        self.void_runs.contains(&position)
    }

    /// What a group consumed and holds in a queue; `None` if it has not begun there.
    pub fn leases(&self, group: GroupId, queue: QueueKey) -> Option<&QueueLeases> {
        self.groups.queue(group, queue).map(Arc::as_ref)
    }

    /// The first record that the group was never handed, begun or not; `None` if group or queue do
    /// not exist.
    pub fn delivery_offset(
        &self,
        group: GroupId,
        queue: QueueKey,
        index: &Index,
    ) -> io::Result<Option<QueueOffset>> {
        if let Some(leases) = self.leases(group, queue) {
            return Ok(Some(leases.next()));
        }
        match (self.catalog.group(group), self.queue_range(queue)) {
            (Some(group), Some(range)) => start_of(group, queue, range, index).map(Some),
            (None, _) | (_, None) => Ok(None),
        }
    }
}

/// Where a group begins in a queue.
fn start_of(
    group: &ConsumerGroup,
    queue: QueueKey,
    range: QueueRange,
    index: &Index,
) -> io::Result<QueueOffset> {
    match group.start {
        GroupStart::Earliest => Ok(range.min),
        GroupStart::Latest => first_offset_from(queue, group.created_at, range, index),
    }
}

/// Offset of the first record of a queue that lies at or behind a position of the log.
fn first_offset_from(
    queue: QueueKey,
    position: LogOffset,
    range: QueueRange,
    index: &Index,
) -> io::Result<QueueOffset> {
    let line = index.first_from(queue, position)?;
    Ok(line.map_or(range.end, |line| line.base_offset).max(range.min))
}

#[cfg(test)]
mod tests;
