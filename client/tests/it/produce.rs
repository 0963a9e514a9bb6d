use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use drumlin_client::admin::{NewTopic, TopicType};
use drumlin_client::{Code, Error, Message, Receipt};

use crate::{Node, read_all, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_message_is_read_at_its_offset_with_all_its_fields() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    let message = Message::new("t", "a body")
        .key("k1")
        .key("k2")
        .tag("eu")
        .property("amount", "12")
        .trace_context("00-11-22-01")
        .message_id("M-1");
    let receipt = within(producer.send(message)).await.unwrap();
    let read = read_all(&client, "t").await;
    let [record] = &read[..] else { panic!("{} records", read.len()) };
    assert_eq!((record.queue_id, record.offset), (receipt.queue_id, receipt.offset));
    assert_eq!(&record.body[..], b"a body");
    assert_eq!(record.keys, ["k1", "k2"]);
    assert_eq!(record.tag.as_deref(), Some("eu"));
    assert_eq!(record.properties["amount"], "12");
    assert_eq!(record.trace_context.as_deref(), Some("00-11-22-01"));
    assert_eq!(record.message_id, "M-1");
    assert_eq!(record.store_time_ms, receipt.store_time_ms);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_groups_keep_their_order_in_one_queue_each() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    let mut acks = Vec::new();
    for n in 0..2000 {
        let message = Message::new("t", n.to_string()).message_group(format!("g{}", n % 7));
        acks.push(producer.enqueue(message).await.unwrap());
    }
    within(producer.flush()).await.unwrap();
    for ack in acks {
        ack.await.unwrap();
    }
    let mut seen: HashMap<String, (u32, i64)> = HashMap::new();
    let read = read_all(&client, "t").await;
    assert_eq!(read.len(), 2000);
    for record in read {
        let n: i64 = record.body_text().parse().unwrap();
        let group = record.message_group.clone().unwrap();
        let (queue_id, last) = seen.entry(group).or_insert((record.queue_id, -1));
        assert_eq!(*queue_id, record.queue_id, "a message group in two queues");
        assert!(n > *last, "{n} behind {last}");
        *last = n;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_waits_for_one_way_messages() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    for n in 0..100 {
        producer.send_oneway(Message::new("t", n.to_string())).unwrap();
    }
    within(producer.shutdown(Duration::from_secs(20))).await.unwrap();
    assert_eq!(producer.send_oneway(Message::new("t", "late")), Err(Error::Closed));
    assert_eq!(read_all(&client, "t").await.len(), 100);
}

#[tokio::test]
async fn many_flushes_at_once_leave_room_for_messages() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().max_in_flight_messages(2).build().await.unwrap();
    let flushes: Vec<_> = (0..200).map(|_| producer.flush()).collect();
    let mut flushing = std::pin::pin!(futures::future::join_all(flushes));
    assert!(futures::poll!(&mut flushing).is_pending());
    producer.send_oneway(Message::new("t", "1")).unwrap();
    producer.send_oneway(Message::new("t", "2")).unwrap();
    within(flushing).await.into_iter().for_each(|flushed| flushed.unwrap());
    within(producer.shutdown(Duration::from_secs(20))).await.unwrap();
}

