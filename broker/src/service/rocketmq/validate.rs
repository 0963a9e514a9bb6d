//! Wire to valid values, or the `Code` that says what is wrong. Pure.

use std::collections::HashMap;

use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::record::{
    BODY_BYTES_MAX, BodyEncoding, PROPERTIES_BYTES_MAX, RUN_BYTES_MAX, RecordKind,
};
use drumlin_proto::rocketmq::{
    Code, Digest, DigestType, Encoding, Endpoints, FilterExpression, FilterType, Message,
    MessageType, Resource, SystemProperties,
};
use md5::{Digest as _, Md5};

use super::status::Fault;
use crate::command::TopicType;
use crate::filter::TagFilter;

const USER_PROPERTIES_MAX: usize = 128;
const MESSAGE_GROUP_BYTES_MAX: usize = 63;
const MESSAGE_ID_BYTES_MAX: usize = 1024;
const TRACE_CONTEXT_BYTES_MAX: usize = 4096;
const BORN_HOST_BYTES_MAX: usize = 255;
/// Bodies of one request together.
const BATCH_BODY_BYTES_MAX: usize = 4 << 20;
/// Bodies and attributes of one request together.
const BATCH_BYTES_MAX: usize = RUN_BYTES_MAX - 256;
const BATCH_MESSAGES_MAX: usize = 4096;
const DELAY_MS_MAX: i128 = 86_400_000;
const RECOVERY_SECONDS_MAX: i64 = 3600;
pub(super) const INVISIBLE_MS_MAX: u64 = 12 * 3600 * 1000;

/// Property keys that RocketMQ uses itself.
const RESERVED_KEYS: [&str; 51] = [
    "TRACE_ON",
    "MSG_REGION",
    "KEYS",
    "TAGS",
    "WAIT",
    "DELAY",
    "RETRY_TOPIC",
    "REAL_TOPIC",
    "REAL_QID",
    "TRAN_MSG",
    "PGROUP",
    "MIN_OFFSET",
    "MAX_OFFSET",
    "BUYER_ID",
    "ORIGIN_MESSAGE_ID",
    "TRANSFER_FLAG",
    "CORRECTION_FLAG",
    "MQ2_FLAG",
    "RECONSUME_TIME",
    "UNIQ_KEY",
    "MAX_RECONSUME_TIMES",
    "CONSUME_START_TIME",
    "POP_CK",
    "POP_CK_OFFSET",
    "1ST_POP_TIME",
    "TRAN_PREPARED_QUEUE_OFFSET",
    "DUP_INFO",
    "EXTEND_UNIQ_INFO",
    "INSTANCE_ID",
    "CORRELATION_ID",
    "REPLY_TO_CLIENT",
    "TTL",
    "ARRIVE_TIME",
    "PUSH_REPLY_TIME",
    "CLUSTER",
    "MSG_TYPE",
    "INNER_MULTI_QUEUE_OFFSET",
    "TIMER_DELAY_MS",
    "TIMER_DELAY_SEC",
    "TIMER_DELIVER_MS",
    "TIMER_ENQUEUE_MS",
    "TIMER_DEQUEUE_MS",
    "TIMER_ROLL_TIMES",
    "TIMER_OUT_MS",
    "TIMER_DEL_UNIQKEY",
    "TIMER_DELAY_LEVEL",
    "__BORNHOST",
    "BORN_TIMESTAMP",
    "DLQ_ORIGIN_TOPIC",
    "DLQ_ORIGIN_MESSAGE_ID",
    "__CRC32#",
];

fn fault(code: Code, text: impl Into<String>) -> Fault {
    Fault::new(code, text)
}

fn has_control(text: &str) -> bool {
    text.chars().any(char::is_control)
}

/// The name inside; `namespace` is that of the call's header.
fn full_name(resource: Option<&Resource>, namespace: &str) -> String {
    resource.filter(|resource| !resource.name.is_empty()).map_or_else(String::new, |resource| {
        drumlin_proto::route::name_with_namespace(resource, namespace)
    })
}

pub(super) fn topic_name(topic: Option<&Resource>, namespace: &str) -> Result<TopicName, Fault> {
    TopicName::parse(&full_name(topic, namespace))
        .map_err(|invalid| fault(Code::IllegalTopic, invalid.to_string()))
}

pub(super) fn group_name(group: Option<&Resource>, namespace: &str) -> Result<GroupName, Fault> {
    GroupName::parse(&full_name(group, namespace))
        .map_err(|invalid| fault(Code::IllegalConsumerGroup, invalid.to_string()))
}

