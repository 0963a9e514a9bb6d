//! ReceiveMessage: calls that become polls here or go to a leader, and the frames that answer them.
//!
//! A poll runs in a task of its own, so that a lease that was proposed is never forgotten half way;
//! the stream that the client reads gives back what it did not take.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::forward::polls;
use drumlin_proto::ids::{GroupName, QueueKey};
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{
    ClientType, Code, ReceiveMessageRequest, ReceiveMessageResponse, Status,
};
use futures::{Stream, StreamExt};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::{Request, Response, Streaming};

use super::caller::{Caller, UNTIMED};
use super::delivery::{Delivery, PollEnd, ReceiveStream};
use super::plan::Want;
use super::poll::{PollRequest, led_elsewhere};
use super::settings::{POLL_MAX, RECEIVE_BATCH_MAX};
use super::status::{Fault, ok};
use super::{Edge, REPLY_MARGIN, Service, told, validate};
use crate::command::GroupId;
use crate::metrics::labels::Processor;
use crate::service::clients::{Sighting, client_key};

/// Lease that the broker chooses and renews.
pub(super) const RENEWED_LEASE_MS: u64 = 60_000;
/// Shortest poll of a client that asks for none.
const POLL_MIN: Duration = Duration::from_secs(5);
/// What clients use when their settings do not say.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a poll may wait, from what the client asks for and what is left of its deadline.
///
/// An asked time is honoured however short, up to [`POLL_MAX`]. Without one it follows from the
/// deadline. Either way the reply leaves half a second before the deadline.
fn poll_time(
    asked: Option<Duration>,
    remaining: Option<Duration>,
    request_timeout: Duration,
) -> Duration {
    let wanted = match (asked.filter(|asked| !asked.is_zero()), remaining) {
        (Some(asked), _) => asked.min(POLL_MAX),
        (None, Some(remaining)) => {
            remaining.saturating_sub(request_timeout / 2).clamp(POLL_MIN, POLL_MAX)
        }
        (None, None) => POLL_MAX,
    };
    match remaining {
        Some(remaining) => wanted.min(remaining.saturating_sub(REPLY_MARGIN)),
        None => wanted,
    }
}

fn invisible_ms(request: &ReceiveMessageRequest, min: Duration) -> Result<u64, Fault> {
    if request.auto_renew {
        return Ok(RENEWED_LEASE_MS);
    }
    let min_ms = u64::try_from(min.as_millis()).unwrap_or(u64::MAX);
    let asked = request.invisible_duration.as_ref().and_then(validate::duration_ms);
    asked.filter(|ms| (min_ms..=validate::INVISIBLE_MS_MAX).contains(ms)).ok_or_else(|| {
        let text = format!("an invisible duration is {min_ms} ms to 12 hours");
        Fault::new(Code::IllegalInvisibleTime, text)
    })
}

fn records_max(batch_size: i32) -> Result<usize, Fault> {
    match usize::try_from(batch_size.min(RECEIVE_BATCH_MAX)) {
        Ok(records_max) if records_max > 0 => Ok(records_max),
        Ok(_) | Err(_) => {
            Err(Fault::new(Code::BadRequest, format!("a batch of {batch_size} messages")))
        }
    }
}

