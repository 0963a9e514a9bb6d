//! What changes the state besides runs, and what came of it.
//!
//! The types here are for code; the bytes in the log are (kind, version) and an rkyv archive of a
//! struct of their own that never changes once published.

use drumlin_proto::ids::{BrokerGroupName, GroupName, QueueKey, QueueOffset, TopicId, TopicName};

use crate::position::{EntryIndex, LogOffset};

mod archive;
mod definitions;
pub mod level;

pub use archive::{CommandError, decode, decode_copy, encode, encode_copy};
pub use definitions::{
    CatalogChange, CatalogDelta, Deleted, GroupDefinition, MessageGroupPlace, Shares, Topic,
};

/// Identity of a consumer group in the log; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

/// Identity of one delivery: the index of the entry that leased the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// Stable hash of a client id, enough to find a client's leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientKey(pub u64);

/// What a topic accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TopicType {
    Normal = 1,
    Fifo = 2,
    Mixed = 3,
}

impl TopicType {
    /// The type of a code on disk.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Normal, Self::Fifo, Self::Mixed].into_iter().find(|known| *known as u8 == code)
    }
}

/// Where a new consumer group begins in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GroupStart {
    Earliest = 1,
    /// What is stored after the group was created.
    Latest = 2,
}

impl GroupStart {
    /// The start of a code on disk.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Earliest, Self::Latest].into_iter().find(|known| *known as u8 == code)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    CreateTopic {
        name: TopicName,
        kind: TopicType,
        /// Queues on each broker group, ascending by name, at least one.
        shares: Vec<(BrokerGroupName, u16)>,
    },
    DeleteTopic {
        topic: TopicId,
    },
    CreateGroup {
        name: GroupName,
        start: GroupStart,
    },
    DeleteGroup {
        group: GroupId,
    },
    /// `offset` is the next to read. Replaces the floor of the group's queue.
    CommitOffset {
        group: GroupId,
        queue: QueueKey,
        offset: QueueOffset,
    },
    Lease(Lease),
    Ack {
        group: GroupId,
        queue: QueueKey,
        records: Vec<(QueueOffset, LeaseId)>,
    },
    /// Gives leased records a new lease id and expiry: nack (`invisible_ms` 0 or a backoff), longer
    /// lease. Refuses each that is not leased under the id given.
    ChangeLease {
        group: GroupId,
        queue: QueueKey,
        offset: QueueOffset,
        lease: LeaseId,
        /// From the entry's clock.
        invisible_ms: u64,
    },
    /// Extends leases in place: their ids stay valid. Those that are gone are passed over.
    RenewLeases {
        group: GroupId,
        queue: QueueKey,
        records: Vec<(QueueOffset, LeaseId)>,
        invisible_ms: u64,
    },
    /// Cuts auto-renewed leases of a client that left to `invisible_ms` from the entry's clock.
    ReleaseClient {
        group: GroupId,
        client: ClientKey,
        invisible_ms: u64,
    },
    /// Forgets all entries below `below`.
    Trim {
        below: EntryIndex,
        /// Where the frame of the entry `below` begins.
        position: LogOffset,
    },
    Catalog(CatalogChange),
    /// From now on the group may use what a release introduced.
    RaiseFeatureLevel {
        level: u32,
        /// Of the node that proposed it.
        release: String,
    },
    /// Of a feature level that no release has.
    #[cfg(test)]
    Unreleased,
}

/// Takes records of one queue for one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub group: GroupId,
    pub queue: QueueKey,
    pub client: ClientKey,
    pub auto_renew: bool,
    /// From the entry's clock.
    pub invisible_ms: u64,
    /// Delivery offset the leader planned from, and what it becomes: records of `from..skip_to`
    /// that are not in `fresh` did not match the filter and count as consumed.
    pub from: QueueOffset,
    pub skip_to: QueueOffset,
    /// Never delivered before; within `from..skip_to`, ascending.
    pub fresh: Vec<QueueOffset>,
    /// Delivered before, due again, ascending. Those that are not due at apply are left out.
    pub again: Vec<QueueOffset>,
    /// Delivered before, due again, ascending, but not wanted by the filter: count as consumed.
    pub unwanted: Vec<QueueOffset>,
}

/// One record of a granted lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    pub offset: QueueOffset,
    /// 1 on first delivery.
    pub attempt: u16,
}

/// Why a record was not acknowledged or changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseRefusal {
    #[error("the lease has ended or was replaced")]
    Gone,
}

/// What came of a command at apply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    TopicCreated {
        topic: TopicId,
    },
    GroupCreated {
        group: GroupId,
    },
    Leased {
        lease: LeaseId,
        granted: Vec<Granted>,
    },
    /// One per record of the command.
    Acked(Vec<Result<(), LeaseRefusal>>),
    LeaseChanged {
        lease: LeaseId,
    },
}

/// Why apply refused an item. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("topic {0} exists already")]
    TopicExists(TopicName),
    #[error("the topic does not exist")]
    TopicNotFound,
    #[error("the queue does not exist")]
    QueueNotFound,
    #[error("the group exists already")]
    GroupExists(GroupId),
    #[error("the consumer group does not exist")]
    GroupNotFound,
    #[error("{topics_max} topics exist already")]
    TooManyTopics { topics_max: u32 },
    #[error("{groups_max} consumer groups exist already")]
    TooManyGroups { groups_max: u32 },
    #[error("offset {asked} lies outside {min}..={end}")]
    OffsetOutOfRange { asked: QueueOffset, min: QueueOffset, end: QueueOffset },
    #[error("the lease was planned from {planned}, deliveries are at {actual}")]
    LeaseOutdated { planned: QueueOffset, actual: QueueOffset },
    #[error(transparent)]
    Lease(#[from] LeaseRefusal),
    #[error("the definition has changed meanwhile: it has version {version}")]
    TopicChanged { version: u32 },
    #[error("the queue list is being changed already")]
    TopicChanging,
    #[error("a queue list only grows: {broker_group} has {queue_count} queues already")]
    SharesShrink { broker_group: BrokerGroupName, queue_count: u16 },
    #[error("the copy of the catalog is at version {version}")]
    CopyElsewhere { version: u64 },
    /// Only after an unsafe election of the catalog group.
    #[error(
        "{told} has the id of {here} in this copy: the catalog lost changes; read {here} out, then \
         delete {told} and create it again"
    )]
    CopyForked { here: String, told: String },
    /// The proposer broke the command's contract.
    #[error("the command is malformed: {field}")]
    Malformed { field: &'static str },
}
