//! Receives messages under leases, as a member of a consumer group.
//!
//! It speaks the calls that official RocketMQ clients use, because a broker has one implementation
//! of leases and this is its interface; there is nothing that a second one would add.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use drumlin_proto::ids::{GroupName, QueueOffset, TopicName};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{self, Resource};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::Client;
use crate::connection::{Address, Backoff, GRPC_BYTES_MAX};
use crate::consumer::Filter;
use crate::error::{Code, Error};
use crate::message::{Delivery, Lease};

mod session;

use session::Sessions;

/// How long a call other than a poll may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take beyond the time that the broker may wait for messages.
const POLL_GRACE: Duration = Duration::from_secs(3);
/// Longest that one poll waits, within what a broker grants; `receive` asks again.
const POLL_MAX: Duration = Duration::from_secs(20);
/// A wait longer than this is as good as endless, and still fits behind the current time.
const WAIT_MAX: Duration = Duration::from_hours(24 * 365);
/// With queues at several brokers each is asked for this long by turns, so that none of them holds
/// messages for this consumer that nobody is there to take.
const POLL_SLICE: Duration = Duration::from_millis(200);
/// Brokers take 0 as not set.
const POLL_MIN: Duration = Duration::from_millis(1);
const START_TIMEOUT: Duration = Duration::from_secs(10);
const INVISIBLE_MAX: Duration = Duration::from_hours(12);

/// Settings of a simple consumer.
#[derive(Clone, Debug)]
pub struct SimpleConsumerBuilder {
    client: Client,
    group: String,
    subscriptions: BTreeMap<String, Filter>,
    invisible: Duration,
}

impl SimpleConsumerBuilder {
    pub(crate) fn new(client: Client, group: String) -> Self {
        Self { client, group, subscriptions: BTreeMap::new(), invisible: Duration::from_secs(30) }
    }

    /// Adds a topic. All members of a consumer group subscribe to the same.
    pub fn subscribe(mut self, topic: impl Into<String>, filter: Filter) -> Self {
        self.subscriptions.insert(topic.into(), filter);
        self
    }

    /// How long a received message stays hidden from the other members of the group, unless it is
    /// acknowledged or changed before. 30 s by default.
    pub fn invisible_duration(mut self, invisible: Duration) -> Self {
        self.invisible = invisible;
        self
    }

    /// Makes the consumer known to the brokers, or lists all faults of the settings.
    pub async fn build(self) -> Result<SimpleConsumer, Error> {
        let mut faults = Vec::new();
        if let Err(error) = GroupName::parse(&self.group) {
            faults.push(format!("group {:?}: {error}", self.group));
        }
        if self.subscriptions.is_empty() {
            faults.push("a simple consumer needs a topic: call subscribe".into());
        }
        for topic in self.subscriptions.keys() {
            if let Err(error) = TopicName::parse(topic) {
                faults.push(format!("topic {topic:?}: {error}"));
            }
        }
        if self.invisible.is_zero() || self.invisible > INVISIBLE_MAX {
            faults.push("invisible_duration: more than 0, at most 12 h".into());
        }
        if !faults.is_empty() {
            return Err(Error::Configuration { faults });
        }
        let sessions = Sessions::new(self.client.clone(), &self.group, &self.subscriptions);
        let consumer = SimpleConsumer {
            shared: Arc::new(Shared {
                client: self.client,
                group: self.group,
                subscriptions: self.subscriptions,
                invisible: self.invisible,
                turn: AtomicUsize::new(0),
                sessions,
            }),
        };
        consumer.start(Instant::now() + START_TIMEOUT).await?;
        Ok(consumer)
    }
}

