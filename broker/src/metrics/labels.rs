//! Labels of the broker's series: typed, so that nothing unbounded becomes one.

use std::fmt::{self, Write};

use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::record::RecordKind;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::gauge::Gauge;

/// Stands for all that found no room.
pub const OTHER: &str = "__other__";

macro_rules! name_label {
    ($label:ident($name:ty)) => {
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        pub enum $label {
            Named($name),
            /// Does not apply: an empty label.
            None,
            Other,
        }

        impl EncodeLabelValue for $label {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
                match self {
                    Self::Named(name) => encoder.write_str(name.as_str()),
                    Self::None => Ok(()),
                    Self::Other => encoder.write_str(OTHER),
                }
            }
        }
    };
}

name_label!(TopicLabel(TopicName));
name_label!(GroupLabel(GroupName));

/// What kind of message it is, as RocketMQ spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MessageType(pub RecordKind);

impl EncodeLabelValue for MessageType {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(match self.0 {
            RecordKind::Normal => "normal",
            RecordKind::Fifo => "fifo",
            RecordKind::Delay => "delay",
            RecordKind::Transaction => "transaction",
        })
    }
}

/// Version that a client says it has: printable, of bounded length.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ClientVersion(String);

impl ClientVersion {
    const CHARS_MAX: usize = 32;

    pub fn named(version: &str) -> Self {
        let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
        Self(version.chars().filter(allowed).take(Self::CHARS_MAX).collect())
    }

    pub fn other() -> Self {
        Self(OTHER.into())
    }
}

impl EncodeLabelValue for ClientVersion {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(&self.0)
    }
}

/// Why a call was turned down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    InFlightBytes,
    DiskFull,
    NotLeader,
    Expired,
    UnknownOutcome,
    /// A topic needs two copies while there is one node.
    TooFewCopies,
    Stopping,
    /// Too many topics or consumer groups.
    Limit,
}

impl EncodeLabelValue for Reason {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            Self::InFlightBytes => "in_flight_bytes",
            Self::DiskFull => "disk_full",
            Self::NotLeader => "not_leader",
            Self::Expired => "expired",
            Self::UnknownOutcome => "unknown_outcome",
            Self::TooFewCopies => "too_few_copies",
            Self::Stopping => "stopping",
            Self::Limit => "limit",
        })
    }
}

/// Family of calls, as RocketMQ's thread pools are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Processor {
    Send,
    Pull,
    Ack,
    QueryMessage,
    ClientManager,
    Heartbeat,
    ConsumerManager,
    Admin,
}

impl Processor {
    /// The family of a call of `apache.rocketmq.v2`.
    pub fn of_call(name: &str) -> Self {
        match name {
            "SendMessage" | "RecallMessage" | "EndTransaction" => Self::Send,
            "ReceiveMessage" | "PullMessage" => Self::Pull,
            "AckMessage" | "ChangeInvisibleDuration" | "ForwardMessageToDeadLetterQueue" => {
                Self::Ack
            }
            "Heartbeat" => Self::Heartbeat,
            "Telemetry" | "NotifyClientTermination" | "QueryRoute" => Self::ClientManager,
            "QueryAssignment" | "UpdateOffset" | "GetOffset" | "QueryOffset" => {
                Self::ConsumerManager
            }
            _ => Self::Admin,
        }
    }
}

impl EncodeLabelValue for Processor {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            Self::Send => "send",
            Self::Pull => "pull",
            Self::Ack => "ack",
            Self::QueryMessage => "query_message",
            Self::ClientManager => "client_manager",
            Self::Heartbeat => "heartbeat",
            Self::ConsumerManager => "consumer_manager",
            Self::Admin => "admin",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TopicIn {
    topic: TopicLabel,
    message_type: MessageType,
    is_system: bool,
}

impl TopicIn {
    /// Clients cannot name a system topic, so `is_system` is there for dashboards only.
    pub(super) fn new(topic: TopicLabel, message_type: MessageType) -> Self {
        Self { topic, message_type, is_system: false }
    }
}

/// Also the label set of a consumer group's gauges.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TopicOut {
    topic: TopicLabel,
    consumer_group: GroupLabel,
    is_retry: bool,
    is_system: bool,
}

impl TopicOut {
    pub(super) fn new(topic: TopicLabel, consumer_group: GroupLabel, is_retry: bool) -> Self {
        Self { topic, consumer_group, is_retry, is_system: false }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Rpc {
    protocol_type: &'static str,
    request_code: &'static str,
    response_code: &'static str,
    is_long_polling: bool,
    result: &'static str,
}

impl Rpc {
    pub(super) fn new(
        request_code: &'static str,
        response_code: &'static str,
        is_long_polling: bool,
    ) -> Self {
        let result = match response_code {
            "OK" => "success",
            _ => "process_request_failed",
        };
        Self { protocol_type: "grpc", request_code, response_code, is_long_polling, result }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Request {
    pub(super) api: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Created {
    invocation_status: &'static str,
    is_system: bool,
}

impl Created {
    pub(super) fn new(succeeded: bool) -> Self {
        let invocation_status = if succeeded { "success" } else { "failure" };
        Self { invocation_status, is_system: false }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Refused {
    pub(super) reason: Reason,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Processing {
    pub(super) processor: Processor,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ProducerClient {
    language: &'static str,
    version: ClientVersion,
    protocol_type: &'static str,
}

impl ProducerClient {
    pub(super) fn new(language: &'static str, version: ClientVersion) -> Self {
        Self { language, version, protocol_type: "grpc" }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ConsumerClient {
    language: &'static str,
    version: ClientVersion,
    protocol_type: &'static str,
    consumer_group: GroupLabel,
    consume_mode: &'static str,
    is_system: bool,
}

impl ConsumerClient {
    pub(super) fn new(
        language: &'static str,
        version: ClientVersion,
        consumer_group: GroupLabel,
        consume_mode: &'static str,
    ) -> Self {
        let protocol_type = "grpc";
        Self { language, version, protocol_type, consumer_group, consume_mode, is_system: false }
    }
}

/// Something counted in a gauge for as long as it lives.
#[derive(Debug)]
pub struct Connected(Gauge);

impl Connected {
    pub(super) fn count(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.dec();
    }
}