impl Edge {
    async fn checked(
        &self,
        caller: &Caller,
        request: &ReceiveMessageRequest,
    ) -> Result<PollRequest, Fault> {
        let now = Instant::now();
        let queue = request.message_queue.as_ref();
        let topic_named = queue.and_then(|queue| queue.topic.clone()).unwrap_or_default();
        let topic_name = validate::topic_name(Some(&topic_named), &caller.namespace)?;
        let group = validate::group_name(request.group.as_ref(), &caller.namespace)?;
        let broker_group = &self.context.config.broker_group;
        let broker = queue.and_then(|queue| queue.broker.as_ref());
        if let Some(broker) = broker
            && !broker.name.is_empty()
            && broker.name != broker_group.as_str()
        {
            let text = format!("this broker belongs to {broker_group}, not to {:?}", broker.name);
            return Err(Fault::new(Code::BadRequest, text));
        }
        let filter = validate::filter(request.filter_expression.as_ref())?;
        let invisible_ms = invisible_ms(request, self.context.config.invisible_min)?;
        let records_max = records_max(request.batch_size)?;
        let asked = request.long_polling_timeout.as_ref().map(|timeout| {
            validate::duration_ms(timeout)
                .map(Duration::from_millis)
                .ok_or_else(|| Fault::new(Code::IllegalPollingTime, "the polling time is negative"))
        });
        let known = self.clients.get(&caller.client_id);
        let request_timeout = caller
            .request_timeout
            .or_else(|| known.and_then(|client| client.request_timeout))
            .unwrap_or(REQUEST_TIMEOUT);
        let wait = poll_time(asked.transpose()?, caller.remaining(now), request_timeout);
        self.led_here()?;
        let topic = self.topic(&topic_name)?;
        let queues: Vec<QueueKey> = topic.queues(broker_group).collect();
        if queues.is_empty() {
            let text = format!("no readable queue of {topic_name} here");
            return Err(Fault::new(Code::Forbidden, text));
        }
        let group_id = self.group_or_create(&group, caller).await?;
        let want = Want {
            group: group_id,
            client: client_key(&caller.client_id),
            auto_renew: request.auto_renew,
            invisible_ms,
            filter,
        };
        let ends = now + wait;
        let late = ends + caller.deadline.map_or(UNTIMED, |_| REPLY_MARGIN / 2);
        Ok(PollRequest { topic, topic_named, group, queues, want, records_max, ends, late })
    }

    /// The consumer group, created on its first use.
    async fn group_or_create(&self, name: &GroupName, caller: &Caller) -> Result<GroupId, Fault> {
        let deadline = caller.deadline.map(|deadline| deadline - REPLY_MARGIN);
        Ok(self.context.group_or_create(name, deadline).await?)
    }
}

/// What the client reads of a poll.
pub(super) type Frames =
    Pin<Box<dyn Stream<Item = Result<ReceiveMessageResponse, tonic::Status>> + Send>>;

/// Answers with the stream of a poll's frames: of one that runs in a task here, or at the leader.
pub(super) async fn open(
    service: &Service,
    request: Request<ReceiveMessageRequest>,
) -> Response<Frames> {
    let (edge, started) = (&service.edge, Instant::now());
    let caller = Caller::from_metadata(request.metadata(), &service.listener, started);
    let request = request.into_inner();
    let Ok(caller) = caller else { return here(service, caller, request, started) };
    let broker_group = edge.polled(&request);
    match edge.is_done_here(&caller, &broker_group).await {
        Ok(true) => return here(service, Ok(caller), request, started),
        Ok(false) => {}
        Err(fault) => return refused(edge, &caller, &fault, started),
    }
    edge.clients.touch(&caller.client_id, started);
    edge.note_polled_elsewhere(&caller, &request, &broker_group);
    match edge.carry_poll(&caller, &broker_group, request.clone()).await {
        Ok(frames) => {
            edge.note("ReceiveMessage", Some(&caller), Code::Ok, started);
            Response::new(relayed(edge, caller, broker_group, request, frames))
        }
        Err(fault) => refused(edge, &caller, &fault, started),
    }
}

/// The frames of a poll that a leader does, or the next one.
fn relayed(
    edge: &Arc<Edge>,
    caller: Caller,
    broker_group: String,
    request: ReceiveMessageRequest,
    frames: Streaming<ReceiveMessageResponse>,
) -> Frames {
    let now = {
        let edge = edge.clone();
        move || timestamp_of(&edge)
    };
    let poll = Arc::new((edge.clone(), caller, broker_group, request));
    let again = move || {
        let poll = poll.clone();
        async move {
            let (edge, caller, broker_group, request) = &*poll;
            let frames = edge.carry_poll(caller, broker_group, request.clone()).await;
            frames.map_err(|fault| fault.status())
        }
    };
    let frames = polls::frames(frames, again, now);
    Box::pin(frames.take_until(edge.stop.clone().cancelled_owned()))
}

fn timestamp_of(edge: &Edge) -> prost_types::Timestamp {
    validate::timestamp(i64::try_from(edge.replica().clock_ms()).unwrap_or(i64::MAX))
}

