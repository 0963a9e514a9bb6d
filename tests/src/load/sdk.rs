//! A producer and a consumer of the SDK: they find leaders by themselves and go on through faults.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use drumlin_client::{Client, Code, Filter, Message, Producer, SimpleConsumer};

use super::{Shared, body_of, seen};
use crate::cluster::PATIENCE;
use crate::event::{Process, Queue, Step, What};

const CONSUMERS: &str = "workers";
const RECEIVE_WAIT: Duration = Duration::from_secs(1);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// Tries until it works or [`PATIENCE`] is at its end.
async fn connect(shared: &Shared) -> Result<Client> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let client = Client::builder().endpoints(shared.nameservers.clone()).build().await;
        if client.is_ok() || tokio::time::Instant::now() >= deadline {
            return Ok(client?);
        }
        shared.pause(super::RETRY_PAUSE).await;
    }
}

async fn subscribe(shared: &Shared, client: &Client) -> Result<SimpleConsumer> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let consumer = client.simple_consumer(CONSUMERS);
        let topic = shared.mix.topic.as_str();
        let consumer = consumer.subscribe(topic, Filter::default()).build().await;
        if consumer.is_ok() || tokio::time::Instant::now() >= deadline {
            return Ok(consumer?);
        }
        shared.pause(super::RETRY_PAUSE).await;
    }
}

pub(super) async fn produce(shared: Arc<Shared>) -> Result<()> {
    let client = connect(&shared).await?;
    let producer = client.producer().send_timeout(Duration::from_secs(20)).build().await?;
    let mut process = shared.recorder.new_process();
    let mut count: u64 = 0;
    while !shared.sent_enough.is_cancelled() {
        count += 1;
        if send(&shared, &producer, process, &format!("s{process}-{count}")).await == Step::Info {
            process = shared.recorder.new_process();
        }
        shared.pause(shared.mix.pause).await;
    }
    client.shutdown(SHUTDOWN_LIMIT).await;
    Ok(())
}

async fn send(shared: &Shared, producer: &Producer, process: Process, value: &str) -> Step {
    let what = |queue, offset, degraded| What::Send {
        value: value.to_owned(),
        queue,
        offset,
        degraded,
        repeats: true,
    };
    shared.recorder.record(process, Step::Invoke, what(None, None, false));
    let body = body_of(value, shared.mix.body_bytes);
    let message = Message::new(shared.mix.topic.as_str(), body).message_id(value);
    let (step, what) = match producer.send(message).await {
        Ok(receipt) => {
            let queue = Queue::new(&receipt.topic, &receipt.broker_group, receipt.queue_id);
            (Step::Ok, what(Some(queue), Some(receipt.offset.get()), receipt.degraded))
        }
        Err(error) => {
            let step = match error.code() {
                Code::DeadlineExceeded => Step::Fail,
                _ => Step::Info,
            };
            (step, what(None, None, false))
        }
    };
    shared.recorder.record(process, step, what);
    step
}

pub(super) async fn consume(shared: Arc<Shared>) -> Result<()> {
    let client = connect(&shared).await?;
    let consumer = subscribe(&shared, &client).await?;
    let process = shared.recorder.new_process();
    let mut received = 0;
    while !shared.stop.is_cancelled() {
        received += receive(&shared, &consumer, process).await;
    }
    consumer.shutdown(SHUTDOWN_LIMIT).await;
    client.shutdown(SHUTDOWN_LIMIT).await;
    ensure!(received > 0, "the consumer of the SDK received nothing");
    Ok(())
}

async fn receive(shared: &Shared, consumer: &SimpleConsumer, process: Process) -> usize {
    let Ok(deliveries) = consumer.receive(32, RECEIVE_WAIT).await else {
        shared.pause(super::RETRY_PAUSE).await;
        return 0;
    };
    for delivery in &deliveries {
        let queue = Queue::new(&delivery.topic, &delivery.broker_group, delivery.queue_id);
        let asked = What::Read { queue: queue.clone(), seen: Vec::new() };
        shared.recorder.record(process, Step::Invoke, asked);
        let seen = vec![seen(delivery.offset.get(), &delivery.body)];
        shared.recorder.record(process, Step::Ok, What::Read { queue, seen });
        // Whether it took effect shows in redeliveries, which are allowed.
        consumer.ack(delivery).await.ok();
    }
    deliveries.len()
}
