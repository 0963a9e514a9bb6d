//! SendMessage: messages to one run of one queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset};
use drumlin_proto::record::{RecordFields, RecordKind, Run, RunBuilder};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{
    Code, Message, SendMessageRequest, SendMessageResponse, SendResultEntry, Status,
    SystemProperties,
};
use drumlin_proto::route;
use tonic::transport::Channel;

use super::caller::Caller;
use super::status::{Fault, ok, ok_degraded};
use super::validate::{self, Batch};
use super::{Edge, validate::DerivedType};
use crate::catalog::Topic;
use crate::command::{MessageGroupPlace, TopicType};
use crate::replica::{Applied, Item};
use crate::service::clients::Sighting;

/// Stores all messages of a request or none, here or at the leader of the broker group that holds
/// their queue.
pub(super) async fn send(
    edge: &Arc<Edge>,
    caller: Arc<Caller>,
    request: SendMessageRequest,
) -> Result<SendMessageResponse, Fault> {
    let (mut status, base_offset) = match store_at_owner(edge, &caller, &request).await {
        Ok(Stored::Here { base_offset, degraded: false }) => (ok(), Some(base_offset)),
        Ok(Stored::Here { base_offset, degraded: true }) => (ok_degraded(), Some(base_offset)),
        Ok(Stored::There(answer)) => return Ok(answer),
        // Whoever sent the call here looks elsewhere.
        Err(fault) if fault.not_led && caller.forwarded => return Err(fault),
        Err(fault) => (fault.status(), None),
    };
    caller.bearable(&mut status);
    let entries = (0..)
        .zip(request.messages)
        .map(|(n, message)| entry(message, status.clone(), base_offset.map(|base| base.advance(n))))
        .collect();
    Ok(SendMessageResponse { status: Some(status), entries })
}

fn entry(message: Message, status: Status, offset: Option<QueueOffset>) -> SendResultEntry {
    let message_id = message.system_properties.map(|system| system.message_id).unwrap_or_default();
    SendResultEntry {
        status: Some(status),
        // The same for every type of message.
        transaction_id: offset.map(|_| message_id.clone()).unwrap_or_default(),
        message_id,
        offset: offset.and_then(|offset| i64::try_from(offset.get()).ok()).unwrap_or_default(),
        recall_handle: String::new(),
    }
}

/// Where the messages of a request went.
enum Stored {
    Here {
        base_offset: QueueOffset,
        /// One copy holds them for now.
        degraded: bool,
    },
    There(SendMessageResponse),
}

async fn store_at_owner(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: &SendMessageRequest,
) -> Result<Stored, Fault> {
    let messages = request.messages.as_slice();
    let now_ms = edge.replica().clock_ms();
    let batch = validate::batch(messages, &caller.namespace, now_ms)
        .map_err(|fault| fault_at(messages, fault))?;
    let owner = edge.owner_of(&batch);
    let done_here = edge.whereabouts.is_own(&owner) && edge.led_here().is_ok();
    // Those of one message group go on in the order in which they came, one at a time.
    let _line = match &batch.message_group {
        Some(message_group) if !done_here && !caller.forwarded => {
            Some(edge.forwarder.stand_in_line(batch.topic.as_str(), message_group).await)
        }
        _ => None,
    };
    if done_here || edge.is_done_here(caller, &owner).await? {
        match store(edge, caller, messages, &batch, now_ms).await {
            // The lead was lost meanwhile, and nothing was proposed.
            Err(fault) if fault.not_led && !caller.forwarded => {}
            stored => return stored,
        }
    }
    let send = |mut leader: MessagingServiceClient<Channel>, request| async move {
        leader.send_message(request).await
    };
    edge.carry(caller, &owner, request.clone(), send).await.map(Stored::There)
}

/// Says which of several messages a fault is about.
fn fault_at(messages: &[Message], (at, fault): (usize, Fault)) -> Fault {
    match messages.len() {
        0 | 1 => fault,
        count => {
            let text = format!("message {} of {count}: {}", at + 1, fault.text);
            Fault { text, ..fault }
        }
    }
}

async fn store(
    edge: &Arc<Edge>,
    caller: &Caller,
    messages: &[Message],
    batch: &Batch,
    now_ms: u64,
) -> Result<Stored, Fault> {
    let at = |fault| fault_at(messages, fault);
    let topic = edge.topic(&batch.topic)?;
    let default = SystemProperties::default();
    for (n, message) in messages.iter().enumerate() {
        let system = message.system_properties.as_ref().unwrap_or(&default);
        let derived = validate::derived_type(system);
        validate::accepted(topic.kind, derived).map_err(|fault| at((n, fault)))?;
        debug_assert!(matches!(derived, DerivedType::Built(_)), "only built types are accepted");
    }
    if let (Some(differing), TopicType::Fifo) = (batch.differing, topic.kind) {
        // One request goes to one queue, which is not where each of its groups belongs.
        let text = "messages of one request to a FIFO topic must share their message group";
        return Err(at((differing, Fault::new(Code::IllegalMessageGroup, text))));
    }
    let queue = edge.queue_for(&topic, batch)?;
    let run = run_of(messages, now_ms)?;
    edge.note_producer(caller);
    let outcome = edge.decided(Item::Run { queue, run }, caller).await?;
    match outcome.inspect_err(|error| edge.context.metrics.propose_refused(error)) {
        Ok(Applied::Run { base_offset, degraded, .. }) => {
            let in_groups = batch.message_group.is_some() || batch.differing.is_some();
            let kind = if in_groups { RecordKind::Fifo } else { RecordKind::Normal };
            let sizes =
                messages.iter().map(|message| u64::try_from(message.body.len()).unwrap_or(0));
            edge.context.metrics.messages_in(&topic.name, kind, sizes);
            Ok(Stored::Here { base_offset, degraded })
        }
        Ok(Applied::Command(_)) => {
            Err(Fault::new(Code::InternalServerError, "unexpected outcome of a run"))
        }
        Err(error) => Err(match Fault::from(error) {
            gone if gone.code == Code::TopicNotFound => {
                Fault::topic_not_found(batch.topic.as_str())
            }
            other => other,
        }),
    }
}

