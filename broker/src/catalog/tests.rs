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
