//! `drumlin.v1.Peer`: what other members ask of this process. One service for all groups that it has
//! a member of; a call goes to the member whose group UUID it names.
//!
//! Callers of another cluster or group, or who mean another member, are turned away here. What a
//! call does is the member's business.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native as proto;
use drumlin_proto::native::peer_server::{Peer, PeerServer};
use futures::Stream;
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::wire::{Caller, MESSAGE_BYTES_MAX};

pub(crate) mod raft_member;

/// Between two log lines about callers that were turned away.
const REFUSAL_REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// For streams of appends: as large as what one follower may be behind in flight.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const FRAME_BYTES_MAX: u32 = 1 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

/// Messages of a stream to the caller.
pub type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The process as one that may become a member.
#[tonic::async_trait]
pub trait Host: Send + Sync + fmt::Debug {
    /// Who it is, or would be, in this broker group.
    async fn probe(&self, broker_group: &str) -> Result<proto::ProbeResponse, Status>;

    async fn adopt(&self, request: proto::AdoptRequest) -> Result<proto::AdoptResponse, Status>;
}

/// Which member of which group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberIdentity {
    pub cluster: String,
    pub broker_group: String,
    pub group_uuid: Uuid,
    pub node_id: u64,
}

/// One member that lives in this process.
#[tonic::async_trait]
pub trait Member: Send + Sync + fmt::Debug {
    fn identity(&self) -> &MemberIdentity;

    fn append(&self, requests: Streaming<proto::AppendRequest>)
    -> Responses<proto::AppendResponse>;

    async fn pre_vote(&self, request: proto::VoteRequest) -> Result<proto::VoteResponse, Status>;

    async fn vote(&self, request: proto::VoteRequest) -> Result<proto::VoteResponse, Status>;

    async fn transfer_leadership(
        &self,
        request: proto::TransferLeadershipRequest,
    ) -> Result<proto::TransferLeadershipResponse, Status>;

    async fn seed(&self, request: proto::SeedRequest) -> Result<proto::SeedResponse, Status>;

    async fn pull(
        &self,
        request: proto::PullRequest,
    ) -> Result<Responses<proto::PullResponse>, Status>;

    async fn entries(
        &self,
        request: proto::EntriesRequest,
    ) -> Result<proto::EntriesResponse, Status>;

    fn state(&self) -> proto::StateResponse;
}

/// The service; clones share the members.
#[derive(Clone, Debug)]
pub struct PeerService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cluster: String,
    host: Arc<dyn Host>,
    members: RwLock<BTreeMap<Uuid, Arc<dyn Member>>>,
    refusals: Mutex<Refusals>,
}

#[derive(Debug, Default)]
struct Refusals {
    reported_at: Option<Instant>,
    unreported_count: u64,
}

impl PeerService {
    /// Without members yet.
    pub fn new(cluster: String, host: Arc<dyn Host>) -> Self {
        let (members, refusals) = (RwLock::default(), Mutex::default());
        Self { shared: Arc::new(Shared { cluster, host, members, refusals }) }
    }

    /// Answers calls to this member from now on.
    pub fn join(&self, member: Arc<dyn Member>) {
        let group_uuid = member.identity().group_uuid;
        self.shared.members.write().insert(group_uuid, member);
    }

    /// Answers calls to the member of this group no more. Streams under way end with their Raft.
    pub fn leave(&self, group_uuid: Uuid) {
        self.shared.members.write().remove(&group_uuid);
    }

