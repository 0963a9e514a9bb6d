use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::NewTopic;
use super::*;
use crate::command::{GroupStart, Shares, TopicType};

const OTHERS: [&str; 2] = ["b", "c"];

fn broker_group(text: &str) -> BrokerGroupName {
    BrokerGroupName::parse(text).unwrap()
}

fn shares(groups: &[&str], queue_count: u16) -> Shares {
    groups.iter().map(|name| (broker_group(name), queue_count)).collect()
}

fn topic_name(text: &str) -> TopicName {
    TopicName::parse(text).unwrap()
}

/// The owner, the copies, and what is on its way between them.
struct Cluster {
    owner: Catalog,
    copies: Vec<Catalog>,
    /// Deltas that were sent and may arrive, again and again, in any order.
    sent: Vec<(usize, CatalogDelta)>,
    topics_seen: BTreeSet<(TopicId, TopicName)>,
    groups_seen: BTreeSet<(GroupId, GroupName)>,
}

#[derive(Clone, Debug)]
enum Act {
    CreateTopic {
        name: u8,
        two_steps: bool,
    },
    Update {
        which: usize,
        queue_count: u16,
        min_copies: u8,
    },
    Complete {
        which: usize,
        activate: bool,
    },
    DropTopic(usize),
    CreateGroup(u8),
    DropGroup(usize),
    /// The owner sends what it believes that a copy lacks.
    Send {
        copy: usize,
        from_known: bool,
        changes_max: usize,
    },
    Arrive(usize),
    /// The answer of a copy reaches the owner.
    Confirm(usize),
    /// Another node leads, out of its checkpoint and log.
    FailOver(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..6_u8, any::<bool>())
            .prop_map(|(name, two_steps)| Act::CreateTopic { name, two_steps }),
        2 => (any::<usize>(), 1..20_u16, 1..=2_u8).prop_map(|(which, queue_count, min_copies)| {
            Act::Update { which, queue_count, min_copies }
        }),
        2 => (any::<usize>(), any::<bool>())
            .prop_map(|(which, activate)| Act::Complete { which, activate }),
        2 => any::<usize>().prop_map(Act::DropTopic),
        2 => (0..6_u8).prop_map(Act::CreateGroup),
        1 => any::<usize>().prop_map(Act::DropGroup),
        6 => (0..2_usize, any::<bool>(), 1..6_usize).prop_map(|(copy, from_known, changes_max)| {
            Act::Send { copy, from_known, changes_max }
        }),
        6 => any::<usize>().prop_map(Act::Arrive),
        3 => (0..2_usize).prop_map(Act::Confirm),
        1 => (0..3_usize).prop_map(Act::FailOver),
    ]
}

impl Cluster {
    fn new() -> Self {
        let mut owner = Catalog::default();
        owner.share();
        let copies = OTHERS.iter().map(|name| {
            owner.confirm(&broker_group(name), 0);
            let mut copy = Catalog::default();
            copy.share();
            copy
        });
        let copies = copies.collect();
        let (topics_seen, groups_seen) = (BTreeSet::new(), BTreeSet::new());
        Self { owner, copies, sent: Vec::new(), topics_seen, groups_seen }
    }

