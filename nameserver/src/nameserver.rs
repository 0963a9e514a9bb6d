//! One nameserver as a whole: puts the parts together, starts and stops them.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use drumlin_proto::native::Address;
use drumlin_proto::native::admin_server::AdminServer;
use drumlin_proto::native::cluster_server::ClusterServer;
use drumlin_proto::native::registry_server::RegistryServer;
use drumlin_proto::native::routes_server::RoutesServer;
use drumlin_proto::rocketmq::admin_server::AdminServer as OfficialAdminServer;
use drumlin_proto::rocketmq::messaging_service_server::MessagingServiceServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::admin::AdminService;
use crate::clients::Clients;
use crate::cluster::ClusterService;
use crate::config::{Config, ListenerConfig};
use crate::directory::Directory;
use crate::forward::{Forwarder, MESSAGE_BYTES_MAX};
use crate::http;
use crate::lookup::ListenerAddress;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::official_admin::OfficialAdminService;
use crate::registry::RegistryService;
use crate::route_table::{Remembered, RouteTable};
use crate::routes::RoutesService;
use crate::service::AccessPoint;
use crate::shared::Shared;

/// Patience with calls in flight at shutdown.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(5);
/// A client that does not answer a ping this long is gone.
const PING_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("listener {name} cannot be bound to {bind}")]
    Bind { name: String, bind: SocketAddr, source: io::Error },
    #[error("listener {name} would advertise {bind}, which nobody can dial: set its address")]
    AdvertisesUnspecified { name: String, bind: SocketAddr },
    #[error("two listeners are named {0}")]
    ListenerTwice(String),
    #[error("a nameserver needs at least one listener")]
    NoListener,
}

/// A running nameserver.
#[derive(Debug)]
pub struct Nameserver {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    http_address: Option<SocketAddr>,
    servers: Vec<JoinHandle<()>>,
}

impl Nameserver {
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_with(config, Routes::default()).await
    }

    /// Serves `others` on every listener too: services of which this crate knows nothing. Whoever
    /// gives them ends their streams before [`Nameserver::shutdown`].
    pub async fn start_with(config: Config, others: Routes) -> Result<Self, StartError> {
        check(&config.listeners)?;
        let memory = Memory::new(&config.data_dir);
        let remembered = memory.load().unwrap_or_else(|error| {
            tracing::warn!(%error, "begins without the brokers that were here before");
            Vec::new()
        });
        let mut bound = Vec::new();
        for listener in &config.listeners {
            bound.push((listener.clone(), bind(&listener.name, listener.bind).await?));
        }
        let http_listener = match config.http {
            Some(address) => Some(bind("http", address).await?),
            None => None,
        };
        let table = RouteTable::new(config.timing(), remembered.clone(), Instant::now());
        let shared = Arc::new(Shared {
            directory: Directory::new(table),
            forwarder: Forwarder::default(),
            clients: Clients::default(),
            metrics: Metrics::new(&config.cluster, &config.node),
            succeeded: watch::Sender::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            config,
        });
        let keeper = remember(Arc::clone(&shared), memory, remembered);
        shared.tasks.spawn(keeper);
        let clock = Arc::clone(&shared);
        shared.tasks.spawn(async move { clock.directory.run_clock(clock.stop.clone()).await });

        let turn = Arc::new(AtomicUsize::new(0));
        let (mut servers, mut addresses) = (Vec::new(), Vec::new());
        for (listener, (socket, address)) in bound {
            addresses.push(address);
            let listener = Arc::new(listener_address(listener, address));
            let (name, advertised) = (&listener.name, &listener.advertised);
            tracing::info!(listener = name, %address, %advertised, "listening");
            servers.push(serve(&shared, listener, Arc::clone(&turn), socket, others.clone()));
        }
        let http_address = http_listener.as_ref().map(|(_, address)| *address);
        if let Some((socket, _)) = http_listener {
            servers.push(tokio::spawn(http::serve(Arc::clone(&shared), socket)));
        }
        Ok(Self { shared, addresses, http_address, servers })
    }

    /// Bound addresses of the listeners, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// Names and UUIDs of broker groups that an unsafe election has replaced: whoever still goes by
    /// such a UUID counts no more.
    pub fn succeeded(&self) -> watch::Receiver<BTreeSet<(String, String)>> {
        self.shared.succeeded.subscribe()
    }

    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// Whether every broker that was here before is back, or was waited for.
    pub fn is_settled(&self) -> bool {
        self.shared.directory.read(|table| table.is_settled(Instant::now()))
    }

    /// Ends streams, finishes calls in flight, stops.
    pub async fn shutdown(self) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        let finish = async {
            for server in self.servers {
                if let Err(error) = server.await {
                    tracing::error!(%error, "a listener's task failed");
                }
            }
            self.shared.tasks.wait().await;
        };
        if tokio::time::timeout(SHUTDOWN_WAIT, finish).await.is_err() {
            tracing::warn!("calls in flight did not end in time");
        }
    }
}