/// Receives messages and acknowledges them one by one; clones share its membership.
///
/// ```
/// # async fn example() -> anyhow::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let config = drumlin_broker::config::Config::embedded(dir.path().to_owned());
/// # let broker = drumlin_broker::broker::Broker::start(config).await?;
/// # let address = broker.addresses()[0].to_string();
/// # let client = drumlin_client::Client::connect(&address).await?;
/// # let producer = client.producer().build().await?;
/// # producer.send(drumlin_client::Message::new("orders", "3 apples").tag("eu")).await?;
/// use std::time::Duration;
///
/// use drumlin_client::Filter;
///
/// let consumer = client
///     .simple_consumer("shipping")
///     .subscribe("orders", Filter::tag("eu || us"))
///     .build()
///     .await?;
/// for delivery in consumer.receive(32, Duration::from_secs(30)).await? {
///     println!("{}", delivery.body_text());
///     consumer.ack(&delivery).await?;
/// }
/// consumer.shutdown(Duration::from_secs(5)).await;
/// # broker.shutdown().await;
/// # Ok(())
/// # }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct SimpleConsumer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    group: String,
    subscriptions: BTreeMap<String, Filter>,
    invisible: Duration,
    /// Which of the targets comes first in the next round.
    turn: AtomicUsize,
    sessions: Sessions,
}

/// Where to ask for messages of one topic.
#[derive(Clone, Debug)]
struct Target {
    topic: Arc<str>,
    broker_group: Arc<str>,
    leader: Address,
}