    /// As a service of a tonic server.
    pub fn server(&self) -> PeerServer<Self> {
        PeerServer::new(self.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The member that the caller means.
    fn member(&self, metadata: &MetadataMap) -> Result<Arc<dyn Member>, Status> {
        let caller = self.caller(metadata)?;
        let Some(group_uuid) = caller.group_uuid else {
            return Err(self.refuse(&caller, "it names no group UUID".to_owned()));
        };
        let member = self.shared.members.read().get(&group_uuid).cloned();
        let Some(member) = member else {
            return Err(self.refuse(&caller, "no member of its group lives here".to_owned()));
        };
        let identity = member.identity();
        if caller.broker_group != identity.broker_group {
            let reason = format!("the group is called {}", identity.broker_group);
            return Err(self.refuse(&caller, reason));
        }
        if caller.to != identity.node_id {
            let reason = format!("this is member {}", identity.node_id);
            return Err(self.refuse(&caller, reason));
        }
        Ok(member)
    }

    /// The caller, of this cluster.
    fn caller(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let caller = Caller::read(metadata).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if caller.cluster != self.shared.cluster {
            let reason = format!("this cluster is called {}", self.shared.cluster);
            return Err(self.refuse(&caller, reason));
        }
        Ok(caller)
    }

    fn refuse(&self, caller: &Caller, reason: String) -> Status {
        let unreported_count = {
            let mut refusals = self.shared.refusals.lock();
            let now = Instant::now();
            let due = refusals.reported_at.is_none_or(|at| now >= at + REFUSAL_REPORT_INTERVAL);
            if due {
                refusals.reported_at = Some(now);
                Some(std::mem::take(&mut refusals.unreported_count))
            } else {
                refusals.unreported_count += 1;
                None
            }
        };
        if let Some(unreported_count) = unreported_count {
            tracing::warn!(?caller, reason, unreported_count, "a member's call was turned away");
        }
        Status::failed_precondition(format!(
            "member {} of group {} ({}) in cluster {} is not served here: {reason}",
            caller.from,
            caller.broker_group,
            caller.group_uuid.map_or("no UUID".to_owned(), |uuid| uuid.to_string()),
            caller.cluster,
        ))
    }
}

/// A server with what streams of large entries need; services are added to it.
pub fn listener() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
}

#[tonic::async_trait]
impl Peer for PeerService {
    type AppendStream = Responses<proto::AppendResponse>;
    type PullStream = Responses<proto::PullResponse>;

    async fn append(
        &self,
        request: Request<Streaming<proto::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let member = self.member(request.metadata())?;
        Ok(Response::new(member.append(request.into_inner())))
    }

    async fn pre_vote(
        &self,
        request: Request<proto::VoteRequest>,
    ) -> Result<Response<proto::VoteResponse>, Status> {
        let member = self.member(request.metadata())?;
        member.pre_vote(request.into_inner()).await.map(Response::new)
    }

    async fn vote(
        &self,
        request: Request<proto::VoteRequest>,
    ) -> Result<Response<proto::VoteResponse>, Status> {
        let member = self.member(request.metadata())?;
        member.vote(request.into_inner()).await.map(Response::new)
    }

    async fn transfer_leadership(
        &self,
        request: Request<proto::TransferLeadershipRequest>,
    ) -> Result<Response<proto::TransferLeadershipResponse>, Status> {
        let member = self.member(request.metadata())?;
        member.transfer_leadership(request.into_inner()).await.map(Response::new)
    }

    async fn seed(
        &self,
        request: Request<proto::SeedRequest>,
    ) -> Result<Response<proto::SeedResponse>, Status> {
        let member = self.member(request.metadata())?;
        member.seed(request.into_inner()).await.map(Response::new)
    }

    async fn pull(
        &self,
        request: Request<proto::PullRequest>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let member = self.member(request.metadata())?;
        member.pull(request.into_inner()).await.map(Response::new)
    }

    async fn entries(
        &self,
        request: Request<proto::EntriesRequest>,
    ) -> Result<Response<proto::EntriesResponse>, Status> {
        let member = self.member(request.metadata())?;
        member.entries(request.into_inner()).await.map(Response::new)
    }

    async fn probe(
        &self,
        request: Request<proto::ProbeRequest>,
    ) -> Result<Response<proto::ProbeResponse>, Status> {
        let caller = self.caller(request.metadata())?;
        self.shared.host.probe(&caller.broker_group).await.map(Response::new)
    }

    async fn adopt(
        &self,
        request: Request<proto::AdoptRequest>,
    ) -> Result<Response<proto::AdoptResponse>, Status> {
        self.caller(request.metadata())?;
        let host = Arc::clone(&self.shared.host);
        // It goes on where its caller gives up: half of it would keep the node from any other.
        let adopting = tokio::spawn(async move { host.adopt(request.into_inner()).await });
        let adopted = adopting.await.map_err(|error| Status::internal(error.to_string()))?;
        adopted.map(Response::new)
    }

    async fn state(
        &self,
        request: Request<proto::StateRequest>,
    ) -> Result<Response<proto::StateResponse>, Status> {
        let member = self.member(request.metadata())?;
        Ok(Response::new(member.state()))
    }
}
