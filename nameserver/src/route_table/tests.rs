use super::*;
use drumlin_proto::native::TopicShare;
use drumlin_proto::route::message_queues;
use proptest::prelude::*;

const TIMING: Timing = Timing {
    expiry: Duration::from_secs(5),
    broken_grace: Duration::from_millis(300),
    start_wait: Duration::from_secs(5),
};

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

fn hello(group: &str, node: &str) -> Hello {
    let listener = |name: &str, port| Listener {
        name: name.into(),
        advertised: Some(Address { host: format!("{node}.{name}"), port }),
    };
    Hello {
        cluster: "c".into(),
        broker_group: group.into(),
        group_uuid: format!("uuid-{group}"),
        node: node.into(),
        listeners: vec![listener("internal", 1), listener("external", 2)],
        catalog: group == "a",
        succeeds_group_uuids: Vec::new(),
    }
}

fn topic(name: &str, version: u64, shares: &[(&str, u32)]) -> Topic {
    let share = |(group, count): &(&str, u32)| TopicShare {
        broker_group: (*group).into(),
        queue_count: *count,
    };
    Topic {
        name: name.into(),
        topic_id: 7,
        r#type: TopicType::Mixed.into(),
        shares: shares.iter().map(share).collect(),
        version,
        created_ms: 1,
        ..Topic::default()
    }
}

fn all(version: u64, topics: Vec<Topic>) -> Topics {
    Topics { full: true, version, changed: topics, deleted: Vec::new() }
}

fn beat(term: u64, leader: bool, topics_version: u64) -> Heartbeat {
    Heartbeat { term, leader, topics_version }
}

/// Registers a node with all that a route needs.
fn register(
    table: &mut RouteTable,
    group: &str,
    node: &str,
    (term, leader): (u64, bool),
    topics: Vec<Topic>,
    now: Instant,
) -> StreamId {
    let stream = table.hello(&hello(group, node), now).unwrap();
    table.topics(stream, all(1, topics), now).unwrap();
    assert!(!table.heartbeat(stream, &beat(term, leader, 1), now).unwrap());
    stream
}

fn host(table: &RouteTable, group: &str) -> Option<String> {
    table.address(group, "external").map(|address| address.host)
}

fn orders() -> Vec<Topic> {
    vec![topic("orders", 1, &[("a", 2), ("b", 2)])]
}

#[test]
fn a_route_names_the_listener_asked_through_and_interleaves_broker_groups() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    register(&mut table, "b", "b0", (3, true), Vec::new(), now);
    register(&mut table, "a", "a0", (1, true), orders(), now);
    let definition = table.topic("orders").unwrap();
    let route = table.route(&definition, "internal");
    assert_eq!(route.queues[0].term, 1);
    assert_eq!(route.queues[1].term, 3);
    let queues = message_queues(&Default::default(), &route);
    let seen: Vec<(String, i32)> = queues
        .into_iter()
        .map(|queue| (queue.broker.unwrap().endpoints.unwrap().addresses[0].host.clone(), queue.id))
        .collect();
    let expected = [("a0", 0), ("b0", 0), ("a0", 1), ("b0", 1)];
    assert_eq!(seen, expected.map(|(node, id)| (format!("{node}.internal"), id)));
}

#[test]
fn silence_ends_a_registration_after_the_expiry() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    register(&mut table, "a", "a0", (1, true), orders(), now);
    assert_eq!(table.next_deadline(), Some(now + TIMING.expiry));
    assert_eq!(table.on_tick(now + ms(4999)), []);
    let gone = table.on_tick(now + ms(5000));
    assert_eq!(gone, [Gone { broker_group: "a".into(), node: "a0".into(), why: WhyGone::Silent }]);
    assert_eq!(host(&table, "a"), None);
    assert!(table.topic("orders").is_some(), "a topic does not vanish with its last process");
    assert_eq!(table.next_deadline(), None);
}

