//! The link to one other member: its connection, and what a failure on it says of the member.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::peer_client::PeerClient;
use openraft::network::RPCOption;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::RETRY_INTERVAL;
use super::connection::client;
use super::failure::{LinkError, chain, refused, timed_out};
use super::links::{Links, Shared};
use crate::replica::gating::Gating;
use crate::replica::membership::{BrokerNode, Role};
use crate::replica::wire;

/// A connection whose member owes an answer for so long is given up; a multiple of heartbeats.
const IDLE_HEARTBEATS: u32 = 10;
/// Said of a member whose log went back.
pub(super) const LOST: &str = "a member lost entries it had answered as synced";

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Entries, on a connection of their own.
    Entries,
    /// Heartbeats, votes, seeds: short calls.
    Control,
}

/// The link to one other member.
#[derive(Debug)]
pub(crate) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) target: u64,
    pub(super) node: BrokerNode,
    pub(super) purpose: Purpose,
    /// For entries; `None`: to be connected.
    channel: Option<Channel>,
    /// Nobody tries to connect before.
    retry_at: Option<Instant>,
    /// Whether the last report said that it cannot be reached.
    reported_away: bool,
}

impl Link {
    /// Connects with the first entries.
    pub(super) fn new(links: &Links, target: u64, node: &BrokerNode, purpose: Purpose) -> Self {
        Self {
            shared: links.shared(),
            target,
            node: node.clone(),
            purpose,
            channel: None,
            retry_at: None,
            reported_away: false,
        }
    }

    pub(super) fn name(&self) -> String {
        self.node.name.clone()
    }

    pub(super) fn gating(&self) -> &Gating {
        &self.shared.parts.gating
    }

    pub(super) fn idle(&self) -> Duration {
        self.shared.parts.heartbeat_interval * IDLE_HEARTBEATS
    }

    pub(super) fn control(&self) -> Result<PeerClient<Channel>, LinkError> {
        self.shared.control(self.target, &self.node)
    }

    /// A connection for entries, paced where nobody is there.
    pub(super) async fn connect(&mut self) -> Result<PeerClient<Channel>, LinkError> {
        if let Some(channel) = &self.channel {
            return Ok(client(channel.clone()));
        }
        if let Some(at) = self.retry_at.take() {
            tokio::time::sleep_until(at).await;
        }
        // Also if this future is dropped while it connects.
        self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
        let (address, endpoint) = self.shared.endpoint(&self.node)?;
        match endpoint.connect().await {
            Ok(channel) => {
                self.channel = Some(channel.clone());
                Ok(client(channel))
            }
            Err(error) => {
                let (name, reason) = (self.name(), chain(&error));
                let error = if timed_out(&error) {
                    LinkError::Silent { name, address, reason }
                } else {
                    LinkError::Refused { name, address, reason }
                };
                Err(self.failed(error))
            }
        }
    }

    /// What a failed call says of the member. `heard`: it had answered on this connection before.
    pub(super) fn judge(&self, status: &Status, heard: bool) -> LinkError {
        let name = self.name();
        let address = self.shared.address(&self.node).unwrap_or_default();
        let reason = match status.source() {
            Some(source) => format!("{} ({})", status.message(), chain(source)),
            None => format!("{} ({:?})", status.message(), status.code()),
        };
        let is_refused = status.source().is_some_and(refused);
        let is_silent = status.source().is_some_and(timed_out);
        // Without a cause it comes from the member itself.
        let said_so = status.source().is_none() && status.code() != Code::Cancelled;
        if said_so && status.code() == Code::DataLoss {
            LinkError::LostWitness { name }
        } else if is_refused || said_so {
            LinkError::Refused { name, address, reason }
        } else if is_silent {
            LinkError::Silent { name, address, reason }
        } else if heard {
            LinkError::Broken { name, address, reason }
        } else {
            LinkError::Refused { name, address, reason }
        }
    }

    /// Gives the connection up and tells the gate; logs where the member's state changes.
    pub(super) fn failed(&mut self, error: LinkError) -> LinkError {
        self.channel = None;
        let pause = match &error {
            LinkError::Broken { .. } => Duration::ZERO,
            _ => RETRY_INTERVAL,
        };
        self.retry_at = Some(Instant::now() + pause);
        match &error {
            LinkError::Refused { .. } => self.gating().refused(self.target),
            LinkError::LostWitness { .. } if self.gating().lost(self.target) => {
                tracing::error!(%error, "{LOST}");
            }
            _ => {}
        }
        if !std::mem::replace(&mut self.reported_away, true) {
            tracing::warn!(%error, "a member gets no entries");
        }
        error
    }

    /// A short call, bounded in time.
    pub(super) async fn call<T, F>(&self, option: &RPCOption, call: F) -> Result<T, LinkError>
    where
        F: AsyncFnOnce(PeerClient<Channel>) -> Result<tonic::Response<T>, Status>,
    {
        let client = self.control()?;
        match tokio::time::timeout(option.hard_ttl(), call(client)).await {
            Ok(Ok(response)) => {
                self.shared.answered(self.target);
                Ok(response.into_inner())
            }
            Ok(Err(status)) => {
                // A member that says no to a short call is there, and may take entries.
                if status.source().is_some_and(refused) {
                    self.gating().refused(self.target);
                }
                Err(self.judge(&status, true))
            }
            Err(_) => {
                let address = self.shared.address(&self.node).unwrap_or_default();
                let reason = format!("nothing for {:?}", option.hard_ttl());
                Err(LinkError::Silent { name: self.name(), address, reason })
            }
        }
    }

    pub(super) fn invalid(&self, error: &wire::WireError) -> LinkError {
        LinkError::Invalid { name: self.name(), reason: error.to_string() }
    }

    pub(super) fn is_witness(&self) -> bool {
        self.node.role == Role::Witness
    }

    /// A member that is not to lead can ask for no votes, whatever made it a candidate.
    pub(super) fn may_campaign(&self) -> Result<(), LinkError> {
        if self.shared.parts.role == Role::Witness {
            return Err(LinkError::Witness);
        }
        match self.shared.parts.doubt.reason() {
            Some(reason) => Err(LinkError::Doubt { reason }),
            None => Ok(()),
        }
    }

    /// The member answers.
    pub(super) fn is_back(&mut self) {
        if std::mem::replace(&mut self.reported_away, false) {
            tracing::info!(member = self.node.name, "a member is back");
        }
    }
}
