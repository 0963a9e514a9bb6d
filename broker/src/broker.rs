//! One broker as a whole: puts the parts together, starts and stops them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::register_request::Hello;
use drumlin_proto::native::{Address, Listener};
use prometheus_client::metrics::counter::Counter;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use crate::config::{Config, Flush, ListenerConfig};
use crate::copies;
use crate::copies_since::CopiesSince;
use crate::data_dir::{Bootstrap, Claim, DataDir, DataDirError, Found, Identity};
use crate::disk::RealDisk;
use crate::feature_level;
use crate::log::{CheckpointMark, Log, LogMetrics, LogOptions, OpenError};
use crate::metrics::{self, Metrics};
use crate::position::EntryIndex;
use crate::registration::Registration;
use crate::replica::Replica;
use crate::replica::bootstrap::{self, Door, Plan};
use crate::replica::checkpoint::{CheckpointError, Checkpointer, Opened};
use crate::replica::committed_hint;
use crate::replica::peer_service::{self, PeerService};
use crate::replica::repairing::Repairing;
use crate::replica::start::{self, Ended, Running};
use crate::replica::state::Limits;
use crate::seed::Receiver;
use crate::seed::install::{InstallError, InstallOptions, install};
use crate::service::admin::AdminService;
use crate::service::catalog::CatalogService;
use crate::service::cluster::{self, ClusterService};
use crate::service::creations::Creations;
use crate::service::definitions::Definitions;
use crate::service::http::Http;
use crate::service::native::NativeService;
use crate::service::rocketmq::Edge;
use crate::service::routes::RoutesService;
use crate::upkeep::Upkeep;
use crate::whereabouts::Whereabouts;

/// Raft's name of a group's first node.
const FIRST_NODE_ID: u64 = 1;
/// File of the committed index within the data directory.
const HINT_FILE: &str = "committed";
/// How long connections of other members may take to close.
const PEERS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long calls in flight may take once the broker stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long entries under way and the last checkpoint may take then.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Calls in progress on one connection; each may hold a request of 16 MiB that is not whole yet.
const STREAMS_MAX: u32 = 512;

