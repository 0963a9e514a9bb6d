//! Faults of a call and the `Code`s that tell of them.

use drumlin_proto::rocketmq::{
    AckMessageResponse, ChangeInvisibleDurationResponse, Code, EndTransactionResponse,
    ForwardMessageToDeadLetterQueueResponse, GetOffsetResponse, HeartbeatResponse,
    NotifyClientTerminationResponse, QueryAssignmentResponse, QueryOffsetResponse,
    QueryRouteResponse, RecallMessageResponse, SendMessageResponse, Status,
    SyncLiteSubscriptionResponse, UpdateOffsetResponse,
};

use crate::command::Refusal;
use crate::replica::ProposeError;
use crate::service::native;

/// Why a call was refused: the code and a text for whoever reads the client's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: Code,
    pub(super) text: String,
    /// Nothing was done, because this node does not lead the broker group.
    pub(super) not_led: bool,
}

impl Fault {
    pub(super) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), not_led: false }
    }

    /// Refused before anything was done: another node leads, or none.
    pub(super) fn not_led(text: impl Into<String>) -> Self {
        Self { not_led: true, ..Self::new(Code::HaNotAvailable, text) }
    }

    pub(super) fn not_supported(what: &str) -> Self {
        Self::new(Code::NotImplemented, format!("{what} are not supported yet"))
    }

    /// Programs look for exactly this text.
    pub(super) fn topic_not_found(topic: &str) -> Self {
        Self::new(
            Code::TopicNotFound,
            format!("CODE: 17  DESC: No topic route info in name server for the topic: {topic}"),
        )
    }

    /// The outcome did not come in time; it may come all the same.
    pub(super) fn late() -> Self {
        let text = "not stored in time, the disk may be slow; it may be stored all the same";
        Self::new(Code::MasterPersistenceTimeout, text)
    }

    pub(super) fn status(&self) -> Status {
        Status { code: self.code.into(), message: self.text.clone() }
    }
}

pub(super) fn ok() -> Status {
    Status { code: Code::Ok.into(), message: "OK".into() }
}

/// Success, on one copy for now: a send's answer has no other place to tell.
pub(super) fn ok_degraded() -> Status {
    Status { code: Code::Ok.into(), message: "OK, DEGRADED: one copy holds it".into() }
}

/// The status over entries: their common one, or MULTIPLE_RESULTS.
pub(super) fn overall<'a>(mut entries: impl Iterator<Item = &'a Status>) -> Option<Status> {
    let first = entries.next()?;
    if entries.all(|status| status.code == first.code) {
        return Some(first.clone());
    }
    let message = "the entries have different results".into();
    Some(Status { code: Code::MultipleResults.into(), message })
}

impl From<ProposeError> for Fault {
    fn from(error: ProposeError) -> Self {
        let code = match &error {
            ProposeError::Refused(refusal) => return refusal.clone().into(),
            ProposeError::NotLeader { .. } => return Self::not_led(error.to_string()),
            ProposeError::Busy { .. } | ProposeError::DiskFull(_) => Code::TooManyRequests,
            ProposeError::UnknownOutcome
            | ProposeError::OutOfOrder
            | ProposeError::TooFewCopies
            | ProposeError::Stopped(_) => Code::HaNotAvailable,
            ProposeError::Expired => Code::ProxyTimeout,
            ProposeError::FeatureLevel { .. } => Code::NotImplemented,
        };
        Self::new(code, error.to_string())
    }
}