#[tokio::test]
async fn shutdown_counts_what_the_producer_had_not_looked_at() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    for n in 0..3 {
        producer.send_oneway(Message::new("t", n.to_string())).unwrap();
    }
    let unsent = within(producer.shutdown(Duration::ZERO)).await.unwrap_err();
    assert_eq!(unsent.messages, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_tells_which_of_its_messages_failed() {
    let node = Node::start().await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    let batch = (0..10).map(|n| Message::new("t", n.to_string()));
    assert_eq!(within(producer.send_batch(batch)).await.unwrap().len(), 10);
    let mixed = [Message::new("t", "good"), Message::new("t", "bad").tag("a|b")];
    let error = within(producer.send_batch(mixed)).await.unwrap_err();
    assert!(error.results[0].is_ok());
    assert_eq!(error.results[1].as_ref().unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_is_not_made_up_where_that_is_off() {
    let node = Node::start_with(|config| config.auto_create_topics = false).await;
    let client = node.client().await;
    let producer = client.producer().build().await.unwrap();
    let error = within(producer.send(Message::new("t", "x"))).await.unwrap_err();
    assert_eq!(error, Error::TopicNotFound { topic: "t".into() });
    client.admin().create_topic(NewTopic::new("t", 2)).await.unwrap();
    within(producer.send(Message::new("t", "x"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_of_the_wrong_type_fails_alone() {
    let node = Node::start().await;
    let client = node.client().await;
    let fifo = NewTopic::new("t", 2).kind(TopicType::Fifo);
    client.admin().create_topic(fifo).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let good = producer.enqueue(Message::new("t", "1").message_group("g")).await.unwrap();
    let bad = producer.enqueue(Message::new("t", "2")).await.unwrap();
    let next = producer.enqueue(Message::new("t", "3").message_group("g")).await.unwrap();
    within(good).await.unwrap();
    assert_eq!(within(bad).await.unwrap_err().code(), Code::InvalidArgument);
    within(next).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_of_the_broker_loses_and_reorders_nothing() {
    let mut node = Node::start().await;
    let client = node.client().await;
    let builder =
        client.producer().send_timeout(Duration::from_secs(25)).max_in_flight_messages(2000);
    let producer = builder.max_batch_bytes(4096).build().await.unwrap();
    within(producer.send(Message::new("t", "first"))).await.unwrap();
    // Sends all the time, from well before the restart until well after it.
    let restarted = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let sender = tokio::spawn({
        let (producer, restarted, sent) = (producer.clone(), restarted.clone(), sent.clone());
        async move {
            let (mut acks, mut left) = (Vec::new(), 500);
            while left > 0 {
                let message = Message::new("t", acks.len().to_string()).message_group("g");
                acks.push(producer.enqueue(message).await.unwrap());
                sent.fetch_add(1, Ordering::SeqCst);
                left -= u32::from(restarted.load(Ordering::SeqCst));
                tokio::task::yield_now().await;
            }
            let mut receipts: Vec<Receipt> = Vec::new();
            for ack in acks {
                receipts.push(ack.await.unwrap());
            }
            receipts
        }
    });
    while sent.load(Ordering::SeqCst) < 500 {
        tokio::task::yield_now().await;
    }
    node.restart().await;
    restarted.store(true, Ordering::SeqCst);
    let receipts = within(sender).await.unwrap();
    let read = read_all(&client, "t").await;
    let of_group = read.iter().filter(|record| record.message_group.is_some());
    let bodies: HashMap<_, _> = of_group.map(|r| (r.offset, r.body_text())).collect();
    let mut last = None;
    for (n, receipt) in receipts.iter().enumerate() {
        assert_eq!(bodies[&receipt.offset], n.to_string(), "at {}", receipt.offset);
        assert!(last.is_none_or(|last| receipt.offset > last), "{n} was acknowledged out of order");
        last = Some(receipt.offset);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadline_ends_a_send_while_the_broker_is_down() {
    let mut node = Node::start().await;
    let client = node.client().await;
    let producer =
        client.producer().send_timeout(Duration::from_millis(500)).build().await.unwrap();
    within(producer.send(Message::new("t", "1"))).await.unwrap();
    node.stop().await;
    let error = within(producer.send(Message::new("t", "2"))).await.unwrap_err();
    assert!(matches!(error.code(), Code::DeadlineExceeded | Code::UnknownOutcome), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_an_error_that_names_it() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = drumlin_client::Client::connect(&free.to_string()).await.unwrap_err();
    assert!(error.to_string().contains(&free.to_string()), "{error}");
    assert_eq!(error.code(), Code::Unavailable);
}
