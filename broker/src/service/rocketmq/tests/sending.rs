//! SendMessage.

use std::collections::BTreeSet;

use drumlin_proto::ids::QueueId;

use super::*;

fn ends(fixture: &Fixture) -> Vec<u64> {
    let topic = fixture.edge.topic(&drumlin_proto::ids::TopicName::parse(TOPIC).unwrap()).unwrap();
    let queues = topic.queues(&broker_group());
    queues.map(|queue| fixture.edge.replica().queue_range(queue).unwrap().1.get()).collect()
}

#[tokio::test]
async fn transaction_id_equals_message_id_and_offsets_are_told() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let answer = fixture.store(vec![message("a"), message("b"), message("c")]).await;
    let offsets: Vec<i64> = answer.entries.iter().map(|entry| entry.offset).collect();
    assert_eq!(offsets, [0, 1, 2]);
    for (entry, body) in answer.entries.iter().zip(["a", "b", "c"]) {
        assert_eq!(entry.message_id, format!("01{body}"));
        assert_eq!(entry.transaction_id, entry.message_id);
        assert_eq!(code(&entry.status), Code::Ok);
        assert!(entry.recall_handle.is_empty());
    }
    assert_eq!(ends(&fixture).iter().sum::<u64>(), 3);
    assert_eq!(ends(&fixture).iter().filter(|end| **end > 0).count(), 1, "one queue");
    fixture.stop().await;
}

#[tokio::test]
async fn messages_without_a_message_group_go_round_and_ignore_the_queue_id_sent() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    for n in 0..16 {
        let mut one = message(&n.to_string());
        one.system_properties.as_mut().unwrap().queue_id = 5;
        fixture.store(vec![one]).await;
    }
    assert_eq!(ends(&fixture), [2; 8]);
    fixture.stop().await;
}

#[tokio::test]
async fn a_message_group_stays_on_the_queue_of_its_hash() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    for n in 0..5 {
        fixture.store(vec![grouped(&n.to_string(), "order-17")]).await;
    }
    let queue = drumlin_proto::route::queue_of_message_group("order-17", 8);
    let mut expected = [0; 8];
    expected[usize::try_from(queue).unwrap()] = 5;
    assert_eq!(ends(&fixture), expected);
    let received = fixture.receive(poll(LONG, LEASE)).await;
    let queues: BTreeSet<i32> = received.messages.iter().map(|m| system(m).queue_id).collect();
    assert_eq!(queues, BTreeSet::from([i32::try_from(queue).unwrap()]));
    assert!(u16::try_from(queue).map(QueueId::new).is_ok());
    fixture.stop().await;
}

#[tokio::test]
async fn a_fault_of_an_entry_is_in_every_entry_and_the_overall_status() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mut blank = message("b");
    blank.system_properties.as_mut().unwrap().tag = Some(" ".into());
    let answer = fixture.send(vec![message("a"), blank, message("c")]).await;
    assert_eq!(code(&answer.status), Code::IllegalMessageTag);
    assert!(answer.status.unwrap().message.starts_with("message 2 of 3: "));
    assert_eq!(answer.entries.len(), 3);
    for entry in &answer.entries {
        assert_eq!(code(&entry.status), Code::IllegalMessageTag);
        assert!(entry.transaction_id.is_empty());
    }
    assert_eq!(ends(&fixture), [0; 8], "all or nothing");
    fixture.stop().await;
}

#[tokio::test]
async fn a_body_of_4_mib_is_stored_and_one_byte_more_is_refused() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let sized = |bytes: usize| {
        let mut large = message("large");
        large.body = vec![7; bytes].into();
        large
    };
    fixture.store(vec![sized(4 << 20)]).await;
    let refused = fixture.send(vec![sized((4 << 20) + 1)]).await;
    assert_eq!(code(&refused.status), Code::MessageBodyTooLarge);
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.messages[0].body.len(), 4 << 20);
    fixture.stop().await;
}

#[tokio::test]
async fn a_send_to_an_unknown_topic_says_so_in_the_known_words() {
    let fixture = Fixture::start().await;
    let answer = fixture.send(vec![message("a")]).await;
    assert_eq!(code(&answer.status), Code::TopicNotFound);
    let text = "CODE: 17  DESC: No topic route info in name server for the topic: orders";
    assert_eq!(answer.status.unwrap().message, text);
    assert_eq!(answer.entries.len(), 1);
    fixture.stop().await;
}

#[tokio::test]
async fn types_that_are_not_built_are_refused_in_clear_words() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let with = |change: fn(&mut SystemProperties)| {
        let mut message = message("a");
        change(message.system_properties.as_mut().unwrap());
        message
    };
    let soon = || Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
    for (message, words) in [
        (with(|s| s.message_type = MessageType::Transaction.into()), "transactions"),
        (
            {
                let mut delayed = with(|_| ());
                delayed.system_properties.as_mut().unwrap().delivery_timestamp = soon();
                delayed
            },
            "delayed messages",
        ),
        (with(|s| s.lite_topic = Some("l".into())), "lite topics"),
        (with(|s| s.priority = Some(3)), "message priorities"),
    ] {
        let answer = fixture.send(vec![message]).await;
        assert_eq!(code(&answer.status), Code::NotImplemented);
        let text = answer.status.unwrap().message;
        assert_eq!(text, format!("{words} are not supported yet"));
    }
    fixture.stop().await;
}

