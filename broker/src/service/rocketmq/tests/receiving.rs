//! ReceiveMessage, AckMessage, ChangeInvisibleDuration.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::super::renew::Lead;
use super::super::status;
use super::*;
use crate::command::{ClientKey, Command, Granted, Lease, LeaseId, Outcome};
use crate::group::leases::Flight;
use crate::position::{EntryIndex, Term};
use crate::replica::{Applied, Item};
use crate::service::creations::CreationRate;

fn handle(message: &Message) -> &str {
    system(message).receipt_handle()
}

fn attempt(message: &Message) -> i32 {
    system(message).delivery_attempt()
}

/// The only delivery of the group.
fn flight(fixture: &Fixture) -> Option<Flight> {
    let view = fixture.edge.replica().view();
    let mut groups = view.state.groups().iter();
    groups.find_map(|(_, _, leases)| leases.flights().next().map(|(_, flight)| *flight))
}

/// Waits until the state says so.
async fn until(fixture: &Fixture, holds: impl Fn(&Fixture) -> bool) {
    let topic = fixture.edge.topic(&drumlin_proto::ids::TopicName::parse(TOPIC).unwrap()).unwrap();
    let wakes = fixture.edge.replica().topic_wakes(topic.id);
    let waiting = async {
        loop {
            let woken = wakes.notified();
            if holds(fixture) {
                return;
            }
            let _elapsed = tokio::time::timeout(Duration::from_millis(50), woken).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("it never came true");
}

#[tokio::test]
async fn delivered_messages_carry_what_clients_need() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mut sent = grouped("body", "g-1");
    sent.user_properties.insert("colour".into(), "red".into());
    {
        let system = sent.system_properties.as_mut().unwrap();
        system.tag = Some("t".into());
        system.keys = vec!["k1".into(), "k2".into()];
        system.trace_context = Some("00-trace".into());
        system.born_timestamp = Some(prost_types::Timestamp { seconds: 5, nanos: 7_000_000 });
    }
    fixture.store(vec![sent]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.code(), Code::Ok);
    let message = &received.messages[0];
    assert_eq!(message.topic, resource(TOPIC));
    assert_eq!(message.body, "body");
    assert_eq!(message.user_properties["colour"], "red");
    assert_eq!(message.user_properties["__SHARDINGKEY"], "g-1");
    let system = system(message);
    let digest = system.body_digest.as_ref().unwrap();
    assert_eq!(digest.r#type(), DigestType::Md5);
    assert_eq!(digest.checksum, "841A2D689AD86BD1611447453C22C6FC");
    assert_eq!(system.body_encoding(), Encoding::Identity);
    assert_eq!(system.message_type(), MessageType::Fifo);
    assert_eq!(system.message_id, "01body");
    assert_eq!(system.tag(), "t");
    assert_eq!(system.keys, ["k1", "k2"]);
    assert_eq!(system.message_group(), "g-1");
    assert_eq!(system.trace_context(), "00-trace");
    assert_eq!(system.born_host, "laptop");
    assert_eq!(system.born_timestamp.as_ref().unwrap().nanos, 7_000_000);
    assert!(system.store_timestamp.as_ref().unwrap().seconds > 1_600_000_000);
    assert_eq!(system.store_host, format!("127.0.0.1:{}", fixture.address.port));
    assert_eq!(system.queue_offset(), 0);
    assert_eq!(system.delivery_attempt(), 1);
    assert_eq!(system.invisible_duration, wire(LEASE));
    assert!(handle(message).starts_with("broker-a.") && handle(message).is_ascii());
    fixture.stop().await;
}

#[tokio::test]
async fn the_queue_of_a_poll_is_no_filter() {
    let fixture = Fixture::start().await;
    let queues = fixture.topic(TOPIC).await;
    let bodies: BTreeSet<String> = (0..16).map(|n| n.to_string()).collect();
    for body in &bodies {
        fixture.store(vec![message(body)]).await;
    }
    let mut request = poll(LONG, LEASE);
    request.message_queue = Some(queues[3].clone());
    let received = fixture.receive(request).await;
    let got: BTreeSet<String> = received.bodies().into_iter().map(str::to_owned).collect();
    assert_eq!(got, bodies);
    fixture.stop().await;
}

#[tokio::test]
async fn polls_that_alternate_with_sends_are_given_of_all_queues() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    for n in 0..80 {
        fixture.store(vec![message(&n.to_string())]).await;
    }
    let mut queues = BTreeSet::new();
    // Half of the queues would have enough.
    for n in 0..39 {
        let one = ReceiveMessageRequest { batch_size: 1, ..poll(LONG, LEASE) };
        let received = fixture.receive(one).await;
        queues.insert(system(&received.messages[0]).queue_id);
        fixture.store(vec![message(&format!("reply {n}"))]).await;
    }
    let odd: BTreeSet<bool> = queues.iter().map(|queue| queue % 2 == 1).collect();
    assert_eq!(odd.len(), 2, "{queues:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn a_new_group_starts_at_the_earliest_message() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("before the group")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.bodies(), ["before the group"]);
    fixture.stop().await;
}

#[tokio::test]
async fn a_waiting_poll_is_woken_by_a_message() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let started = Instant::now();
    let waiting = fixture.receive(poll(LONG, LEASE));
    let sending = async {
        until(&fixture, |fixture| fixture.edge.clients().count() > 0).await;
        fixture.store(vec![message("wake")]).await;
    };
    let (received, ()) = tokio::join!(waiting, sending);
    assert_eq!(received.bodies(), ["wake"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    fixture.stop().await;
}

#[tokio::test]
async fn an_empty_poll_says_message_not_found_and_not_before_its_time() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![tagged("x", "other")]).await;
    let started = Instant::now();
    let received = fixture.receive(filtered("wanted", SHORT)).await;
    assert_eq!(received.code(), Code::MessageNotFound);
    assert!(received.messages.is_empty());
    assert!(started.elapsed() >= SHORT, "{:?}", started.elapsed());
    fixture.stop().await;
}

#[tokio::test]
async fn a_poll_ends_before_the_deadline_of_its_call() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mut request = call(poll(LONG, LEASE));
    request.set_timeout(Duration::from_secs(2));
    let stream = fixture.client.clone().receive_message(request).await.unwrap();
    assert_eq!(frames(stream.into_inner()).await.code(), Code::MessageNotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn only_messages_with_the_tag_come_and_others_count_as_consumed() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let tags = ["a", "b", "c"];
    let messages = (0..30).map(|n| tagged(&n.to_string(), tags[n % 3])).collect();
    fixture.store(messages).await;
    fixture.store(vec![message("no tag")]).await;
    let received = fixture.receive(filtered("a || c", LONG)).await;
    assert_eq!(received.messages.len(), 20);
    assert!(received.messages.iter().all(|message| ["a", "c"].contains(&system(message).tag())));
    let all: Vec<&Message> = received.messages.iter().collect();
    assert_eq!(code(&fixture.ack_all(&all).await.status), Code::Ok);
    let again = fixture.receive(filtered("a || c", SHORT)).await;
    assert_eq!(again.code(), Code::MessageNotFound);
    // Another filter of the same group finds nothing either: what did not match is consumed.
    until(&fixture, |fixture| {
        let view = fixture.edge.replica().view();
        let committed = |(_, _, leases): (_, _, &Arc<crate::group::leases::QueueLeases>)| {
            leases.committed().get()
        };
        view.state.groups().iter().map(committed).sum::<u64>() == 31
    })
    .await;
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::MessageNotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn acknowledged_messages_do_not_come_again_and_a_second_ack_is_ok() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let received = fixture.receive(poll(LONG, Duration::from_millis(500))).await;
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::Ok);
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::Ok);
    let again = fixture.receive(poll(Duration::from_millis(900), LEASE)).await;
    assert_eq!(again.code(), Code::MessageNotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn a_lease_that_ends_brings_the_message_back_with_a_higher_attempt() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let short_lease = Duration::from_millis(150);
    let mut last = None;
    for expected in 1..=3 {
        let received = fixture.receive(poll(LONG, short_lease)).await;
        assert_eq!(received.bodies(), ["a"]);
        assert_eq!(attempt(&received.messages[0]), expected);
        assert_eq!(received.messages[0].topic, resource(TOPIC), "the original topic");
        let stale = last.replace(received.messages[0].clone());
        if let Some(stale) = stale {
            assert_ne!(handle(&stale), handle(&received.messages[0]));
            assert_eq!(fixture.ack(&stale).await, Code::InvalidReceiptHandle);
        }
    }
    fixture.stop().await;
}