/// Milliseconds of a duration; `None` if it is negative or beyond reason.
pub(super) fn duration_ms(duration: &prost_types::Duration) -> Option<u64> {
    let ms = i128::from(duration.seconds) * 1000 + i128::from(duration.nanos) / 1_000_000;
    u64::try_from(ms).ok()
}

/// Milliseconds since the epoch, clamped to what an `i64` holds.
pub(super) fn timestamp_ms(timestamp: &prost_types::Timestamp) -> i64 {
    let ms = i128::from(timestamp.seconds) * 1000 + i128::from(timestamp.nanos) / 1_000_000;
    i64::try_from(ms).unwrap_or(if ms < 0 { i64::MIN } else { i64::MAX })
}

pub(super) fn timestamp(ms: i64) -> prost_types::Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000)).unwrap_or(0) * 1_000_000;
    prost_types::Timestamp { seconds: ms.div_euclid(1000), nanos }
}

/// Addresses that a client says it dialled; it need not name them at all.
pub(super) fn access_point(endpoints: Option<&Endpoints>) -> Result<(), Fault> {
    let Some(endpoints) = endpoints else { return Ok(()) };
    if drumlin_proto::route::is_usable(endpoints) {
        return Ok(());
    }
    Err(fault(Code::IllegalAccessPoint, "the endpoints name no usable address"))
}

/// The filter of a subscription or a poll.
pub(super) fn filter(expression: Option<&FilterExpression>) -> Result<TagFilter, Fault> {
    let Some(expression) = expression else { return Ok(TagFilter::All) };
    match FilterType::try_from(expression.r#type) {
        Ok(FilterType::Tag | FilterType::Unspecified) => TagFilter::parse(&expression.expression)
            .map_err(|invalid| fault(Code::IllegalFilterExpression, invalid.to_string())),
        Ok(FilterType::Sql) => Err(Fault::not_supported("SQL92 filters")),
        Err(_) => Err(fault(
            Code::IllegalFilterExpression,
            format!("filter type {} is unknown", expression.r#type),
        )),
    }
}

/// Labels that a client gives itself in its settings.
pub(super) fn client_properties(properties: &HashMap<String, String>) -> Result<(), Fault> {
    let refuse = |text: String| Err(fault(Code::InvalidClientProperties, text));
    if properties.len() > 32 {
        return refuse(format!("{} client properties, 32 are allowed", properties.len()));
    }
    let bytes: usize = properties.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > 4096 {
        return refuse(format!("{bytes} bytes of client properties, 4096 are allowed"));
    }
    for (key, value) in properties {
        let valid = key.len() <= 64
            && key.starts_with(|c: char| c.is_ascii_alphabetic())
            && key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if !valid {
            return refuse(format!("client property key {key:?} is not allowed"));
        }
        if key.starts_with("rocketmq.") {
            return refuse(format!("client property key {key:?} is reserved"));
        }
        if value.chars().count() > 256 {
            return refuse(format!("the value of client property {key:?} is longer than 256"));
        }
    }
    Ok(())
}

/// What the type of a message is, whatever it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DerivedType {
    Built(RecordKind),
    /// Known to the protocol, not built here.
    Missing(&'static str),
}

/// What is true of all messages of a request.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) topic: TopicName,
    /// Of all messages, where they agree.
    pub(super) message_group: Option<String>,
    /// The first message whose message group is not that of the messages before.
    pub(super) differing: Option<usize>,
}

/// Checks a SendMessage request up to the topic's type; the index is that of the faulty message.
pub(super) fn batch(
    messages: &[Message],
    namespace: &str,
    now_ms: u64,
) -> Result<Batch, (usize, Fault)> {
    let Some(first) = messages.first() else {
        return Err((0, fault(Code::MessageCorrupted, "the request holds no message")));
    };
    if messages.len() > BATCH_MESSAGES_MAX {
        let text = format!("{} messages, {BATCH_MESSAGES_MAX} are allowed", messages.len());
        return Err((0, fault(Code::BadRequest, text)));
    }
    let topic = topic_name(first.topic.as_ref(), namespace).map_err(|fault| (0, fault))?;
    let same_topic =
        |message: &Message| full_name(message.topic.as_ref(), namespace) == topic.as_str();
    if let Some(other) = messages.iter().position(|message| !same_topic(message)) {
        return Err((other, fault(Code::MessageCorrupted, "messages of several topics")));
    }
    let mut body_bytes = 0;
    let mut all_bytes = 0;
    for (at, one) in messages.iter().enumerate() {
        let attribute_bytes = message(one, now_ms).map_err(|fault| (at, fault))?;
        body_bytes += one.body.len();
        all_bytes += one.body.len() + attribute_bytes;
        if body_bytes > BATCH_BODY_BYTES_MAX || all_bytes > BATCH_BYTES_MAX {
            let text = format!("the batch has {body_bytes} bytes of bodies, {all_bytes} in all");
            return Err((at, fault(Code::MessageBodyTooLarge, text)));
        }
    }
    let group_of = |message: &Message| {
        message.system_properties.as_ref().and_then(|system| system.message_group.clone())
    };
    let message_group = group_of(first);
    let differing = messages.iter().position(|message| group_of(message) != message_group);
    let message_group = message_group.filter(|_| differing.is_none());
    Ok(Batch { topic, message_group, differing })
}

