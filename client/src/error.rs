//! What can go wrong, as facts a program can act on.

use drumlin_proto::native::status;
use drumlin_proto::record::InvalidFields;
use drumlin_proto::rocketmq;

/// What kind of failure it was, whichever API of the broker named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// A setting or a field of a message; the text says which.
    InvalidArgument,
    /// No such topic, and none is created on first use.
    TopicNotFound,
    /// No such consumer group.
    GroupNotFound,
    /// Another broker leads the queue; the route will say which.
    NotLeader,
    /// The broker takes no more for now.
    Busy,
    /// Something sent before it to the same queue failed.
    OutOfOrder,
    /// Something of this name exists.
    AlreadyExists,
    /// The deadline passed and nothing was stored.
    DeadlineExceeded,
    /// It may or may not have been stored.
    UnknownOutcome,
    /// The broker does not do this (yet).
    Unsupported,
    /// A fault of the broker or of the connection to it.
    Internal,
    /// The queue does not reach to this offset.
    OffsetOutOfRange,
    /// Nobody answers, or nobody leads just now.
    Unavailable,
    /// The broker's settings or state forbid it; the text says why.
    PreconditionFailed,
    /// The lease of a received message has ended or was replaced.
    LeaseEnded,
    /// The producer's own window has no room.
    WindowFull,
    /// The client, producer or consumer was shut down.
    Closed,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// All that is wrong with the settings of a builder.
    #[error("invalid configuration: {}", faults.join("; "))]
    Configuration { faults: Vec<String> },
    /// Found before anything was sent.
    #[error("invalid message: {reason}")]
    InvalidMessage { reason: String },
    /// No such topic, and none is created on first use.
    #[error("topic {topic} does not exist")]
    TopicNotFound { topic: String },
    /// A broker or nameserver answered with a failure.
    #[error("{message}")]
    Refused { code: Code, message: String },
    /// Nobody answered at this address.
    #[error("{address} cannot be reached: {reason}")]
    Unreachable { address: String, reason: String },
    /// Nothing was sent; await [`crate::Producer::send`] to wait for room instead.
    #[error("{window_bytes} bytes or {window_messages} messages are unacknowledged already")]
    WindowFull { window_bytes: usize, window_messages: usize },
    /// Nothing was stored.
    #[error("not stored before its deadline: {reason}")]
    DeadlineExceeded { reason: String },
    /// It may or may not have been stored.
    #[error("it is not known whether it was stored: {reason}")]
    UnknownOutcome { reason: String },
    /// The client, producer or consumer was shut down.
    #[error("shut down")]
    Closed,
    /// A broker and this SDK do not fit together.
    #[error("the broker sent what makes no sense: {reason}")]
    Protocol { reason: String },
}

impl Error {
    /// What kind of failure it is.
    pub fn code(&self) -> Code {
        match self {
            Self::Configuration { .. } | Self::InvalidMessage { .. } => Code::InvalidArgument,
            Self::TopicNotFound { .. } => Code::TopicNotFound,
            Self::Refused { code, .. } => *code,
            Self::Unreachable { .. } => Code::Unavailable,
            Self::WindowFull { .. } => Code::WindowFull,
            Self::DeadlineExceeded { .. } => Code::DeadlineExceeded,
            Self::UnknownOutcome { .. } => Code::UnknownOutcome,
            Self::Closed => Code::Closed,
            Self::Protocol { .. } => Code::Internal,
        }
    }

    /// Whether the same call may succeed later. After [`Code::UnknownOutcome`] it may also store a
    /// message a second time.
    pub fn is_retryable(&self) -> bool {
        match self.code() {
            Code::NotLeader
            | Code::Busy
            | Code::OutOfOrder
            | Code::DeadlineExceeded
            | Code::UnknownOutcome
            | Code::Unavailable
            | Code::WindowFull => true,
            Code::InvalidArgument
            | Code::TopicNotFound
            | Code::GroupNotFound
            | Code::AlreadyExists
            | Code::Unsupported
            | Code::Internal
            | Code::OffsetOutOfRange
            | Code::PreconditionFailed
            | Code::LeaseEnded
            | Code::Closed => false,
        }
    }