/// What the edges share.
#[derive(Debug)]
pub struct Context {
    pub config: Config,
    /// Whose data this is.
    pub identity: Identity,
    pub replica: Replica,
    pub metrics: Arc<Metrics>,
    /// What clients create on first use, over all edges.
    pub creations: Creations,
    /// How topics and consumer groups come to be.
    pub definitions: Definitions,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("I/O failed")]
    Io(#[from] io::Error),
    #[error("listener {name} cannot listen on {bind}")]
    Bind { name: String, bind: SocketAddr, source: io::Error },
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Seed(#[from] InstallError),
    #[error(transparent)]
    Replica(#[from] start::StartError),
    #[error("the broker group cannot serve: {reason}")]
    NotServing { reason: String },
}

/// The HTTP port; it answers until everything else has stopped.
#[derive(Debug)]
struct HttpServer {
    address: SocketAddr,
    end: CancellationToken,
    serving: JoinHandle<()>,
}

/// A running broker.
#[derive(Debug)]
pub struct Broker {
    context: Arc<Context>,
    addresses: Vec<SocketAddr>,
    peers: Option<Peers>,
    running: Running,
    registration: Registration,
    edge: Arc<Edge>,
    http: Option<HttpServer>,
    /// Ends the edges.
    stop: CancellationToken,
    servers: Vec<JoinHandle<()>>,
    streams: TaskTracker,
    upkeep: JoinHandle<()>,
    first_checkpoint: JoinHandle<()>,
    copying: JoinHandle<()>,
    raising: JoinHandle<()>,
    /// Dropped last: it holds the lock.
    _data_dir: DataDir,
}

impl Broker {
    /// Starts everything and returns once calls are answered.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let listeners = bind(&config.listeners).await?;
        let http = bind_http(config.http).await?;
        let peers = match &config.peers {
            Some(peers) => Some(bind_one(peers).await?),
            None => None,
        };
        let (data_dir, peers) = match peers {
            Some(bound) => {
                let (data_dir, peers) = meet(&config, bound).await?;
                (data_dir, Some(peers))
            }
            None => (open_data_dir(&config)?, None),
        };
        let identity = data_dir.identity().clone();
        let metrics = Arc::new(Metrics::new(
            &metrics::Identity {
                cluster: config.cluster.clone(),
                broker_group: config.broker_group.to_string(),
                node: config.node.clone(),
            },
            usize::try_from(config.metrics_series_max).unwrap_or(usize::MAX),
        ));
        let (replica, running) = start_replica(&config, &data_dir, &metrics).await?;
        let context = Arc::new(Context {
            config,
            identity,
            replica: replica.clone(),
            metrics,
            creations: Creations::default(),
            definitions: Definitions::default(),
        });
        replica.tell_listeners(listeners.iter().map(Bound::told).collect());
        if let Some(peers) = &peers {
            peers.enter(&replica);
        }
        if running.is_alone() {
            if let Err(reason) = running.until_serving().await {
                running.shutdown().await;
                return Err(StartError::NotServing { reason });
            }
            if let Err(error) = feature_level::raise_alone(&replica).await {
                tracing::warn!(%error, "the feature level was not raised");
            }
            first_checkpoint(replica, CancellationToken::new()).await;
        }
        Ok(Self::serve(context, listeners, peers, http, running, data_dir))
    }

    fn serve(
        context: Arc<Context>,
        listeners: Vec<Bound>,
        peers: Option<Peers>,
        http: Option<(TcpListener, SocketAddr)>,
        running: Running,
        data_dir: DataDir,
    ) -> Self {
        let stop = CancellationToken::new();
        let streams = TaskTracker::new();
        let hello = hello(&context, &listeners);
        let own_listeners = hello.listeners.clone();
        let registration =
            Registration::start(hello, &context.config.nameservers, &context.replica, stop.clone());
        let whereabouts = whereabouts(&context, own_listeners, &registration);
        context.definitions.attach(whereabouts.clone());
        let copying = copies::keep_equal(Arc::clone(&context), whereabouts.clone(), stop.clone());
        let copying = tokio::spawn(copying);
        let raising = feature_level::raise_group(Arc::clone(&context), stop.clone());
        let raising = tokio::spawn(raising);
        let edge = Edge::start(Arc::clone(&context), whereabouts.clone(), stop.clone());
        let http = http.map(|(listener, address)| {
            let http = Http::new(
                &context.config,
                context.replica.clone(),
                Arc::clone(&context.metrics),
                registration.registered(),
                stop.clone(),
            );
            let end = CancellationToken::new();
            let serving = tokio::spawn(http.serve(listener, end.clone()));
            HttpServer { address, end, serving }
        });
        let openings = Counter::default();
        let (since, following) =
            CopiesSince::follow(context.replica.gate(), openings.clone(), stop.clone());
        streams.spawn(following);
        context.metrics.register_replication(openings, context.replica.state_mismatches());
        let cluster =
            cluster::Shared::new(Arc::clone(&context), registration.other_groups(), since);
        let addresses = listeners.iter().map(|bound| bound.address).collect();
        let servers = listeners
            .into_iter()
            .map(|bound| {
                let serving = serve_listener(
                    Arc::clone(&context),
                    Arc::clone(&edge),
                    whereabouts.clone(),
                    Arc::clone(&cluster),
                    bound,
                    streams.clone(),
                    stop.clone(),
                );
                tokio::spawn(serving)
            })
            .collect();
        let upkeep = Upkeep::new(Arc::clone(&context), data_dir.root().to_owned());
        let upkeep = tokio::spawn(upkeep.run(stop.clone()));
        let first_checkpoint =
            tokio::spawn(first_checkpoint(context.replica.clone(), stop.clone()));
        Self {
            context,
            addresses,
            peers,
            running,
            registration,
            edge,
            http,
            stop,
            servers,
            streams,
            upkeep,
            first_checkpoint,
            copying,
            raising,
            _data_dir: data_dir,
        }
    }

    /// Bound addresses of the listeners, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.clone()
    }

    /// Where other members of the group reach this node.
    pub fn peers_address(&self) -> Option<SocketAddr> {
        self.peers.as_ref().map(|peers| peers.address)
    }

    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(|http| http.address)
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Resolves once the broker cannot go on as it is: it must be shut down then.
    pub fn ended(&self) -> impl Future<Output = Ended> + Send + use<> {
        self.running.ended()
    }

    /// Lets another node lead, stops taking calls, finishes those in flight, closes the log.
    ///
    /// False if the disk does not answer: then nothing may be started on it by this process.
    pub async fn shutdown(self) -> bool {
        self.context.replica.hand_over().await;
        self.stop.cancel();
        let draining = async {
            for server in self.servers {
                report(server.await, "a listener");
            }
            self.streams.close();
            self.streams.wait().await;
            self.edge.stopped().await;
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, draining).await.is_err() {
            tracing::warn!("calls in flight did not end in time and are cut off");
        }
        self.registration.join().await;
        report(self.upkeep.await, "upkeep");
        report(self.first_checkpoint.await, "the first checkpoint");
        report(self.copying.await, "the task that pushes definitions");
        report(self.raising.await, "the task that raises the feature level");
        let closed = self.running.shutdown().await;
        if let Some(peers) = self.peers {
            peers.shutdown(self.context.identity.group_uuid).await;
        }
        if let Some(http) = self.http {
            http.end.cancel();
            report(http.serving.await, "the HTTP port");
        }
        closed
    }
}

