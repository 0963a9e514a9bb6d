use std::time::Duration;

use drumlin_client::admin::NewTopic;
use drumlin_client::{At, Client, Code, Filter, Message, QueueOffset, Queues};

use crate::{Node, read_all, within};

const WAIT: Duration = Duration::from_secs(10);

/// Sends `bodies` one after the other to a topic with one queue.
async fn fill(client: &Client, topic: &str, bodies: impl IntoIterator<Item = u32>) {
    // It may be there already.
    client.admin().create_topic(NewTopic::new(topic, 1)).await.ok();
    let producer = client.producer().build().await.expect("valid settings");
    let messages = bodies.into_iter().map(|n| {
        let tag = if n % 2 == 0 { "even" } else { "odd" };
        Message::new(topic, n.to_string()).tag(tag)
    });
    within(producer.send_batch(messages)).await.expect("all are stored");
}

fn numbers(records: &[drumlin_client::Delivery]) -> Vec<u32> {
    records.iter().map(|record| record.body_text().parse().expect("a number")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_messages_do_not_come_back() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", 0..5).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let mut received = Vec::new();
    while received.len() < 5 {
        for delivery in within(consumer.receive(32, WAIT)).await.unwrap() {
            assert_eq!(delivery.attempt, 1);
            within(consumer.ack(&delivery)).await.unwrap();
            received.push(delivery);
        }
    }
    let mut got = numbers(&received);
    got.sort_unstable();
    assert_eq!(got, [0, 1, 2, 3, 4]);
    let again = within(consumer.receive(32, Duration::from_millis(200))).await.unwrap();
    assert!(again.is_empty(), "{} came back", again.len());
    within(consumer.shutdown(WAIT)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_back_message_comes_again_as_the_next_attempt() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", [7]).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    for attempt in 1..=3 {
        let received = within(consumer.receive(1, WAIT)).await.unwrap();
        let [delivery] = &received[..] else { panic!("{} messages", received.len()) };
        assert_eq!(delivery.attempt, attempt);
        within(consumer.nack(delivery)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn longer_lease_is_acknowledged_under_its_new_handle() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", [7]).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let received = within(consumer.receive(1, WAIT)).await.unwrap();
    within(consumer.change_invisible(&received[0], Duration::from_secs(60))).await.unwrap();
    within(consumer.ack(&received[0])).await.unwrap();
    let again = within(consumer.receive(1, Duration::from_millis(200))).await.unwrap();
    assert!(again.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filter_passes_its_tag_only() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", 0..6).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::tag("odd"));
    let consumer = within(consumer.build()).await.unwrap();
    let mut got = Vec::new();
    while got.len() < 3 {
        let received = within(consumer.receive(32, WAIT)).await.unwrap();
        got.extend(numbers(&received));
    }
    assert_eq!(got, [1, 3, 5]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receive_wakes_for_a_message_that_comes_while_it_waits() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", []).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let waiting = tokio::spawn(async move { consumer.receive(1, Duration::from_secs(20)).await });
    fill(&client, "t", [1]).await;
    assert_eq!(numbers(&within(waiting).await.unwrap().unwrap()), [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receive_waits_on_through_a_restart_of_the_broker() {
    let mut node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", [1]).await;
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let first = within(consumer.receive(1, WAIT)).await.unwrap();
    consumer.ack(&first[0]).await.unwrap();
    let waiting = tokio::spawn(async move { consumer.receive(1, Duration::from_secs(25)).await });
    node.restart().await;
    fill(&client, "t", [2]).await;
    assert_eq!(numbers(&within(waiting).await.unwrap().unwrap()), [2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_times_are_as_good_as_long_ones() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().send_timeout(Duration::MAX).build().await.unwrap();
    within(producer.send(Message::new("t", "1"))).await.unwrap();
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let received = within(consumer.receive(1, Duration::MAX)).await.unwrap();
    assert_eq!(numbers(&received), [1]);
    within(consumer.shutdown(Duration::MAX)).await;
    within(producer.shutdown(Duration::MAX)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn builder_lists_all_faults() {
    let node = Node::start().await;
    let client = node.client().await;
    let builder = client.simple_consumer("bad group").subscribe("bad topic", Filter::All);
    let error = builder.invisible_duration(Duration::ZERO).build().await.unwrap_err();
    for part in ["bad group", "bad topic", "invisible_duration"] {
        assert!(error.to_string().contains(part), "{error} does not name {part}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_begins_where_it_is_told_to() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", 0..4).await;
    let read = read_all(&client, "t").await;
    assert_eq!(numbers(&read), [0, 1, 2, 3]);
    let later = read[3].store_time_ms;
    let places = [
        (At::Earliest, 4),
        (At::Latest, 0),
        (At::Offset(QueueOffset::new(3)), 1),
        (At::Offset(QueueOffset::new(1000)), 0),
        (At::TimeMs(later + 60_000), 0),
        (At::TimeMs(0), 4),
    ];
    for (at, count) in places {
        let builder = client.pull_consumer().assign("t", Queues::All).seek(at);
        let mut stream = builder.stop_at_end().into_stream();
        let mut read = 0;
        while let Some(record) = within(stream.next()).await {
            record.unwrap();
            read += 1;
        }
        assert_eq!(read, count, "from {at:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_goes_on_behind_its_last_record_after_a_restart() {
    let mut node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", 0..10).await;
    let mut stream = client.pull_consumer().assign("t", Queues::All).into_stream();
    let mut read = Vec::new();
    for _ in 0..10 {
        read.push(within(stream.next()).await.unwrap().unwrap());
    }
    node.restart().await;
    fill(&client, "t", 10..20).await;
    for _ in 0..10 {
        read.push(within(stream.next()).await.unwrap().unwrap());
    }
    assert_eq!(numbers(&read), (0..20).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_reader_gets_everything_through_a_small_buffer() {
    let node = Node::start().await;
    let client = node.client().await;
    client.admin().create_topic(NewTopic::new("t", 3)).await.unwrap();
    let producer = client.producer().max_batch_bytes(32 << 10).build().await.unwrap();
    let body = vec![b'x'; 8 << 10];
    let messages = (0..400).map(|_| Message::new("t", body.clone()));
    within(producer.send_batch(messages)).await.unwrap();
    let builder = client.pull_consumer().assign("t", Queues::All).max_buffered_bytes(1);
    let mut stream = builder.stop_at_end().into_stream();
    let mut count = 0;
    while let Some(record) = within(stream.next()).await {
        assert_eq!(record.unwrap().body.len(), body.len());
        tokio::task::yield_now().await;
        count += 1;
    }
    assert_eq!(count, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_that_is_missing_ends_the_stream_with_its_name() {
    let node = Node::start().await;
    let client = node.client().await;
    let mut stream = client.pull_consumer().assign("nope", Queues::All).into_stream();
    let error = within(stream.next()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::TopicNotFound);
    assert!(within(stream.next()).await.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chosen_queues_are_read_alone_and_must_exist() {
    let node = Node::start().await;
    let client = node.client().await;
    client.admin().create_topic(NewTopic::new("t", 3)).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let messages = (0..60).map(|n| Message::new("t", "x").message_group(format!("g{n}")));
    let receipts = within(producer.send_batch(messages)).await.unwrap();
    let in_queue_1 = receipts.iter().filter(|receipt| receipt.queue_id == 1).count();
    let group = receipts[0].broker_group.to_string();
    let read = |queue_id| {
        let queues = Queues::some([(group.clone(), queue_id)]);
        client.pull_consumer().assign("t", queues).stop_at_end().into_stream()
    };
    let mut stream = read(1);
    let mut count = 0;
    while let Some(record) = within(stream.next()).await {
        assert_eq!(record.unwrap().queue_id, 1);
        count += 1;
    }
    assert!(count > 0 && count == in_queue_1, "{count} of {in_queue_1}");
    let error = within(read(3).next()).await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_of_the_client_ends_all_it_made() {
    let node = Node::start().await;
    let client = node.client().await;
    fill(&client, "t", 0..3).await;
    let producer = client.producer().build().await.unwrap();
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let mut stream = client.pull_consumer().assign("t", Queues::All).into_stream();
    within(stream.next()).await.unwrap().unwrap();
    within(client.shutdown(WAIT)).await;
    let sent = within(producer.send(Message::new("t", "x"))).await;
    assert_eq!(sent.unwrap_err().code(), Code::Closed);
    assert_eq!(within(consumer.receive(1, WAIT)).await.unwrap_err().code(), Code::Closed);
    while let Some(record) = within(stream.next()).await {
        record.unwrap();
    }
}
