//! Keys of a broker.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drumlin_broker::config::{Config, Flush, ListenerConfig};
use drumlin_proto::ids::BrokerGroupName;

use super::check;
use super::key::{role, section};
use super::reader::Reader;
use super::value::{Bytes, HostPort, NodeAddress, Value};

section! {
    /// Which cluster and which broker group this node belongs to.
    Cluster("cluster") {
        /// Nodes of another cluster are refused.
        name: String = "drumlin";
        /// The broker group that owns the definitions of topics and consumer groups. Off: this
        /// broker's own group.
        catalog_group: Option<BrokerGroupName> = "";
    }
}

section! {
    /// This node.
    Node("node") {
        /// Unique within the cluster.
        name: String = "broker-a-0";
        /// The Raft group whose commitlog this node keeps.
        broker_group: BrokerGroupName = "broker-a";
        /// Log, checkpoints and indexes. Must belong to the user that runs the broker.
        data_dir: PathBuf = "./data/broker";
    }
}

section! {
    /// Where clients reach this broker. A route answers with the address of the listener that the
    /// query came in on, so clients inside and outside of a container network each get addresses
    /// that they can reach.
    Listeners("listeners") {
        /// Allows addresses beyond loopback although neither TLS nor authentication exist yet.
        /// Warns at every start.
        allow_insecure: bool = "false";
    }
}

section! {
    /// For clients outside of the cluster's network.
    External("listeners.external") {
        /// Port 0: any free one.
        bind: SocketAddr = "127.0.0.1:8081";
        /// What clients are told to dial. Off: the bound address.
        advertised: Option<HostPort> = "";
    }
}

section! {
    /// For clients inside of the cluster's network.
    Internal("listeners.internal") {
        /// Off: there is no such listener.
        bind: Option<SocketAddr> = "";
        /// What clients are told to dial. Off: the bound address.
        advertised: Option<HostPort> = "";
    }
}

section! {
    /// Where the other members of the broker group reach this node: Raft and the files of a re-seed.
    Peers("listeners.peers") {
        /// Off: no such listener; only a group of one node can do without.
        bind: Option<SocketAddr> = "";
        /// What the others dial. Off: the bound address.
        advertised: Option<HostPort> = "";
    }
}

section! {
    /// The broker group as it is made at its first start. Later changes are commands
    /// (`drumlin cluster add`, ...); the addresses here win over those that the group has recorded.
    Replicas("replicas") {
        /// Data nodes of the group, this one among them. Empty: this node alone. Two need a
        /// witness, other even numbers are refused.
        nodes: Vec<NodeAddress> = "";
        /// The nameserver that hosts the witness voter of a group of two. On another machine than
        /// either data node.
        witness: Option<NodeAddress> = "";
        /// Leads when it is in step with the others. Off: the first by name.
        preferred_leader: Option<String> = "";
    }
}

section! {
    /// Health (/livez, /readyz) and metrics (/metrics).
    Http("http") {
        /// Off: no HTTP port; `drumlin health` then has nothing to ask.
        bind: Option<SocketAddr> = "127.0.0.1:8082";
    }
}

section! {
    /// Nameservers that this broker registers at.
    Nameservers("nameservers") {
        /// All of them: each holds its own registrations. An empty list: clients use this broker
        /// alone.
        addresses: Vec<HostPort> = "";
    }
}

section! {
    /// Topics and consumer groups.
    Topics("topics") {
        /// Creates a topic when a client first asks for its route: 8 queues, any kind of message.
        auto_create: bool = "false";
        /// Creation is refused beyond it.
        topics_max: u32 = "10000", min "1", max "1000000";
        /// Creation is refused beyond it.
        groups_max: u32 = "10000", min "1", max "1000000";
        /// Shortest time that a consumer may ask to hold a message unacknowledged.
        invisible_min: Duration = "10s", unit "s", min "10ms", max "12h";
    }
}