#[tokio::test]
async fn what_comes_again_leaves_room_for_what_is_new() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store((0..64).map(|n| grouped(&n.to_string(), "g")).collect()).await;
    let short_lease = Duration::from_millis(20);
    assert_eq!(fixture.receive(poll(LONG, short_lease)).await.messages.len(), 32);
    let first = flight(&fixture).unwrap();
    until(&fixture, |fixture| fixture.edge.replica().clock_ms() >= first.expires_ms).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let again = received.messages.iter().filter(|message| attempt(message) == 2).count();
    assert_eq!((received.messages.len(), again), (32, 16));
    fixture.stop().await;
}

#[tokio::test]
async fn a_zero_invisible_duration_brings_the_message_back_at_once() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let first = fixture.receive(poll(LONG, LEASE)).await;
    let changed = fixture.change(handle(&first.messages[0]), Duration::ZERO).await;
    assert_eq!(code(&changed.status), Code::Ok);
    assert_ne!(changed.receipt_handle, handle(&first.messages[0]));
    let started = Instant::now();
    let second = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(attempt(&second.messages[0]), 2);
    assert!(started.elapsed() < Duration::from_secs(5));
    fixture.stop().await;
}

#[tokio::test]
async fn a_longer_lease_replaces_the_handle() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let old = handle(&received.messages[0]).to_owned();
    let changed = fixture.change(&old, LEASE * 2).await;
    assert_eq!(code(&changed.status), Code::Ok);
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::InvalidReceiptHandle);
    let mut renewed = received.messages[0].clone();
    renewed.system_properties.as_mut().unwrap().receipt_handle = Some(changed.receipt_handle);
    assert_eq!(fixture.ack(&renewed).await, Code::Ok);
    fixture.stop().await;
}

