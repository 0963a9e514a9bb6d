//! What consumer groups have consumed and hold: offsets and leases by (group, queue).
//!
//! Pure. Knows groups and queues by id only; whether they exist is the caller's to say.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset, TopicId};

use crate::command::{ClientKey, GroupId};

pub mod leases;
pub mod offsets;

use leases::QueueLeases;

type Queues = BTreeMap<QueueKey, Arc<QueueLeases>>;

/// Consumer groups that have begun with at least one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    groups: BTreeMap<GroupId, Arc<Queues>>,
}

impl Groups {
    /// `None`: the group has not begun with the queue.
    pub fn queue(&self, group: GroupId, queue: QueueKey) -> Option<&Arc<QueueLeases>> {
        self.groups.get(&group)?.get(&queue)
    }

    /// The queues that a group has begun with, ascending.
    pub fn queues(
        &self,
        group: GroupId,
    ) -> impl Iterator<Item = (QueueKey, &Arc<QueueLeases>)> + use<'_> {
        let queues = self.groups.get(&group).into_iter();
        queues.flat_map(|queues| queues.iter().map(|(queue, leases)| (*queue, leases)))
    }

    /// Everything, ascending by group and queue.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, QueueKey, &Arc<QueueLeases>)> {
        self.groups.iter().flat_map(|(group, queues)| {
            queues.iter().map(|(queue, leases)| (*group, *queue, leases))
        })
    }

    pub(crate) fn queue_mut(
        &mut self,
        group: GroupId,
        queue: QueueKey,
    ) -> Option<&mut QueueLeases> {
        self.queue(group, queue)?;
        let queues = Arc::make_mut(self.groups.get_mut(&group)?);
        queues.get_mut(&queue).map(Arc::make_mut)
    }

    /// The group's state in a queue; begins at `start` if there is none yet.
    pub(crate) fn queue_or_start(
        &mut self,
        group: GroupId,
        queue: QueueKey,
        start: QueueOffset,
    ) -> &mut QueueLeases {
        let queues = Arc::make_mut(self.groups.entry(group).or_default());
        let begin = || Arc::new(QueueLeases::starting_at(start));
        Arc::make_mut(queues.entry(queue).or_insert_with(begin))
    }

    /// Cuts a client's auto-renewed leases; returns the topics concerned, ascending.
    pub(crate) fn release(
        &mut self,
        group: GroupId,
        client: ClientKey,
        invisible_ms: u64,
        clock_ms: u64,
    ) -> Vec<TopicId> {
        let held = self.queues(group).filter(|(_, leases)| leases.has_renewed_leases_of(client));
        let held: Vec<QueueKey> = held.map(|(queue, _)| queue).collect();
        for queue in &held {
            if let Some(leases) = self.queue_mut(group, *queue) {
                leases.release(client, invisible_ms, clock_ms);
            }
        }
        let mut topics: Vec<TopicId> = held.into_iter().map(|queue| queue.topic).collect();
        topics.dedup();
        topics
    }

    /// Ends what lies below a queue's minimum, in all groups; returns how many records were in
    /// flight there.
    pub(crate) fn trim(&mut self, queue: QueueKey, min: QueueOffset) -> u64 {
        let behind = |leases: &Arc<QueueLeases>| leases.committed() < min;
        let groups =
            self.groups.iter().filter(|(_, queues)| queues.get(&queue).is_some_and(behind));
        let groups: Vec<GroupId> = groups.map(|(group, _)| *group).collect();
        let mut expired = 0;
        for group in groups {
            expired += self.queue_mut(group, queue).map_or(0, |leases| leases.trim(min));
        }
        expired
    }

    pub(crate) fn remove_group(&mut self, group: GroupId) {
        self.groups.remove(&group);
    }

    pub(crate) fn remove_topic(&mut self, topic: TopicId) {
        let first = QueueKey { topic, queue: QueueId::new(0) };
        let last = QueueKey { topic, queue: QueueId::new(u16::MAX) };
        for queues in self.groups.values_mut() {
            if queues.range(first..=last).next().is_some() {
                Arc::make_mut(queues).retain(|queue, _| queue.topic != topic);
            }
        }
        self.groups.retain(|_, queues| !queues.is_empty());
    }

    /// `None` if a group has two states in a queue.
    pub(crate) fn from_parts(
        parts: impl IntoIterator<Item = (GroupId, QueueKey, QueueLeases)>,
    ) -> Option<Self> {
        let mut groups: BTreeMap<GroupId, Queues> = BTreeMap::new();
        for (group, queue, leases) in parts {
            let before = groups.entry(group).or_default().insert(queue, Arc::new(leases));
            if before.is_some() {
                return None;
            }
        }
        let groups = groups.into_iter().map(|(group, queues)| (group, Arc::new(queues)));
        Some(Self { groups: groups.collect() })
    }
}