    fn topic(&self, which: usize) -> Option<Arc<Topic>> {
        let topics: Vec<_> = self.owner.definitions().cloned().collect();
        topics.get(which.checked_rem(topics.len())?).cloned()
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::CreateTopic { name, two_steps } => {
                let (name, shares) = (topic_name(&format!("t{name}")), shares(&["a", "b"], 2));
                let (kind, min_copies, two_steps) = (TopicType::Normal, 1, *two_steps);
                let new = NewTopic { name: &name, kind, shares: &shares, min_copies, two_steps };
                self.owner.create_topic(new, 7, 4).ok();
            }
            Act::Update { which, queue_count, min_copies } => {
                let Some(topic) = self.topic(*which) else { return };
                let (shares, id) = (shares(&["a", "b", "c"], *queue_count), topic.id);
                self.owner.update_topic(id, topic.version, &shares, *min_copies, true).ok();
            }
            Act::Complete { which, activate } => {
                let Some(topic) = self.topic(*which) else { return };
                if *activate {
                    self.owner.activate_topic(topic.id, topic.version).ok();
                } else {
                    self.owner.withdraw_topic(topic.id, topic.version).ok();
                }
            }
            Act::DropTopic(which) => {
                let Some(topic) = self.topic(*which) else { return };
                self.owner.delete_topic(topic.id).unwrap();
            }
            Act::CreateGroup(name) => {
                let name = GroupName::parse(&format!("g{name}")).unwrap();
                self.owner.create_group(&name, GroupStart::Latest, 7, LogOffset::new(8), 4).ok();
            }
            Act::DropGroup(which) => {
                let groups: Vec<_> = self.owner.groups().cloned().collect();
                let Some(which) = which.checked_rem(groups.len()) else { return };
                self.owner.delete_group(groups[which].id).unwrap();
            }
            Act::Send { copy, from_known, changes_max } => {
                let own = self.owner.version();
                let from = if *from_known { self.copies[*copy].version() } else { own };
                self.sent.push((*copy, self.owner.delta(from, *changes_max)));
            }
            Act::Arrive(which) => {
                let Some(which) = which.checked_rem(self.sent.len()) else { return };
                let (copy, delta) = self.sent[which].clone();
                self.copies[copy].copy(&delta, LogOffset::new(16)).ok();
            }
            Act::Confirm(copy) => {
                self.owner.confirm(&broker_group(OTHERS[*copy]), self.copies[*copy].version());
            }
            Act::FailOver(at) => {
                let catalog = if *at == 2 { &mut self.owner } else { &mut self.copies[*at] };
                *catalog = Catalog::from_parts(catalog.to_parts()).unwrap();
            }
        }
    }

    fn note_ids(&mut self) {
        let topics = self.owner.definitions().map(|topic| (topic.id, topic.name.clone()));
        self.topics_seen.extend(topics);
        let groups = self.owner.groups().map(|group| (group.id, group.name.clone()));
        self.groups_seen.extend(groups);
    }

    /// No id ever meant two things, and no copy holds what the owner never had.
    fn check(&self) {
        let ids: BTreeSet<_> = self.topics_seen.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids.len(), self.topics_seen.len(), "a topic id was used twice");
        let ids: BTreeSet<_> = self.groups_seen.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids.len(), self.groups_seen.len(), "a group id was used twice");
        for copy in &self.copies {
            assert!(copy.version() <= self.owner.version());
            for topic in copy.definitions() {
                assert!(self.topics_seen.contains(&(topic.id, topic.name.clone())));
            }
            if copy.version() == self.owner.version() {
                assert_eq!(copy.defined(), self.owner.defined());
            }
        }
    }

    /// What the pushing task does once nothing fails any more.
    fn converge(&mut self) {
        for (name, copy) in OTHERS.iter().zip(&mut self.copies) {
            while copy.version() != self.owner.version() {
                let (before, delta) = (copy.version(), self.owner.delta(copy.version(), 3));
                copy.copy(&delta, LogOffset::new(24)).unwrap();
                assert!(copy.version() > before, "a push moves the copy on");
            }
            self.owner.confirm(&broker_group(name), copy.version());
        }
        assert_eq!(self.owner.oldest_deletion(), None, "all copies have all deletions");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn copies_converge_whatever_is_lost_repeated_or_late(
        acts in prop::collection::vec(act(), 1..120),
    ) {
        let mut cluster = Cluster::new();
        for act in &acts {
            cluster.act(act);
            cluster.note_ids();
            cluster.check();
        }
        cluster.converge();
        cluster.check();
        for copy in &cluster.copies {
            prop_assert_eq!(copy.defined(), cluster.owner.defined());
        }
    }
}

