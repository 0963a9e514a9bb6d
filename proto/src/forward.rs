//! Calls that one process sends on to another for a client: what nameservers and followers share.
//!
//! Metadata and the rest of the deadline travel along. A call that found nobody to take it is held
//! inside its deadline. One that may have been taken is repeated only where doing it twice is what
//! its client would do, too: see [`IfLost`]. Knows no broker group: where to send is asked of the
//! caller.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tonic::metadata::{KeyAndValueRef, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::native::Address;
use crate::native::admin_client::AdminClient;
use crate::rocketmq::messaging_service_client::MessagingServiceClient;

pub mod acks;
pub mod polls;

/// Longest answer of a broker: a message of maximal size and its properties, with room.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Named by brokers for calls from within the cluster, where they have such a listener.
pub const INTERNAL_LISTENER: &str = "internal";

/// Set by a broker that sends a call on, to its node's name: whoever gets it sends it nowhere else.
pub const FORWARDED_BY: &str = "drumlin-forwarded-by";
/// Of the client's settings, which the process that forwards has: its type, as a number.
pub const CLIENT_TYPE: &str = "drumlin-client-type";
/// Of the client's settings: how long its calls take at most, ms.
pub const REQUEST_TIMEOUT_MS: &str = "drumlin-request-timeout-ms";
/// In an answer: nothing was done, because its process does not lead the broker group.
pub const NOT_LED: &str = "drumlin-not-led";

/// Patience with calls that carry no deadline.
pub const NO_DEADLINE_HOLD: Duration = Duration::from_secs(10);
/// What is kept of a deadline for the way back.
const ANSWER_MARGIN: Duration = Duration::from_millis(200);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Before a place that took nothing is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How often is looked whether another process answers for a call that waits for its answer; also
/// how long one that does not any more may take to answer: it may be frozen or cut off.
const DEPOSED_INTERVAL: Duration = Duration::from_millis(500);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const CHANNELS_MAX: usize = 512;
/// Message groups share this many places in line.
const LINES: usize = 1024;

const CLIENT_ID: &str = "x-mq-client-id";
const NAMESPACE: &str = "x-mq-namespace";
const TIMEOUT: &str = "grpc-timeout";
/// What belongs to one connection, not to the call.
const HOP_HEADERS: [&str; 9] = [
    TIMEOUT,
    "grpc-encoding",
    "grpc-accept-encoding",
    "content-type",
    "content-length",
    "user-agent",
    "te",
    "host",
    "connection",
];

/// A client's call without its message: who calls, and until when.
#[derive(Debug, Clone, Default)]
pub struct Call {
    metadata: MetadataMap,
    deadline: Option<Instant>,
}

impl Call {
    /// Takes a request apart; its deadline counts from now.
    pub fn split<T>(request: Request<T>) -> (Self, T) {
        let (headers, _, message) = request.into_parts();
        let timeout = headers.get(TIMEOUT).and_then(|text| text.to_str().ok());
        let deadline = timeout.and_then(parse_timeout).and_then(|left| {
            // A deadline beyond what the clock can tell is none.
            Instant::now().checked_add(left)
        });
        let mut metadata = MetadataMap::with_capacity(headers.len());
        for pair in headers.iter() {
            match pair {
                KeyAndValueRef::Ascii(key, value) if !HOP_HEADERS.contains(&key.as_str()) => {
                    metadata.append(key, value.clone());
                }
                KeyAndValueRef::Ascii(..) => {}
                KeyAndValueRef::Binary(key, value) => {
                    metadata.append_bin(key, value.clone());
                }
            }
        }
        (Self { metadata, deadline }, message)
    }

    /// A call made of what is known of it.
    pub fn new(metadata: MetadataMap, deadline: Option<Instant>) -> Self {
        Self { metadata, deadline }
    }

    /// Sets a header; text that no header can hold is left out.
    pub fn set(&mut self, name: &'static str, text: &str) {
        if let Ok(value) = MetadataValue::try_from(text) {
            self.metadata.insert(name, value);
        }
    }

    fn header(&self, name: &str) -> &str {
        self.metadata.get(name).and_then(|text| text.to_str().ok()).unwrap_or("")
    }

    pub fn client_id(&self) -> &str {
        self.header(CLIENT_ID).trim()
    }

    pub fn namespace(&self) -> &str {
        self.header(NAMESPACE)
    }

    /// Until when the call may be held, at most `hold` from now.
    pub fn hold_until(&self, hold: Duration) -> Instant {
        let held = Instant::now() + hold;
        self.deadline.map_or(held, |deadline| held.min(deadline - ANSWER_MARGIN.min(hold)))
    }

    /// The call for the next process, with what is left of the deadline.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = self.endless_request(message);
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Status::deadline_exceeded("the deadline passed before forwarding"));
            }
            request.set_timeout(left);
        }
        Ok(request)
    }

    /// As [`Self::request`], for streams that outlive deadlines.
    pub fn endless_request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        *request.metadata_mut() = self.metadata.clone();
        request
    }
}

/// The `grpc-timeout` header: up to 8 digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// Connections to brokers, and the lines that message groups wait in.
#[derive(Debug)]
pub struct Forwarder {
    channels: Mutex<BTreeMap<(String, u32), Channel>>,
    lines: Vec<tokio::sync::Mutex<()>>,
}

impl Default for Forwarder {
    fn default() -> Self {
        let lines = std::iter::repeat_with(|| tokio::sync::Mutex::new(())).take(LINES).collect();
        Self { channels: Mutex::new(BTreeMap::new()), lines }
    }
}

