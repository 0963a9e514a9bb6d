//! The official Rust client against a running access point: rust-client-check ENDPOINT PREFIX.
//!
//! It has a producer and a simple consumer, and no call to change a lease.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::time::{Duration, Instant};

use rocketmq::conf::{ClientOption, LoggingFormat, ProducerOption, SimpleConsumerOption};
use rocketmq::model::common::{FilterExpression, FilterType};
use rocketmq::model::message::{MessageBuilder, MessageView};
use rocketmq::{Producer, SimpleConsumer};

type Checked = Result<(), Box<dyn Error>>;

const LEASE: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(30);

struct Access {
    endpoint: String,
    prefix: String,
}

macro_rules! check {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            return Err(format!($($text)*).into());
        }
    };
}

fn ok(name: &str) {
    println!("ok {name}");
}

fn tags(expression: &str) -> FilterExpression {
    FilterExpression::new(FilterType::Tag, expression)
}

impl Access {
    fn option(&self) -> ClientOption {
        let mut option = ClientOption::default();
        option.set_access_url(&self.endpoint);
        option.set_enable_tls(false);
        option
    }

    fn topic(&self, of: &str) -> String {
        format!("{}-{of}", self.prefix)
    }

    async fn producer(&self, topic: &str) -> Result<Producer, Box<dyn Error>> {
        let mut option = ProducerOption::default();
        option.set_topics(vec![topic]);
        option.set_logging_format(LoggingFormat::Json);
        let mut producer = Producer::new(option, self.option())?;
        producer.start().await?;
        Ok(producer)
    }

    async fn consumer(&self, topic: &str) -> Result<SimpleConsumer, Box<dyn Error>> {
        let mut option = SimpleConsumerOption::default();
        option.set_consumer_group(format!("{topic}-group"));
        option.set_topics(vec![topic]);
        option.set_logging_format(LoggingFormat::Json);
        let mut consumer = SimpleConsumer::new(option, self.option())?;
        consumer.start().await?;
        Ok(consumer)
    }
}

/// Receives until `count` messages are there; fails when that takes too long.
async fn collect(
    consumer: &SimpleConsumer,
    topic: &str,
    filter: &FilterExpression,
    count: usize,
    lease: Duration,
) -> Result<Vec<MessageView>, Box<dyn Error>> {
    let mut received = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while received.len() < count {
        check!(Instant::now() < deadline, "{} of {count} messages came", received.len());
        received.extend(consumer.receive_with(topic, filter, 32, lease).await?);
    }
    check!(received.len() == count, "{} messages came instead of {count}", received.len());
    Ok(received)
}

async fn ack_all(consumer: &SimpleConsumer, messages: &[MessageView]) -> Checked {
    for message in messages {
        consumer.ack(message).await?;
    }
    Ok(())
}

async fn send_and_receive(access: &Access) -> Checked {
    let topic = access.topic("plain");
    let producer = access.producer(&topic).await?;
    let mut sent = BTreeMap::new();
    for at in 0..20 {
        let body = format!("body {at}");
        let properties = HashMap::from([("colour", "blue".to_owned()), ("nr", at.to_string())]);
        let message = MessageBuilder::builder()
            .set_topic(&topic)
            .set_tag("t")
            .set_keys(vec![format!("key-{at}")])
            .set_properties(properties)
            .set_body(body.clone().into_bytes())
            .build()?;
        let receipt = producer.send(message).await?;
        check!(receipt.transaction_id() == receipt.message_id(), "transaction id differs");
        sent.insert(receipt.message_id().to_owned(), body);
    }
    check!(sent.len() == 20, "message ids are not unique");
    ok("send");
    let batch = (20..25).map(|at| {
        let builder = MessageBuilder::builder().set_topic(&topic).set_tag("t");
        let builder = builder.set_keys(vec![format!("key-{at}")]);
        builder.set_body(format!("body {at}").into_bytes()).build()
    });
    let receipts = producer.batch_send(batch.collect::<Result<Vec<_>, _>>()?).await?;
    for (receipt, at) in receipts.iter().zip(20..) {
        sent.insert(receipt.message_id().to_owned(), format!("body {at}"));
    }
    check!(sent.len() == 25, "a batch of 5 gave {} receipts", receipts.len());
    ok("batch send");

    let consumer = access.consumer(&topic).await?;
    for got in collect(&consumer, &topic, &tags("*"), 25, LEASE).await? {
        let Some(body) = sent.remove(got.message_id()) else {
            return Err(format!("{} came twice or was never sent", got.message_id()).into());
        };
        let at = body.trim_start_matches("body ");
        check!(got.body() == body.as_bytes() && got.topic() == topic, "body or topic is wrong");
        check!(got.tag() == Some("t") && got.keys() == [format!("key-{at}")], "tag or key");
        let colour = got.properties().get("colour").map(String::as_str);
        check!(at.parse::<u32>()? >= 20 || colour == Some("blue"), "property is wrong");
        check!(got.delivery_attempt() == 1, "first attempt is {}", got.delivery_attempt());
        consumer.ack(&got).await?;
    }
    ok("receive and ack");
    consumer.shutdown().await?;
    producer.shutdown().await?;
    Ok(())
}