fn report(ended: Result<(), tokio::task::JoinError>, task: &str) {
    if let Err(error) = ended {
        tracing::error!(task, %error, "a task ended badly");
    }
}

/// A listener with its address known.
#[derive(Debug)]
struct Bound {
    name: String,
    listener: TcpListener,
    address: SocketAddr,
    advertised: Address,
}

impl Bound {
    /// As clients and other members are told of it.
    fn told(&self) -> Listener {
        Listener { name: self.name.clone(), advertised: Some(self.advertised.clone()) }
    }
}

async fn bind(listeners: &[ListenerConfig]) -> Result<Vec<Bound>, StartError> {
    let mut bound = Vec::with_capacity(listeners.len());
    for config in listeners {
        bound.push(bind_one(config).await?);
    }
    Ok(bound)
}

async fn bind_one(config: &ListenerConfig) -> Result<Bound, StartError> {
    let failed = |source| StartError::Bind { name: config.name.clone(), bind: config.bind, source };
    let listener = TcpListener::bind(config.bind).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let advertised = match &config.advertised {
        Some((host, 0)) => Address { host: host.clone(), port: u32::from(address.port()) },
        Some((host, port)) => Address { host: host.clone(), port: u32::from(*port) },
        None => Address { host: address.ip().to_string(), port: u32::from(address.port()) },
    };
    Ok(Bound { name: config.name.clone(), listener, address, advertised })
}

async fn bind_http(
    bind: Option<SocketAddr>,
) -> Result<Option<(TcpListener, SocketAddr)>, StartError> {
    let Some(bind) = bind else { return Ok(None) };
    let failed = |source| StartError::Bind { name: "http".into(), bind, source };
    let listener = TcpListener::bind(bind).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok(Some((listener, address)))
}

/// Locks the data directory; an empty one becomes this node's, as a group by itself.
pub(crate) fn open_data_dir(config: &Config) -> Result<DataDir, DataDirError> {
    find_data_dir(config)?.or_claim(new_group)
}

/// Of a node that is a group by itself.
fn new_group() -> Bootstrap {
    Bootstrap {
        group_uuid: Uuid::now_v7(),
        succeeds: Vec::new(),
        directory_uuid: Uuid::new_v4(),
        node_id: FIRST_NODE_ID,
    }
}