#[tokio::test]
async fn a_failed_change_returns_the_handle_that_was_sent() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let changed = fixture.change("broker-a.nonsense", LEASE).await;
    assert_eq!(code(&changed.status), Code::InvalidReceiptHandle);
    assert_eq!(changed.receipt_handle, "broker-a.nonsense");
    let changed = fixture.change("x", Duration::from_secs(13 * 3600)).await;
    assert_eq!(code(&changed.status), Code::IllegalInvisibleTime);
    assert_eq!(changed.receipt_handle, "x");
    let nameless = ChangeInvisibleDurationRequest {
        receipt_handle: "y".into(),
        ..ChangeInvisibleDurationRequest::default()
    };
    let changed =
        fixture.client.clone().change_invisible_duration(Request::new(nameless)).await.unwrap();
    let changed = changed.into_inner();
    assert_eq!(code(&changed.status), Code::ClientIdRequired);
    assert_eq!(changed.receipt_handle, "y");
    fixture.stop().await;
}

#[tokio::test]
async fn entries_of_an_ack_are_judged_one_by_one() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a"), message("b")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let mut forged = received.messages[1].clone();
    forged.system_properties.as_mut().unwrap().receipt_handle = Some("broker-a.00".into());
    let answer = fixture.ack_all(&[&received.messages[0], &forged]).await;
    assert_eq!(code(&answer.status), Code::MultipleResults);
    let codes: Vec<Code> = answer.entries.iter().map(|entry| code(&entry.status)).collect();
    assert_eq!(codes, [Code::Ok, Code::InvalidReceiptHandle]);
    assert_eq!(answer.entries[1].receipt_handle, "broker-a.00");
    assert_eq!(answer.entries[1].message_id, "01b");
    let both_bad = fixture.ack_all(&[&forged, &forged]).await;
    assert_eq!(code(&both_bad.status), Code::InvalidReceiptHandle);
    fixture.stop().await;
}