#[test]
fn a_broken_stream_has_a_moment_to_come_back() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    let stream = register(&mut table, "a", "a0", (1, true), orders(), now);
    table.stream_broken(stream, now);
    assert_eq!(table.on_tick(now + ms(299)), []);
    assert_eq!(host(&table, "a").as_deref(), Some("a0.external"));
    table.hello(&hello("a", "a0"), now + ms(299)).unwrap();
    assert_eq!(table.on_tick(now + ms(400)), []);
    assert_eq!(host(&table, "a").as_deref(), Some("a0.external"));
}

#[test]
fn a_broken_stream_that_stays_away_leaves_the_routes_at_once() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    let stream = register(&mut table, "a", "a0", (1, true), orders(), now);
    register(&mut table, "a", "a1", (1, false), orders(), now);
    table.stream_broken(stream, now);
    assert_eq!(table.on_tick(now + ms(300))[0].why, WhyGone::StreamBroken);
    assert_eq!(host(&table, "a").as_deref(), Some("a1.external"), "a live replica stands in");
}

#[test]
fn messages_of_a_replaced_stream_are_refused() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    let old = register(&mut table, "a", "a0", (1, true), orders(), now);
    let new = register(&mut table, "a", "a0", (2, true), orders(), now);
    assert_eq!(table.heartbeat(old, &beat(9, false, 1), now), Err(Refusal::Replaced));
    table.stream_broken(old, now);
    assert_eq!(table.on_tick(now + ms(301)), []);
    assert_eq!(table.heartbeat(new, &beat(2, true, 1), now), Ok(false));
}

#[test]
fn a_leader_of_an_older_term_is_not_named() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    register(&mut table, "a", "a0", (1, true), orders(), now);
    let follower = register(&mut table, "a", "a1", (1, false), orders(), now);
    table.heartbeat(follower, &beat(2, false, 1), now).unwrap();
    assert_eq!(host(&table, "a").as_deref(), Some("a1.external"));
    table.heartbeat(follower, &beat(2, true, 1), now).unwrap();
    assert_eq!(table.group_routes("b")[0].nodes.len(), 1);
    assert_eq!(host(&table, "a").as_deref(), Some("a1.external"));
}

#[test]
fn terms_and_uuids_outlive_a_restart() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    register(&mut table, "a", "a0", (4, true), orders(), now);
    let mut table = RouteTable::new(TIMING, table.remembered(), now);
    let stranger = Hello { group_uuid: "other".into(), ..hello("a", "a0") };
    let refusal = table.hello(&stranger, now).unwrap_err();
    assert!(matches!(refusal, Refusal::OtherGroupUuid { .. }), "{refusal}");
    register(&mut table, "a", "a0", (3, true), orders(), now);
    assert_eq!(host(&table, "a"), None, "the remembered term is newer");
    register(&mut table, "a", "a0", (5, true), orders(), now);
    assert_eq!(host(&table, "a").as_deref(), Some("a0.external"));
}

#[test]
fn a_successor_takes_the_place_of_a_group_uuid_for_good() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    let old = register(&mut table, "a", "a0", (4, true), orders(), now);
    let successor = Hello {
        group_uuid: "new".into(),
        succeeds_group_uuids: vec!["older".into(), "uuid-a".into()],
        ..hello("a", "a1")
    };
    let stranger = Hello { succeeds_group_uuids: vec!["other".into()], ..successor.clone() };
    assert!(matches!(table.hello(&stranger, now), Err(Refusal::OtherGroupUuid { .. })));
    assert_eq!(host(&table, "a").as_deref(), Some("a0.external"));
    let new = table.hello(&successor, now).unwrap();
    assert_eq!(table.heartbeat(old, &beat(4, true, 1), now), Err(Refusal::Replaced));
    let again = table.hello(&hello("a", "a0"), now).unwrap_err();
    assert!(matches!(again, Refusal::OtherGroupUuid { .. }), "{again}");
    table.topics(new, all(1, orders()), now).unwrap();
    table.heartbeat(new, &beat(5, true, 1), now).unwrap();
    assert_eq!(host(&table, "a").as_deref(), Some("a1.external"));
    assert_eq!(table.remembered()[0].group_uuid, "new");
    assert!(table.hello(&successor, now).is_ok(), "it says so at every registration");
}