    /// What the broker said about it, where it said something.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Refused { message, .. } if !message.is_empty() => Some(message),
            _ => None,
        }
    }

    /// The failure that a native status names; `None` for success.
    pub(crate) fn of_native(status: Option<&drumlin_proto::native::Status>) -> Option<Self> {
        let Some(status) = status else {
            return Some(Self::Protocol { reason: "an answer without status".into() });
        };
        let code = match status.code() {
            status::Code::Ok => return None,
            status::Code::InvalidArgument => Code::InvalidArgument,
            status::Code::TopicNotFound => Code::TopicNotFound,
            status::Code::GroupNotFound => Code::GroupNotFound,
            status::Code::NotLeader => Code::NotLeader,
            status::Code::Busy => Code::Busy,
            status::Code::OutOfOrder => Code::OutOfOrder,
            status::Code::AlreadyExists => Code::AlreadyExists,
            status::Code::DeadlineExceeded => Code::DeadlineExceeded,
            status::Code::UnknownOutcome => Code::UnknownOutcome,
            status::Code::Unsupported => Code::Unsupported,
            status::Code::Internal => Code::Internal,
            status::Code::OffsetOutOfRange => Code::OffsetOutOfRange,
            status::Code::Unavailable => Code::Unavailable,
            status::Code::PreconditionFailed => Code::PreconditionFailed,
        };
        Some(Self::Refused { code, message: or_name(&status.message, status.code().as_str_name()) })
    }

    /// The failure that a RocketMQ status names; `None` for success.
    pub(crate) fn of_rocketmq(status: Option<&rocketmq::Status>) -> Option<Self> {
        use rocketmq::Code as Wire;
        let Some(status) = status else {
            return Some(Self::Protocol { reason: "an answer without status".into() });
        };
        let wire = status.code();
        let code = match wire {
            Wire::Ok => return None,
            Wire::TopicNotFound => Code::TopicNotFound,
            Wire::ConsumerGroupNotFound => Code::GroupNotFound,
            Wire::TooManyRequests => Code::Busy,
            Wire::InvalidReceiptHandle => Code::LeaseEnded,
            // A broker that stops says so to those who wait; the next one serves them.
            Wire::InternalError | Wire::InternalServerError | Wire::HaNotAvailable => {
                Code::Unavailable
            }
            Wire::Unsupported | Wire::NotImplemented => Code::Unsupported,
            Wire::Forbidden | Wire::PreconditionFailed => Code::PreconditionFailed,
            Wire::RequestTimeout | Wire::ProxyTimeout | Wire::MasterPersistenceTimeout => {
                Code::UnknownOutcome
            }
            // The many codes that name one wrong field each; the text says which.
            other if (40_000..50_000).contains(&(other as i32)) => Code::InvalidArgument,
            _ => Code::Internal,
        };
        Some(Self::Refused { code, message: or_name(&status.message, wire.as_str_name()) })
    }

    /// The failure of a call that got no answer.
    pub(crate) fn of_call(address: &str, status: &tonic::Status) -> Self {
        match status.code() {
            tonic::Code::Unimplemented => Self::Refused {
                code: Code::Unsupported,
                message: format!("{address} does not know this call"),
            },
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => {
                Self::UnknownOutcome { reason: format!("{address} did not answer in time") }
            }
            _ => {
                let reason = or_name(status.message(), status.code().description());
                Self::Unreachable { address: address.to_owned(), reason }
            }
        }
    }

    /// One fault of a builder.
    pub(crate) fn fault(fault: impl Into<String>) -> Self {
        Self::Configuration { faults: vec![fault.into()] }
    }
}

impl From<InvalidFields> for Error {
    fn from(error: InvalidFields) -> Self {
        Self::InvalidMessage { reason: error.to_string() }
    }
}

fn or_name(message: &str, name: &str) -> String {
    if message.is_empty() { name.to_owned() } else { message.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_native_code_but_ok_is_a_failure_that_keeps_its_text() {
        for number in 0..=14 {
            let status = drumlin_proto::native::Status {
                code: number,
                message: "because".into(),
                leader: None,
            };
            let error = Error::of_native(Some(&status));
            assert_eq!(error.is_none(), number == 0);
            assert!(error.is_none_or(|e| e.hint() == Some("because")));
        }
    }

    #[test]
    fn missing_status_is_not_success() {
        assert!(Error::of_native(None).is_some());
        assert!(Error::of_rocketmq(None).is_some());
    }

    #[test]
    fn rocketmq_failures_of_the_broker_itself_are_retryable() {
        use rocketmq::Code as Wire;
        let failed = |wire: Wire| {
            let status = rocketmq::Status { code: wire.into(), message: String::new() };
            Error::of_rocketmq(Some(&status)).unwrap()
        };
        for wire in [Wire::InternalServerError, Wire::InternalError, Wire::HaNotAvailable] {
            assert_eq!(failed(wire).code(), Code::Unavailable);
            assert!(failed(wire).is_retryable());
        }
        assert!(!failed(Wire::IllegalTopic).is_retryable());
    }

    #[test]
    fn only_failures_that_may_pass_are_retryable() {
        let refused = |code| Error::Refused { code, message: String::new() };
        assert!(refused(Code::Busy).is_retryable());
        assert!(refused(Code::NotLeader).is_retryable());
        assert!(!refused(Code::TopicNotFound).is_retryable());
        assert!(!Error::Closed.is_retryable());
    }
}
