//! Definitions of topics and consumer groups: who exists, under which id.
//!
//! Pure. Ids are never reused, so what is deleted and created again is something new. Knows no
//! queue ends, offsets or leases.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::ids::{BrokerGroupName, GroupName, QueueId, QueueKey, TopicId, TopicName};

use crate::command::{GroupId, GroupStart, Refusal, TopicType};
use crate::position::LogOffset;

/// How much a catalog may hold; the same on all replicas.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub topics_max: u32,
    pub groups_max: u32,
}

/// Definition of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub id: TopicId,
    pub name: TopicName,
    pub kind: TopicType,
    /// Queues on each broker group, ascending by name.
    pub shares: Vec<(BrokerGroupName, u16)>,
    /// Rises with each change of the definition, from 1.
    pub version: u32,
    /// Store clock, ms since the epoch.
    pub created_ms: u64,
}

impl Topic {
    /// Queues on a broker group; 0 if it has no share.
    pub fn queue_count(&self, broker_group: &BrokerGroupName) -> u16 {
        let share = self.shares.iter().find(|(name, _)| name == broker_group);
        share.map_or(0, |(_, queue_count)| *queue_count)
    }

    /// The queues on a broker group, ascending.
    pub fn queues(&self, broker_group: &BrokerGroupName) -> impl Iterator<Item = QueueKey> + use<> {
        let topic = self.id;
        let queues = 0..self.queue_count(broker_group);
        queues.map(move |queue| QueueKey { topic, queue: QueueId::new(queue) })
    }
}

/// Definition of a consumer group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerGroup {
    pub id: GroupId,
    pub name: GroupName,
    pub start: GroupStart,
    /// Store clock, ms since the epoch.
    pub created_ms: u64,
    /// Where the entry lies that created it: what is stored behind it counts as later.
    pub created_at: LogOffset,
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
}

/// What a catalog consists of, for checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogParts {
    pub topics: Vec<Topic>,
    pub groups: Vec<ConsumerGroup>,
    pub next_topic: u32,
    pub next_group: u32,
    pub version: u64,
}

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
        }
    }
}

impl Catalog {
    pub fn topic(&self, id: TopicId) -> Option<&Arc<Topic>> {
        self.topics.get(&id)
    }

    pub fn topic_by_name(&self, name: &TopicName) -> Option<&Arc<Topic>> {
        self.topics.get(self.topic_ids.get(name)?)
    }

