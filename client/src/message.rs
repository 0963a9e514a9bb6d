//! Messages on their way out, and what comes back for them and as them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use drumlin_proto::ids::{QueueOffset, TopicName};
use drumlin_proto::record::{BodyEncoding, Record, RecordFields};

use crate::error::Error;

/// A message to be sent.
#[derive(Clone, Debug, Default)]
pub struct Message {
    topic: String,
    body: Bytes,
    message_id: String,
    keys: Vec<String>,
    tag: Option<String>,
    message_group: Option<String>,
    properties: BTreeMap<String, String>,
    trace_context: Option<String>,
    body_encoding: Option<BodyEncoding>,
}

impl Message {
    /// A message without tag, keys or message group.
    pub fn new(topic: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self { topic: topic.into(), body: body.into(), ..Self::default() }
    }

    /// Messages of one message group lie in one queue, in the order they were sent.
    pub fn message_group(mut self, message_group: impl Into<String>) -> Self {
        self.message_group = Some(message_group.into());
        self
    }

    /// Adds a key to look the message up by. Keys never decide where a message goes.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.keys.push(key.into());
        self
    }

    /// What consumers filter by.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.tag = Some(tag.into());
        self
    }

    /// Sets a user property.
    pub fn property(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.insert(key.into(), value.into());
        self
    }

    /// Passed on to consumers as it is.
    pub fn trace_context(mut self, trace_context: impl Into<String>) -> Self {
        self.trace_context = Some(trace_context.into());
        self
    }

    /// Says that the body is gzip; it is stored and delivered as it is.
    pub fn gzip_body(mut self) -> Self {
        self.body_encoding = Some(BodyEncoding::Gzip);
        self
    }

    /// Instead of an id made when it is sent.
    pub fn message_id(mut self, message_id: impl Into<String>) -> Self {
        self.message_id = message_id.into();
        self
    }

    /// Where it goes.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// What it says.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// Checks the message and turns it into what is encoded; `new_id` is called if it has no id.
    pub(crate) fn seal(
        mut self,
        born_ms: i64,
        new_id: impl FnOnce() -> String,
    ) -> Result<Sealed, Error> {
        let invalid = |reason: String| Error::InvalidMessage { reason };
        TopicName::parse(&self.topic).map_err(|e| invalid(format!("topic: {e}")))?;
        if self.message_id.is_empty() {
            self.message_id = new_id();
        }
        for (text, what) in self.texts() {
            if text.trim().is_empty() || text.chars().any(char::is_control) {
                return Err(invalid(format!("{what} {text:?} is blank or has control characters")));
            }
        }
        if self.tag.as_ref().is_some_and(|tag| tag.contains('|')) {
            return Err(invalid("a tag has no vertical bar".into()));
        }
        let sealed = Sealed {
            message_id: self.message_id,
            keys: self.keys,
            tag: self.tag,
            message_group: self.message_group,
            properties: self.properties.into_iter().collect(),
            trace_context: self.trace_context,
            body_encoding: self.body_encoding,
            born_ms,
            body: self.body,
        };
        sealed.fields().check()?;
        Ok(sealed)
    }

    fn texts(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let tag = self.tag.as_deref().map(|text| (text, "tag"));
        let group = self.message_group.as_deref().map(|text| (text, "message group"));
        let keys = self.keys.iter().map(|key| (key.as_str(), "key"));
        tag.into_iter().chain(group).chain(keys)
    }
}

/// A checked message, without its topic: what becomes a record.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) message_id: String,
    keys: Vec<String>,
    tag: Option<String>,
    pub(crate) message_group: Option<String>,
    properties: Vec<(String, String)>,
    trace_context: Option<String>,
    body_encoding: Option<BodyEncoding>,
    born_ms: i64,
    body: Bytes,
}

impl Sealed {
    pub(crate) fn fields(&self) -> RecordFields<'_> {
        RecordFields {
            message_id: &self.message_id,
            keys: &self.keys,
            tag: self.tag.as_deref(),
            message_group: self.message_group.as_deref(),
            user_properties: &self.properties,
            trace_context: self.trace_context.as_deref(),
            born_host: None,
            body_encoding: self.body_encoding,
            born_ms: self.born_ms,
            body: &self.body,
        }
    }
}

