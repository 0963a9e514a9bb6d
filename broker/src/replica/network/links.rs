//! The ways to all other members: where they are, their connections, and who calls.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native as proto;
use drumlin_proto::native::peer_client::PeerClient;
use parking_lot::Mutex;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use super::connection::{client, endpoint};
use super::failure::{LinkError, timed_out};
use crate::replica::doubt::Doubt;
use crate::replica::gating::Gating;
use crate::replica::membership::{BrokerNode, Role};
use crate::replica::peer_service::MemberIdentity;
use crate::replica::seeding::Giving;
use crate::replica::wire::Caller;

/// Calls in a row without an answer after which their connection is made anew.
const UNANSWERED_CALLS_MAX: u32 = 5;
/// How long it may take a member to show that it is there.
const GONE_TIMEOUT: Duration = Duration::from_millis(300);

/// Makes links to other members; clones share their connections.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    shared: Arc<Shared>,
}

/// What links are made with.
#[derive(Debug)]
pub(crate) struct LinkParts {
    pub(crate) identity: MemberIdentity,
    pub(crate) role: Role,
    /// Addresses by name that win over those in the membership.
    pub(crate) addresses: BTreeMap<String, String>,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) gating: Gating,
    /// What members are given that lack purged entries; `None`: this one is a witness.
    pub(crate) giving: Option<Arc<Giving>>,
    /// While this node's own log is in doubt it asks for no votes.
    pub(crate) doubt: Arc<Doubt>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) parts: LinkParts,
    controls: Mutex<BTreeMap<u64, Control>>,
}

/// The connection for what must not wait behind entries.
#[derive(Debug)]
struct Control {
    address: String,
    channel: Channel,
    /// Calls begun since the last answer.
    unanswered_count: u32,
}

impl Links {
    pub(crate) fn new(parts: LinkParts) -> Self {
        Self { shared: Arc::new(Shared { parts, controls: Mutex::default() }) }
    }

    /// For short calls to a member, on the connection that votes and heartbeats use.
    pub(crate) fn client(
        &self,
        target: u64,
        node: &BrokerNode,
    ) -> Result<PeerClient<Channel>, LinkError> {
        self.shared.control(target, node)
    }

    /// A call with who calls whom.
    pub(crate) fn request<T>(&self, target: u64, message: T) -> Request<T> {
        self.shared.request(target, message)
    }

    /// Whether nobody answers at a member's address. Not so where nothing comes back at all.
    pub(crate) async fn is_gone(&self, node: &BrokerNode) -> bool {
        let Ok((_, endpoint)) = self.shared.endpoint(node) else { return false };
        let asked = async {
            let channel = endpoint.connect().await.map_err(|error| timed_out(&error))?;
            // Any answer will do, also that this is no probe for it.
            let probed = client(channel).probe(proto::ProbeRequest {}).await;
            match probed {
                Err(status) => Err(status.source().is_none_or(timed_out)),
                Ok(_) => Ok(()),
            }
        };
        let is_alive_or_silent = match tokio::time::timeout(GONE_TIMEOUT, asked).await {
            Ok(Ok(())) | Err(_) => true,
            Ok(Err(is_alive_or_silent)) => is_alive_or_silent,
        };
        !is_alive_or_silent
    }

    /// The call to this member was answered.
    pub(crate) fn answered(&self, target: u64) {
        self.shared.answered(target);
    }

    /// For many bytes at once, on a connection of its own.
    pub(crate) fn bulk_client(&self, node: &BrokerNode) -> Result<PeerClient<Channel>, LinkError> {
        let (_, endpoint) = self.shared.endpoint(node)?;
        Ok(client(endpoint.connect_lazy()))
    }

    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
}

impl Shared {
    /// Where a member is: as the local configuration has its name, else as the membership says.
    pub(super) fn address(&self, node: &BrokerNode) -> Result<String, LinkError> {
        let configured = self.parts.addresses.get(&node.name);
        let address = configured.unwrap_or(&node.address);
        if address.is_empty() {
            return Err(LinkError::NoAddress { name: node.name.clone() });
        }
        Ok(address.clone())
    }

    pub(super) fn endpoint(&self, node: &BrokerNode) -> Result<(String, Endpoint), LinkError> {
        let address = self.address(node)?;
        let endpoint = endpoint(&address).map_err(|error| LinkError::Invalid {
            name: node.name.clone(),
            reason: format!("address {address}: {error}"),
        })?;
        Ok((address, endpoint))
    }

    /// The short calls to a member, on their connection, which is made anew where nothing came back.
    pub(super) fn control(
        &self,
        target: u64,
        node: &BrokerNode,
    ) -> Result<PeerClient<Channel>, LinkError> {
        let (address, endpoint) = self.endpoint(node)?;
        let mut controls = self.controls.lock();
        let fresh = |control: &Control| {
            control.address == address && control.unanswered_count < UNANSWERED_CALLS_MAX
        };
        if !controls.get(&target).is_some_and(fresh) {
            let channel = endpoint.connect_lazy();
            controls.insert(target, Control { address, channel, unanswered_count: 0 });
        }
        let control = controls.get_mut(&target).expect("inserted above where it was missing");
        control.unanswered_count += 1;
        Ok(client(control.channel.clone()))
    }

    pub(super) fn answered(&self, target: u64) {
        if let Some(control) = self.controls.lock().get_mut(&target) {
            control.unanswered_count = 0;
        }
    }

    pub(super) fn request<T>(&self, target: u64, message: T) -> Request<T> {
        let identity = &self.parts.identity;
        let caller = Caller {
            cluster: identity.cluster.clone(),
            broker_group: identity.broker_group.clone(),
            group_uuid: Some(identity.group_uuid),
            from: identity.node_id,
            to: target,
        };
        let mut request = Request::new(message);
        if let Err(error) = caller.write(request.metadata_mut()) {
            // The target then turns the call away, with its reason.
            tracing::error!(%error, "a name of this node cannot be sent");
        }
        request
    }
}