    /// Ascending by id.
    pub fn topics(&self) -> impl ExactSizeIterator<Item = &Arc<Topic>> {
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

    /// Rises with every change of the catalog.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether a topic has or had the id.
    pub(crate) fn was_issued(&self, id: TopicId) -> bool {
        id.get() < self.next_topic
    }

    pub(crate) fn create_topic(
        &mut self,
        name: &TopicName,
        kind: TopicType,
        shares: &[(BrokerGroupName, u16)],
        clock_ms: u64,
        limits: Limits,
    ) -> Result<TopicId, Refusal> {
        if self.topic_ids.contains_key(name) {
            return Err(Refusal::TopicExists(name.clone()));
        }
        let ascending = shares.windows(2).all(|pair| matches!(pair, [a, b] if a.0 < b.0));
        if shares.is_empty() || !ascending || shares.iter().any(|(_, queues)| *queues == 0) {
            return Err(Refusal::Malformed { field: "shares" });
        }
        if self.topics.len() >= usize::try_from(limits.topics_max).unwrap_or(usize::MAX) {
            return Err(Refusal::TooManyTopics { topics_max: limits.topics_max });
        }
        let id = TopicId::new(self.next_topic);
        self.next_topic = self.next_topic.checked_add(1).expect("topic ids last for 2^32 topics");
        let topic = Topic {
            id,
            name: name.clone(),
            kind,
            shares: shares.to_vec(),
            version: 1,
            created_ms: clock_ms,
        };
        self.topics.insert(id, Arc::new(topic));
        Arc::make_mut(&mut self.topic_ids).insert(name.clone(), id);
        self.version += 1;
        Ok(id)
    }

    pub(crate) fn delete_topic(&mut self, id: TopicId) -> Result<Arc<Topic>, Refusal> {
        let topic = self.topics.remove(&id).ok_or(Refusal::TopicNotFound)?;
        Arc::make_mut(&mut self.topic_ids).remove(&topic.name);
        self.version += 1;
        Ok(topic)
    }

    pub(crate) fn create_group(
        &mut self,
        name: &GroupName,
        start: GroupStart,
        clock_ms: u64,
        created_at: LogOffset,
        limits: Limits,
    ) -> Result<GroupId, Refusal> {
        if let Some(id) = self.group_ids.get(name) {
            return Err(Refusal::GroupExists(*id));
        }
        if self.groups.len() >= usize::try_from(limits.groups_max).unwrap_or(usize::MAX) {
            return Err(Refusal::TooManyGroups { groups_max: limits.groups_max });
        }
        let id = GroupId(self.next_group);
        self.next_group = self.next_group.checked_add(1).expect("group ids last for 2^32 groups");
        let name = name.clone();
        Arc::make_mut(&mut self.group_ids).insert(name.clone(), id);
        let group = ConsumerGroup { id, name, start, created_ms: clock_ms, created_at };
        self.groups.insert(id, Arc::new(group));
        self.version += 1;
        Ok(id)
    }

    pub(crate) fn delete_group(&mut self, id: GroupId) -> Result<(), Refusal> {
        let group = self.groups.remove(&id).ok_or(Refusal::GroupNotFound)?;
        Arc::make_mut(&mut self.group_ids).remove(&group.name);
        self.version += 1;
        Ok(())
    }

    pub(crate) fn to_parts(&self) -> CatalogParts {
        CatalogParts {
            topics: self.topics.values().map(|topic| Topic::clone(topic)).collect(),
            groups: self.groups.values().map(|group| ConsumerGroup::clone(group)).collect(),
            next_topic: self.next_topic,
            next_group: self.next_group,
            version: self.version,
        }
    }

    /// `None` if the parts contradict each other.
    pub(crate) fn from_parts(parts: CatalogParts) -> Option<Self> {
        let CatalogParts { topics, groups, next_topic, next_group, version } = parts;
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
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { topics_max: 2, groups_max: 2 };

    fn name(text: &str) -> TopicName {
        TopicName::parse(text).unwrap()
    }

    fn group(text: &str) -> GroupName {
        GroupName::parse(text).unwrap()
    }

    fn share(text: &str, queues: u16) -> (BrokerGroupName, u16) {
        (BrokerGroupName::parse(text).unwrap(), queues)
    }

    fn create(catalog: &mut Catalog, topic: &str) -> Result<TopicId, Refusal> {
        let shares = [share("a", 4), share("b", 2)];
        catalog.create_topic(&name(topic), TopicType::Normal, &shares, 7, LIMITS)
    }

    #[test]
    fn a_topic_created_again_is_a_new_one() {
        let mut catalog = Catalog::default();
        let first = create(&mut catalog, "t").unwrap();
        assert_eq!(create(&mut catalog, "t"), Err(Refusal::TopicExists(name("t"))));
        assert_eq!(catalog.delete_topic(first).unwrap().name, name("t"));
        assert_eq!(catalog.delete_topic(first), Err(Refusal::TopicNotFound));
        let second = create(&mut catalog, "t").unwrap();
        assert!(second > first);
        assert!(catalog.topic(first).is_none());
        assert_eq!(catalog.topic_by_name(&name("t")).unwrap().id, second);
        assert_eq!(catalog.version(), 3);
    }

    #[test]
    fn a_group_created_again_is_a_new_one() {
        let mut catalog = Catalog::default();
        let create = |catalog: &mut Catalog| {
            let (start, at) = (GroupStart::Latest, LogOffset::new(80));
            catalog.create_group(&group("g"), start, 7, at, LIMITS)
        };
        let first = create(&mut catalog).unwrap();
        assert_eq!(create(&mut catalog), Err(Refusal::GroupExists(first)));
        catalog.delete_group(first).unwrap();
        assert_eq!(catalog.delete_group(first), Err(Refusal::GroupNotFound));
        let second = create(&mut catalog).unwrap();
        assert!(second > first);
        assert_eq!(catalog.group_by_name(&group("g")).unwrap().id, second);
        assert!(catalog.group(first).is_none());
    }

    #[test]
    fn limits_count_what_exists_now() {
        let mut catalog = Catalog::default();
        let first = create(&mut catalog, "t1").unwrap();
        create(&mut catalog, "t2").unwrap();
        assert_eq!(create(&mut catalog, "t3"), Err(Refusal::TooManyTopics { topics_max: 2 }));
        catalog.delete_topic(first).unwrap();
        create(&mut catalog, "t3").unwrap();
    }

    #[test]
    fn shares_must_be_ascending_and_not_empty() {
        let mut catalog = Catalog::default();
        let cases = [
            vec![],
            vec![share("a", 0)],
            vec![share("b", 1), share("a", 1)],
            vec![share("a", 1), share("a", 2)],
        ];
        for shares in cases {
            let created = catalog.create_topic(&name("t"), TopicType::Fifo, &shares, 0, LIMITS);
            assert_eq!(created, Err(Refusal::Malformed { field: "shares" }));
        }
        assert_eq!(catalog, Catalog::default());
    }

    #[test]
    fn queues_are_numbered_per_broker_group() {
        let mut catalog = Catalog::default();
        let id = create(&mut catalog, "t").unwrap();
        let topic = catalog.topic(id).unwrap();
        let queues = |group: &str| {
            let group = BrokerGroupName::parse(group).unwrap();
            topic.queues(&group).map(|key| key.queue.get()).collect::<Vec<_>>()
        };
        assert_eq!(queues("a"), [0, 1, 2, 3]);
        assert_eq!(queues("b"), [0, 1]);
        assert!(queues("c").is_empty());
    }

    #[test]
    fn parts_that_contradict_each_other_are_refused() {
        let mut catalog = Catalog::default();
        create(&mut catalog, "t1").unwrap();
        create(&mut catalog, "t2").unwrap();
        let parts = catalog.to_parts();
        assert_eq!(Catalog::from_parts(parts.clone()), Some(catalog));
        let mut twice = parts.clone();
        twice.topics[1].name = name("t1");
        assert_eq!(Catalog::from_parts(twice), None);
        let mut reused = parts;
        reused.next_topic = 2;
        assert_eq!(Catalog::from_parts(reused), None);
    }
}
