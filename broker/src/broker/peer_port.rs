//! The port of other members: it answers from before this node is one of them until its Raft has
//! ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::StartError;
use super::listeners::Bound;
use super::opening::{find_data_dir, new_group};
use crate::config::Config;
use crate::data_dir::{DataDir, Found};
use crate::replica::Replica;
use crate::replica::bootstrap::{self, Door, Plan};
use crate::replica::peer_service::{self, PeerService};

/// How long connections of other members may take to close.
const PEERS_TIMEOUT: Duration = Duration::from_secs(1);

/// The peer port, which answers from before this node is a member until after its Raft has ended.
#[derive(Debug)]
pub(super) struct Peers {
    pub(super) address: SocketAddr,
    service: PeerService,
    door: Arc<Door>,
    stop: DropGuard,
    serving: JoinHandle<()>,
}

/// Opens the peer port and locks the data directory. An empty one of a group of several nodes is
/// waited for until it belongs to a member.
/// `waiting`: told for whom.
pub(super) async fn meet(
    config: &Config,
    bound: Bound,
    waiting: &watch::Sender<String>,
) -> Result<(DataDir, Peers), StartError> {
    let plan = Plan::of(config).map(|plan| plan.telling(waiting.clone()));
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
    pub(super) fn enter(&self, replica: &Replica) {
        self.door.enter(replica.clone());
        self.service.join(replica.member());
    }

    pub(super) async fn shutdown(self, group_uuid: Uuid) {
        self.service.leave(group_uuid);
        drop(self.stop);
        let mut serving = self.serving;
        if tokio::time::timeout(PEERS_TIMEOUT, &mut serving).await.is_err() {
            serving.abort();
        }
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