#[tokio::test]
async fn a_full_disk_throttles_producers_and_lets_consumers_go_on() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("before")]).await;
    fixture.edge.replica().refuse_runs(Some("/data is 91 % full".into()));
    let refused = fixture.send(vec![message("during")]).await;
    assert_eq!(code(&refused.status), Code::TooManyRequests);
    assert_eq!(code(&refused.entries[0].status), Code::TooManyRequests);
    assert!(refused.status.unwrap().message.contains("91 % full"));
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(received.bodies(), ["before"]);
    assert_eq!(fixture.ack(&received.messages[0]).await, Code::Ok);
    fixture.edge.replica().refuse_runs(None);
    fixture.store(vec![message("after")]).await;
    fixture.stop().await;
}

#[tokio::test]
async fn rust_5_0_0_is_not_told_of_empty_bodies() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mut request = call(SendMessageRequest { messages: vec![message("")] });
    assert_eq!(code(&fixture.send(vec![message("")]).await.status), Code::MessageBodyEmpty);
    request.metadata_mut().insert("x-mq-language", "RUST".parse().unwrap());
    request.metadata_mut().insert("x-mq-client-version", "5.0.0".parse().unwrap());
    let answer = fixture.client.clone().send_message(request).await.unwrap().into_inner();
    assert_eq!(code(&answer.status), Code::MessageCorrupted);
    assert_eq!(code(&answer.entries[0].status), Code::MessageCorrupted);
    fixture.stop().await;
}

#[tokio::test]
async fn a_request_of_several_message_groups_is_stored_in_order_unless_the_topic_is_fifo() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mixed = || vec![grouped("1", "a"), grouped("2", "b"), message("3")];
    fixture.store(mixed()).await;
    assert_eq!(ends(&fixture).iter().filter(|end| **end > 0).count(), 1, "one queue");
    assert_eq!(fixture.receive(poll(LONG, LEASE)).await.bodies(), ["1", "2", "3"]);
    let fifo = crate::command::Command::CreateTopic {
        name: drumlin_proto::ids::TopicName::parse("fifo").unwrap(),
        kind: crate::command::TopicType::Fifo,
        shares: vec![(broker_group(), 8)],
    };
    fixture.edge.replica().propose(crate::replica::Item::Command(fifo), None).await.unwrap();
    let mut to_fifo = vec![grouped("1", "a"), grouped("2", "b")];
    to_fifo.iter_mut().for_each(|message| message.topic = resource("fifo"));
    let answer = fixture.send(to_fifo).await;
    assert_eq!(code(&answer.status), Code::IllegalMessageGroup);
    fixture.stop().await;
}

#[tokio::test]
async fn a_request_of_almost_6_mib_with_its_attributes_is_stored() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let mut fat = message("a");
    fat.user_properties.insert("k".into(), "v".repeat(16_000));
    fixture.store(vec![fat; 386]).await;
    fixture.stop().await;
}

/// Keeps every outcome back by holding the applied state, as a stuck disk would.
struct Stall {
    release: std::sync::mpsc::Sender<()>,
    holding: std::thread::JoinHandle<()>,
}

impl Stall {
    fn begin(fixture: &Fixture) -> Self {
        let replica = fixture.edge.replica().clone();
        let (release, released) = std::sync::mpsc::channel();
        let (began, begun) = std::sync::mpsc::channel();
        let holding = std::thread::spawn(move || {
            let _view = replica.view();
            began.send(()).unwrap();
            released.recv().ok();
        });
        begun.recv().unwrap();
        Self { release, holding }
    }

    fn end(self) {
        self.release.send(()).unwrap();
        self.holding.join().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_send_that_is_not_stored_in_time_is_told_so_before_its_deadline() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let stall = Stall::begin(&fixture);
    let mut request = call(SendMessageRequest { messages: vec![message("late")] });
    request.set_timeout(Duration::from_millis(800));
    let answer = fixture.client.clone().send_message(request).await;
    stall.end();
    let answer = answer.unwrap().into_inner();
    assert_eq!(code(&answer.status), Code::MasterPersistenceTimeout);
    assert_eq!(code(&answer.entries[0].status), Code::MasterPersistenceTimeout);
    // It was proposed, so it comes all the same.
    assert_eq!(fixture.receive(poll(LONG, LEASE)).await.bodies(), ["late"]);
    fixture.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leases_that_come_too_late_for_their_poll_are_given_back() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    assert_eq!(fixture.receive(poll(SHORT, LEASE)).await.code(), Code::MessageNotFound);
    fixture.store(vec![message("a")]).await;
    let stall = Stall::begin(&fixture);
    let mut request = call(poll(SHORT, LEASE));
    request.set_timeout(Duration::from_millis(1500));
    let stream = fixture.client.clone().receive_message(request).await.unwrap();
    let received = tokio::time::timeout(Duration::from_secs(5), frames(stream.into_inner())).await;
    stall.end();
    assert_eq!(received.unwrap().code(), Code::MasterPersistenceTimeout);
    let again = fixture.receive(poll(LONG, LEASE)).await;
    assert_eq!(again.bodies(), ["a"]);
    assert_eq!(system(&again.messages[0]).delivery_attempt(), 2);
    fixture.stop().await;
}