#[tokio::test]
async fn a_handle_that_comes_twice_in_a_request_is_acknowledged_twice() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a"), message("b")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let [a, b] = &received.messages[..] else { panic!("{received:?}") };
    let mut stale = b.clone();
    let changed = fixture.change(handle(b), LEASE).await;
    stale.system_properties.as_mut().unwrap().receipt_handle = Some(handle(b).to_owned());
    let mut current = b.clone();
    current.system_properties.as_mut().unwrap().receipt_handle = Some(changed.receipt_handle);
    let answer = fixture.ack_all(&[a, &stale, a, &current, &stale]).await;
    let codes: Vec<Code> = answer.entries.iter().map(|entry| code(&entry.status)).collect();
    let (ok, invalid) = (Code::Ok, Code::InvalidReceiptHandle);
    assert_eq!(codes, [ok, invalid, ok, ok, invalid]);
    fixture.stop().await;
}

#[tokio::test]
async fn a_handle_is_good_for_its_group_and_topic_only() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.topic("payments").await;
    fixture.store(vec![message("a")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let entry = AckMessageEntry {
        message_id: "01a".into(),
        receipt_handle: handle(&received.messages[0]).to_owned(),
        lite_topic: None,
    };
    for (group, topic) in [("others", TOPIC), (GROUP, "payments"), (GROUP, "unknown")] {
        let request = AckMessageRequest {
            group: resource(group),
            topic: resource(topic),
            entries: vec![entry.clone()],
        };
        let answer = fixture.client.clone().ack_message(call(request)).await.unwrap();
        assert_eq!(code(&answer.into_inner().status), Code::InvalidReceiptHandle);
    }
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::Ok);
    fixture.stop().await;
}

#[tokio::test]
async fn groups_receive_independently_of_each_other() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    for group in ["first", "second"] {
        let request = ReceiveMessageRequest { group: resource(group), ..poll(LONG, LEASE) };
        assert_eq!(fixture.receive(request).await.bodies(), ["a"]);
    }
    fixture.stop().await;
}

#[tokio::test]
async fn many_polls_get_every_message_once() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    for n in 0..100 {
        let batch = (0..4).map(|m| message(&format!("{n}-{m}"))).collect();
        fixture.store(batch).await;
    }
    let request = || ReceiveMessageRequest { batch_size: 7, ..poll(SHORT, LEASE) };
    let consumer = async || {
        let mut got = Vec::new();
        loop {
            let received = fixture.receive(request()).await;
            if received.code() == Code::MessageNotFound {
                return got;
            }
            got.extend(received.bodies().into_iter().map(str::to_owned));
        }
    };
    let all = tokio::join!(consumer(), consumer(), consumer(), consumer());
    let mut got = [all.0, all.1, all.2, all.3].concat();
    assert_eq!(got.len(), 400, "none twice");
    got.sort_unstable();
    got.dedup();
    assert_eq!(got.len(), 400, "none missing");
    fixture.stop().await;
}

#[tokio::test]
async fn an_unacknowledged_predecessor_does_not_block_its_message_group() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![grouped("1", "g")]).await;
    assert_eq!(fixture.receive(poll(LONG, LEASE)).await.bodies(), ["1"]);
    fixture.store(vec![grouped("2", "g")]).await;
    assert_eq!(fixture.receive(poll(LONG, LEASE)).await.bodies(), ["2"]);
    fixture.stop().await;
}