#[test]
fn a_missed_delta_asks_for_all_topics() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    let stream = table.hello(&hello("a", "a0"), now).unwrap();
    assert_eq!(table.heartbeat(stream, &beat(1, true, 4), now), Ok(true));
    assert_eq!(host(&table, "a"), None, "not before its topics are known");
    table.topics(stream, all(4, orders()), now).unwrap();
    assert_eq!(table.heartbeat(stream, &beat(1, true, 4), now), Ok(false));
    let delta = |version, deleted: &str| Topics {
        full: false,
        version,
        changed: vec![topic("new", version, &[("a", 1)])],
        deleted: vec![deleted.into()],
    };
    table.topics(stream, delta(5, "orders"), now).unwrap();
    assert!(table.topic("orders").is_none() && table.topic("new").is_some());
    table.topics(stream, delta(3, "new"), now).unwrap();
    assert!(table.topic("new").is_some(), "an older delta changes nothing");
    assert_eq!(table.heartbeat(stream, &beat(1, true, 6), now), Ok(true));
}

#[test]
fn the_catalog_group_has_the_last_word_while_it_is_there() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    register(&mut table, "b", "b0", (1, true), orders(), now);
    assert!(table.topic("orders").is_some());
    let catalog = register(&mut table, "a", "a0", (1, true), Vec::new(), now);
    assert!(table.topic("orders").is_none());
    table.stream_broken(catalog, now);
    table.on_tick(now + ms(300));
    assert!(table.topic("orders").is_some());
}

#[test]
fn it_is_settled_when_remembered_groups_are_back_or_time_is_up() {
    let now = Instant::now();
    let known = |group: &str| Remembered {
        broker_group: group.into(),
        group_uuid: format!("uuid-{group}"),
        term: 1,
    };
    let mut table = RouteTable::new(TIMING, vec![known("a"), known("b")], now);
    register(&mut table, "a", "a0", (1, true), orders(), now);
    assert!(!table.is_settled(now + ms(4999)));
    assert!(table.is_settled(now + ms(5000)));
    register(&mut table, "b", "b0", (1, true), orders(), now);
    assert!(table.is_settled(now));
}

#[test]
fn what_a_peer_can_grow_is_bounded() {
    let now = Instant::now();
    let mut table = RouteTable::new(TIMING, Vec::new(), now);
    for index in 0..NODES_PER_GROUP_MAX {
        table.hello(&hello("a", &format!("n{index}")), now).unwrap();
    }
    assert!(matches!(table.hello(&hello("a", "more"), now), Err(Refusal::TooMany { .. })));
    assert!(table.hello(&hello("a", "n0"), now).is_ok());
}

/// Nodes of the broker groups of the properties, by group.
const NODES: [(&str, &str); 5] = [("a", "a0"), ("a", "a1"), ("a", "a2"), ("b", "b0"), ("b", "b1")];

#[derive(Clone, Debug)]
enum Event {
    Hello(usize),
    Beat(usize, u64, bool),
    /// The node is elected in a new term, and says so; the others of its group may hear it later.
    Elect(usize),
    Break(usize),
    Wait(u64),
}

fn event() -> impl Strategy<Value = Event> {
    let node = || 0..NODES.len();
    prop_oneof![
        3 => node().prop_map(Event::Hello),
        4 => (node(), 1..6_u64, any::<bool>()).prop_map(|(n, t, l)| Event::Beat(n, t, l)),
        2 => node().prop_map(Event::Elect),
        1 => node().prop_map(Event::Break),
        2 => (1..3000_u64).prop_map(Event::Wait),
    ]
}

