//! Heartbeat and NotifyClientTermination: clients stay, clients leave.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{
    ClientType, Code, HeartbeatRequest, HeartbeatResponse, NotifyClientTerminationRequest,
    NotifyClientTerminationResponse,
};
use tokio::time::Instant;
use tonic::transport::Channel;

use super::caller::Caller;
use super::renew::GIVEN_BACK_MS;
use super::status::{Fault, ok};
use super::{Edge, validate};
use crate::command::Command;
use crate::metrics::labels::Connected;
use crate::replica::{Item, ProposeError};
use crate::service::clients::{Registration, Sighting, client_key};

/// How long leaders may take to hear of a client that leaves.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// Label of a language; clients choose their text, the metric's values are known ones.
fn language_label(language: &str) -> &'static str {
    const LABELS: [&str; 12] = [
        "java", "cpp", "dot_net", "golang", "go", "rust", "python", "php", "node_js", "http",
        "ruby", "kotlin",
    ];
    LABELS.into_iter().find(|label| label.eq_ignore_ascii_case(language)).unwrap_or("other")
}

impl Edge {
    /// Adds to what is known of the calling client.
    pub(super) fn register(&self, caller: &Caller, sighting: Sighting) -> Result<(), Fault> {
        self.clients
            .register(&caller.client_id, sighting, Instant::now(), |known| {
                self.connections(caller, known)
            })
            .map_err(|error| Fault::new(Code::TooManyRequests, error.to_string()))
    }

    fn connections(&self, caller: &Caller, known: &Registration) -> Vec<Connected> {
        let metrics = &self.context.metrics;
        let (language, version) = (language_label(&caller.language), caller.version.as_str());
        let mode = match known.client_type {
            ClientType::Producer | ClientType::Unspecified => {
                return vec![metrics.producer_connected(language, version)];
            }
            ClientType::PushConsumer | ClientType::LitePushConsumer => "push",
            ClientType::SimpleConsumer | ClientType::LiteSimpleConsumer => "simple",
            ClientType::PullConsumer => "pull",
        };
        let groups = known.groups.iter();
        groups.map(|group| metrics.consumer_connected(language, version, group, mode)).collect()
    }
}

/// Registers by client type and group: settings may have gone to another node, or be lost.
pub(super) async fn heartbeat(
    edge: &Edge,
    caller: Arc<Caller>,
    request: HeartbeatRequest,
) -> Result<HeartbeatResponse, Fault> {
    let client_type = match ClientType::try_from(request.client_type) {
        Ok(ClientType::Unspecified) | Err(_) => {
            let text = format!("client type {} is unknown", request.client_type);
            return Err(Fault::new(Code::UnrecognizedClientType, text));
        }
        Ok(client_type) => client_type,
    };
    let group = match client_type {
        ClientType::Producer => None,
        _ => Some(validate::group_name(request.group.as_ref(), &caller.namespace)?),
    };
    let sighting = Sighting { client_type: Some(client_type), group, ..Sighting::default() };
    edge.register(&caller, sighting)?;
    Ok(HeartbeatResponse { status: Some(ok()) })
}

/// Tells the leaders that may hold leases of a client. One that cannot be told finds out by silence.
async fn tell_leaders(
    edge: &Edge,
    caller: &Caller,
    known: &Registration,
    request: &NotifyClientTerminationRequest,
) {
    let hasty = Caller {
        deadline: Some(
            caller
                .deadline
                .unwrap_or(Instant::now() + TOLD_WITHIN)
                .min(Instant::now() + TOLD_WITHIN),
        ),
        ..caller.clone()
    };
    for broker_group in &known.forwarded_to {
        let send = |mut leader: MessagingServiceClient<Channel>, request| async move {
            leader.notify_client_termination(request).await
        };
        let told: Result<NotifyClientTerminationResponse, Fault> =
            edge.carry(&hasty, broker_group, request.clone(), send).await;
        if let Err(fault) = told {
            tracing::debug!(broker_group, reason = fault.text, "the leader was not told");
        }
    }
}

/// Forgets the client and gives its renewed leases back soon. Its Telemetry stream may end before
/// or after this call.
pub(super) async fn terminate(
    edge: &Arc<Edge>,
    caller: Arc<Caller>,
    request: NotifyClientTerminationRequest,
) -> Result<NotifyClientTerminationResponse, Fault> {
    let named = request.group.as_ref().filter(|group| !group.name.is_empty());
    let group =
        named.map(|group| validate::group_name(Some(group), &caller.namespace)).transpose()?;
    let Some(known) = edge.clients.remove(&caller.client_id) else {
        let text = "the client is not known here";
        return Err(Fault::new(Code::UnrecognizedClientType, text));
    };
    if !caller.forwarded {
        tell_leaders(edge, &caller, &known, &request).await;
    }
    if edge.led_here().is_err() {
        return Ok(NotifyClientTerminationResponse { status: Some(ok()) });
    }
    let mut groups = known.groups;
    groups.extend(group);
    let ids: Vec<_> = {
        let view = edge.replica().view();
        let ids = groups.iter().filter_map(|name| view.state.catalog().group_by_name(name));
        ids.map(|group| group.id).collect()
    };
    let client = client_key(&caller.client_id);
    // The client leaves all the same where that fails; its leases end by themselves.
    for group in ids {
        let command = Command::ReleaseClient { group, client, invisible_ms: GIVEN_BACK_MS };
        let Ok(outcome) = edge.decided(Item::Command(command), &caller).await else { break };
        match outcome {
            Ok(_) | Err(ProposeError::Refused(_)) => {}
            Err(error) => tracing::debug!(%error, client = caller.client_id, "leases not cut"),
        }
    }
    tracing::info!(client = caller.client_id, client_type = ?known.client_type, "client left");
    Ok(NotifyClientTerminationResponse { status: Some(ok()) })
}