#[tokio::test]
async fn a_push_poll_gets_a_renewed_lease_of_a_minute() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let received = fixture.receive(push_poll(LONG)).await;
    assert_eq!(system(&received.messages[0]).invisible_duration, wire(Duration::from_secs(60)));
    let flight = flight(&fixture).unwrap();
    assert!(flight.auto_renew);
    assert_eq!(flight.expires_ms - flight.delivered_ms, 60_000);
    fixture.stop().await;
}

/// Leases the first record of the first queue that has one, as a poll of `client` would.
async fn lease_directly(fixture: &Fixture, client: ClientKey, invisible_ms: u64) -> LeaseId {
    let name = drumlin_proto::ids::TopicName::parse(TOPIC).unwrap();
    let topic = fixture.edge.topic(&name).unwrap();
    let replica = fixture.edge.replica();
    let queue = topic
        .queues(&broker_group())
        .find(|queue| replica.queue_range(*queue).unwrap().1.get() > 0)
        .unwrap();
    let group = replica.view().state.catalog().groups().next().unwrap().id;
    let first = drumlin_proto::ids::QueueOffset::ZERO;
    let lease = Lease {
        group,
        queue,
        client,
        auto_renew: true,
        invisible_ms,
        from: first,
        skip_to: first.advance(1),
        fresh: vec![first],
        again: Vec::new(),
        unwanted: Vec::new(),
    };
    match replica.propose(Item::Command(Command::Lease(lease)), None).await.unwrap() {
        Applied::Command(Outcome::Leased { lease, granted }) => {
            assert_eq!(granted.len(), 1);
            lease
        }
        other => panic!("{other:?}"),
    }
}

/// All leases are this leader's own.
fn led_since(since: Instant) -> Lead {
    Lead::in_term(None, Term::new(1), EntryIndex::ZERO, since)
}

#[tokio::test]
async fn leases_of_clients_that_are_alive_are_renewed_under_their_handle() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    assert_eq!(fixture.receive(push_poll(SHORT)).await.code(), Code::MessageNotFound);
    fixture.store(vec![message("a")]).await;
    let client = crate::service::clients::client_key("client-1");
    let lease = lease_directly(&fixture, client, 5000).await;
    let now = Instant::now();
    let long_ago = now - crate::service::clients::SILENCE_MAX;
    let commands = fixture.edge.renewals(&led_since(long_ago), now);
    fixture.edge.propose_all(commands.commands()).await;
    let renewed = flight(&fixture).unwrap();
    assert_eq!(renewed.lease, lease, "the handle stays valid");
    assert!(renewed.expires_ms - renewed.delivered_ms > 50_000, "{renewed:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn leases_of_silent_clients_are_cut_once_the_leader_could_have_heard_them() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    assert_eq!(fixture.receive(push_poll(SHORT)).await.code(), Code::MessageNotFound);
    fixture.store(vec![message("a")]).await;
    lease_directly(&fixture, ClientKey(77), 3_600_000).await;
    let now = Instant::now();
    let new_leader = fixture.edge.renewals(&led_since(now), now).commands();
    assert_eq!(new_leader, [], "a new leader takes every holder as alive");
    let long_ago = now - crate::service::clients::SILENCE_MAX;
    let commands = fixture.edge.renewals(&led_since(long_ago), now).commands();
    assert_eq!(commands.len(), 1);
    fixture.edge.propose_all(commands).await;
    let second = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(attempt(&second.messages[0]), 2);
    fixture.stop().await;
}

#[tokio::test]
async fn messages_of_a_broken_stream_come_again_after_a_second() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store((0..8).map(|n| message(&n.to_string())).collect()).await;
    let unread = receive::open(&fixture.service(), slow_call(poll(LONG, LEASE))).await;
    until(&fixture, |fixture| flight(fixture).is_some()).await;
    drop(unread);
    let started = Instant::now();
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.messages.len(), 8);
    assert!(received.messages.iter().all(|message| attempt(message) == 2));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    fixture.stop().await;
}