section! {
    /// The commitlog.
    Log("log") {
        /// Size of one file. Retention frees whole files.
        segment_bytes: Bytes = "1GiB", unit "B", min "1MiB", max "16GiB";
        /// Zeroed space kept ahead of the writer, because overwriting makes a sync cheaper than
        /// appending.
        prepared_bytes: Bytes = "64MiB", unit "B", max "1GiB";
        /// Space for entries that were cut off; the oldest go first.
        quarantine_bytes_max: Bytes = "1GiB", unit "B";
        /// sync: a message is acknowledged once it is on the disks. async: once it is written and
        /// committed, and synced within half a second: the loss of power of both data nodes, or of
        /// one that stands alone, may lose acknowledged messages, and an operator must then decide
        /// who leads. Alike on all data nodes of the broker group.
        flush: Flush = "sync";
        /// Log bytes between two checkpoints: what a start has to replay at most.
        checkpoint_bytes: Bytes = "256MiB", unit "B", min "1MiB", max "64GiB";
    }
}

section! {
    /// What may be forgotten.
    Retention("retention") {
        /// Messages are kept at least so long.
        retention_hours: Duration = "72h", unit "h", min "1m";
        /// Trims older messages beyond it, whatever their age. Off: age alone decides.
        retention_bytes_max: Option<Bytes> = "", unit "B", min "16MiB";
    }
}

section! {
    /// The data disk. Both marks are judged by its fill.
    Disk("disk") {
        /// Warns in log and metrics.
        warn_percent: u8 = "85", unit "%", min "1", max "99";
        /// Refuses messages with a clear error; reads go on, and writes resume by themselves.
        refuse_percent: u8 = "90", unit "%", min "1", max "100";
    }
}

section! {
    /// What the broker takes on at once.
    Limits("limits") {
        /// Bytes of messages that are not acknowledged yet. Beyond it clients are told to back off.
        in_flight_bytes_max: Bytes = "256MiB", unit "B", min "16MiB", max "64GiB";
    }
}

section! {
    /// Consensus within the broker group.
    Raft("raft") {
        /// How often the leader is heard of.
        heartbeat_interval: Duration = "100ms", unit "ms", min "10ms", max "10s";
        /// A follower that hears nothing campaigns after a time between this ...
        election_timeout_min: Duration = "500ms", unit "ms", min "50ms", max "60s";
        /// ... and this.
        election_timeout_max: Duration = "900ms", unit "ms", min "50ms", max "60s";
        /// A peer that is owed entries and takes none for so long is given up, and the leader goes
        /// on with the witness: acknowledged messages then have one copy.
        peer_silence_max: Duration = "2s", unit "ms", min "100ms", max "60s";
        /// Bytes a second that a re-seed of another node may take. Off: what the disk and the
        /// network give.
        seed_bytes_per_second_max: Option<Bytes> = "", unit "B", min "1MiB";
        /// Largest step of the wall clock that store times follow at once.
        clock_step_max: Duration = "10s", unit "s", max "1h";
    }
}

section! {
    /// Metrics on the HTTP port.
    Metrics("metrics") {
        /// Series of one metric with a topic or group label; what is beyond shares `__other__`.
        series_max: u32 = "10000", min "1", max "1000000";
    }
}

role! {
    /// A broker, as configured.
    BrokerKeys {
        cluster: Cluster,
        node: Node,
        listeners: Listeners,
        external: External,
        internal: Internal,
        peers: Peers,
        replicas: Replicas,
        http: Http,
        nameservers: Nameservers,
        topics: Topics,
        log: Log,
        retention: Retention,
        disk: Disk,
        limits: Limits,
        raft: Raft,
        metrics: Metrics,
    }
}

impl BrokerKeys {
    /// Addresses that the process will listen on, with their keys.
    pub(crate) fn binds(&self) -> Vec<check::Bound> {
        let mut binds = vec![("listeners.external.bind", self.external.bind)];
        binds.extend(self.internal.bind.map(|bind| ("listeners.internal.bind", bind)));
        binds.extend(self.peers.bind.map(|bind| ("listeners.peers.bind", bind)));
        binds.extend(self.http.bind.map(|bind| ("http.bind", bind)));
        binds
    }

