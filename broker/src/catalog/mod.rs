//! Definitions of topics and consumer groups: who exists, under which id.
//!
//! Pure. Ids are never reused, so what is deleted and created again is something new. The catalog
//! group's catalog owns the definitions and stamps each change with its version; the other broker
//! groups' catalogs are copies of it at one of its versions. Knows no queue ends, offsets or leases.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::ids::{BrokerGroupName, GroupName, TopicId, TopicName};

pub use crate::command::Topic;
use crate::command::{Deleted, GroupDefinition, GroupId, GroupStart};
use crate::position::LogOffset;

mod copies;
mod owner;

pub(crate) use owner::NewTopic;

/// How much a catalog may hold, where commands do not say.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub topics_max: u32,
    pub groups_max: u32,
}

/// Definition of a consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerGroup {
    pub id: GroupId,
    pub name: GroupName,
    pub start: GroupStart,
    /// Store clock of the catalog group, ms since the epoch.
    pub created_ms: u64,
    /// Where the entry lies that brought it to this broker group: what is stored behind it counts
    /// as later.
    pub created_at: LogOffset,
    /// Version of the catalog that the last change made.
    pub changed: u64,
}

impl ConsumerGroup {
    /// What of it is the same everywhere.
    pub fn definition(&self) -> GroupDefinition {
        GroupDefinition {
            id: self.id,
            name: self.name.clone(),
            start: self.start,
            created_ms: self.created_ms,
            changed: self.changed,
        }
    }
}

/// All topics and consumer groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalog {
    topics: BTreeMap<TopicId, Arc<Topic>>,
    topic_ids: Arc<BTreeMap<TopicName, TopicId>>,
    groups: BTreeMap<GroupId, Arc<ConsumerGroup>>,
    group_ids: Arc<BTreeMap<GroupName, GroupId>>,
    next_topic: u32,
    next_group: u32,
    version: u64,
    /// Whether other broker groups may have copies: deletions are kept for them, then.
    shared: bool,
    /// Deletions by the version that made them, until every copy has them.
    deleted: Arc<BTreeMap<u64, Deleted>>,
    /// How far the copies of other broker groups are at least.
    confirmed: Arc<BTreeMap<BrokerGroupName, u64>>,
}

/// What a catalog consists of, for checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogParts {
    pub topics: Vec<Topic>,
    pub groups: Vec<ConsumerGroup>,
    pub next_topic: u32,
    pub next_group: u32,
    pub version: u64,
    pub shared: bool,
    /// Ascending by version.
    pub deleted: Vec<(u64, Deleted)>,
    pub confirmed: Vec<(BrokerGroupName, u64)>,
}

/// The stamp of everything that was made before definitions were shared. A state that was written
/// then does not tell, so that it must be the same for all.
pub(crate) const UNSHARED_STAMP: u64 = 1;

impl Default for Catalog {
    /// Empty; the first ids are 1, because a run names topic 0 until the broker knows better.
    fn default() -> Self {
        Self {
            topics: BTreeMap::new(),
            topic_ids: Arc::default(),
            groups: BTreeMap::new(),
            group_ids: Arc::default(),
            next_topic: 1,
            next_group: 1,
            version: 0,
            shared: false,
            deleted: Arc::default(),
            confirmed: Arc::default(),
        }
    }
}

impl Catalog {
    /// Also of a topic that cannot be used yet.
    pub fn topic(&self, id: TopicId) -> Option<&Arc<Topic>> {
        self.topics.get(&id)
    }

    /// A topic that can be used.
    pub fn topic_by_name(&self, name: &TopicName) -> Option<&Arc<Topic>> {
        self.definition_by_name(name).filter(|topic| topic.is_active())
    }