/// The records of a request, as they are stored.
fn run_of(messages: &[Message], now_ms: u64) -> Result<Run, Fault> {
    let default = SystemProperties::default();
    let body_bytes: usize = messages.iter().map(|message| message.body.len()).sum();
    let mut builder = RunBuilder::with_capacity(body_bytes + 256 * (messages.len() + 1));
    for message in messages {
        let system = message.system_properties.as_ref().unwrap_or(&default);
        let mut user_properties: Vec<(String, String)> = message
            .user_properties
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        user_properties.sort_unstable();
        let born = system.born_timestamp.as_ref().map(validate::timestamp_ms);
        let fields = RecordFields {
            message_id: &system.message_id,
            keys: &system.keys,
            tag: system.tag.as_deref(),
            message_group: system.message_group.as_deref(),
            user_properties: &user_properties,
            trace_context: system.trace_context.as_deref(),
            born_host: Some(&system.born_host),
            body_encoding: Some(validate::encoding(system)?),
            born_ms: born.unwrap_or_else(|| i64::try_from(now_ms).unwrap_or(i64::MAX)),
            body: &message.body,
        };
        fields.check().map_err(|invalid| Fault::new(Code::BadRequest, invalid.to_string()))?;
        builder.push(&fields);
    }
    Run::from_log(builder.finish())
        .map_err(|invalid| Fault::new(Code::InternalServerError, invalid.to_string()))
}

impl Edge {
    /// The broker group that stores a batch: with a message group that one's, else this node's, or
    /// where that has no queue of the topic, each of the others in turn.
    fn owner_of(&self, batch: &Batch) -> String {
        let own = &self.context.config.broker_group;
        // Who does not know the topic yet asks the leader of its group.
        let Ok(topic) = self.topic(&batch.topic) else { return own.to_string() };
        if let Some(message_group) = &batch.message_group {
            return match topic.place_of(message_group) {
                MessageGroupPlace::Queue(owner, _) => owner.to_string(),
                MessageGroupPlace::Moving | MessageGroupPlace::Nowhere => own.to_string(),
            };
        }
        if topic.queue_count(own) > 0 {
            return own.to_string();
        }
        let counts: Vec<u32> = topic.shares.iter().map(|(_, count)| u32::from(*count)).collect();
        let queues: Vec<_> = route::queues_in_route_order(&counts).collect();
        let turn = self.next_queue.fetch_add(1, Ordering::Relaxed);
        let turn = usize::try_from(turn).unwrap_or(0).checked_rem(queues.len());
        let owner = turn.and_then(|turn| topic.shares.get(queues.get(turn)?.0));
        owner.map_or_else(|| own.to_string(), |(owner, _)| owner.to_string())
    }

    /// The queue is the server's choice: SDKs disagree on theirs.
    fn queue_for(&self, topic: &Topic, batch: &Batch) -> Result<QueueKey, Fault> {
        let own = &self.context.config.broker_group;
        let chosen = match &batch.message_group {
            Some(message_group) => match topic.place_of(message_group) {
                MessageGroupPlace::Queue(owner, queue) if owner == own => Some(u32::from(queue)),
                MessageGroupPlace::Queue(owner, _) => {
                    let text = format!("this message group belongs to broker group {owner}");
                    return Err(Fault::not_led(text));
                }
                MessageGroupPlace::Moving => {
                    let text = format!("the queue list of {} is being changed", topic.name);
                    return Err(Fault::new(Code::TooManyRequests, text));
                }
                MessageGroupPlace::Nowhere => None,
            },
            None => {
                let count = u32::from(topic.queue_count(own));
                self.next_queue.fetch_add(1, Ordering::Relaxed).checked_rem(count)
            }
        };
        let queue = chosen.and_then(|queue| u16::try_from(queue).ok()).ok_or_else(|| {
            Fault::new(Code::Forbidden, format!("no writable queue of {} here", topic.name))
        })?;
        Ok(QueueKey { topic: topic.id, queue: QueueId::new(queue) })
    }

    /// A send registers its client, for producers whose settings went elsewhere.
    fn note_producer(&self, caller: &Caller) {
        if let Err(fault) = self.register(caller, Sighting::default()) {
            tracing::warn!(reason = fault.text, client = caller.client_id, "not registered");
        }
    }
}
