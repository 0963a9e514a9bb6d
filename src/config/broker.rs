//! Keys of a broker.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drumlin_broker::config::{Config, ListenerConfig};
use drumlin_proto::ids::BrokerGroupName;

use super::check;
use super::key::{role, section};
use super::reader::Reader;
use super::value::{Bytes, HostPort};

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
        self.check_sizes(reader);
        self.check_raft(reader);
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

fn listener(name: &str, bind: SocketAddr, advertised: Option<&HostPort>) -> ListenerConfig {
    let advertised = advertised.map(|address| (address.host.clone(), address.port));
    ListenerConfig { name: name.into(), bind, advertised }
}