async fn fifo_send(access: &Access) -> Checked {
    let topic = access.topic("fifo");
    let producer = access.producer(&topic).await?;
    for at in 0..10 {
        let body = at.to_string().into_bytes();
        producer.send(MessageBuilder::fifo_message_builder(&topic, body, "g-1").build()?).await?;
    }
    let consumer = access.consumer(&topic).await?;
    let received = collect(&consumer, &topic, &tags("*"), 10, LEASE).await?;
    check!(received.iter().all(|got| got.message_group() == Some("g-1")), "message group");
    let bodies: BTreeSet<&[u8]> = received.iter().map(MessageView::body).collect();
    check!(bodies.len() == 10, "bodies are wrong");
    ack_all(&consumer, &received).await?;
    consumer.shutdown().await?;
    producer.shutdown().await?;
    ok("FIFO send");
    Ok(())
}

async fn send(producer: &Producer, topic: &str, body: &str, tag: &str) -> Checked {
    let builder = MessageBuilder::builder().set_topic(topic).set_tag(tag);
    producer.send(builder.set_body(body.as_bytes().to_vec()).build()?).await?;
    Ok(())
}

async fn lease_expiry(access: &Access) -> Checked {
    let topic = access.topic("expiry");
    let producer = access.producer(&topic).await?;
    send(&producer, &topic, "left alone", "t").await?;
    let consumer = access.consumer(&topic).await?;
    let lease = Duration::from_secs(10);
    let first = collect(&consumer, &topic, &tags("*"), 1, lease).await?;
    let began = Instant::now();
    let second = collect(&consumer, &topic, &tags("*"), 1, lease).await?;
    let took = began.elapsed();
    check!(second[0].message_id() == first[0].message_id(), "another message came");
    let attempts = (first[0].delivery_attempt(), second[0].delivery_attempt());
    check!(attempts == (1, 2), "attempts are {attempts:?}");
    check!((8..13).contains(&took.as_secs()), "a lease of 10 s ended after {took:?}");
    check!(consumer.ack(&first[0]).await.is_err(), "an expired handle was acked");
    ack_all(&consumer, &second).await?;
    consumer.shutdown().await?;
    producer.shutdown().await?;
    ok("lease expiry and redelivery");
    Ok(())
}

async fn tag_filter(access: &Access) -> Checked {
    let topic = access.topic("tags");
    let producer = access.producer(&topic).await?;
    for (at, tag) in ["a", "b", "c"].iter().cycle().take(12).enumerate() {
        send(&producer, &topic, &at.to_string(), tag).await?;
    }
    let consumer = access.consumer(&topic).await?;
    let received = collect(&consumer, &topic, &tags("a||c"), 8, LEASE).await?;
    check!(received.iter().all(|got| got.tag() != Some("b")), "a filtered tag came");
    ack_all(&consumer, &received).await?;
    consumer.shutdown().await?;
    producer.shutdown().await?;
    ok("tag filter");
    Ok(())
}

async fn long_poll(access: &Access) -> Checked {
    let topic = access.topic("poll");
    let producer = access.producer(&topic).await?;
    let consumer = access.consumer(&topic).await?;
    let filter = tags("*");
    let waiting = async {
        let received = consumer.receive_with(&topic, &filter, 1, LEASE).await;
        (received, Instant::now())
    };
    let sending = async {
        // Long enough for the poll to be waiting, far shorter than the poll.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let sent_at = Instant::now();
        send(&producer, &topic, "wake", "t").await.map(|()| sent_at)
    };
    let ((received, arrived_at), sent_at) = tokio::join!(waiting, sending);
    let (received, sent_at) = (received?, sent_at?);
    check!(received.len() == 1 && received[0].body() == b"wake", "the wrong message woke it");
    check!(arrived_at > sent_at, "a poll of an empty topic ended early");
    let took = arrived_at - sent_at;
    check!(took < Duration::from_millis(1500), "a waiting poll took {took:?} to see a message");
    ack_all(&consumer, &received).await?;
    consumer.shutdown().await?;
    producer.shutdown().await?;
    ok("long poll wakes");
    Ok(())
}

async fn all(access: &Access) -> Checked {
    send_and_receive(access).await?;
    fifo_send(access).await?;
    tag_filter(access).await?;
    long_poll(access).await?;
    lease_expiry(access).await
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(endpoint), Some(prefix)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: rust-client-check ENDPOINT PREFIX");
        std::process::exit(2);
    };
    // Its log file has a fixed name in a folder that it does not make.
    std::fs::create_dir_all("logs").expect("the working directory is writable");
    if let Err(error) = all(&Access { endpoint, prefix }).await {
        println!("FAILED {error:?}");
        std::process::exit(1);
    }
}