/// What a test knows of one node.
#[derive(Clone, Copy, Debug)]
struct Seen {
    stream: Option<StreamId>,
    beat: Option<(u64, bool)>,
    heard: Instant,
    broken: Option<Instant>,
}

impl Seen {
    /// Whether its address may be given out: it is there, or was a moment ago.
    fn may_be_named(&self, now: Instant) -> bool {
        let back_by = self.broken.map(|at| at + TIMING.broken_grace);
        now < self.heard + TIMING.expiry && back_by.is_none_or(|at| now < at)
    }
}

proptest! {
    #[test]
    fn a_named_address_is_registered_and_never_an_older_leader(
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut now = Instant::now();
        let mut table = RouteTable::new(TIMING, Vec::new(), now);
        let unseen = Seen { stream: None, beat: None, heard: now, broken: None };
        let mut nodes = [unseen; NODES.len()];
        let mut terms = BTreeMap::from([("a", 0), ("b", 0)]);
        let mut named_terms: BTreeMap<&str, u64> = BTreeMap::new();
        for event in events {
            let event = match event {
                Event::Elect(n) => Event::Beat(n, terms[NODES[n].0] + 1, true),
                event => event,
            };
            match event {
                Event::Hello(n) => {
                    let (group, node) = NODES[n];
                    let stream = table.hello(&hello(group, node), now).unwrap();
                    table.topics(stream, all(1, orders()), now).unwrap();
                    // A registration that had ended begins without what was told before.
                    let beat = nodes[n].beat.filter(|_| nodes[n].may_be_named(now));
                    nodes[n] = Seen { stream: Some(stream), heard: now, broken: None, beat };
                }
                Event::Beat(n, term, leader) => {
                    let Some(stream) = nodes[n].stream else { continue };
                    if table.heartbeat(stream, &beat(term, leader, 1), now).is_ok() {
                        nodes[n].beat = Some((term, leader));
                        nodes[n].heard = now;
                        let known = terms.get_mut(NODES[n].0).unwrap();
                        *known = term.max(*known);
                    }
                }
                Event::Break(n) => {
                    if let Some(stream) = nodes[n].stream.take() {
                        table.stream_broken(stream, now);
                        nodes[n].broken = nodes[n].broken.or(Some(now));
                    }
                }
                Event::Wait(count) => {
                    now += ms(count);
                    table.on_tick(now);
                }
                Event::Elect(_) => unreachable!("it became a beat"),
            }
            let definition = table.topic("orders");
            for (group, term) in &terms {
                if let Some(definition) = &definition {
                    let route = table.route(definition, "external");
                    let told = route.queues.iter().find(|q| q.broker_group == *group).unwrap();
                    let before = named_terms.insert(group, told.term).unwrap_or(0);
                    prop_assert!(told.term >= before, "the term of {group} went back");
                    prop_assert_eq!(told.leader.as_ref().map(|a| a.host.clone()), host(&table, group));
                }
                let Some(named) = host(&table, group) else { continue };
                let n = NODES.iter().position(|(_, node)| named.starts_with(node)).unwrap();
                prop_assert_eq!(NODES[n].0, *group);
                prop_assert!(nodes[n].may_be_named(now), "{named} is gone: {:?}", nodes[n]);
                let (told, leader) = nodes[n].beat.unwrap();
                prop_assert!(!leader || told == *term, "{named} leads in {told}, seen {term}");
                let leads = |(at, seen): (usize, &Seen)| {
                    NODES[at].0 == *group && seen.beat == Some((*term, true)) && seen.may_be_named(now)
                };
                let leader_is_there = nodes.iter().enumerate().any(leads);
                prop_assert!(!leader_is_there || leader, "{named} stands in for a leader that is there");
            }
        }
    }
}