/// Checks one message in the order that clients are told of; answers the bytes of its attributes.
fn message(message: &Message, now_ms: u64) -> Result<usize, Fault> {
    let default = SystemProperties::default();
    let system = message.system_properties.as_ref().unwrap_or(&default);
    let bytes = message.body.len();
    if bytes == 0 {
        return Err(fault(Code::MessageBodyEmpty, "the body is empty"));
    }
    if bytes > BODY_BYTES_MAX {
        let text = format!("the body has {bytes} bytes, {BODY_BYTES_MAX} are allowed");
        return Err(fault(Code::MessageBodyTooLarge, text));
    }
    properties(message, system)?;
    identity(system)?;
    times(system, now_ms)?;
    if let Some(group) = &system.message_group {
        let valid = !group.trim().is_empty() && group.len() <= MESSAGE_GROUP_BYTES_MAX;
        if !valid || has_control(group) {
            let text = "a message group has 1 to 63 bytes and no control character";
            return Err(fault(Code::IllegalMessageGroup, text));
        }
    }
    digest(system.body_digest.as_ref(), &message.body)?;
    encoding(system)?;
    let property_overhead = 8 * (message.user_properties.len() + system.keys.len());
    Ok(256
        + property_overhead
        + property_bytes(message, system)
        + system.message_id.len()
        + system.born_host.len()
        + system.trace_context.as_ref().map_or(0, String::len))
}

fn property_bytes(message: &Message, system: &SystemProperties) -> usize {
    let user: usize = message.user_properties.iter().map(|(k, v)| k.len() + v.len()).sum();
    let keys: usize = system.keys.iter().map(String::len).sum();
    user + keys + system.tag.as_ref().map_or(0, String::len)
}

fn properties(message: &Message, system: &SystemProperties) -> Result<(), Fault> {
    let count = message.user_properties.len();
    if count > USER_PROPERTIES_MAX {
        let text = format!("{count} user properties, {USER_PROPERTIES_MAX} are allowed");
        return Err(fault(Code::MessagePropertiesTooLarge, text));
    }
    for (key, value) in &message.user_properties {
        if RESERVED_KEYS.contains(&key.as_str()) {
            let text = format!("user property key {key:?} is reserved");
            return Err(fault(Code::IllegalMessagePropertyKey, text));
        }
        if has_control(key) || has_control(value) {
            let text = format!("user property {key:?} holds a control character");
            return Err(fault(Code::IllegalMessagePropertyKey, text));
        }
    }
    if let Some(tag) = &system.tag
        && (tag.trim().is_empty() || tag.contains('|') || has_control(tag))
    {
        let text = "a tag must not be blank nor hold a vertical bar or a control character";
        return Err(fault(Code::IllegalMessageTag, text));
    }
    if system.keys.iter().any(|key| key.trim().is_empty() || has_control(key)) {
        let text = "a key must not be blank nor hold a control character";
        return Err(fault(Code::IllegalMessageKey, text));
    }
    let bytes = property_bytes(message, system);
    let trace_bytes = system.trace_context.as_ref().map_or(0, String::len);
    if bytes > PROPERTIES_BYTES_MAX
        || trace_bytes > TRACE_CONTEXT_BYTES_MAX
        || system.born_host.len() > BORN_HOST_BYTES_MAX
    {
        let text = format!("{bytes} bytes of properties, {PROPERTIES_BYTES_MAX} are allowed");
        return Err(fault(Code::MessagePropertiesTooLarge, text));
    }
    Ok(())
}

