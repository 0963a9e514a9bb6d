//! The network of a witness: it reaches nobody. A witness that cannot ask for votes can never win
//! an election, whatever triggered it.

use std::io;

use openraft::OptionalSend;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};

use crate::replica::membership::BrokerNode;
use crate::replica::raft_types::{RaftVote, TypeConfig};
use crate::replica::state_machine::Manifest;

/// Reaches nobody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mute;

fn refused() -> Unreachable<TypeConfig> {
    let reason = "a witness asks nothing of other members";
    Unreachable::new(&io::Error::new(io::ErrorKind::Unsupported, reason))
}

impl RaftNetworkFactory<TypeConfig> for Mute {
    type Network = Self;

    async fn new_client(&mut self, _target: u64, _node: &BrokerNode) -> Self {
        Self
    }
}

impl RaftNetworkV2<TypeConfig> for Mute {
    type SnapshotData = Manifest;

    async fn append_entries(
        &mut self,
        _request: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(refused()))
    }

    async fn vote(
        &mut self,
        _request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(refused()))
    }

    /// The default grants, which would let it go on to real votes.
    async fn pre_vote(
        &mut self,
        _request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(refused()))
    }

    async fn full_snapshot(
        &mut self,
        _vote: RaftVote,
        _snapshot: openraft::alias::SnapshotOf<TypeConfig, Manifest>,
        _cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        Err(StreamingError::Unreachable(refused()))
    }
}
