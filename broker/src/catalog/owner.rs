//! Changes of definitions as their owner makes them: the catalog group, or a broker group that has
//! its definitions to itself.

use std::sync::Arc;

use drumlin_proto::ids::{GroupName, TopicId, TopicName};

use super::{Catalog, ConsumerGroup, Topic, UNSHARED_STAMP};
use crate::command::{Deleted, GroupId, GroupStart, Refusal, Shares, TopicType};
use crate::position::LogOffset;

/// A topic to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewTopic<'a> {
    pub(crate) name: &'a TopicName,
    pub(crate) kind: TopicType,
    pub(crate) shares: &'a Shares,
    pub(crate) min_copies: u8,
    /// Not usable before other owners have stored it.
    pub(crate) two_steps: bool,
}

impl Catalog {
    pub(crate) fn create_topic(
        &mut self,
        new: NewTopic<'_>,
        clock_ms: u64,
        topics_max: u32,
    ) -> Result<TopicId, Refusal> {
        if self.topic_ids.contains_key(new.name) {
            return Err(Refusal::TopicExists(new.name.clone()));
        }
        check(new.shares, new.min_copies)?;
        if self.topics.len() >= usize::try_from(topics_max).unwrap_or(usize::MAX) {
            return Err(Refusal::TooManyTopics { topics_max });
        }
        let id = TopicId::new(self.next_topic);
        assert!(id.get() < u32::MAX, "topic ids last for 2^32 topics");
        let (shares, next) = match new.two_steps {
            true => (Vec::new(), Some(new.shares.clone())),
            false => (new.shares.clone(), None),
        };
        let topic = Topic {
            id,
            name: new.name.clone(),
            kind: new.kind,
            shares,
            next,
            min_copies: new.min_copies,
            version: 1,
            created_ms: clock_ms,
            changed: self.stamp(),
        };
        self.insert_topic(topic);
        Ok(id)
    }

    /// The list takes effect at once unless other owners must store it first.
    pub(crate) fn update_topic(
        &mut self,
        id: TopicId,
        version: u32,
        shares: &Shares,
        min_copies: u8,
        two_steps: bool,
    ) -> Result<(), Refusal> {
        let topic = self.topics.get(&id).ok_or(Refusal::TopicNotFound)?;
        if topic.version != version {
            return Err(Refusal::TopicChanged { version: topic.version });
        }
        if topic.next.is_some() {
            return Err(Refusal::TopicChanging);
        }
        check(shares, min_copies)?;
        let shrinks = |(name, count): &&(_, u16)| {
            !shares.iter().any(|(kept, now)| kept == name && now >= count)
        };
        if let Some((broker_group, queue_count)) = topic.shares.iter().find(shrinks) {
            let broker_group = broker_group.clone();
            return Err(Refusal::SharesShrink { broker_group, queue_count: *queue_count });
        }
        let grows = topic.shares != *shares;
        self.change_topic(id, |topic| {
            topic.min_copies = min_copies;
            if grows && two_steps {
                topic.next = Some(shares.clone());
            } else {
                topic.shares.clone_from(shares);
            }
        });
        Ok(())
    }

    pub(crate) fn activate_topic(&mut self, id: TopicId, version: u32) -> Result<(), Refusal> {
        let next = self.pending(id, version)?;
        self.change_topic(id, |topic| {
            topic.shares = next;
            topic.next = None;
        });
        Ok(())
    }

    /// True if the topic is gone with it.
    pub(crate) fn withdraw_topic(&mut self, id: TopicId, version: u32) -> Result<bool, Refusal> {
        self.pending(id, version)?;
        let is_active = self.topics.get(&id).is_some_and(|topic| topic.is_active());
        if is_active {
            self.change_topic(id, |topic| topic.next = None);
        } else {
            self.delete_topic(id)?;
        }
        Ok(!is_active)
    }

    /// What is to take effect in a definition of this version.
    fn pending(&self, id: TopicId, version: u32) -> Result<Shares, Refusal> {
        let topic = self.topics.get(&id).ok_or(Refusal::TopicNotFound)?;
        let next = topic.next.clone().filter(|_| topic.version == version);
        next.ok_or(Refusal::TopicChanged { version: topic.version })
    }

    fn change_topic(&mut self, id: TopicId, change: impl FnOnce(&mut Topic)) {
        let changed = self.stamp();
        if let Some(topic) = self.topics.get_mut(&id).map(Arc::make_mut) {
            change(topic);
            topic.version += 1;
            topic.changed = changed;
        }
    }

    pub(crate) fn delete_topic(&mut self, id: TopicId) -> Result<Arc<Topic>, Refusal> {
        let topic = self.remove_topic(id).ok_or(Refusal::TopicNotFound)?;
        self.note_deleted(Deleted::Topic(id));
        Ok(topic)
    }

    pub(crate) fn create_group(
        &mut self,
        name: &GroupName,
        start: GroupStart,
        clock_ms: u64,
        created_at: LogOffset,
        groups_max: u32,
    ) -> Result<GroupId, Refusal> {
        if let Some(id) = self.group_ids.get(name) {
            return Err(Refusal::GroupExists(*id));
        }
        if self.groups.len() >= usize::try_from(groups_max).unwrap_or(usize::MAX) {
            return Err(Refusal::TooManyGroups { groups_max });
        }
        let id = GroupId(self.next_group);
        assert!(id.0 < u32::MAX, "group ids last for 2^32 groups");
        let (name, changed) = (name.clone(), self.stamp());
        let created_ms = clock_ms;
        self.insert_group(ConsumerGroup { id, name, start, created_ms, created_at, changed });
        Ok(id)
    }

    pub(crate) fn delete_group(&mut self, id: GroupId) -> Result<(), Refusal> {
        self.remove_group(id).ok_or(Refusal::GroupNotFound)?;
        self.note_deleted(Deleted::Group(id));
        Ok(())
    }

    /// The next version, for what changes with it.
    fn stamp(&mut self) -> u64 {
        self.version += 1;
        if self.shared { self.version } else { UNSHARED_STAMP }
    }

    fn note_deleted(&mut self, deleted: Deleted) {
        let stamp = self.stamp();
        if self.shared && !self.confirmed.is_empty() {
            Arc::make_mut(&mut self.deleted).insert(stamp, deleted);
        }
    }
}

fn check(shares: &Shares, min_copies: u8) -> Result<(), Refusal> {
    let ascending = shares.windows(2).all(|pair| matches!(pair, [a, b] if a.0 < b.0));
    if shares.is_empty() || !ascending || shares.iter().any(|(_, queues)| *queues == 0) {
        return Err(Refusal::Malformed { field: "shares" });
    }
    if !(1..=2).contains(&min_copies) {
        return Err(Refusal::Malformed { field: "copies" });
    }
    Ok(())
}