/// A poll that ends before it began.
fn refused(edge: &Edge, caller: &Caller, fault: &Fault, started: Instant) -> Response<Frames> {
    let mut status = fault.status();
    caller.bearable(&mut status);
    edge.note("ReceiveMessage", Some(caller), status.code(), started);
    let frame = |content| Ok(ReceiveMessageResponse { content: Some(content) });
    let end = Content::DeliveryTimestamp(timestamp_of(edge));
    let frames = [frame(Content::Status(status)), frame(end)];
    told(Box::pin(futures::stream::iter(frames)) as Frames, fault.not_led)
}

fn here(
    service: &Service,
    caller: Result<Caller, Fault>,
    request: ReceiveMessageRequest,
    started: Instant,
) -> Response<Frames> {
    let (sender, receiver) = oneshot::channel();
    let (task, store_host) = (service.edge.clone(), service.advertised.to_string());
    service.edge.tasks.spawn(async move {
        let _working = task.context.metrics.in_progress(Processor::Pull);
        let end = match &caller {
            Ok(caller) => {
                task.clients.touch(&caller.client_id, started);
                run(&task, caller, request, store_host, sender).await
            }
            Err(fault) => finish(sender, fault.status(), None),
        };
        task.note("ReceiveMessage", caller.as_ref().ok(), end, started);
    });
    Response::new(Box::pin(ReceiveStream::new(service.edge.clone(), receiver)))
}

async fn run(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: ReceiveMessageRequest,
    store_host: String,
    mut sender: oneshot::Sender<PollEnd>,
) -> Code {
    let Ok(_permit) = edge.polls.try_acquire() else {
        let fault = Fault::new(Code::TooManyRequests, "too many polls wait already");
        return finish(sender, fault.status(), None);
    };
    let ended = match edge.checked(caller, &request).await.map(Arc::new) {
        Ok(poll) => match edge.note_consumer(caller, &request, &poll) {
            Ok(()) => edge.poll(&poll, &mut sender).await.map(|records| (poll, records)),
            Err(fault) => Err(fault),
        },
        Err(fault) => Err(fault),
    };
    let ended = ended.map_err(|fault| if fault.not_led { led_elsewhere() } else { fault });
    match ended {
        Ok((poll, records)) => {
            let delivery = Delivery {
                edge: edge.clone(),
                topic_named: poll.topic_named.clone(),
                topic: poll.topic.clone(),
                group: poll.group.clone(),
                group_id: poll.want.group,
                invisible_ms: poll.want.invisible_ms,
                store_host,
                records: records.into(),
                reader: None,
            };
            finish(sender, ok(), Some(delivery))
        }
        Err(fault) => {
            let mut status = fault.status();
            caller.bearable(&mut status);
            finish(sender, status, None)
        }
    }
}

fn finish(sender: oneshot::Sender<PollEnd>, status: Status, delivery: Option<Delivery>) -> Code {
    let code = status.code();
    if let Err(unread) = sender.send(PollEnd { status, delivery: delivery.map(Box::new) }) {
        // Nobody reads any more; dropping the delivery gives it back.
        drop(unread);
    }
    code
}

impl Edge {
    /// A poll registers its client, for clients whose settings went elsewhere. What a client that
    /// is not registered leases would be taken for that of one that has gone.
    fn note_consumer(
        &self,
        caller: &Caller,
        request: &ReceiveMessageRequest,
        poll: &PollRequest,
    ) -> Result<(), Fault> {
        self.note_group(caller, request, poll.group.clone())
    }

    fn note_group(
        &self,
        caller: &Caller,
        request: &ReceiveMessageRequest,
        group: GroupName,
    ) -> Result<(), Fault> {
        let known = self.clients.get(&caller.client_id).is_some();
        let client_type = caller.client_type.or(match (known, request.auto_renew) {
            (true, _) => None,
            (false, true) => Some(ClientType::PushConsumer),
            (false, false) => Some(ClientType::SimpleConsumer),
        });
        let request_timeout = caller.request_timeout;
        self.register(caller, Sighting { client_type, group: Some(group), request_timeout })
    }