#[test]
fn a_late_definition_does_not_bring_back_a_deleted_topic() {
    let mut cluster = Cluster::new();
    cluster.act(&Act::CreateTopic { name: 1, two_steps: false });
    let created = cluster.owner.delta(0, 10);
    cluster.copies[0].copy(&created, LogOffset::ZERO).unwrap();
    cluster.act(&Act::DropTopic(0));
    let deleted = cluster.owner.delta(created.to, 10);
    let copied = cluster.copies[0].copy(&deleted, LogOffset::ZERO).unwrap();
    assert_eq!(copied.deleted, [Deleted::Topic(TopicId::new(1))]);
    let late = cluster.copies[0].copy(&created, LogOffset::ZERO);
    assert_eq!(late, Err(Refusal::CopyElsewhere { version: 2 }));
    assert_eq!(cluster.copies[0].definitions().len(), 0);
}

/// The owner was elected from a log that lacked some of its changes, and gives their ids out again.
#[test]
fn id_that_was_given_out_twice_does_not_mix_two_topics() {
    let mut cluster = Cluster::new();
    cluster.act(&Act::CreateTopic { name: 1, two_steps: false });
    let lost = cluster.owner.delta(0, 10);
    cluster.copies[0].copy(&lost, LogOffset::ZERO).unwrap();
    let mut again = Cluster::new();
    again.act(&Act::CreateTopic { name: 2, two_steps: false });
    again.act(&Act::CreateTopic { name: 3, two_steps: false });
    let mut forked = again.owner.delta(0, 10);
    forked.from = lost.to;
    let before = cluster.copies[0].clone();
    let refused = cluster.copies[0].copy(&forked, LogOffset::ZERO);
    assert!(matches!(refused, Err(Refusal::CopyForked { .. })), "{refused:?}");
    assert_eq!(cluster.copies[0], before);
    // What an operator is told to do.
    again.act(&Act::DropTopic(0));
    let mended = CatalogDelta { from: lost.to, ..again.owner.delta(0, 10) };
    let copied = cluster.copies[0].copy(&mended, LogOffset::ZERO).unwrap();
    assert_eq!(copied.deleted, [Deleted::Topic(TopicId::new(1))]);
    assert_eq!(cluster.copies[0].defined(), again.owner.defined());
}

#[test]
fn deletions_are_kept_until_every_copy_has_them() {
    let mut cluster = Cluster::new();
    cluster.act(&Act::CreateTopic { name: 1, two_steps: false });
    cluster.act(&Act::DropTopic(0));
    assert_eq!(cluster.owner.oldest_deletion(), Some(2));
    cluster.owner.confirm(&broker_group("b"), 2);
    assert_eq!(cluster.owner.oldest_deletion(), Some(2));
    cluster.owner.confirm(&broker_group("c"), 2);
    assert_eq!(cluster.owner.oldest_deletion(), None);
}

#[test]
fn definitions_of_before_sharing_come_with_the_first_delta() {
    let mut owner = Catalog::default();
    let new = |name| NewTopic {
        name,
        kind: TopicType::Normal,
        shares: Box::leak(Box::new(shares(&["a"], 1))),
        min_copies: 1,
        two_steps: false,
    };
    let names = [topic_name("t1"), topic_name("t2"), topic_name("t3")];
    owner.create_topic(new(&names[0]), 7, 9).unwrap();
    owner.create_topic(new(&names[1]), 7, 9).unwrap();
    owner.share();
    owner.create_topic(new(&names[2]), 7, 9).unwrap();
    let mut copy = Catalog::default();
    let delta = owner.delta(0, 1);
    assert_eq!((delta.topics.len(), delta.to), (2, 1), "what has one stamp is not torn apart");
    copy.copy(&delta, LogOffset::ZERO).unwrap();
    copy.copy(&owner.delta(1, 1), LogOffset::ZERO).unwrap();
    assert_eq!(copy.defined(), owner.defined());
    assert_eq!(copy.version(), owner.version());
}