fn identity(system: &SystemProperties) -> Result<(), Fault> {
    let id = &system.message_id;
    if id.trim().is_empty() {
        return Err(fault(Code::IllegalMessageId, "the message id is blank"));
    }
    if id.len() > MESSAGE_ID_BYTES_MAX {
        let text = format!("{} bytes of id, {MESSAGE_ID_BYTES_MAX} are allowed", id.len());
        return Err(fault(Code::IllegalMessageId, text));
    }
    Ok(())
}

fn times(system: &SystemProperties, now_ms: u64) -> Result<(), Fault> {
    if let Some(recovery) = &system.orphaned_transaction_recovery_duration {
        let whole = recovery.seconds == RECOVERY_SECONDS_MAX && recovery.nanos <= 0;
        if recovery.seconds >= RECOVERY_SECONDS_MAX && !whole {
            let text = "a transaction recovery duration is at most 3600 s";
            return Err(fault(Code::BadRequest, text));
        }
    }
    if let Some(delivery) = &system.delivery_timestamp {
        let ahead_ms = i128::from(timestamp_ms(delivery)) - i128::from(now_ms);
        if ahead_ms > DELAY_MS_MAX {
            let text = format!("delivery in {ahead_ms} ms, {DELAY_MS_MAX} are allowed");
            return Err(fault(Code::IllegalDeliveryTime, text));
        }
    }
    Ok(())
}

/// Upper-case hex of the MD5 of a body.
pub(super) fn body_md5(body: &[u8]) -> String {
    Md5::digest(body).iter().map(|byte| format!("{byte:02X}")).collect()
}

fn digest(digest: Option<&Digest>, body: &[u8]) -> Result<(), Fault> {
    let Some(digest) = digest else { return Ok(()) };
    let computed = match DigestType::try_from(digest.r#type) {
        Ok(DigestType::Unspecified) if digest.checksum.is_empty() => return Ok(()),
        Ok(DigestType::Md5) => body_md5(body),
        Ok(DigestType::Crc32) => format!("{:X}", crc32fast::hash(body)),
        Ok(DigestType::Sha1) => return Err(Fault::not_supported("SHA-1 body digests")),
        Ok(DigestType::Unspecified) | Err(_) => {
            let text = format!("digest type {} is unknown", digest.r#type);
            return Err(fault(Code::MessageCorrupted, text));
        }
    };
    let told = digest.checksum.trim_start_matches('0');
    if told.eq_ignore_ascii_case(computed.trim_start_matches('0')) {
        return Ok(());
    }
    Err(fault(Code::MessageCorrupted, "the body does not match its digest"))
}

/// How the body says it is encoded; unset means not at all.
pub(super) fn encoding(system: &SystemProperties) -> Result<BodyEncoding, Fault> {
    match Encoding::try_from(system.body_encoding) {
        Ok(Encoding::Unspecified | Encoding::Identity) => Ok(BodyEncoding::Identity),
        Ok(Encoding::Gzip) => Ok(BodyEncoding::Gzip),
        Err(_) => {
            let text = format!("body encoding {} is unknown", system.body_encoding);
            Err(fault(Code::BadRequest, text))
        }
    }
}

pub(super) fn derived_type(system: &SystemProperties) -> DerivedType {
    if system.message_type == i32::from(MessageType::Transaction) {
        DerivedType::Missing("transactions")
    } else if system.delivery_timestamp.is_some() {
        DerivedType::Missing("delayed messages")
    } else if system.lite_topic.is_some() {
        DerivedType::Missing("lite topics")
    } else if system.priority.is_some() {
        DerivedType::Missing("message priorities")
    } else if system.message_group.is_some() {
        DerivedType::Built(RecordKind::Fifo)
    } else {
        DerivedType::Built(RecordKind::Normal)
    }
}

/// Whether a topic of this type takes a message of that type.
pub(super) fn accepted(topic: TopicType, derived: DerivedType) -> Result<(), Fault> {
    match (topic, derived) {
        (TopicType::Mixed, DerivedType::Built(_))
        | (TopicType::Normal, DerivedType::Built(RecordKind::Normal))
        | (TopicType::Fifo, DerivedType::Built(RecordKind::Fifo)) => Ok(()),
        (TopicType::Mixed, DerivedType::Missing(what)) => Err(Fault::not_supported(what)),
        (TopicType::Normal | TopicType::Fifo, _) => {
            let text = format!("a topic of type {topic:?} does not take this type of message");
            Err(fault(Code::MessagePropertyConflictWithType, text))
        }
    }
}

#[cfg(test)]
mod tests;