    /// The broker group that a poll asks; this node's where the one it names is not known.
    fn polled(&self, request: &ReceiveMessageRequest) -> String {
        let broker = request.message_queue.as_ref().and_then(|queue| queue.broker.as_ref());
        let named = broker.map(|broker| &broker.name).filter(|name| self.whereabouts.knows(name));
        named.cloned().unwrap_or_else(|| self.context.config.broker_group.to_string())
    }

    /// Whoever leads the broker group is told that the client is alive. What is wrong with the
    /// request is the leader's to say.
    fn note_polled_elsewhere(
        &self,
        caller: &Caller,
        request: &ReceiveMessageRequest,
        broker_group: &str,
    ) {
        let group = validate::group_name(request.group.as_ref(), &caller.namespace);
        let noted = group.and_then(|group| self.note_group(caller, request, group));
        match noted {
            Ok(()) => self.clients.note_forwarded(&caller.client_id, broker_group),
            Err(fault) => {
                tracing::debug!(reason = fault.text, client = caller.client_id, "not registered");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn poll_time_rules() {
        let half = Duration::from_millis(500);
        for (row, asked, remaining, timeout, expected) in [
            ("as asked", Some(s(10)), Some(s(13)), s(3), s(10)),
            ("at most 20 s", Some(s(40)), Some(s(60)), s(3), s(20)),
            ("short ones are honoured", Some(s(1)), Some(s(4)), s(3), s(1)),
            ("3 s with room for 5 s", Some(s(3)), Some(s(6)), s(3), s(3)),
            ("Rust: deadline is the poll", Some(s(40)), Some(s(40)), s(3), s(20)),
            ("Go after a redial", Some(s(20)), Some(s(18)), s(3), s(18) - half),
            ("ends before the deadline", Some(s(5)), Some(s(5)), s(3), s(5) - half),
            ("Go simple asks for none", None, Some(s(18)), s(3), s(16) + half),
            ("none, large timeout", None, Some(s(10)), s(20), s(5)),
            ("none, at most 20 s", None, Some(s(60)), s(3), s(20)),
            ("none, little left", None, Some(s(3)), s(3), s(3) - half),
            ("zero counts as none", Some(s(0)), Some(s(3)), s(3), s(3) - half),
            ("no deadline", Some(s(7)), None, s(3), s(7)),
            ("neither", None, None, s(3), s(20)),
            ("nothing left", Some(s(7)), Some(Duration::ZERO), s(3), Duration::ZERO),
        ] {
            assert_eq!(poll_time(asked, remaining, timeout), expected, "{row}");
        }
    }

    #[test]
    fn leases_have_a_minimum_and_a_maximum_unless_renewed() {
        let lease = |seconds, nanos, auto_renew| {
            let invisible_duration = Some(prost_types::Duration { seconds, nanos });
            let request =
                ReceiveMessageRequest { auto_renew, invisible_duration, ..Default::default() };
            invisible_ms(&request, s(10)).map_err(|fault| fault.code)
        };
        let illegal = Err(Code::IllegalInvisibleTime);
        assert_eq!(lease(10, 0, false), Ok(10_000));
        assert_eq!(lease(12 * 3600, 0, false), Ok(43_200_000));
        assert_eq!(lease(9, 999_000_000, false), illegal);
        assert_eq!(lease(12 * 3600, 1_000_000, false), illegal);
        assert_eq!(lease(-1, 0, false), illegal);
        assert_eq!(lease(i64::MAX, 0, false), illegal);
        assert_eq!(lease(0, 0, true), Ok(60_000));
        let none = ReceiveMessageRequest::default();
        assert_eq!(invisible_ms(&none, s(10)).map_err(|fault| fault.code), illegal);
        let push = ReceiveMessageRequest { auto_renew: true, ..Default::default() };
        assert_eq!(invisible_ms(&push, s(10)), Ok(60_000));
    }

    #[test]
    fn batches_are_cut_to_32() {
        assert_eq!(records_max(1), Ok(1));
        assert_eq!(records_max(32), Ok(32));
        assert_eq!(records_max(i32::MAX), Ok(32));
        assert_eq!(records_max(0).unwrap_err().code, Code::BadRequest);
        assert_eq!(records_max(i32::MIN).unwrap_err().code, Code::BadRequest);
    }
}
