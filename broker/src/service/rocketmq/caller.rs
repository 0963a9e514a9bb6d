//! Who calls: what the request's metadata says, read once per call.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::forward::{CLIENT_TYPE, Call, FORWARDED_BY, REQUEST_TIMEOUT_MS};
use drumlin_proto::rocketmq::{ClientType, Code, Status};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

use super::REPLY_MARGIN;
use super::status::Fault;
use crate::service::clients::Registration;

const CLIENT_ID_BYTES_MAX: usize = 1024;
/// For calls that name no timeout: what clients use by default.
pub(super) const UNTIMED: Duration = Duration::from_secs(3);
/// Left of a deadline for the way from the node that does a call to the one that sent it on.
const FORWARD_MARGIN: Duration = Duration::from_millis(100);

/// The client behind one call, also when another node forwarded it.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) client_id: String,
    pub(super) language: String,
    pub(super) version: String,
    /// Of resources that name none themselves; may be empty.
    pub(super) namespace: String,
    /// For the log only.
    pub(super) request_id: String,
    pub(super) deadline: Option<Instant>,
    /// Name of the listener that the call came in on.
    pub(super) listener: Arc<str>,
    /// Another broker sent it here: it is done here or not at all.
    pub(super) forwarded: bool,
    /// Of the client's settings, where the node that sent the call here has them.
    pub(super) client_type: Option<ClientType>,
    pub(super) request_timeout: Option<Duration>,
}

fn text<'a>(metadata: &'a MetadataMap, name: &str) -> &'a str {
    metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().trim()
}

impl Caller {
    pub(super) fn from_metadata(
        metadata: &MetadataMap,
        listener: &Arc<str>,
        now: Instant,
    ) -> Result<Self, Fault> {
        let client_id = text(metadata, "x-mq-client-id");
        if client_id.is_empty() {
            return Err(Fault::new(Code::ClientIdRequired, "x-mq-client-id is missing"));
        }
        if client_id.len() > CLIENT_ID_BYTES_MAX {
            let bytes = client_id.len();
            return Err(Fault::new(
                Code::ClientIdRequired,
                format!("x-mq-client-id has {bytes} bytes, {CLIENT_ID_BYTES_MAX} are allowed"),
            ));
        }
        Ok(Self {
            client_id: client_id.to_owned(),
            language: text(metadata, "x-mq-language").to_owned(),
            version: text(metadata, "x-mq-client-version").to_owned(),
            namespace: text(metadata, "x-mq-namespace").to_owned(),
            request_id: text(metadata, "x-mq-request-id").chars().take(64).collect(),
            deadline: timeout(text(metadata, "grpc-timeout"))
                .and_then(|timeout| now.checked_add(timeout)),
            listener: Arc::clone(listener),
            forwarded: metadata.contains_key(FORWARDED_BY),
            client_type: text(metadata, CLIENT_TYPE)
                .parse()
                .ok()
                .and_then(|number: i32| ClientType::try_from(number).ok())
                .filter(|client_type| *client_type != ClientType::Unspecified),
            request_timeout: text(metadata, REQUEST_TIMEOUT_MS)
                .parse()
                .ok()
                .map(Duration::from_millis),
        })
    }

    /// The call as `node` sends it on, with what it knows of the client.
    pub(super) fn forward(&self, node: &str, known: Option<&Registration>) -> Call {
        let deadline = self.deadline.map(|deadline| deadline - FORWARD_MARGIN);
        let mut call = Call::new(MetadataMap::new(), deadline.map(Instant::into_std));
        for (name, value) in [
            ("x-mq-client-id", &self.client_id),
            ("x-mq-language", &self.language),
            ("x-mq-client-version", &self.version),
            ("x-mq-namespace", &self.namespace),
            ("x-mq-request-id", &self.request_id),
        ] {
            if !value.is_empty() {
                call.set(name, value);
            }
        }
        call.set(FORWARDED_BY, node);
        if let Some(known) = known {
            call.set(CLIENT_TYPE, &i32::from(known.client_type).to_string());
            if let Some(timeout) = known.request_timeout {
                call.set(REQUEST_TIMEOUT_MS, &timeout.as_millis().to_string());
            }
        }
        call
    }

    /// Replaces codes that the client's SDK cannot bear: Rust 5.0.0 panics on numbers that are
    /// newer than itself.
    pub(super) fn bearable(&self, status: &mut Status) {
        if !self.language.eq_ignore_ascii_case("RUST") || self.version != "5.0.0" {
            return;
        }
        let replaced = match status.code() {
            Code::MessageBodyEmpty => Code::MessageCorrupted,
            Code::IllegalOffset | Code::IllegalLiteTopic | Code::InvalidClientProperties => {
                Code::BadRequest
            }
            Code::OffsetNotFound => Code::NotFound,
            Code::LiteTopicQuotaExceeded | Code::LiteSubscriptionQuotaExceeded => {
                Code::TooManyRequests
            }
            _ => return,
        };
        status.code = replaced.into();
    }

    /// When a call must be answered for the client to hear of it.
    pub(super) fn answer_by(&self, now: Instant) -> Instant {
        match self.remaining(now) {
            Some(left) => now + left.saturating_sub(REPLY_MARGIN.min(left / 4)),
            None => now + UNTIMED,
        }
    }