    /// Topics that can be used, ascending by id.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<Topic>> {
        self.definitions().filter(|topic| topic.is_active())
    }

    /// Also of a topic that cannot be used yet.
    pub fn definition_by_name(&self, name: &TopicName) -> Option<&Arc<Topic>> {
        self.topics.get(self.topic_ids.get(name)?)
    }

    /// Topics and those to be, ascending by id.
    pub fn definitions(&self) -> impl ExactSizeIterator<Item = &Arc<Topic>> {
        self.topics.values()
    }

    pub fn group(&self, id: GroupId) -> Option<&Arc<ConsumerGroup>> {
        self.groups.get(&id)
    }

    pub fn group_by_name(&self, name: &GroupName) -> Option<&Arc<ConsumerGroup>> {
        self.groups.get(self.group_ids.get(name)?)
    }

    /// Ascending by id.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &Arc<ConsumerGroup>> {
        self.groups.values()
    }

    /// Rises with every change of the catalog; of a copy: the owner's version that it equals.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// How far the copy of a broker group is at least; `None` if it has none.
    pub fn confirmed(&self, broker_group: &BrokerGroupName) -> Option<u64> {
        self.confirmed.get(broker_group).copied()
    }

    /// The broker groups that have copies, or had.
    pub fn copied_to(&self) -> impl Iterator<Item = &BrokerGroupName> {
        self.confirmed.keys()
    }

    /// The oldest deletion that not every copy has confirmed.
    pub fn oldest_deletion(&self) -> Option<u64> {
        self.deleted.keys().next().copied()
    }

    /// Whether a topic has or had the id.
    pub(crate) fn was_issued(&self, id: TopicId) -> bool {
        id.get() < self.next_topic
    }

    /// From now on deletions are kept for copies.
    pub(crate) fn share(&mut self) {
        self.shared = true;
    }

    fn insert_topic(&mut self, topic: Topic) {
        Arc::make_mut(&mut self.topic_ids).insert(topic.name.clone(), topic.id);
        self.next_topic = self.next_topic.max(topic.id.get().saturating_add(1));
        self.topics.insert(topic.id, Arc::new(topic));
    }

    fn remove_topic(&mut self, id: TopicId) -> Option<Arc<Topic>> {
        let topic = self.topics.remove(&id)?;
        Arc::make_mut(&mut self.topic_ids).remove(&topic.name);
        Some(topic)
    }

    fn insert_group(&mut self, group: ConsumerGroup) {
        Arc::make_mut(&mut self.group_ids).insert(group.name.clone(), group.id);
        self.next_group = self.next_group.max(group.id.0.saturating_add(1));
        self.groups.insert(group.id, Arc::new(group));
    }

    fn remove_group(&mut self, id: GroupId) -> Option<Arc<ConsumerGroup>> {
        let group = self.groups.remove(&id)?;
        Arc::make_mut(&mut self.group_ids).remove(&group.name);
        Some(group)
    }

    pub(crate) fn to_parts(&self) -> CatalogParts {
        CatalogParts {
            topics: self.topics.values().map(|topic| Topic::clone(topic)).collect(),
            groups: self.groups.values().map(|group| ConsumerGroup::clone(group)).collect(),
            next_topic: self.next_topic,
            next_group: self.next_group,
            version: self.version,
            shared: self.shared,
            deleted: self.deleted.iter().map(|(version, gone)| (*version, *gone)).collect(),
            confirmed: self.confirmed.iter().map(|(name, upto)| (name.clone(), *upto)).collect(),
        }
    }

    /// `None` if the parts contradict each other.
    pub(crate) fn from_parts(parts: CatalogParts) -> Option<Self> {
        let CatalogParts { topics, groups, next_topic, next_group, version, .. } = parts;
        let (topic_count, group_count) = (topics.len(), groups.len());
        let topic_ids: BTreeMap<_, _> = topics.iter().map(|t| (t.name.clone(), t.id)).collect();
        let group_ids: BTreeMap<_, _> = groups.iter().map(|g| (g.name.clone(), g.id)).collect();
        let topics: BTreeMap<_, _> = topics.into_iter().map(|t| (t.id, Arc::new(t))).collect();
        let groups: BTreeMap<_, _> = groups.into_iter().map(|g| (g.id, Arc::new(g))).collect();
        let unique = topics.len() == topic_count
            && topic_ids.len() == topic_count
            && groups.len() == group_count
            && group_ids.len() == group_count;
        let issued = topics.keys().all(|id| id.get() < next_topic)
            && groups.keys().all(|id| id.0 < next_group);
        (unique && issued).then(|| Self {
            topics,
            topic_ids: Arc::new(topic_ids),
            groups,
            group_ids: Arc::new(group_ids),
            next_topic,
            next_group,
            version,
            shared: parts.shared,
            deleted: Arc::new(parts.deleted.into_iter().collect()),
            confirmed: Arc::new(parts.confirmed.into_iter().collect()),
        })
    }
}

#[cfg(test)]
mod tests;
