//! Connections: one HTTP/2 channel per address, dialled on first use and again after it broke.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::error::Error;

/// A body of 4 MiB makes a larger frame, and a fetch may answer with a run of 6 MiB.
pub(crate) const GRPC_BYTES_MAX: usize = 16 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer that is silent for twice this is taken as gone.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// `host:port` of a nameserver or broker, checked.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address(Arc<str>);

impl Address {
    /// Accepts `host:port`, `[v6]:port`, and either behind `http://`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with("https://") {
            return Err(format!("{text:?}: TLS is not supported yet"));
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let parts = address.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>()));
        match parts {
            Some((host, Ok(port))) if !host.is_empty() && port != 0 => {
                // What passes here makes a valid URI, so that dialling cannot fail on its form.
                Endpoint::from_shared(format!("http://{address}"))
                    .map_err(|_| format!("{text:?} is not host:port"))?;
                Ok(Self(address.into()))
            }
            _ => Err(format!("{text:?} is not host:port")),
        }
    }

    pub(crate) fn of_native(address: &drumlin_proto::native::Address) -> Result<Self, String> {
        Self::parse(&address.to_string())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The channels of one client.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    channels: Mutex<HashMap<Address, Channel>>,
}

impl Connections {
    /// The channel to an address; it dials when it is used.
    pub(crate) fn channel(&self, address: &Address) -> Channel {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let dial = || endpoint(address).connect_lazy();
        channels.entry(address.clone()).or_insert_with(dial).clone()
    }

    /// Dials now, to find out whether anyone answers.
    pub(crate) async fn check(&self, address: &Address) -> Result<(), Error> {
        let dialled = endpoint(address).connect().await;
        let channel = dialled.map_err(|error| Error::Unreachable {
            address: address.to_string(),
            reason: root_cause(&error),
        })?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.entry(address.clone()).or_insert(channel);
        Ok(())
    }
}

fn endpoint(address: &Address) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}"))
        .expect("an address is checked when it is parsed")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .tcp_nodelay(true)
}

/// The innermost source, which says what happened; tonic's outer text is "transport error".
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Pauses between attempts: doubling, with jitter, until something works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(20);
    const LAST: Duration = Duration::from_secs(1);

    pub(crate) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// The pause before the next attempt; `jitter` in `0.0..1.0` takes up to half of it away.
    pub(crate) fn pause(&mut self, jitter: f64) -> Duration {
        let pause = self.next.mul_f64(1.0 - jitter / 2.0);
        self.next = (self.next * 2).min(Self::LAST);
        pause
    }

    pub(crate) fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_host_and_port() {
        for text in ["localhost:8081", "http://127.0.0.1:8081/", "[::1]:8081", "broker-a.x:1"] {
            assert!(Address::parse(text).is_ok(), "{text}");
        }
        for text in ["", "localhost", "localhost:", ":8081", "h:0", "h:70000", "https://h:1"] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
        let v6 = drumlin_proto::native::Address { host: "::1".into(), port: 8081 };
        assert_eq!(Address::of_native(&v6).unwrap().as_str(), "[::1]:8081");
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_start_over() {
        let mut backoff = Backoff::new();
        let pauses: Vec<_> = (0..8).map(|_| backoff.pause(0.0).as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.pause(1.0).as_millis(), 10);
    }
}
