use super::*;
use crate::command::{Refusal, Shares, TopicType};

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

fn create_with(catalog: &mut Catalog, topic: &str, shares: Shares) -> Result<TopicId, Refusal> {
    let (name, kind) = (&name(topic), TopicType::Normal);
    let new = NewTopic { name, kind, shares: &shares, min_copies: 1, two_steps: false };
    catalog.create_topic(new, 7, LIMITS.topics_max)
}

fn create(catalog: &mut Catalog, topic: &str) -> Result<TopicId, Refusal> {
    create_with(catalog, topic, vec![share("a", 4), share("b", 2)])
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
        catalog.create_group(&group("g"), start, 7, at, LIMITS.groups_max)
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
        let created = create_with(&mut catalog, "t", shares);
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

#[test]
fn a_topic_of_several_owners_is_usable_once_it_is_activated() {
    let mut catalog = Catalog::default();
    let shares = vec![share("a", 4), share("b", 2)];
    let (name, kind) = (name("t"), TopicType::Fifo);
    let new = NewTopic { name: &name, kind, shares: &shares, min_copies: 2, two_steps: true };
    let id = catalog.create_topic(new, 7, 9).unwrap();
    assert!(catalog.topic_by_name(&name).is_none());
    assert_eq!(catalog.topics().count(), 0);
    let taken = catalog.create_topic(new, 7, 9);
    assert_eq!(taken, Err(Refusal::TopicExists(name.clone())), "its name is taken");
    assert_eq!(catalog.activate_topic(id, 2), Err(Refusal::TopicChanged { version: 1 }));
    catalog.activate_topic(id, 1).unwrap();
    let topic = catalog.topic_by_name(&name).unwrap();
    assert_eq!((&topic.shares, &topic.next, topic.version), (&shares, &None, 2));
    assert_eq!(catalog.activate_topic(id, 1), Err(Refusal::TopicChanged { version: 2 }));
}

#[test]
fn a_withdrawn_creation_leaves_nothing() {
    let mut catalog = Catalog::default();
    let (name, shares) = (name("t"), vec![share("b", 2)]);
    let kind = TopicType::Fifo;
    let new = NewTopic { name: &name, kind, shares: &shares, min_copies: 1, two_steps: true };
    let id = catalog.create_topic(new, 7, 9).unwrap();
    assert_eq!(catalog.withdraw_topic(id, 1), Ok(true));
    assert!(catalog.definition_by_name(&name).is_none());
    assert!(catalog.create_topic(new, 7, 9).unwrap() > id);
}

#[test]
fn queue_lists_only_grow_and_change_in_two_steps() {
    let mut catalog = Catalog::default();
    let id = create(&mut catalog, "t").unwrap();
    let grown = vec![share("a", 4), share("b", 2), share("c", 1)];
    let shrunk = vec![share("a", 4)];
    let refused = catalog.update_topic(id, 1, &shrunk, 1, true);
    let broker_group = BrokerGroupName::parse("b").unwrap();
    assert_eq!(refused, Err(Refusal::SharesShrink { broker_group, queue_count: 2 }));
    let outdated = catalog.update_topic(id, 9, &grown, 1, true);
    assert_eq!(outdated, Err(Refusal::TopicChanged { version: 1 }));
    catalog.update_topic(id, 1, &grown, 2, true).unwrap();
    let topic = Arc::clone(catalog.topic(id).unwrap());
    assert_eq!((topic.shares.len(), topic.min_copies, topic.version), (2, 2, 2));
    assert_eq!(topic.owners().count(), 3);
    let again = catalog.update_topic(id, 2, &grown, 2, true);
    assert_eq!(again, Err(Refusal::TopicChanging));
    assert_eq!(catalog.withdraw_topic(id, 2), Ok(false));
    catalog.update_topic(id, 3, &grown, 2, true).unwrap();
    catalog.activate_topic(id, 4).unwrap();
    assert_eq!(catalog.topic(id).unwrap().shares, grown);
    let zero_copies = catalog.update_topic(id, 5, &grown, 0, true);
    assert_eq!(zero_copies, Err(Refusal::Malformed { field: "copies" }));
}

#[test]
fn message_groups_that_move_have_no_place_while_the_queue_list_changes() {
    use crate::command::MessageGroupPlace;

    let mut catalog = Catalog::default();
    let id = create(&mut catalog, "t").unwrap();
    let before = Arc::clone(catalog.topic(id).unwrap());
    let grown = vec![share("a", 4), share("b", 4)];
    catalog.update_topic(id, 1, &grown, 1, true).unwrap();
    let during = Arc::clone(catalog.topic(id).unwrap());
    catalog.activate_topic(id, 2).unwrap();
    let after = Arc::clone(catalog.topic(id).unwrap());
    let mut moving = 0;
    for n in 0..1000 {
        let message_group = format!("order-{n}");
        let (old, new) = (before.place_of(&message_group), after.place_of(&message_group));
        if old == new {
            assert_eq!(during.place_of(&message_group), old);
        } else {
            moving += 1;
            assert_eq!(during.place_of(&message_group), MessageGroupPlace::Moving);
        }
    }
    assert!(moving > 100, "{moving}");
}
