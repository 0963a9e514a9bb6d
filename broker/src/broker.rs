//! One broker as a whole: puts the parts together, starts and stops them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::Listener;
use drumlin_proto::native::register_request::Hello;
use prometheus_client::metrics::counter::Counter;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use self::listeners::{Bound, bind, bind_one, serve_listener};
use self::opening::{open_data_dir, start_replica};
use self::peer_port::{Peers, meet};
use crate::config::Config;
use crate::copies;
use crate::copies_since::CopiesSince;
use crate::data_dir::{DataDir, DataDirError, Identity};
use crate::feature_level;
use crate::metrics::{self, Metrics};
use crate::position::EntryIndex;
use crate::registration::Registration;
use crate::replica::Replica;
use crate::replica::checkpoint::CheckpointError;
use crate::replica::start::{self, Ended, Running};
use crate::seed::install::InstallError;
use crate::service::cluster;
use crate::service::creations::Creations;
use crate::service::definitions::Definitions;
use crate::service::http::{Http, HttpPort};
use crate::service::rocketmq::Edge;
use crate::upkeep::Upkeep;
use crate::whereabouts::Whereabouts;

mod listeners;
pub(crate) mod opening;
mod peer_port;

/// How long calls in flight may take once the broker stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

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

/// The HTTP port; it answers from before the start is complete until everything else has stopped.
#[derive(Debug)]
struct HttpServer {
    address: SocketAddr,
    port: HttpPort,
    /// Also where the start fails.
    end: DropGuard,
    serving: JoinHandle<()>,
}

impl HttpServer {
    /// `waiting`: for whom the start waits.
    async fn start(
        bind: Option<SocketAddr>,
        waiting: watch::Receiver<String>,
    ) -> Result<Option<Self>, StartError> {
        let Some(bind) = bind else { return Ok(None) };
        let failed = |source| StartError::Bind { name: "http".into(), bind, source };
        let listener = TcpListener::bind(bind).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (port, end) = (HttpPort::new(waiting), CancellationToken::new());
        let serving = tokio::spawn(port.clone().serve(listener, end.clone()));
        Ok(Some(Self { address, port, end: end.drop_guard(), serving }))
    }
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
        let waiting = watch::Sender::default();
        let http = HttpServer::start(config.http, waiting.subscribe()).await?;
        let peers = match &config.peers {
            Some(peers) => Some(bind_one(peers).await?),
            None => None,
        };
        let (data_dir, peers) = match peers {
            Some(bound) => {
                let (data_dir, peers) = meet(&config, bound, &waiting).await?;
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
        http: Option<HttpServer>,
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
        if let Some(http) = &http {
            http.port.show(Http::new(
                &context.config,
                context.replica.clone(),
                Arc::clone(&context.metrics),
                registration.registered(),
                stop.clone(),
            ));
        }
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
            drop(http.end);
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

/// What nameservers are told of this broker.
fn hello(context: &Context, listeners: &[Bound]) -> Hello {
    let config = &context.config;
    let succeeds = &context.identity.succeeds;
    Hello {
        cluster: config.cluster.clone(),
        broker_group: config.broker_group.to_string(),
        group_uuid: context.identity.group_uuid.to_string(),
        node: config.node.clone(),
        listeners: listeners.iter().map(Bound::told).collect(),
        catalog: config.broker_group == config.catalog_group,
        succeeds_group_uuids: succeeds.iter().map(ToString::to_string).collect(),
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

#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod tests;

#[cfg(test)]
mod several_groups;