impl SimpleConsumer {
    /// Receives up to `count` messages (32 at most), waiting up to `wait` for the first. Empty if
    /// there was none. [`Duration::MAX`] waits until there is one.
    ///
    /// Cancelled while it waits, messages that were on their way stay hidden until their lease
    /// ends.
    pub async fn receive(&self, count: usize, wait: Duration) -> Result<Vec<Delivery>, Error> {
        let until = Instant::now() + wait.min(WAIT_MAX);
        let mut backoff = Backoff::new();
        loop {
            let targets = self.targets();
            let slice = if targets.len() > 1 { POLL_SLICE } else { POLL_MAX };
            let mut failure = targets.is_empty().then(|| Error::Refused {
                code: Code::Unavailable,
                message: "no broker leads a queue of the subscribed topics".into(),
            });
            for target in &targets {
                let left = until.saturating_duration_since(Instant::now());
                match self.poll(target, count, left.min(slice)).await {
                    Ok(deliveries) if deliveries.is_empty() => {}
                    Ok(deliveries) => return Ok(deliveries),
                    Err(error) if error.is_retryable() => failure = Some(error),
                    Err(error) => return Err(error),
                }
            }
            let pause = failure.as_ref().map(|_| backoff.pause(fastrand::f64()));
            let left = until.saturating_duration_since(Instant::now());
            if left <= pause.unwrap_or_default() {
                return failure.map_or(Ok(Vec::new()), Err);
            }
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Ends the delivery: the group has consumed the message.
    pub async fn ack(&self, delivery: &Delivery) -> Result<(), Error> {
        let entry = rocketmq::AckMessageEntry {
            message_id: delivery.message_id.clone(),
            receipt_handle: delivery.lease.handle(),
            lite_topic: None,
        };
        let request = rocketmq::AckMessageRequest {
            group: Some(resource(&self.shared.group)),
            topic: Some(resource(&delivery.topic)),
            entries: vec![entry],
        };
        let until = Instant::now() + CALL_TIMEOUT;
        let mut backoff = Backoff::new();
        loop {
            let answer = match self.leader_of(delivery, until).await {
                Ok(leader) => {
                    let call = self.api(&leader).ack_message(self.call(request.clone())).await;
                    call.map_err(|status| Error::of_call(leader.as_str(), &status))
                }
                Err(error) => Err(error),
            };
            let settled = answer.and_then(|response| {
                let answer = response.into_inner();
                let status = answer.entries.first().and_then(|entry| entry.status.as_ref());
                Error::of_rocketmq(status.or(answer.status.as_ref())).map_or(Ok(()), Err)
            });
            match settled {
                Err(error) if error.is_retryable() => pause(&mut backoff, until, error).await?,
                settled => return settled,
            }
        }
    }

    /// Hides the message for `invisible` from now on, instead of what is left of its lease: to
    /// work longer on it, or to see it again sooner.
    ///
    /// Where the change took effect but its answer got lost, this fails with
    /// [`Code::LeaseEnded`]: the delivery can then not be acknowledged, and the message comes again
    /// once `invisible` has passed.
    pub async fn change_invisible(
        &self,
        delivery: &Delivery,
        invisible: Duration,
    ) -> Result<(), Error> {
        let until = Instant::now() + CALL_TIMEOUT;
        let mut backoff = Backoff::new();
        loop {
            let request = rocketmq::ChangeInvisibleDurationRequest {
                group: Some(resource(&self.shared.group)),
                topic: Some(resource(&delivery.topic)),
                receipt_handle: delivery.lease.handle(),
                invisible_duration: Some(wire_duration(invisible)),
                message_id: delivery.message_id.clone(),
                lite_topic: None,
                suspend: None,
            };
            let answer = match self.leader_of(delivery, until).await {
                Ok(leader) => {
                    let call = self.call(request);
                    let call = self.api(&leader).change_invisible_duration(call).await;
                    call.map_err(|status| Error::of_call(leader.as_str(), &status))
                }
                Err(error) => Err(error),
            };
            let settled = answer.and_then(|response| {
                let answer = response.into_inner();
                match Error::of_rocketmq(answer.status.as_ref()) {
                    None => {
                        delivery.lease.replace(answer.receipt_handle);
                        Ok(())
                    }
                    Some(error) => Err(error),
                }
            });
            match settled {
                Err(error) if error.is_retryable() => pause(&mut backoff, until, error).await?,
                settled => return settled,
            }
        }
    }

    /// Gives the message back: it is delivered again at once, as its next attempt.
    pub async fn nack(&self, delivery: &Delivery) -> Result<(), Error> {
        self.change_invisible(delivery, Duration::ZERO).await
    }

    /// Leaves the group and tells the brokers, at most for `deadline`. Messages that were received
    /// but not acknowledged come back when their leases end.
    pub async fn shutdown(&self, deadline: Duration) {
        self.shared.sessions.close(deadline).await;
    }

    async fn start(&self, until: Instant) -> Result<(), Error> {
        for topic in self.shared.subscriptions.keys() {
            self.shared.client.routes().resolve(topic, until).await?;
        }
        let targets = self.targets();
        for target in &targets {
            self.shared.sessions.ready(&target.leader, until).await?;
        }
        Ok(())
    }

    /// Every broker group that has queues of a subscribed topic, beginning with another each time.
    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for topic in self.shared.subscriptions.keys() {
            let Some(route) = self.shared.client.routes().get(topic) else { continue };
            let topic: Arc<str> = topic.as_str().into();
            for group in route.groups.iter().filter(|group| group.queue_count > 0) {
                if let Some(leader) = group.leader.clone() {
                    let (topic, broker_group) = (topic.clone(), Arc::clone(&group.broker_group));
                    targets.push(Target { topic, broker_group, leader });
                }
            }
        }
        let turn = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        if !targets.is_empty() {
            let first = turn % targets.len();
            targets.rotate_left(first);
        }
        targets
    }

    async fn poll(
        &self,
        target: &Target,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, Error> {
        // Whoever hardly waits still gets a session begun.
        let until = Instant::now() + wait.clamp(POLL_SLICE, CALL_TIMEOUT);
        self.shared.sessions.ready(&target.leader, until).await?;
        let filter = self.shared.subscriptions.get(&*target.topic).cloned().unwrap_or_default();
        let request = rocketmq::ReceiveMessageRequest {
            group: Some(resource(&self.shared.group)),
            message_queue: Some(rocketmq::MessageQueue {
                topic: Some(resource(&target.topic)),
                // Any queue of the broker group.
                id: -1,
                broker: Some(rocketmq::Broker {
                    name: target.broker_group.to_string(),
                    ..rocketmq::Broker::default()
                }),
                ..rocketmq::MessageQueue::default()
            }),
            filter_expression: Some(filter.to_wire()),
            batch_size: i32::try_from(count.clamp(1, 32)).unwrap_or(32),
            invisible_duration: Some(wire_duration(self.shared.invisible)),
            auto_renew: false,
            long_polling_timeout: Some(wire_duration(wait.max(POLL_MIN))),
            attempt_id: None,
        };
        let mut call = self.call(request);
        call.set_timeout(wait.saturating_add(POLL_GRACE));
        let unreachable = |status: &tonic::Status| Error::of_call(target.leader.as_str(), status);
        let frames = self.api(&target.leader).receive_message(call).await;
        let mut frames = frames.map_err(|status| unreachable(&status))?.into_inner();
        let mut deliveries = Vec::new();
        loop {
            let content = match frames.message().await {
                Ok(Some(frame)) => frame.content,
                Ok(None) => return Ok(deliveries),
                // What has arrived is leased to this consumer, so it is better given than lost.
                Err(_) if !deliveries.is_empty() => return Ok(deliveries),
                Err(status) => return Err(unreachable(&status)),
            };
            match content {
                Some(Content::Message(message)) => deliveries.push(delivery(target, message)),
                Some(Content::Status(status))
                    if status.code() == rocketmq::Code::MessageNotFound => {}
                Some(Content::Status(status)) => {
                    if let Some(error) = Error::of_rocketmq(Some(&status)) {
                        return Err(error);
                    }
                }
                Some(Content::DeliveryTimestamp(_)) | None => {}
            }
        }
    }

    /// The broker that knows a delivery's lease.
    async fn leader_of(&self, delivery: &Delivery, until: Instant) -> Result<Address, Error> {
        let route = self.shared.client.routes().resolve(&delivery.topic, until).await?;
        let leader = route.group(&delivery.broker_group).and_then(|group| group.leader.clone());
        leader.ok_or_else(|| Error::Refused {
            code: Code::Unavailable,
            message: format!("broker group {} has no leader now", delivery.broker_group),
        })
    }

    fn api(&self, address: &Address) -> MessagingServiceClient<Channel> {
        MessagingServiceClient::new(self.shared.client.connections().channel(address))
            .max_decoding_message_size(GRPC_BYTES_MAX)
    }

    fn call<T>(&self, request: T) -> tonic::Request<T> {
        session::call(self.shared.client.id(), request)
    }
}

async fn pause(backoff: &mut Backoff, until: Instant, error: Error) -> Result<(), Error> {
    let resume_at = Instant::now() + backoff.pause(fastrand::f64());
    if resume_at >= until {
        return Err(error);
    }
    tokio::time::sleep_until(resume_at).await;
    Ok(())
}

fn resource(name: &str) -> Resource {
    Resource { resource_namespace: String::new(), name: name.to_owned() }
}

fn wire_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn millis(timestamp: Option<prost_types::Timestamp>) -> i64 {
    timestamp.map_or(0, |time| {
        time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos / 1_000_000))
    })
}

fn delivery(target: &Target, message: rocketmq::Message) -> Delivery {
    let system = message.system_properties.unwrap_or_default();
    let gzip_body = system.body_encoding() == rocketmq::Encoding::Gzip;
    let positive = |number: i32| u32::try_from(number).unwrap_or(0);
    Delivery {
        topic: Arc::clone(&target.topic),
        broker_group: Arc::clone(&target.broker_group),
        queue_id: positive(system.queue_id),
        offset: QueueOffset::new(u64::try_from(system.queue_offset.unwrap_or(0)).unwrap_or(0)),
        message_id: system.message_id,
        keys: system.keys,
        tag: system.tag,
        message_group: system.message_group,
        properties: message.user_properties.into_iter().collect(),
        trace_context: system.trace_context,
        body: message.body,
        gzip_body,
        born_ms: millis(system.born_timestamp),
        store_time_ms: millis(system.store_timestamp),
        attempt: positive(system.delivery_attempt.unwrap_or(1)),
        lease: Lease::of(system.receipt_handle.unwrap_or_default()),
    }
}