pub(crate) fn find_data_dir(config: &Config) -> Result<Found, DataDirError> {
    let claim = Claim {
        cluster: config.cluster.clone(),
        broker_group: config.broker_group.clone(),
        node: config.node.clone(),
    };
    DataDir::open(&config.data_dir, &claim)
}

/// The peer port, which answers from before this node is a member until after its Raft has ended.
#[derive(Debug)]
struct Peers {
    address: SocketAddr,
    service: PeerService,
    door: Arc<Door>,
    stop: DropGuard,
    serving: JoinHandle<()>,
}

/// Opens the peer port and locks the data directory. An empty one of a group of several nodes is
/// waited for until it belongs to a member.
async fn meet(config: &Config, bound: Bound) -> Result<(DataDir, Peers), StartError> {
    let plan = Plan::of(config);
    let (door, data_dir) = match (find_data_dir(config)?, &plan) {
        (Found::Empty(empty), Some(_)) => (Door::of_empty(empty), None),
        (found, _) => {
            let data_dir = found.or_claim(new_group)?;
            (Door::of_member(data_dir.identity()), Some(data_dir))
        }
    };
    let door = Arc::new(door);
    let service = PeerService::new(config.cluster.clone(), door.clone());
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve_peers(bound.listener, service.clone(), stop.clone()));
    let (address, stop) = (bound.address, stop.drop_guard());
    let peers = Peers { address, service, door, stop, serving };
    let data_dir = match (data_dir, plan) {
        (Some(data_dir), _) => data_dir,
        (None, Some(plan)) => bootstrap::join(&plan, &peers.door).await?,
        (None, None) => unreachable!("only a planned node is left without a directory"),
    };
    Ok((data_dir, peers))
}

impl Peers {
    /// Answers as a member from now on.
    fn enter(&self, replica: &Replica) {
        self.door.enter(replica.clone());
        self.service.join(replica.member());
    }

    async fn shutdown(self, group_uuid: Uuid) {
        self.service.leave(group_uuid);
        drop(self.stop);
        let mut serving = self.serving;
        if tokio::time::timeout(PEERS_TIMEOUT, &mut serving).await.is_err() {
            serving.abort();
        }
    }
}

/// Takes the first checkpoint once there is something in it: trims need one.
async fn first_checkpoint(replica: Replica, stop: CancellationToken) {
    let mut readable = replica.readable_end();
    let taking = async {
        if replica.trim_limit().is_some()
            || readable.wait_for(|end| end.index > EntryIndex::ZERO).await.is_err()
        {
            return;
        }
        if let Err(error) = replica.checkpoint().await {
            tracing::warn!(%error, "the first checkpoint was not written");
        }
    };
    stop.run_until_cancelled(taking).await;
}

/// The replica of an open data directory. A log that is damaged where it had been durable is mended
/// with what other data nodes have.
pub(crate) async fn start_replica(
    config: &Config,
    data_dir: &DataDir,
    metrics: &Metrics,
) -> Result<(Replica, Running), StartError> {
    put_seed_in_place(config, data_dir).await?;
    let log_metrics = LogMetrics::default();
    metrics.register_log(&log_metrics);
    loop {
        let error = match open_replica(config, data_dir, metrics, log_metrics.clone()).await {
            Err(StartError::Replica(error)) => error.into_log()?,
            opened => return opened,
        };
        let mended = repairing(config, data_dir)?.mend(error).await;
        mended.map_err(|error| StartError::Replica(error.into()))?;
    }
}

/// How a damaged log may be mended.
fn repairing(config: &Config, data_dir: &DataDir) -> Result<Repairing, StartError> {
    let opened = open_checkpoints(data_dir)?;
    let meta = opened.checkpoint.as_ref().map(|checkpoint| &checkpoint.meta);
    let configured = config.replicas.iter().map(|node| (node.name.clone(), node.address.clone()));
    Ok(Repairing::new(
        data_dir.identity().clone(),
        &data_dir.log_dir(),
        meta.map(|meta| (meta.mark(), meta.membership.as_slice())),
        configured.collect(),
        addresses(config),
        config.quarantine_bytes_max,
    ))
}