    /// Time left before the deadline; `None` without one.
    pub(super) fn remaining(&self, now: Instant) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(now))
    }
}

/// A `grpc-timeout` header: up to eight digits and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut map = MetadataMap::new();
        for (name, value) in pairs {
            map.insert(*name, value.parse().unwrap());
        }
        map
    }

    fn caller(pairs: &[(&'static str, &str)], now: Instant) -> Result<Caller, Fault> {
        Caller::from_metadata(&metadata(pairs), &"external".into(), now)
    }

    #[test]
    fn what_is_sent_on_tells_the_leader_the_same() {
        let now = Instant::now();
        let pairs = [
            ("x-mq-client-id", "c"),
            ("x-mq-language", "GO"),
            ("x-mq-namespace", "eu"),
            ("grpc-timeout", "3S"),
        ];
        let told = caller(&pairs, now).unwrap();
        assert!(!told.forwarded);
        let clients = crate::service::clients::Clients::default();
        let sighting = crate::service::clients::Sighting {
            client_type: Some(ClientType::SimpleConsumer),
            request_timeout: Some(Duration::from_secs(9)),
            ..Default::default()
        };
        clients.register("c", sighting, now, |_| Vec::new()).unwrap();
        let sent = told.forward("a1", clients.get("c").as_ref()).request(()).unwrap();
        let heard = Caller::from_metadata(sent.metadata(), &"internal".into(), now).unwrap();
        assert!(heard.forwarded);
        assert_eq!((&*heard.client_id, &*heard.language, &*heard.namespace), ("c", "GO", "eu"));
        assert_eq!(heard.client_type, Some(ClientType::SimpleConsumer));
        assert_eq!(heard.request_timeout, Some(Duration::from_secs(9)));
        assert!(heard.remaining(now).unwrap() < Duration::from_secs(3), "time for the way back");
    }

    #[test]
    fn client_id_is_required() {
        let now = Instant::now();
        for pairs in [&[][..], &[("x-mq-client-id", "  ")][..]] {
            let fault = caller(pairs, now).unwrap_err();
            assert_eq!(fault.code, Code::ClientIdRequired);
        }
        let long = "c".repeat(CLIENT_ID_BYTES_MAX + 1);
        let fault = caller(&[("x-mq-client-id", &long)], now).unwrap_err();
        assert_eq!(fault.code, Code::ClientIdRequired);
    }

    #[test]
    fn grpc_timeouts_are_read_in_every_unit() {
        for (text, expected) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("4m", Some(Duration::from_millis(4))),
            ("5u", Some(Duration::from_micros(5))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("", None),
            ("S", None),
            ("-1S", None),
            ("999999999S", None),
            ("1s", None),
            ("1é", None),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
        ] {
            assert_eq!(timeout(text), expected, "{text:?}");
        }
    }

    #[test]
    fn deadline_comes_from_the_timeout() {
        let now = Instant::now();
        let pairs = [("x-mq-client-id", "c"), ("grpc-timeout", "3S")];
        let caller = caller(&pairs, now).unwrap();
        assert_eq!(caller.remaining(now), Some(Duration::from_secs(3)));
        assert_eq!(caller.remaining(now + Duration::from_secs(4)), Some(Duration::ZERO));
    }

    #[test]
    fn an_answer_leaves_time_for_its_way() {
        let now = Instant::now();
        let answer_in_ms = |timeout: Option<&str>| {
            let pairs = [("x-mq-client-id", "c"), ("grpc-timeout", timeout.unwrap_or(""))];
            let caller = caller(&pairs, now).unwrap();
            caller.answer_by(now).duration_since(now).as_millis()
        };
        assert_eq!(answer_in_ms(Some("3S")), 2500);
        assert_eq!(answer_in_ms(Some("400m")), 300);
        assert_eq!(answer_in_ms(Some("0m")), 0);
        assert_eq!(answer_in_ms(None), 3000);
    }

    #[test]
    fn rust_5_0_0_gets_no_code_that_it_does_not_know() {
        let status = |code: Code| Status { code: code.into(), message: "text".into() };
        let pairs = |version| {
            [("x-mq-client-id", "c"), ("x-mq-language", "RUST"), ("x-mq-client-version", version)]
        };
        let old = caller(&pairs("5.0.0"), Instant::now()).unwrap();
        let new = caller(&pairs("5.1.0"), Instant::now()).unwrap();
        for (code, told) in [
            (Code::MessageBodyEmpty, Code::MessageCorrupted),
            (Code::IllegalOffset, Code::BadRequest),
            (Code::IllegalLiteTopic, Code::BadRequest),
            (Code::InvalidClientProperties, Code::BadRequest),
            (Code::OffsetNotFound, Code::NotFound),
            (Code::LiteTopicQuotaExceeded, Code::TooManyRequests),
            (Code::LiteSubscriptionQuotaExceeded, Code::TooManyRequests),
            (Code::MessageBodyTooLarge, Code::MessageBodyTooLarge),
            (Code::Ok, Code::Ok),
        ] {
            let mut seen = status(code);
            old.bearable(&mut seen);
            assert_eq!(seen, status(told));
            let mut seen = status(code);
            new.bearable(&mut seen);
            assert_eq!(seen, status(code));
        }
    }
}