    fn check_together(&self, reader: &mut Reader) {
        check::binds(reader, &self.binds(), self.listeners.allow_insecure);
        check::advertised(
            reader,
            "listeners.external.bind",
            self.external.bind,
            "listeners.external.advertised",
            self.external.advertised.as_ref(),
        );
        match (self.internal.bind, &self.internal.advertised) {
            (Some(bind), advertised) => check::advertised(
                reader,
                "listeners.internal.bind",
                bind,
                "listeners.internal.advertised",
                advertised.as_ref(),
            ),
            (None, Some(_)) => reader.fault(
                "listeners.internal.advertised",
                "is set, but listeners.internal.bind is off".into(),
            ),
            (None, None) => {}
        }
        self.check_replicas(reader);
        self.check_sizes(reader);
        self.check_raft(reader);
    }

    fn check_replicas(&self, reader: &mut Reader) {
        let Replicas { nodes, witness, preferred_leader } = &self.replicas;
        let mut names: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        if names.len() < count {
            reader.fault("replicas.nodes", "names a node twice".into());
        }
        if count > 0 && !names.contains(&self.node.name.as_str()) {
            reader.fault("replicas.nodes", format!("lacks this node, {:?}", self.node.name));
        }
        if count > 2 && count % 2 == 0 {
            reader
                .fault("replicas.nodes", "is an even number of nodes: use 1, 2, 3, 5, ...".into());
        }
        match (count, witness) {
            (2, None) => {
                reader.fault("replicas.witness", "is off, but two data nodes need one".into());
            }
            (2, Some(_)) | (_, None) => {}
            (_, Some(_)) => {
                reader.fault("replicas.witness", "is only for groups of two data nodes".into());
            }
        }
        if count > 1 && self.peers.bind.is_none() {
            reader.fault("listeners.peers.bind", "is off, but the group has other nodes".into());
        }
        if count > 1 && self.cluster.catalog_group.is_none() {
            reader.fault("cluster.catalog_group", "is off; name it on every broker".into());
        }
        if let Some(name) = preferred_leader
            && !names.contains(&name.as_str())
        {
            reader.fault("replicas.preferred_leader", format!("{name:?} is not in replicas.nodes"));
        }
        match (self.peers.bind, &self.peers.advertised) {
            (Some(bind), advertised) => check::advertised(
                reader,
                "listeners.peers.bind",
                bind,
                "listeners.peers.advertised",
                advertised.as_ref(),
            ),
            (None, Some(_)) => reader.fault(
                "listeners.peers.advertised",
                "is set, but listeners.peers.bind is off".into(),
            ),
            (None, None) => {}
        }
    }

    fn check_sizes(&self, reader: &mut Reader) {
        let Log { segment_bytes, prepared_bytes, .. } = self.log;
        if prepared_bytes > segment_bytes {
            reader.fault(
                "log.prepared_bytes",
                format!("is more than log.segment_bytes, {} B", segment_bytes.0),
            );
        }
        if !segment_bytes.0.is_multiple_of(4096) {
            reader.fault("log.segment_bytes", "is not a multiple of 4096".into());
        }
        let Disk { warn_percent, refuse_percent } = self.disk;
        if warn_percent > refuse_percent {
            reader.fault(
                "disk.warn_percent",
                format!("is {warn_percent}, more than disk.refuse_percent, {refuse_percent}"),
            );
        }
        if let Some(bytes_max) = self.retention.retention_bytes_max
            && bytes_max.0 < 2 * segment_bytes.0
        {
            reader.fault(
                "retention.retention_bytes_max",
                "is less than two segments (log.segment_bytes), and only whole ones are freed"
                    .into(),
            );
        }
    }