async fn open_replica(
    config: &Config,
    data_dir: &DataDir,
    metrics: &Metrics,
    log_metrics: LogMetrics,
) -> Result<(Replica, Running), StartError> {
    let identity = data_dir.identity();
    let (commit_seconds, elections) = metrics.of_replica();
    let options = start::Options {
        identity: identity.clone(),
        plan: Plan::of(config),
        peer_address: own_address(config),
        addresses: addresses(config),
        preferred_leader: preferred_leader(config),
        data_dir: data_dir.root().to_owned(),
        hint_path: data_dir.root().join(HINT_FILE),
        seed_bytes_per_second_max: config.seed_bytes_per_second_max,
        checkpoint_interval_bytes: config.checkpoint_bytes.min(config.segment_bytes),
        limits: Limits { topics_max: config.topics_max, groups_max: config.groups_max },
        in_flight_bytes_max: config.in_flight_bytes_max,
        clock_step_max: config.clock_step_max,
        heartbeat_interval: config.heartbeat_interval,
        election_timeout_min: config.election_timeout_min,
        election_timeout_max: config.election_timeout_max,
        peer_silence_max: config.peer_silence_max,
        settle_timeout: SETTLE_TIMEOUT,
        commit_seconds,
        elections,
    };
    let opened = open_checkpoints(data_dir)?;
    Ok(start::start(options, opened, log_opener(config, data_dir, log_metrics)).await?)
}

pub(crate) fn open_checkpoints(data_dir: &DataDir) -> Result<Opened, CheckpointError> {
    Checkpointer::open(
        Arc::new(RealDisk),
        &data_dir.checkpoint_dir(),
        &data_dir.index_dir(),
        data_dir.identity().log_uuid(),
    )
}

/// Opens the log; it blocks while it recovers.
pub(crate) fn log_opener(
    config: &Config,
    data_dir: &DataDir,
    metrics: LogMetrics,
) -> impl FnOnce(Option<CheckpointMark>) -> Result<Log, OpenError> + Send + use<> {
    let options = LogOptions {
        segment_bytes: config.segment_bytes,
        prepared_bytes: config.prepared_bytes,
        quarantine_bytes_max: config.quarantine_bytes_max,
        defer_syncs: config.flush == Flush::Async,
        metrics,
        ..LogOptions::new(data_dir.identity().log_uuid())
    };
    let dir = data_dir.log_dir();
    move |mark| {
        let (log, report) = Log::open(&dir, options, mark)?;
        let (scanned_entries, scanned_bytes) = (report.scanned_entries, report.scanned_bytes);
        let (clean, last) = (report.clean, log.last().map(tracing::field::display));
        tracing::info!(last, clean, scanned_entries, scanned_bytes, "opened the log");
        if let Some((index, bytes)) = report.torn_tail {
            tracing::warn!(%index, bytes, "a tail that was never synced went to quarantine");
        }
        Ok(log)
    }
}

/// File of the committed index.
pub(crate) fn hint_path(data_dir: &DataDir) -> PathBuf {
    data_dir.root().join(HINT_FILE)
}

/// Before anything is opened: a complete re-seed takes the place of log and checkpoints.
async fn put_seed_in_place(config: &Config, data_dir: &DataDir) -> Result<(), StartError> {
    let identity = data_dir.identity();
    let options = InstallOptions {
        root: data_dir.root().to_owned(),
        receiver: Receiver {
            group_uuid: identity.log_uuid(),
            directory_uuid: identity.directory_uuid,
        },
        hint_file: HINT_FILE,
        committed: committed_hint(&data_dir.root().join(HINT_FILE))?,
        quarantine_bytes_max: config.quarantine_bytes_max,
    };
    let installing = tokio::task::spawn_blocking(move || install(&options));
    installing.await.map_err(io::Error::other)??;
    Ok(())
}

