//! Client calls sent on to the broker group that owns what they are about.
//!
//! Metadata and the rest of the deadline travel along. A call whose broker group has no process to
//! answer is held inside its deadline; one that may have reached a broker is never repeated.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use drumlin_proto::native::Address;
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use parking_lot::Mutex;
use tonic::metadata::{KeyAndValueRef, MetadataMap};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::route_table::RouteTable;
use crate::shared::Shared;

/// Longest answer of a broker: a message of maximal size and its properties, with room.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Patience with calls that carry no deadline.
const NO_DEADLINE_HOLD: Duration = Duration::from_secs(10);
/// What is kept of a deadline for the way back.
const ANSWER_MARGIN: Duration = Duration::from_millis(200);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_PAUSE: Duration = Duration::from_millis(100);
const CHANNELS_MAX: usize = 512;
/// Message groups share this many places in line.
const LINES: usize = 1024;

/// Named by brokers for calls from within the cluster, where they have such a listener.
const INTERNAL_LISTENER: &str = "internal";

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
#[derive(Debug, Clone)]
pub(crate) struct Call {
    metadata: MetadataMap,
    deadline: Option<Instant>,
}

impl Call {
    /// Takes a request apart; its deadline counts from now.
    pub(crate) fn split<T>(request: Request<T>) -> (Self, T) {
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

    fn header(&self, name: &str) -> &str {
        self.metadata.get(name).and_then(|text| text.to_str().ok()).unwrap_or("")
    }

    pub(crate) fn client_id(&self) -> &str {
        self.header(CLIENT_ID).trim()
    }

    pub(crate) fn namespace(&self) -> &str {
        self.header(NAMESPACE)
    }

    /// Until when the call may be held, at most `hold` from now.
    pub(crate) fn hold_until(&self, hold: Duration) -> Instant {
        let held = Instant::now() + hold;
        self.deadline.map_or(held, |deadline| held.min(deadline - ANSWER_MARGIN.min(hold)))
    }

    /// The call for the next process, with what is left of the deadline.
    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
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
    pub(crate) fn endless_request<T>(&self, message: T) -> Request<T> {
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
pub(crate) struct Forwarder {
    channels: Mutex<BTreeMap<(String, u32), Channel>>,
    lines: Vec<tokio::sync::Mutex<()>>,
}

impl Forwarder {
    pub(crate) fn new() -> Self {
        let lines = std::iter::repeat_with(|| tokio::sync::Mutex::new(())).take(LINES).collect();
        Self { channels: Mutex::new(BTreeMap::new()), lines }
    }

    /// The connection to an address, made when it is first used and again after it broke.
    pub(crate) fn channel(&self, address: &Address) -> Result<Channel, Status> {
        let key = (address.host.clone(), address.port);
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| Status::unavailable(format!("a broker's address: {error}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5));
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        let channel = endpoint.connect_lazy();
        channels.insert(key, channel.clone());
        Ok(channel)
    }

    /// A place in line for a message group: sends of one go on one after the other, as they came.
    pub(crate) async fn stand_in_line(
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
pub(crate) fn messaging(channel: Channel) -> MessagingServiceClient<Channel> {
    MessagingServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// A broker's own API.
pub(crate) fn administration(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
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

/// Sends a call to the process that answers for a broker group now.
pub(crate) async fn forward<T, R, F>(
    shared: &Shared,
    broker_group: &str,
    call: &Call,
    message: T,
    send: impl Fn(Channel, Request<T>) -> F,
) -> Result<R, Status>
where
    T: Clone,
    F: Future<Output = Result<Response<R>, Status>>,
{
    let hold_until = call.hold_until(NO_DEADLINE_HOLD);
    loop {
        let look = |table: &RouteTable| table.address(broker_group, INTERNAL_LISTENER);
        let Some(address) = shared.directory.wait_for(hold_until, look).await else {
            let message = format!("no process of broker group {broker_group} is there");
            return Err(Status::unavailable(message));
        };
        let channel = shared.forwarder.channel(&address)?;
        let error = match send(channel, call.request(message.clone())?).await {
            Ok(response) => return Ok(response.into_inner()),
            Err(error) => error,
        };
        if !was_not_sent(&error) || Instant::now() + CONNECT_PAUSE >= hold_until {
            return Err(error);
        }
        tracing::debug!(broker_group, %error, "held a call, its broker cannot be reached");
        tokio::time::sleep(CONNECT_PAUSE).await;
    }
}

/// Any broker group, for calls that every broker answers the same way.
pub(crate) fn any_group(shared: &Shared) -> Result<String, Status> {
    let first = shared.directory.read(|table| {
        let catalog = table.catalog_group().map(str::to_owned);
        catalog.or_else(|| table.live_groups().into_iter().next())
    });
    first.ok_or_else(|| Status::unavailable("no broker has registered yet"))
}

/// Where a stream that outlives single brokers begins: any live broker group, the catalog's first.
pub(crate) fn any_address(table: &RouteTable) -> Option<Address> {
    let catalog = table.catalog_group().map(str::to_owned);
    let groups = catalog.into_iter().chain(table.live_groups());
    groups.filter_map(|group| table.address(&group, INTERNAL_LISTENER)).next()
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