impl Forwarder {
    /// The connection to an address, made when it is first used and again after it broke.
    pub fn channel(&self, address: &Address) -> Result<Channel, Status> {
        let key = (address.host.clone(), address.port);
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Status::unavailable(format!("a broker's address: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        let channel = endpoint.connect_lazy();
        channels.insert(key, channel.clone());
        Ok(channel)
    }

    /// A place in line for a message group: sends of one go on one after the other, as they came.
    pub async fn stand_in_line(
        &self,
        topic: &str,
        message_group: &str,
    ) -> tokio::sync::MutexGuard<'_, ()> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (topic, message_group).hash(&mut hasher);
        let lines = u64::try_from(LINES).unwrap_or(1);
        let line = usize::try_from(hasher.finish() % lines).unwrap_or(0);
        self.lines.get(line).expect("the remainder is below the count").lock().await
    }
}

/// A broker's RocketMQ API.
pub fn messaging(channel: Channel) -> MessagingServiceClient<Channel> {
    MessagingServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// A broker's own API.
pub fn administration(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// What becomes of a call whose process went away before it answered: it may have been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfLost {
    /// That is told.
    Fail,
    /// The next process does it, perhaps for the second time. Right for whatever RocketMQ's clients
    /// do again by themselves: a message may be stored twice, a delivery may be repeated.
    Repeat,
}

/// Whether the way to a process broke: what it told itself has no cause beyond it.
fn is_lost(status: &Status) -> bool {
    status.source().is_some()
}

/// Whether the call cannot have reached anyone.
fn was_not_sent(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Why a call brought no answer of the process that it is for.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// Nothing was done: nobody took it in time.
    #[error("no process took the call in time")]
    Nobody,
    /// It may have been done.
    #[error("{}", .0.message())]
    Failed(Status),
}

/// Sends a call to the address that `find` gives, until one does it or `hold_until` has come.
/// `find` is told that time, and waits for an address until then.
pub async fn carry<T, R, A, F>(
    forwarder: &Forwarder,
    call: &Call,
    message: T,
    if_lost: IfLost,
    hold_until: Instant,
    find: impl Fn(Instant) -> A,
    send: impl Fn(Channel, Request<T>) -> F,
) -> Result<Response<R>, CarryError>
where
    T: Clone,
    A: Future<Output = Option<Address>>,
    F: Future<Output = Result<Response<R>, Status>>,
{
    // Once it may have been done, that stays so whatever comes after it.
    let mut lost: Option<Status> = None;
    let failed = |lost: Option<Status>| lost.map_or(CarryError::Nobody, CarryError::Failed);
    loop {
        let Some(address) = find(hold_until).await else { return Err(failed(lost)) };
        let channel = forwarder.channel(&address).map_err(CarryError::Failed)?;
        let request = match call.request(message.clone()) {
            Ok(request) => request,
            Err(late) => return Err(CarryError::Failed(lost.unwrap_or(late))),
        };
        let answer = tokio::select! {
            answer = send(channel, request) => answer,
            () = deposed(&address, &find), if if_lost == IfLost::Repeat => {
                let text = format!("{address} did not answer before another process took over");
                lost = Some(Status::unavailable(text));
                continue;
            }
        };
        match answer {
            Ok(response) if !response.metadata().contains_key(NOT_LED) => return Ok(response),
            Ok(_) => tracing::debug!(%address, "held a call, who got it does not lead"),
            Err(error) if was_not_sent(&error) => {
                tracing::debug!(%address, %error, "held a call, nobody can be reached there");
            }
            Err(error) if if_lost == IfLost::Repeat && is_lost(&error) => {
                tracing::debug!(%address, %error, "repeats a call, who got it went away");
                lost = Some(error);
            }
            Err(error) => return Err(CarryError::Failed(error)),
        }
        if Instant::now() + RETRY_PAUSE >= hold_until {
            return Err(failed(lost));
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Until another process than the one at `address` answers for a call.
async fn deposed<A>(address: &Address, find: impl Fn(Instant) -> A)
where
    A: Future<Output = Option<Address>>,
{
    loop {
        tokio::time::sleep(DEPOSED_INTERVAL).await;
        if find(Instant::now()).await.is_some_and(|other| other != *address) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_in_every_unit() {
        assert_eq!(parse_timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(parse_timeout("525600H"), Some(Duration::from_secs(525_600 * 3600)));
        assert_eq!(parse_timeout("2999000u"), Some(Duration::from_millis(2999)));
        for wrong in ["", "S", "123456789S", "3", "-3S", "3s"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_belongs_to_the_connection_is_not_forwarded() {
        let mut request = Request::new(());
        for (name, value) in [("grpc-accept-encoding", "gzip"), ("user-agent", "x")] {
            request.metadata_mut().insert(name, value.parse().unwrap());
        }
        request.metadata_mut().insert("x-mq-client-id", "me".parse().unwrap());
        request.set_timeout(Duration::from_secs(3));
        let (call, ()) = Call::split(request);
        assert_eq!(call.client_id(), "me");
        let forwarded = call.request(()).unwrap();
        assert_eq!(forwarded.metadata().len(), 2, "the client id and a deadline");
        let left = forwarded.metadata().get(TIMEOUT).unwrap().to_str().unwrap();
        let left = parse_timeout(left).unwrap();
        assert!(left <= Duration::from_secs(3) && left > Duration::from_secs(2), "{left:?}");
    }
}