impl From<native::Fault> for Fault {
    fn from(fault: native::Fault) -> Self {
        use drumlin_proto::native::status::Code as Told;
        let code = match fault.code {
            Told::Busy => Code::TooManyRequests,
            Told::NotLeader => return Self::not_led(fault.message),
            Told::Unavailable | Told::UnknownOutcome => Code::HaNotAvailable,
            Told::DeadlineExceeded => Code::ProxyTimeout,
            Told::TopicNotFound => Code::TopicNotFound,
            Told::GroupNotFound => Code::ConsumerGroupNotFound,
            Told::InvalidArgument => Code::BadRequest,
            _ => Code::InternalServerError,
        };
        Self::new(code, fault.message)
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        let code = match &refusal {
            Refusal::TopicNotFound | Refusal::QueueNotFound => Code::TopicNotFound,
            Refusal::GroupNotFound => Code::ConsumerGroupNotFound,
            Refusal::TooManyTopics { .. } | Refusal::TooManyGroups { .. } => Code::TooManyRequests,
            Refusal::OffsetOutOfRange { .. } => Code::IllegalOffset,
            Refusal::Lease(_) => Code::InvalidReceiptHandle,
            Refusal::TopicExists(_)
            | Refusal::GroupExists(_)
            | Refusal::LeaseOutdated { .. }
            | Refusal::TopicChanged { .. }
            | Refusal::TopicChanging
            | Refusal::SharesShrink { .. }
            | Refusal::CopyElsewhere { .. }
            | Refusal::CopyForked { .. }
            | Refusal::Malformed { .. } => Code::InternalServerError,
        };
        let text = match &refusal {
            Refusal::Lease(lease) => format!("invalid receipt handle: {lease}"),
            other => other.to_string(),
        };
        Self::new(code, text)
    }
}

/// A reply that carries a status.
pub(super) trait Answer: Default + Send {
    fn status_mut(&mut self) -> &mut Option<Status>;
}

macro_rules! answers {
    ($($answer:ty),* $(,)?) => {$(
        impl Answer for $answer {
            fn status_mut(&mut self) -> &mut Option<Status> {
                &mut self.status
            }
        }
    )*};
}

answers!(
    AckMessageResponse,
    ChangeInvisibleDurationResponse,
    EndTransactionResponse,
    ForwardMessageToDeadLetterQueueResponse,
    GetOffsetResponse,
    HeartbeatResponse,
    NotifyClientTerminationResponse,
    QueryAssignmentResponse,
    QueryOffsetResponse,
    QueryRouteResponse,
    RecallMessageResponse,
    SendMessageResponse,
    SyncLiteSubscriptionResponse,
    UpdateOffsetResponse,
);

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: Code) -> Status {
        Status { code: code.into(), message: String::new() }
    }

    #[test]
    fn overall_status_is_the_common_one_or_multiple_results() {
        assert_eq!(overall([].iter()), None);
        let same = [status(Code::BadRequest), status(Code::BadRequest)];
        assert_eq!(overall(same.iter()).unwrap().code(), Code::BadRequest);
        let mixed = [status(Code::Ok), status(Code::BadRequest)];
        assert_eq!(overall(mixed.iter()).unwrap().code(), Code::MultipleResults);
    }

    #[test]
    fn unknown_topic_text_is_what_programs_look_for() {
        let fault = Fault::topic_not_found("orders");
        let expected = "CODE: 17  DESC: No topic route info in name server for the topic: orders";
        assert_eq!(fault.status().message, expected);
        assert_eq!(fault.status().code(), Code::TopicNotFound);
    }

    #[test]
    fn overload_and_a_full_disk_say_too_many_requests_with_the_cause() {
        let busy = Fault::from(ProposeError::Busy { waiting_bytes: 7, bytes_max: 5 });
        assert_eq!(busy.code, Code::TooManyRequests);
        assert_eq!(busy.text, "7 bytes wait already, 5 are allowed");
        let full = Fault::from(ProposeError::DiskFull("/data is 91 % full".into()));
        assert_eq!(full.code, Code::TooManyRequests);
        assert!(full.text.contains("91 %"), "{}", full.text);
    }

    #[test]
    fn lost_leadership_and_lateness_have_codes_of_their_own() {
        let code = |error: ProposeError| Fault::from(error).code;
        assert_eq!(code(ProposeError::NotLeader { leader: None }), Code::HaNotAvailable);
        assert_eq!(code(ProposeError::UnknownOutcome), Code::HaNotAvailable);
        assert_eq!(code(ProposeError::Expired), Code::ProxyTimeout);
        assert_eq!(code(ProposeError::Stopped("x".into())), Code::HaNotAvailable);
        assert_eq!(code(Refusal::GroupNotFound.into()), Code::ConsumerGroupNotFound);
    }
}
