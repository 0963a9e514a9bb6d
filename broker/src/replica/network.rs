//! The way to other members: openraft's client half over tonic. One long-lived stream of appends
//! per member, votes and heartbeats on a connection of their own.
//!
//! A link tells the gate what it hears of its member. It never decides anything but when a
//! connection is given up.

use std::io;
use std::time::Duration;

use drumlin_proto::native::seed_response::Result as Seeded;
use futures::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};

use super::membership::BrokerNode;
use super::raft_types::{RaftVote, TypeConfig};
use super::state_machine::Manifest;
use super::wire::{self, StreamAppendResult};
use crate::position::{EntryIndex, Term};

mod appending;
mod connection;
mod failure;
mod link;
mod links;
mod session;

pub(crate) use connection::{client, endpoint};
use failure::LinkError;
use link::{Link, Purpose};
pub(crate) use links::{LinkParts, Links};

/// Between two tries to connect where nobody is there.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Between two questions whether a member has pulled all of a seed.
const SEED_POLL_INTERVAL: Duration = Duration::from_secs(1);

impl RaftNetworkFactory<TypeConfig> for Links {
    type Network = Link;

    /// Connects with the first entries; votes, which go through it too, use the other connection.
    async fn new_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        Link::new(self, target, node, Purpose::Entries)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        Link::new(self, target, node, Purpose::Control)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        Link::new(self, target, node, Purpose::Control)
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = Manifest;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut answers = self.stream_append(stream::iter([request]), option).await?;
        match answers.next().await {
            Some(answer) => answer.map(Into::into),
            None => Err(RPCError::Unreachable(Unreachable::new(&io::Error::other("no answer")))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<
            BoxStream<'s, Result<StreamAppendResult, RPCError<TypeConfig>>>,
            RPCError<TypeConfig>,
        >,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(self.append(input))
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.may_campaign()?;
        let message = self.shared.request(self.target, wire::vote_request_to_wire(&request));
        let response = self.call(&option, async |mut client| client.vote(message).await).await?;
        Ok(wire::vote_response_from_wire(response).map_err(|e| self.invalid(&e))?)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.may_campaign()?;
        let message = self.shared.request(self.target, wire::vote_request_to_wire(&request));
        let response =
            self.call(&option, async |mut client| client.pre_vote(message).await).await?;
        Ok(wire::vote_response_from_wire(response).map_err(|e| self.invalid(&e))?)
    }

    /// A data member pulls the files beside Raft and is asked until it has them.
    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, Manifest>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let seeding = async {
            if self.is_witness()
                && let Some(last) = &snapshot.meta.last_log_id
            {
                let term = Term::new(vote.leader_id.term);
                self.gating().pass(term, EntryIndex::new(last.index)).await;
            }
            let mut message = wire::seed_to_wire(&vote, &snapshot.meta);
            let giving = self.shared.parts.giving.clone().filter(|_| !self.is_witness());
            // Files are held only for a member that answers and wants them.
            let mut wanted = false;
            loop {
                if let Some(giving) = giving.as_ref().filter(|_| wanted) {
                    let manifest = giving.manifest().await;
                    message.manifest = Some(manifest.map_err(|error| Unreachable::new(&error))?);
                }
                let request = self.shared.request(self.target, message.clone());
                let asked = self.call(&option, async |mut client| client.seed(request).await);
                let answer = asked.await.map_err(Unreachable::from)?;
                match answer.result {
                    Some(Seeded::Installed(vote)) => {
                        let vote = wire::vote_from_wire(Some(vote))
                            .map_err(|error| Unreachable::from(self.invalid(&error)))?;
                        giving.iter().for_each(|giving| giving.done(self.target));
                        return Ok(SnapshotResponse::new(vote));
                    }
                    Some(Seeded::Pulling(pulling)) => {
                        if let Some(giving) = giving.as_ref().filter(|_| wanted) {
                            giving.note(self.target, &pulling);
                        }
                        wanted = true;
                        let (done_bytes, all_bytes) = (pulling.done_bytes, pulling.all_bytes);
                        tracing::debug!(member = self.node.name, done_bytes, all_bytes, "pulling");
                        tokio::time::sleep(SEED_POLL_INTERVAL).await;
                    }
                    None => {
                        let empty = self.invalid(&wire::WireError::Missing("the result"));
                        return Err(Unreachable::from(empty).into());
                    }
                }
            }
        };
        tokio::select! {
            seeded = seeding => seeded,
            closed = cancel => Err(closed.into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let to_witness = self.is_witness() && *request.to_node_id() == self.target;
        if to_witness {
            return Err(LinkError::Witness.into());
        }
        let message = self.shared.request(self.target, wire::transfer_to_wire(&request));
        self.call(&option, async |mut client| client.transfer_leadership(message).await).await?;
        Ok(Ok(()))
    }

    /// Connecting is paced here; this delays the first entries behind a failure.
    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(RETRY_INTERVAL)))
    }
}

#[cfg(test)]
mod tests;