/// Where the configuration says that others reach this node; empty if it does not.
pub(crate) fn own_address(config: &Config) -> String {
    let listed = config.replicas.iter().find(|node| node.name == config.node);
    let advertised = config.peers.as_ref().and_then(|peers| peers.advertised.as_ref());
    match (listed, advertised) {
        (Some(node), _) => node.address.clone(),
        (None, Some((host, port))) => format!("{host}:{port}"),
        (None, None) => {
            config.peers.as_ref().map(|peers| peers.bind.to_string()).unwrap_or_default()
        }
    }
}

/// Who leads when it is in step: by configuration, or the first by name.
fn preferred_leader(config: &Config) -> Option<String> {
    let first = || config.replicas.iter().map(|node| &node.name).min().cloned();
    config.preferred_leader.clone().or_else(first)
}

/// Of the members that the configuration names.
pub(crate) fn addresses(config: &Config) -> BTreeMap<String, String> {
    let members = config.replicas.iter().chain(&config.witness);
    members.map(|member| (member.name.clone(), member.address.clone())).collect()
}

/// What nameservers are told of this broker.
fn hello(context: &Context, listeners: &[Bound]) -> Hello {
    let config = &context.config;
    let listener = |bound: &Bound| Listener {
        name: bound.name.clone(),
        advertised: Some(bound.advertised.clone()),
    };
    let succeeds = &context.identity.succeeds;
    Hello {
        cluster: config.cluster.clone(),
        broker_group: config.broker_group.to_string(),
        group_uuid: context.identity.group_uuid.to_string(),
        node: config.node.clone(),
        listeners: listeners.iter().map(listener).collect(),
        catalog: config.broker_group == config.catalog_group,
        succeeds_group_uuids: succeeds.iter().map(ToString::to_string).collect(),
    }
}

/// Answers other members until `stop`.
async fn serve_peers(listener: TcpListener, service: PeerService, stop: CancellationToken) {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = peer_service::listener()
        .add_service(service.server())
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the peer port failed");
    }
}

/// Where this broker, its peers and the other broker groups are reached.
fn whereabouts(
    context: &Context,
    listeners: Vec<Listener>,
    registration: &Registration,
) -> Whereabouts {
    Whereabouts::new(
        context.config.broker_group.to_string(),
        listeners,
        context.replica.raft_status(),
        context.replica.peers(),
        registration.other_groups(),
    )
}

/// Answers calls on one listener until `stop`, then those in flight.
async fn serve_listener(
    context: Arc<Context>,
    edge: Arc<Edge>,
    whereabouts: Whereabouts,
    cluster: Arc<cluster::Shared>,
    bound: Bound,
    streams: TaskTracker,
    stop: CancellationToken,
) {
    let Bound { name, listener, address, advertised } = bound;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let vantage = whereabouts.at(&name);
    // Runs are large: with the default windows and frames one connection gets a third of this.
    let served = Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(edge.messaging(&name, advertised))
        .add_service(edge.admin())
        .add_service(edge.forwarding())
        .add_service(NativeService::server(
            Arc::clone(&context),
            vantage.clone(),
            streams.clone(),
            stop.clone(),
        ))
        .add_service(ClusterService::server(cluster, name.clone(), vantage.clone()))
        .add_service(CatalogService::server(Arc::clone(&context)))
        .add_service(AdminService::server(Arc::clone(&context), vantage.clone()))
        .add_service(RoutesService::server(context, vantage, streams, stop.clone()))
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await;
    match served {
        Ok(()) => tracing::info!(listener = name, %address, "stopped listening"),
        Err(error) => tracing::error!(listener = name, %address, %error, "a listener failed"),
    }
}

#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod tests;

#[cfg(test)]
mod several_groups;
