//! The peer port of a node that is no member yet: it says who it is and can be adopted, no more.

use std::sync::Arc;

use drumlin_proto::native::peer_server::{Peer, PeerServer};
use drumlin_proto::native::{
    AdoptRequest, AdoptResponse, AppendRequest, AppendResponse, EntriesRequest, EntriesResponse,
    ProbeRequest, ProbeResponse, PullRequest, PullResponse, SeedRequest, SeedResponse,
    StateRequest, StateResponse, TransferLeadershipRequest, TransferLeadershipResponse,
    VoteRequest, VoteResponse,
};
use futures::stream::Empty;
use tonic::{Request, Response, Status, Streaming};

use super::{BROKER_GROUP_KEY, CLUSTER_KEY, Door};

/// Serves a [`Door`].
#[derive(Clone, Debug)]
pub(crate) struct DoorService {
    door: Arc<Door>,
}

impl DoorService {
    pub(crate) fn server(door: Arc<Door>) -> PeerServer<Self> {
        PeerServer::new(Self { door })
    }

    /// Refuses callers that mean another cluster or broker group.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let claim = &self.door.claim;
        let expected = [
            (CLUSTER_KEY, claim.cluster.as_str()),
            (BROKER_GROUP_KEY, claim.broker_group.as_str()),
        ];
        for (key, own) in expected {
            let told = request.metadata().get(key).and_then(|value| value.to_str().ok());
            if told != Some(own) {
                let told = told.unwrap_or_default();
                let reason = format!("{key} is {told:?} in the call, {own:?} here");
                return Err(Status::failed_precondition(reason));
            }
        }
        Ok(())
    }
}

fn no_member<T>() -> Result<Response<T>, Status> {
    Err(Status::unavailable("this node belongs to no broker group yet"))
}

#[tonic::async_trait]
impl Peer for DoorService {
    type AppendStream = Empty<Result<AppendResponse, Status>>;
    type PullStream = Empty<Result<PullResponse, Status>>;

    async fn probe(
        &self,
        request: Request<ProbeRequest>,
    ) -> Result<Response<ProbeResponse>, Status> {
        self.check(&request)?;
        Ok(Response::new(self.door.probe(false)))
    }

    async fn adopt(
        &self,
        request: Request<AdoptRequest>,
    ) -> Result<Response<AdoptResponse>, Status> {
        self.check(&request)?;
        self.door.adopt(request.into_inner()).await.map(Response::new)
    }

    async fn append(
        &self,
        _: Request<Streaming<AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        no_member()
    }

    async fn pre_vote(&self, _: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        no_member()
    }

    async fn vote(&self, _: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        no_member()
    }

    async fn transfer_leadership(
        &self,
        _: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        no_member()
    }

    async fn seed(&self, _: Request<SeedRequest>) -> Result<Response<SeedResponse>, Status> {
        no_member()
    }

    async fn pull(&self, _: Request<PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        no_member()
    }

    async fn entries(
        &self,
        _: Request<EntriesRequest>,
    ) -> Result<Response<EntriesResponse>, Status> {
        no_member()
    }

    async fn state(&self, _: Request<StateRequest>) -> Result<Response<StateResponse>, Status> {
        no_member()
    }
}
