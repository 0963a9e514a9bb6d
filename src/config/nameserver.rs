//! Keys of a nameserver.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use drumlin_nameserver::{Config, ListenerConfig, RouteMode};

use super::check;
use super::key::{role, section};
use super::reader::Reader;
use super::value::{HostPort, Value};

section! {
    /// Which cluster this nameserver answers for.
    Cluster("cluster") {
        /// Brokers of another cluster are refused.
        name: String = "drumlin";
    }
}

section! {
    /// This node.
    Node("node") {
        /// Unique within the cluster.
        name: String = "nameserver-0";
        /// What it remembers of the brokers, so that it can tell a topic that does not exist from
        /// one whose broker has not registered yet.
        data_dir: PathBuf = "./data/nameserver";
    }
}

section! {
    /// Where brokers and clients reach this nameserver.
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
        bind: SocketAddr = "127.0.0.1:9876";
        /// What clients are told to dial where routes lead via this nameserver. Off: the bound
        /// address.
        advertised: Option<HostPort> = "";
    }
}

section! {
    /// For brokers, and clients inside of the cluster's network.
    Internal("listeners.internal") {
        /// Off: there is no such listener.
        bind: Option<SocketAddr> = "";
        /// What clients are told to dial where routes lead via this nameserver. Off: the bound
        /// address.
        advertised: Option<HostPort> = "";
    }
}

section! {
    /// Health (/livez, /readyz) and metrics (/metrics).
    Http("http") {
        /// Off: no HTTP port; `drumlin health` then has nothing to ask.
        bind: Option<SocketAddr> = "127.0.0.1:9877";
    }
}

section! {
    /// Answers to route queries.
    Routes("routes") {
        /// direct: clients dial the brokers. via-endpoint: routes name this nameserver, which
        /// forwards; for clients that cannot reach brokers or never refresh a route.
        mode: RouteMode = "direct";
        /// Creates a topic when a client first asks for its route: 8 queues, any kind of message.
        auto_create: bool = "false";
        /// Queues of such a topic on each broker group.
        auto_create_queue_count: u32 = "8", min "1", max "1024";
        /// A broker that is silent for so long is taken out of routes.
        registration_expiry: Duration = "5s", unit "s", min "1s", max "10m";
        /// Time that a broken registration has to come back before routes drop the address.
        broken_grace: Duration = "300ms", unit "ms", max "1m";
        /// Longest time that a query is held while its answer is not known yet.
        query_hold: Duration = "2s", unit "s", max "1m";
        /// Longest time after the start that the brokers known from before are waited for.
        start_wait: Duration = "5s", unit "s", max "10m";
    }
}

role! {
    /// A nameserver, as configured.
    NameserverKeys {
        cluster: Cluster,
        node: Node,
        listeners: Listeners,
        external: External,
        internal: Internal,
        http: Http,
        routes: Routes,
    }
}

impl Value for RouteMode {
    const KIND: &'static str = "direct or via-endpoint";

    fn parse(raw: &config::ValueKind, _key: &super::key::Key) -> Result<Self, String> {
        match raw {
            config::ValueKind::String(text) if text == "direct" => Ok(Self::Direct),
            config::ValueKind::String(text) if text == "via-endpoint" => Ok(Self::ViaEndpoint),
            other => Err(format!("{other} is neither \"direct\" nor \"via-endpoint\"")),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Direct => "\"direct\"".into(),
            Self::ViaEndpoint => "\"via-endpoint\"".into(),
        }
    }

    fn above(&self, _limit: &Self) -> bool {
        false
    }
}

impl NameserverKeys {
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
    }

    /// What the nameserver is started with.
    pub(crate) fn config(&self) -> Config {
        let mut listeners =
            vec![listener("external", self.external.bind, self.external.advertised.as_ref())];
        listeners.extend(
            self.internal
                .bind
                .map(|bind| listener("internal", bind, self.internal.advertised.as_ref())),
        );
        Config {
            cluster: self.cluster.name.clone(),
            node: self.node.name.clone(),
            data_dir: self.node.data_dir.clone(),
            listeners,
            http: self.http.bind,
            route_mode: self.routes.mode,
            auto_create_topics: self.routes.auto_create,
            auto_create_queue_count: self.routes.auto_create_queue_count,
            registration_expiry: self.routes.registration_expiry,
            broken_grace: self.routes.broken_grace,
            query_hold: self.routes.query_hold,
            start_wait: self.routes.start_wait,
        }
    }
}

fn listener(name: &str, bind: SocketAddr, advertised: Option<&HostPort>) -> ListenerConfig {
    let advertised = advertised.map(|address| (address.host.clone(), address.port));
    ListenerConfig { name: name.into(), bind, advertised }
}