fn check(listeners: &[ListenerConfig]) -> Result<(), StartError> {
    if listeners.is_empty() {
        return Err(StartError::NoListener);
    }
    for (at, listener) in listeners.iter().enumerate() {
        let ListenerConfig { name, bind, advertised } = listener;
        if listeners.iter().take(at).any(|earlier| earlier.name == *name) {
            return Err(StartError::ListenerTwice(name.clone()));
        }
        if advertised.is_none() && bind.ip().is_unspecified() {
            return Err(StartError::AdvertisesUnspecified { name: name.clone(), bind: *bind });
        }
    }
    Ok(())
}

async fn bind(name: &str, bind: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Bind { name: name.to_owned(), bind, source };
    let socket = TcpListener::bind(bind).await.map_err(failed)?;
    let address = socket.local_addr().map_err(failed)?;
    Ok((socket, address))
}

fn listener_address(listener: ListenerConfig, bound: SocketAddr) -> ListenerAddress {
    let (host, port) = match listener.advertised {
        Some((host, 0)) => (host, bound.port()),
        Some(advertised) => advertised,
        None => (bound.ip().to_string(), bound.port()),
    };
    ListenerAddress { name: listener.name, advertised: Address { host, port: u32::from(port) } }
}

fn serve(
    shared: &Arc<Shared>,
    listener: Arc<ListenerAddress>,
    turn: Arc<AtomicUsize>,
    socket: TcpListener,
    others: Routes,
) -> JoinHandle<()> {
    let shared = Arc::clone(shared);
    let access_point =
        AccessPoint { shared: Arc::clone(&shared), listener: Arc::clone(&listener), turn };
    let routes = RoutesService { shared: Arc::clone(&shared), listener: Arc::clone(&listener) };
    let cluster = ClusterService { shared: Arc::clone(&shared), listener: Arc::clone(&listener) };
    let services = others
        .add_service(
            MessagingServiceServer::new(access_point).max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            RegistryServer::new(RegistryService { shared: Arc::clone(&shared) })
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(OfficialAdminServer::new(OfficialAdminService { shared: Arc::clone(&shared) }))
        .add_service(RoutesServer::new(routes))
        .add_service(ClusterServer::new(cluster))
        .add_service(AdminServer::new(AdminService { shared: Arc::clone(&shared) }));
    let router =
        Server::builder().http2_keepalive_interval(Some(PING_INTERVAL)).add_routes(services);
    let incoming = TcpIncoming::from(socket).with_nodelay(Some(true));
    let stop = shared.stop.clone().cancelled_owned();
    tokio::spawn(async move {
        if let Err(error) = router.serve_with_incoming_shutdown(incoming, stop).await {
            tracing::error!(listener = listener.name, %error, "a listener failed");
        }
    })
}

/// Keeps the file of known broker groups up to date.
async fn remember(shared: Arc<Shared>, memory: Memory, mut saved: Vec<Remembered>) {
    let mut changes = shared.directory.changes();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = shared.stop.cancelled() => return,
        }
        let known = shared.directory.read(RouteTable::remembered);
        if known == saved {
            continue;
        }
        let (file, groups) = (memory.clone(), known.clone());
        match tokio::task::spawn_blocking(move || file.save(&groups)).await {
            Ok(Ok(())) => saved = known,
            Ok(Err(error)) => tracing::error!(%error, "cannot remember the brokers"),
            Err(error) => tracing::error!(%error, "cannot remember the brokers"),
        }
    }
}

#[cfg(test)]
mod fake_broker;
#[cfg(test)]
mod tests;