/// Proof that a message is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    pub message_id: String,
    pub topic: Arc<str>,
    pub broker_group: Arc<str>,
    pub queue_id: u32,
    pub offset: QueueOffset,
    /// Ms since the epoch.
    pub store_time_ms: i64,
    /// Fewer than the healthy number of copies held it when it was acknowledged.
    pub degraded: bool,
}

/// A message that was read.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Delivery {
    pub topic: Arc<str>,
    pub broker_group: Arc<str>,
    pub queue_id: u32,
    pub offset: QueueOffset,
    pub message_id: String,
    pub keys: Vec<String>,
    pub tag: Option<String>,
    pub message_group: Option<String>,
    pub properties: BTreeMap<String, String>,
    pub trace_context: Option<String>,
    pub body: Bytes,
    /// The body is gzip, as its sender said.
    pub gzip_body: bool,
    /// Ms since the epoch, by the sender's clock.
    pub born_ms: i64,
    /// Ms since the epoch, by the broker's clock.
    pub store_time_ms: i64,
    /// 1 on the first delivery.
    pub attempt: u32,
    pub(crate) lease: Lease,
}

impl Delivery {
    /// The body as text; invalid UTF-8 is replaced.
    pub fn body_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.body)
    }

    /// A record read by offset; `run` holds it, so that the body is not copied.
    pub(crate) fn of_record(
        place: &Place,
        offset: QueueOffset,
        store_time_ms: i64,
        run: &Bytes,
        record: Record<'_>,
    ) -> Self {
        let body = record.body();
        Self {
            topic: Arc::clone(&place.topic),
            broker_group: Arc::clone(&place.broker_group),
            queue_id: place.queue_id,
            offset,
            message_id: record.message_id().into(),
            keys: record.keys().map(Into::into).collect(),
            tag: record.tag().map(Into::into),
            message_group: record.message_group().map(Into::into),
            properties: record.user_properties().map(|(k, v)| (k.into(), v.into())).collect(),
            trace_context: record.trace_context().map(Into::into),
            body: if body.is_empty() { Bytes::new() } else { run.slice_ref(body) },
            gzip_body: record.body_encoding() == BodyEncoding::Gzip,
            born_ms: record.born_ms(),
            store_time_ms,
            attempt: 1,
            lease: Lease::default(),
        }
    }
}

/// What the broker knows a delivery by; clones of the delivery share it, since every change of the
/// lease gives it a new handle. Empty where there is no lease.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lease {
    receipt_handle: Arc<Mutex<String>>,
}

impl Lease {
    pub(crate) fn of(receipt_handle: String) -> Self {
        Self { receipt_handle: Arc::new(Mutex::new(receipt_handle)) }
    }

    pub(crate) fn handle(&self) -> String {
        self.receipt_handle.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn replace(&self, receipt_handle: String) {
        *self.receipt_handle.lock().unwrap_or_else(PoisonError::into_inner) = receipt_handle;
    }
}

/// One queue of a topic on one broker group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) topic: Arc<str>,
    pub(crate) broker_group: Arc<str>,
    pub(crate) queue_id: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(message: Message) -> Result<Sealed, Error> {
        message.seal(7, || "made".into())
    }

    #[test]
    fn message_without_an_id_gets_one() {
        assert_eq!(seal(Message::new("t", "x")).unwrap().message_id, "made");
        let own = Message::new("t", "x").message_id("own");
        assert_eq!(seal(own).unwrap().message_id, "own");
    }

    #[test]
    fn wrong_fields_are_named_before_anything_is_sent() {
        let cases = [
            (Message::new("a b", "x"), "topic"),
            (Message::new("t", "x").tag("a|b"), "vertical bar"),
            (Message::new("t", "x").tag(" "), "tag"),
            (Message::new("t", "x").key("\n"), "key"),
            (Message::new("t", "x").message_group(""), "message group"),
            (Message::new("t", vec![0; (4 << 20) + 1]), "body"),
            (Message::new("t", "x").property("k", "v".repeat(17 << 10)), "properties"),
        ];
        for (message, part) in cases {
            let error = seal(message).unwrap_err();
            assert!(error.to_string().contains(part), "{error} does not name {part}");
        }
    }
}
