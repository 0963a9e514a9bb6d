//! How the owner's definitions come to the other broker groups: deltas from one of its versions to
//! a later one, and what it knows of how far the copies are.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;

use drumlin_proto::ids::{BrokerGroupName, GroupName, TopicId, TopicName};

use super::{Catalog, ConsumerGroup};
use crate::command::{CatalogDelta, Deleted, GroupId, Refusal, Topic};
use crate::position::LogOffset;

/// What a delta took away from a copy, and which topics it brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    pub(crate) topics: Vec<TopicId>,
    pub(crate) deleted: Vec<Deleted>,
}

enum Change {
    Topic(Arc<Topic>),
    Group(Arc<ConsumerGroup>),
    Deleted(Deleted),
}

impl Catalog {
    /// What a copy at version `from` lacks, as much of it as about `changes_max` changes.
    ///
    /// Deltas that begin where the one before ended lead to the version of now.
    pub fn delta(&self, from: u64, changes_max: usize) -> CatalogDelta {
        let topics =
            self.topics.values().map(|topic| (topic.changed, Change::Topic(topic.clone())));
        let groups =
            self.groups.values().map(|group| (group.changed, Change::Group(group.clone())));
        let deleted = self.deleted.iter().map(|(stamp, gone)| (*stamp, Change::Deleted(*gone)));
        let all = topics.chain(groups).chain(deleted);
        let mut changes: Vec<_> = all.filter(|(stamp, _)| *stamp > from).collect();
        changes.sort_by_key(|(stamp, _)| *stamp);
        // Never between two changes of one stamp.
        let upto = changes.get(changes_max.saturating_sub(1)).map(|(stamp, _)| *stamp);
        let cut =
            upto.map_or(changes.len(), |upto| changes.partition_point(|(stamp, _)| *stamp <= upto));
        let to = match upto.filter(|_| cut < changes.len()) {
            Some(upto) => upto,
            None => self.version.max(from),
        };
        let mut delta = CatalogDelta { from, to, ..CatalogDelta::default() };
        for (_, change) in changes.into_iter().take(cut) {
            match change {
                Change::Topic(topic) => delta.topics.push(Topic::clone(&topic)),
                Change::Group(group) => delta.groups.push(group.definition()),
                Change::Deleted(deleted) => delta.deleted.push(deleted),
            }
        }
        delta.deleted.sort_unstable();
        delta
    }

    /// Takes over a delta that begins at this copy's version.
    pub(crate) fn copy(
        &mut self,
        delta: &CatalogDelta,
        created_at: LogOffset,
    ) -> Result<Copied, Refusal> {
        if delta.from != self.version || delta.to < delta.from {
            return Err(Refusal::CopyElsewhere { version: self.version });
        }
        self.check_names(delta)?;
        let mut copied = Copied::default();
        for deleted in &delta.deleted {
            copied.deleted.extend(self.forget(*deleted));
        }
        for topic in &delta.topics {
            // A name that passed to another topic: the deletion is behind this delta already.
            let former = self.topic_ids.get(&topic.name).filter(|id| **id != topic.id);
            let former = former.map(|id| Deleted::Topic(*id));
            copied.deleted.extend(former.and_then(|former| self.forget(former)));
            self.insert_topic(topic.clone());
            copied.topics.push(topic.id);
        }
        for group in &delta.groups {
            let former = self.group_ids.get(&group.name).filter(|id| **id != group.id);
            let former = former.map(|id| Deleted::Group(*id));
            copied.deleted.extend(former.and_then(|former| self.forget(former)));
            let known = self.groups.get(&group.id);
            self.insert_group(ConsumerGroup {
                id: group.id,
                name: group.name.clone(),
                start: group.start,
                created_ms: group.created_ms,
                created_at: known.map_or(created_at, |known| known.created_at),
                changed: group.changed,
            });
        }
        self.version = delta.to;
        Ok(copied)
    }

    /// An id means the same for ever, unless the catalog lost changes and gave it out once more. Then
    /// what is stored here under one name must not be shown under another.
    fn check_names(&self, delta: &CatalogDelta) -> Result<(), Refusal> {
        let goes = |deleted| delta.deleted.contains(&deleted);
        for told in &delta.topics {
            if let Some(here) = self.topics.get(&told.id)
                && here.name != told.name
                && !goes(Deleted::Topic(told.id))
            {
                return Err(forked("topic", &here.name, &told.name));
            }
        }
        for told in &delta.groups {
            if let Some(here) = self.groups.get(&told.id)
                && here.name != told.name
                && !goes(Deleted::Group(told.id))
            {
                return Err(forked("consumer group", &here.name, &told.name));
            }
        }
        Ok(())
    }

    /// `None`: it was never here, or is gone already.
    fn forget(&mut self, deleted: Deleted) -> Option<Deleted> {
        let was_here = match deleted {
            Deleted::Topic(id) => self.remove_topic(id).is_some(),
            Deleted::Group(id) => self.remove_group(id).is_some(),
        };
        was_here.then_some(deleted)
    }

    /// A copy has everything up to `upto`; deletions that all copies have are forgotten.
    pub(crate) fn confirm(&mut self, broker_group: &BrokerGroupName, upto: u64) {
        let confirmed = Arc::make_mut(&mut self.confirmed);
        let known = confirmed.entry(broker_group.clone()).or_default();
        *known = upto.max(*known);
        let all = confirmed.values().min().copied().unwrap_or(0);
        if self.oldest_deletion().is_some_and(|oldest| oldest <= all) {
            Arc::make_mut(&mut self.deleted).retain(|stamp, _| *stamp > all);
        }
    }

    /// The definitions by name: what copies of one version agree on.
    pub fn defined(&self) -> (BTreeMap<TopicName, Topic>, BTreeMap<GroupName, GroupId>) {
        let topics = self.topics.values();
        let groups = self.groups.values();
        (
            topics.map(|topic| (topic.name.clone(), Topic::clone(topic))).collect(),
            groups.map(|group| (group.name.clone(), group.id)).collect(),
        )
    }
}

fn forked(what: &str, here: &impl Display, told: &impl Display) -> Refusal {
    Refusal::CopyForked { here: format!("{what} {here}"), told: format!("{what} {told}") }
}

#[cfg(test)]
mod tests;