#[tokio::test]
async fn polls_beyond_the_bound_are_told_to_come_later() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let all = fixture.edge.polls.acquire_many(u32::try_from(POLLS_MAX).unwrap()).await.unwrap();
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.code(), Code::TooManyRequests);
    drop(all);
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::MessageNotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn faults_of_a_poll_are_frames_too() {
    let fixture = Fixture::start().await;
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::TopicNotFound);
    fixture.topic(TOPIC).await;
    let foreign = Broker { name: "broker-z".into(), id: 0, endpoints: None };
    let queue =
        MessageQueue { topic: resource(TOPIC), broker: Some(foreign), ..MessageQueue::default() };
    let elsewhere = ReceiveMessageRequest { message_queue: Some(queue), ..poll(SHORT, LEASE) };
    assert_eq!(fixture.receive(elsewhere).await.code(), Code::BadRequest);
    let sql = FilterExpression { r#type: FilterType::Sql.into(), expression: "a > 1".into() };
    let sql = ReceiveMessageRequest { filter_expression: Some(sql), ..poll(SHORT, LEASE) };
    assert_eq!(fixture.receive(sql).await.code(), Code::NotImplemented);
    assert_eq!(
        fixture.receive(poll(SHORT, Duration::from_secs(13 * 3600))).await.code(),
        Code::IllegalInvisibleTime
    );
    assert_eq!(fixture.receive(filtered("a|b", SHORT)).await.code(), Code::IllegalFilterExpression);
    assert_eq!(status::ok().code(), Code::Ok);
    fixture.stop().await;
}

#[tokio::test]
async fn leases_handles_and_attempts_survive_a_restart() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a"), message("b")]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.bodies(), ["a", "b"]);
    let fixture = fixture.restart().await;
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::MessageNotFound);
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::Ok);
    let changed = fixture.change(handle(&received.messages[1]), Duration::ZERO).await;
    assert_eq!(code(&changed.status), Code::Ok);
    let again = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!((again.bodies(), attempt(&again.messages[0])), (vec!["b"], 2));
    fixture.stop().await;
}

#[tokio::test]
async fn a_deleted_topic_ends_its_polls() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let name = drumlin_proto::ids::TopicName::parse(TOPIC).unwrap();
    let topic = fixture.edge.topic(&name).unwrap().id;
    let waiting = fixture.receive(poll(LONG, LEASE));
    let deleting = async {
        until(&fixture, |fixture| fixture.edge.clients().count() > 0).await;
        let delete = Item::Command(Command::DeleteTopic { topic });
        fixture.edge.replica().propose(delete, None).await.unwrap();
    };
    let (received, ()) = tokio::join!(waiting, deleting);
    assert_eq!(received.code(), Code::TopicNotFound);
    fixture.stop().await;
}

#[tokio::test]
async fn a_stopping_broker_ends_its_polls() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let stop = fixture.stop.clone();
    let waiting = fixture.receive(poll(LONG, LEASE));
    let stopping = async {
        until(&fixture, |fixture| fixture.edge.clients().count() > 0).await;
        stop.cancel();
    };
    let (received, ()) = tokio::join!(waiting, stopping);
    assert_eq!(received.code(), Code::HaNotAvailable);
    fixture.stop().await;
}

#[tokio::test]
async fn a_poll_over_a_long_backlog_of_other_tags_ends_in_time_and_with_its_client() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    // Each round passes over what fits one scan of a queue, so this takes several.
    for _ in 0..24 {
        let mut other = grouped("x", "g");
        other.system_properties.as_mut().unwrap().tag = Some("other".into());
        fixture.store(vec![other; 1000]).await;
    }
    let tasks_before = fixture.edge.tasks.len();
    let request = slow_call(filtered("wanted", LONG));
    drop(receive::open(&fixture.service(), request).await);
    until(&fixture, |fixture| fixture.edge.tasks.len() == tasks_before).await;
    let passed = || {
        let view = fixture.edge.replica().view();
        let mut groups = view.state.groups().iter();
        groups.next().map_or(0, |(_, _, leases)| leases.next().get())
    };
    assert!(passed() < 24_000, "a poll without a client goes on to the end of the backlog");
    let received = fixture.receive(filtered("wanted", Duration::from_millis(1))).await;
    assert_eq!(received.code(), Code::MessageNotFound);
    assert!(passed() < 24_000, "a poll goes on behind its end");
    fixture.stop().await;
}

