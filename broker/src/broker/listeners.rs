//! The listeners of clients: how they are bound, what others are told of them, what they serve.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::{Address, Listener};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::{Context, StartError};
use crate::config::ListenerConfig;
use crate::service::admin::AdminService;
use crate::service::catalog::CatalogService;
use crate::service::cluster::{self, ClusterService};
use crate::service::native::NativeService;
use crate::service::rocketmq::Edge;
use crate::service::routes::RoutesService;
use crate::whereabouts::Whereabouts;

/// Calls in progress on one connection; each may hold a request of 16 MiB that is not whole yet.
const STREAMS_MAX: u32 = 512;

/// A listener with its address known.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) name: String,
    pub(super) listener: TcpListener,
    pub(super) address: SocketAddr,
    pub(super) advertised: Address,
}

impl Bound {
    /// As clients and other members are told of it.
    pub(super) fn told(&self) -> Listener {
        Listener { name: self.name.clone(), advertised: Some(self.advertised.clone()) }
    }
}

pub(super) async fn bind(listeners: &[ListenerConfig]) -> Result<Vec<Bound>, StartError> {
    let mut bound = Vec::with_capacity(listeners.len());
    for config in listeners {
        bound.push(bind_one(config).await?);
    }
    Ok(bound)
}

pub(super) async fn bind_one(config: &ListenerConfig) -> Result<Bound, StartError> {
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

/// Answers calls on one listener until `stop`, then those in flight.
pub(super) async fn serve_listener(
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
