//! What a nameserver is told at start: typed, checked once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::route_table::Timing;

/// One named listener. Brokers' listeners of the same name are what its callers are told to dial.
#[derive(Clone, Debug)]
pub struct ListenerConfig {
    pub name: String,
    /// Port 0: any free one, advertised as bound.
    pub bind: SocketAddr,
    /// What clients are told to dial with [`RouteMode::ViaEndpoint`]; `None`: the bound address.
    /// Port 0: the bound one.
    pub advertised: Option<(String, u16)>,
}

/// Whose addresses routes carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteMode {
    /// The brokers'.
    Direct,
    /// This nameserver's own: it forwards everything.
    ViaEndpoint,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub cluster: String,
    /// Unique within the cluster.
    pub node: String,
    pub data_dir: PathBuf,
    pub listeners: Vec<ListenerConfig>,
    pub http: Option<SocketAddr>,
    pub route_mode: RouteMode,
    /// Create topics when a client asks for their route.
    pub auto_create_topics: bool,
    /// Queues of such a topic on each broker group.
    pub auto_create_queue_count: u32,
    /// Silence after which a broker's registration ends.
    pub registration_expiry: Duration,
    /// Time that a broken registration has to come back before routes drop the address.
    pub broken_grace: Duration,
    /// Longest time that a query is held for an answer.
    pub query_hold: Duration,
    /// Longest time after the start that remembered brokers are waited for.
    pub start_wait: Duration,
}

impl Config {
    /// On loopback with an ephemeral port: for `drumlin dev` and tests, which change it.
    pub fn embedded(data_dir: PathBuf) -> Self {
        Self {
            cluster: "drumlin".into(),
            node: "nameserver-0".into(),
            data_dir,
            listeners: vec![ListenerConfig {
                name: "external".into(),
                bind: SocketAddr::from(([127, 0, 0, 1], 0)),
                advertised: None,
            }],
            http: None,
            route_mode: RouteMode::Direct,
            auto_create_topics: true,
            auto_create_queue_count: 8,
            registration_expiry: Duration::from_secs(5),
            broken_grace: Duration::from_millis(300),
            query_hold: Duration::from_secs(2),
            start_wait: Duration::from_secs(5),
        }
    }

    pub(crate) fn timing(&self) -> Timing {
        Timing {
            expiry: self.registration_expiry,
            broken_grace: self.broken_grace,
            start_wait: self.start_wait,
        }
    }
}
