//! Which clients are alive, between brokers: whoever sends calls on for a client tells the leader that
//! holds its leases.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::GroupName;
use drumlin_proto::native::forwarding_client::ForwardingClient;
use drumlin_proto::native::forwarding_server;
use drumlin_proto::native::{AliveClient, AliveRequest, AliveResponse};
use drumlin_proto::rocketmq::ClientType;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::{Request, Response, Status};

use super::Edge;
use crate::service::clients::Sighting;
use crate::service::native::ok;
use crate::whereabouts::Leader;

const BEAT: Duration = Duration::from_secs(5);
const BEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// Clients of one beat.
const CLIENTS_MAX: usize = 1000;

/// Takes the beats of other brokers.
#[derive(Clone, Debug)]
pub struct Forwarding {
    edge: Arc<Edge>,
}

impl Forwarding {
    pub(super) fn new(edge: Arc<Edge>) -> Self {
        Self { edge }
    }
}

#[tonic::async_trait]
impl forwarding_server::Forwarding for Forwarding {
    async fn alive(
        &self,
        request: Request<AliveRequest>,
    ) -> Result<Response<AliveResponse>, Status> {
        let now = Instant::now();
        for client in request.into_inner().clients.into_iter().take(CLIENTS_MAX) {
            let client_type = ClientType::try_from(client.client_type).ok();
            let mut groups = client.consumer_groups.iter().filter_map(|g| GroupName::parse(g).ok());
            let first = Sighting { client_type, group: groups.next(), ..Sighting::default() };
            let rest = groups.map(|group| Sighting { group: Some(group), ..Sighting::default() });
            for sighting in std::iter::once(first).chain(rest) {
                let registered =
                    self.edge.clients.register(&client.client_id, sighting, now, |_| Vec::new());
                if let Err(error) = registered {
                    tracing::warn!(%error, client = client.client_id, "not registered");
                }
            }
        }
        Ok(Response::new(AliveResponse { status: ok() }))
    }
}

/// Beats for the clients whose calls went to another leader, until the broker stops.
pub(super) async fn tell_leaders(edge: Arc<Edge>) {
    let mut beats = interval(BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = edge.stop.cancelled() => return,
            _ = beats.tick() => {}
        }
        for (broker_group, clients) in edge.clients.forwarded() {
            tokio::select! {
                () = edge.stop.cancelled() => return,
                () = beat(&edge, broker_group.as_str(), clients) => {}
            }
        }
    }
}

async fn beat(edge: &Edge, broker_group: &str, clients: Vec<AliveClient>) {
    let listener = edge.context.config.listeners.first().map_or("", |listener| &listener.name);
    let leader = edge.whereabouts.leader_by(Instant::now(), broker_group, listener).await;
    let Leader::There { address, .. } = leader else { return };
    let channel = match edge.forwarder.channel(&address) {
        Ok(channel) => channel,
        Err(error) => {
            tracing::warn!(broker_group, %error, "cannot tell the leader of clients");
            return;
        }
    };
    let mut client = ForwardingClient::new(channel);
    for clients in clients.chunks(CLIENTS_MAX) {
        let mut request = Request::new(AliveRequest { clients: clients.to_vec() });
        request.set_timeout(BEAT_TIMEOUT);
        if let Err(error) = client.alive(request).await {
            tracing::debug!(broker_group, %error, "the leader was not told of clients");
            return;
        }
    }
}