    fn check_raft(&self, reader: &mut Reader) {
        let Raft { heartbeat_interval, election_timeout_min, election_timeout_max, .. } = self.raft;
        if election_timeout_min >= election_timeout_max {
            reader.fault(
                "raft.election_timeout_min",
                "is not less than raft.election_timeout_max".into(),
            );
        }
        if heartbeat_interval * 2 > election_timeout_min {
            reader.fault(
                "raft.heartbeat_interval",
                "is more than half of raft.election_timeout_min: one lost heartbeat would cost \
                 the leader its place"
                    .into(),
            );
        }
    }

    /// What the broker is started with.
    pub(crate) fn config(&self) -> Config {
        let group = &self.node.broker_group;
        let mut listeners =
            vec![listener("external", self.external.bind, self.external.advertised.as_ref())];
        listeners.extend(
            self.internal
                .bind
                .map(|bind| listener("internal", bind, self.internal.advertised.as_ref())),
        );
        Config {
            cluster: self.cluster.name.clone(),
            broker_group: group.clone(),
            catalog_group: self.cluster.catalog_group.clone().unwrap_or_else(|| group.clone()),
            node: self.node.name.clone(),
            data_dir: self.node.data_dir.clone(),
            listeners,
            peers: self
                .peers
                .bind
                .map(|bind| listener("peers", bind, self.peers.advertised.as_ref())),
            replicas: self.replicas.nodes.iter().map(node_address).collect(),
            witness: self.replicas.witness.as_ref().map(node_address),
            preferred_leader: self.replicas.preferred_leader.clone(),
            flush: self.log.flush,
            peer_silence_max: self.raft.peer_silence_max,
            seed_bytes_per_second_max: self.raft.seed_bytes_per_second_max.map(|bytes| bytes.0),
            http: self.http.bind,
            nameservers: self.nameservers.addresses.iter().map(HostPort::to_string).collect(),
            auto_create_topics: self.topics.auto_create,
            segment_bytes: self.log.segment_bytes.0,
            prepared_bytes: self.log.prepared_bytes.0,
            quarantine_bytes_max: self.log.quarantine_bytes_max.0,
            checkpoint_bytes: self.log.checkpoint_bytes.0,
            retention: self.retention.retention_hours,
            retention_bytes_max: self.retention.retention_bytes_max.map(|bytes| bytes.0),
            in_flight_bytes_max: self.limits.in_flight_bytes_max.0,
            topics_max: self.topics.topics_max,
            groups_max: self.topics.groups_max,
            disk_warn_percent: self.disk.warn_percent,
            disk_refuse_percent: self.disk.refuse_percent,
            clock_step_max: self.raft.clock_step_max,
            invisible_min: self.topics.invisible_min,
            heartbeat_interval: self.raft.heartbeat_interval,
            election_timeout_min: self.raft.election_timeout_min,
            election_timeout_max: self.raft.election_timeout_max,
            metrics_series_max: self.metrics.series_max,
        }
    }
}

fn node_address(node: &NodeAddress) -> drumlin_broker::config::NodeAddress {
    drumlin_broker::config::NodeAddress {
        name: node.name.clone(),
        address: node.address.to_string(),
    }
}

fn listener(name: &str, bind: SocketAddr, advertised: Option<&HostPort>) -> ListenerConfig {
    let advertised = advertised.map(|address| (address.host.clone(), address.port));
    ListenerConfig { name: name.into(), bind, advertised }
}

impl Value for Flush {
    const KIND: &'static str = "sync or async";

    fn parse(raw: &config::ValueKind, key: &super::key::Key) -> Result<Self, String> {
        match String::parse(raw, key)?.as_str() {
            "sync" => Ok(Self::Sync),
            "async" => Ok(Self::Async),
            other => Err(format!("{other:?} is neither sync nor async")),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Sync => "\"sync\"".into(),
            Self::Async => "\"async\"".into(),
        }
    }

    fn above(&self, _limit: &Self) -> bool {
        false
    }
}