#[tokio::test]
async fn a_lease_that_ends_while_a_poll_looks_is_waited_for() {
    let fixture = Fixture::start().await;
    let queues = fixture.topic(TOPIC).await.len();
    fixture.store(vec![message("a")]).await;
    let received = fixture.receive(poll(LONG, Duration::from_millis(20))).await;
    assert_eq!(received.bodies(), ["a"]);
    let flight = flight(&fixture).unwrap();
    let name = drumlin_proto::ids::TopicName::parse(TOPIC).unwrap();
    let queue_keys: Vec<_> = fixture.edge.topic(&name).unwrap().queues(&broker_group()).collect();
    assert_eq!(queue_keys.len(), queues);
    let replica = fixture.edge.replica();
    let group = replica.view().state.catalog().groups().next().unwrap().id;
    until(&fixture, |_| replica.clock_ms() >= flight.expires_ms).await;
    let due_in = |looked_ms| plan::next_due_in_ms(replica, looked_ms, group, &queue_keys);
    assert_eq!(due_in(flight.expires_ms - 1), Some(0), "it ended behind the look");
    assert_eq!(due_in(flight.expires_ms), None, "the look has found it");
    fixture.stop().await;
}

#[tokio::test]
async fn what_no_client_got_is_not_renewed_and_comes_again() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    assert_eq!(fixture.receive(push_poll(SHORT)).await.code(), Code::MessageNotFound);
    fixture.store(vec![message("a")]).await;
    let client = crate::service::clients::client_key("client-1");
    lease_directly(&fixture, client, 5000).await;
    let (record, flight) = {
        let view = fixture.edge.replica().view();
        let mut groups = view.state.groups().iter();
        let flights = |(group, queue, leases): (_, _, &Arc<crate::group::leases::QueueLeases>)| {
            leases.flights().next().map(|(offset, flight)| ((group, queue, offset), *flight))
        };
        groups.find_map(flights).unwrap()
    };
    let granted = Granted { offset: record.2, attempt: 1 };
    let unsent = std::iter::once((record.1, flight.lease, granted));
    assert_eq!(fixture.edge.unsent.add(record.0, unsent), 0);
    let now = Instant::now();
    let long_ago = now - crate::service::clients::SILENCE_MAX;
    assert_eq!(fixture.edge.renewals(&led_since(long_ago), now).commands(), []);
    let again = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(attempt(&again.messages[0]), 2);
    assert!(!fixture.edge.unsent.holds(record, flight.lease));
    fixture.stop().await;
}

#[tokio::test]
async fn what_an_earlier_leader_may_not_have_sent_comes_again_though_its_client_lives() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    assert_eq!(fixture.receive(push_poll(SHORT)).await.code(), Code::MessageNotFound);
    fixture.store(vec![message("a")]).await;
    let client = crate::service::clients::client_key("client-1");
    lease_directly(&fixture, client, 2000).await;
    let fixture = fixture.restart().await;
    let again = fixture.receive(push_poll(LONG)).await;
    assert_eq!((again.bodies(), attempt(&again.messages[0])), (vec!["a"], 2));
    fixture.stop().await;
}

#[tokio::test]
async fn polls_create_a_bounded_number_of_groups_a_second() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let now = Instant::now();
    let rate = &fixture.edge.context.creations.groups;
    while rate.lock().take(now + Duration::from_secs(3600)) {}
    let refused = fixture.receive(poll(SHORT, LEASE)).await;
    assert_eq!(refused.code(), Code::TooManyRequests);
    assert!(fixture.edge.replica().view().state.catalog().groups().next().is_none());
    *rate.lock() = CreationRate::default();
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::MessageNotFound);
    fixture.stop().await;
}
