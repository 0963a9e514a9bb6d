//! Definitions of topics and consumer groups, and how the catalog group changes and spreads them.
//!
//! From feature level 2 on; before, each broker group has [`super::Command::CreateTopic`] and
//! [`super::Command::CreateGroup`] for itself.

use drumlin_proto::ids::{BrokerGroupName, GroupName, QueueId, QueueKey, TopicId, TopicName};
use drumlin_proto::route;

use super::{GroupId, GroupStart, TopicType};

/// Queues on each broker group, ascending by name.
pub type Shares = Vec<(BrokerGroupName, u16)>;

/// Definition of a topic; the same on every broker group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub id: TopicId,
    pub name: TopicName,
    pub kind: TopicType,
    /// None while the broker groups of `next` have not all stored the definition yet.
    pub shares: Shares,
    /// Takes the place of `shares` once each of its broker groups has stored it.
    pub next: Option<Shares>,
    /// Copies that an acknowledged message must have: 1 or 2.
    pub min_copies: u8,
    /// Rises with each change of the definition, from 1.
    pub version: u32,
    /// Store clock, ms since the epoch.
    pub created_ms: u64,
    /// Version of the catalog that the last change made.
    pub changed: u64,
}

/// Where the messages of one message group go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageGroupPlace<'a> {
    Queue(&'a BrokerGroupName, u16),
    /// To another queue soon, so to none until the change of the queue list is complete.
    Moving,
    /// The topic has no queue yet.
    Nowhere,
}

impl Topic {
    /// Whether it can be used: a definition that not every owner has is no topic yet.
    pub fn is_active(&self) -> bool {
        !self.shares.is_empty()
    }

    /// Queues on a broker group; 0 if it has no share.
    pub fn queue_count(&self, broker_group: &BrokerGroupName) -> u16 {
        count_of(&self.shares, broker_group)
    }

    /// Queues that a broker group keeps ready: those to come included.
    pub fn prepared_queue_count(&self, broker_group: &BrokerGroupName) -> u16 {
        let next = self.next.as_ref().map_or(0, |next| count_of(next, broker_group));
        next.max(self.queue_count(broker_group))
    }

    /// The queues on a broker group, ascending.
    pub fn queues(&self, broker_group: &BrokerGroupName) -> impl Iterator<Item = QueueKey> + use<> {
        let topic = self.id;
        let queues = 0..self.queue_count(broker_group);
        queues.map(move |queue| QueueKey { topic, queue: QueueId::new(queue) })
    }

    /// Every broker group that has or will have queues, ascending.
    pub fn owners(&self) -> impl Iterator<Item = &BrokerGroupName> {
        // A queue list only ever grows.
        self.next.as_ref().unwrap_or(&self.shares).iter().map(|(name, _)| name)
    }

    /// Where a message group belongs. While the queue list changes, only those that stay where they
    /// are have a place: no owner stores by the old list what another stores by the new one.
    pub fn place_of(&self, message_group: &str) -> MessageGroupPlace<'_> {
        let Some(now) = place_in(&self.shares, message_group) else {
            return MessageGroupPlace::Nowhere;
        };
        match &self.next {
            Some(next) if place_in(next, message_group) != Some(now) => MessageGroupPlace::Moving,
            Some(_) | None => MessageGroupPlace::Queue(now.0, now.1),
        }
    }
}

fn count_of(shares: &Shares, broker_group: &BrokerGroupName) -> u16 {
    let share = shares.iter().find(|(name, _)| name == broker_group);
    share.map_or(0, |(_, queue_count)| *queue_count)
}

fn place_in<'a>(shares: &'a Shares, message_group: &str) -> Option<(&'a BrokerGroupName, u16)> {
    let counts: Vec<u32> = shares.iter().map(|(_, count)| u32::from(*count)).collect();
    let (group, queue) = route::place_of_message_group(message_group, &counts)?;
    Some((&shares.get(group)?.0, u16::try_from(queue).ok()?))
}

/// What a consumer group is everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupDefinition {
    pub id: GroupId,
    pub name: GroupName,
    pub start: GroupStart,
    /// Store clock of the catalog group, ms since the epoch.
    pub created_ms: u64,
    /// Version of the catalog that the last change made.
    pub changed: u64,
}

/// What was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deleted {
    Topic(TopicId),
    Group(GroupId),
}

/// What leads from one version of the catalog to a later one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CatalogDelta {
    pub from: u64,
    pub to: u64,
    /// As they are now.
    pub topics: Vec<Topic>,
    pub groups: Vec<GroupDefinition>,
    pub deleted: Vec<Deleted>,
}

/// Changes of definitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CatalogChange {
    /// Usable at once where only the catalog group has queues, else once every owner has it.
    CreateTopic {
        name: TopicName,
        kind: TopicType,
        /// At least one.
        shares: Shares,
        min_copies: u8,
        topics_max: u32,
    },
    /// Refused unless the definition still has this version. Queue lists only grow.
    UpdateTopic {
        topic: TopicId,
        version: u32,
        shares: Shares,
        min_copies: u8,
    },
    /// Every owner has stored the definition of this version: its `next` takes effect.
    ActivateTopic {
        topic: TopicId,
        version: u32,
    },
    /// Not every owner has: drops `next`, and a topic that was never usable with it.
    WithdrawTopic {
        topic: TopicId,
        version: u32,
    },
    CreateGroup {
        name: GroupName,
        start: GroupStart,
        groups_max: u32,
    },
    /// Another broker group has everything up to a version of the catalog.
    Confirm {
        broker_group: BrokerGroupName,
        upto: u64,
    },
    /// On the other broker groups: takes over what the catalog group tells. Refused unless the copy
    /// is at the delta's beginning.
    Copy(CatalogDelta),
}
