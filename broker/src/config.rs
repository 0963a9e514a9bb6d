//! What a broker is told at start: typed, checked once.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drumlin_proto::ids::BrokerGroupName;

/// One named listener of the client API.
#[derive(Clone, Debug)]
pub struct ListenerConfig {
    pub name: String,
    /// Port 0: any free one, advertised as bound.
    pub bind: SocketAddr,
    /// What clients are told to dial; `None`: the bound address.
    pub advertised: Option<(String, u16)>,
}

/// A member of the broker group and where the others reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    /// Unique within the cluster.
    pub name: String,
    /// `host:port` of its peer port; of a witness, of its nameserver.
    pub address: String,
}

/// When an entry counts as kept by a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    #[default]
    Sync,
    /// Written, and synced a little later. Votes and membership are always synced.
    Async,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub cluster: String,
    pub broker_group: BrokerGroupName,
    pub catalog_group: BrokerGroupName,
    /// Unique within the cluster.
    pub node: String,
    pub data_dir: PathBuf,
    pub listeners: Vec<ListenerConfig>,
    /// Where other members of the group reach this node.
    pub peers: Option<ListenerConfig>,
    /// Data nodes at the first start, this one among them; empty: this node alone. Their addresses
    /// win over those in the group's membership.
    pub replicas: Vec<NodeAddress>,
    /// Who hosts the witness voter of a group of two.
    pub witness: Option<NodeAddress>,
    /// Leads when it is in step; `None`: the first by name.
    pub preferred_leader: Option<String>,
    pub flush: Flush,
    /// A peer that is owed entries and takes none for so long is given up.
    pub peer_silence_max: Duration,
    pub seed_bytes_per_second_max: Option<u64>,
    pub http: Option<SocketAddr>,
    /// `host:port` of each.
    pub nameservers: Vec<String>,
    /// Create topics on first use.
    pub auto_create_topics: bool,
    pub segment_bytes: u64,
    pub prepared_bytes: u64,
    pub quarantine_bytes_max: u64,
    /// Log bytes between two checkpoints.
    pub checkpoint_bytes: u64,
    pub retention: Duration,
    pub retention_bytes_max: Option<u64>,
    pub in_flight_bytes_max: u64,
    pub topics_max: u32,
    pub groups_max: u32,
    /// Fill of the data disk, percent.
    pub disk_warn_percent: u8,
    pub disk_refuse_percent: u8,
    pub clock_step_max: Duration,
    /// Shortest lease that a consumer may ask for.
    pub invisible_min: Duration,
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
    /// Series of one metric with a topic or group label.
    pub metrics_series_max: u32,
}

impl Config {
    /// One node on loopback with ephemeral ports: for `drumlin dev` and tests, which change it.
    pub fn embedded(data_dir: PathBuf) -> Self {
        let group = BrokerGroupName::parse("broker-a").expect("a valid literal");
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            cluster: "drumlin".into(),
            broker_group: group.clone(),
            catalog_group: group,
            node: "broker-a-0".into(),
            data_dir,
            listeners: vec![ListenerConfig {
                name: "external".into(),
                bind: loopback,
                advertised: None,
            }],
            peers: None,
            replicas: Vec::new(),
            witness: None,
            preferred_leader: None,
            flush: Flush::Sync,
            peer_silence_max: Duration::from_secs(2),
            seed_bytes_per_second_max: None,
            http: Some(loopback),
            nameservers: Vec::new(),
            auto_create_topics: true,
            segment_bytes: 64 << 20,
            prepared_bytes: 64 << 20,
            quarantine_bytes_max: 1 << 30,
            checkpoint_bytes: 256 << 20,
            retention: Duration::from_hours(72),
            retention_bytes_max: None,
            in_flight_bytes_max: 256 << 20,
            topics_max: 10_000,
            groups_max: 10_000,
            disk_warn_percent: 85,
            disk_refuse_percent: 90,
            clock_step_max: Duration::from_secs(10),
            invisible_min: Duration::from_secs(10),
            heartbeat_interval: Duration::from_millis(100),
            election_timeout_min: Duration::from_millis(500),
            election_timeout_max: Duration::from_millis(900),
            metrics_series_max: 10_000,
        }
    }
}
