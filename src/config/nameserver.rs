//! Keys of a nameserver.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

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
        /// A broker that is silent for so long is taken out of routes.
        broker_expiry: Duration = "5s", unit "s", min "1s", max "10m";
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

/// What addresses routes name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RouteMode {
    Direct,
    ViaEndpoint,
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
}
