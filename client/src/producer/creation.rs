//! Topics that are created on first use: when that is asked for, and what comes of it.

use tokio::time::Instant;

use crate::admin::{Admin, NewTopic};
use crate::connection::Backoff;
use crate::error::{Code, Error};

/// Queues on each broker group of a topic that is created on first use, as RocketMQ has it.
const AUTO_CREATE_QUEUE_COUNT: u32 = 8;

/// How far a topic is with being created on first use.
#[derive(Debug)]
pub(super) struct Creation {
    asking: bool,
    /// Not asked again before.
    retry_at: Option<Instant>,
    backoff: Backoff,
    pub(super) last_failure: Option<String>,
}

impl Creation {
    pub(super) fn new() -> Self {
        Self { asking: false, retry_at: None, backoff: Backoff::new(), last_failure: None }
    }

    pub(super) fn may_ask(&self, now: Instant) -> bool {
        !self.asking && self.retry_at.is_none_or(|at| at <= now)
    }

    pub(super) fn asked(&mut self) {
        self.asking = true;
    }

    /// Takes what came of it; a failure that may pass is tried again after a pause.
    pub(super) fn answered(&mut self, result: &Result<(), Error>, now: Instant) {
        self.asking = false;
        match result {
            Err(error) if error.is_retryable() => {
                self.retry_at = Some(now + self.backoff.pause(fastrand::f64()));
                self.last_failure = Some(error.to_string());
            }
            Ok(()) | Err(_) => *self = Self::new(),
        }
    }
}

/// Creates a topic on first use. Where that is off it may still have been created by someone else
/// since the route was pushed.
pub(super) async fn create(admin: &Admin, name: &str) -> Result<(), Error> {
    let new = NewTopic::new(name, AUTO_CREATE_QUEUE_COUNT).auto();
    let Err(error) = admin.create_topic(new).await else { return Ok(()) };
    if !matches!(error.code(), Code::Unsupported | Code::PreconditionFailed) {
        return Err(error);
    }
    match admin.describe_topic(name).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_retryable() => Err(error),
        Err(_) => Err(Error::TopicNotFound { topic: name.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn creation_is_asked_for_again_after_a_pause_where_that_may_help() {
        let busy = Err(Error::Refused { code: Code::Busy, message: String::new() });
        let off = Err(Error::TopicNotFound { topic: "t".into() });
        let (mut creation, now) = (Creation::new(), Instant::now());
        assert!(creation.may_ask(now));
        creation.asked();
        assert!(!creation.may_ask(now), "one question at a time");
        creation.answered(&busy, now);
        assert!(!creation.may_ask(now), "a pause comes first");
        assert!(creation.may_ask(now + Duration::from_secs(1)));
        creation.asked();
        creation.answered(&off, now);
        assert!(creation.may_ask(now), "whoever sends next is told anew");
    }
}
