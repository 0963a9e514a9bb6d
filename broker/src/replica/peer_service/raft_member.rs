//! A member whose log is kept by openraft, data node or witness: the server half of replication.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use drumlin_proto::native as proto;
use futures::StreamExt;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::StreamAppendError;
use openraft::storage::{RaftStateMachine, Snapshot};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tonic::{Status, Streaming};

use super::{Member, MemberIdentity, Responses};
use crate::position::{EntryId, EntryIndex, Term};
use crate::replica::doubt::{Doubt, Owed};
use crate::replica::fence::Fence;
use crate::replica::membership::Role;
use crate::replica::raft_types::TypeConfig;
use crate::replica::state_machine::Manifest;
use crate::replica::wire;

/// Request bytes that a member holds at once, of all its callers: taken before they are fed to
/// Raft, given back once they are answered.
const UNANSWERED_BYTES_MAX: usize = 64 << 20;
/// What an entry costs beside its payload.
const ENTRY_BYTES: usize = 128;

/// Files of a re-seed, and entries for the repair of a log.
#[tonic::async_trait]
pub(crate) trait Seeding: Send + Sync + fmt::Debug {
    async fn seed(&self, request: proto::SeedRequest) -> Result<proto::SeedResponse, Status>;

    async fn pull(
        &self,
        request: proto::PullRequest,
    ) -> Result<Responses<proto::PullResponse>, Status>;

    async fn entries(
        &self,
        request: proto::EntriesRequest,
    ) -> Result<proto::EntriesResponse, Status>;
}

/// What the member says of itself.
pub(crate) type StateProvider = Arc<dyn Fn() -> proto::StateResponse + Send + Sync>;

/// A member is made of it. Change what differs from [`MemberParts::new`].
pub(crate) struct MemberParts {
    pub(crate) identity: MemberIdentity,
    pub(crate) role: Role,
    pub(crate) state: StateProvider,
    pub(crate) seeding: Option<Arc<dyn Seeding>>,
    /// Told what a witness may forget.
    pub(crate) trim_upto: Option<watch::Sender<Option<EntryId>>>,
    /// While closed, this member does not vote and takes no lead.
    pub(crate) fence: Fence,
    /// The same while its log is known to lack what it had answered.
    pub(crate) doubt: Arc<Doubt>,
    /// Told when a caller's stream of appends broke.
    pub(crate) broken: Arc<Notify>,
}

impl MemberParts {
    pub(crate) fn new(
        identity: MemberIdentity,
        role: Role,
        state: StateProvider,
        doubt: Arc<Doubt>,
    ) -> Self {
        let (fence, broken) = (Fence::default(), Arc::default());
        Self { identity, role, state, seeding: None, trim_upto: None, fence, doubt, broken }
    }
}

impl fmt::Debug for MemberParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemberParts")
            .field("identity", &self.identity)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// The member in front of its Raft.
pub(crate) struct RaftMember<SM: RaftStateMachine<TypeConfig, SnapshotData = Manifest>> {
    raft: openraft::Raft<TypeConfig, SM>,
    parts: MemberParts,
    unanswered: Arc<Semaphore>,
}

impl<SM: RaftStateMachine<TypeConfig, SnapshotData = Manifest>> fmt::Debug for RaftMember<SM> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RaftMember").field("parts", &self.parts).finish_non_exhaustive()
    }
}

fn invalid(error: wire::WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn fatal(error: impl fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

impl<SM: RaftStateMachine<TypeConfig, SnapshotData = Manifest>> RaftMember<SM> {
    pub(crate) fn new(raft: openraft::Raft<TypeConfig, SM>, parts: MemberParts) -> Self {
        Self { raft, parts, unanswered: Arc::new(Semaphore::new(UNANSWERED_BYTES_MAX)) }
    }

    /// Whether a candidate may be voted for: a witness may not, and nobody while this node's own
    /// log is in doubt.
    fn check_candidate(&self, request: &proto::VoteRequest) -> Result<(), Status> {
        self.check_fence()?;
        let Some(vote) = request.vote else { return Ok(()) };
        let metrics = self.raft.metrics();
        let role = {
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().get_node(&vote.node).map(|node| node.role)
        };
        if role == Some(Role::Witness) {
            tracing::error!(candidate = vote.node, "a witness asks for votes and gets none");
            return Err(Status::failed_precondition("a witness may not lead"));
        }
        Ok(())
    }

    fn check_fence(&self) -> Result<(), Status> {
        if let Some(reason) = self.parts.doubt.reason() {
            return Err(Status::unavailable(reason));
        }
        if !self.parts.fence.is_closed() {
            return Ok(());
        }
        let reason = "this member may have lost entries it had answered; it does not vote yet";
        Err(Status::unavailable(reason))
    }

    fn seeding(&self) -> Result<&Arc<dyn Seeding>, Status> {
        let missing = || Status::unimplemented("re-seeding is not supported here");
        self.parts.seeding.as_ref().ok_or_else(missing)
    }
}

/// A request that was fed to Raft and is not answered yet.
struct Fed {
    _permit: Option<OwnedSemaphorePermit>,
    /// What the log lacked when it came, though this leader was answered that it was there.
    lacked: Option<Owed>,
}

/// In their order.
type Unanswered = Arc<Mutex<VecDeque<Fed>>>;

/// A witness that lost entries takes none any more.
fn lost(doubt: &Doubt, role: Role) -> Result<(), Status> {
    match doubt.reason() {
        Some(reason) if role == Role::Witness => Err(Status::data_loss(reason)),
        Some(_) | None => Ok(()),
    }
}

fn request_bytes(request: &proto::AppendRequest) -> u32 {
    let entries = request.entries.iter();
    let bytes: usize = entries.map(|entry| entry.payload.len() + ENTRY_BYTES).sum();
    // One that is larger than all permits together takes them all.
    u32::try_from(bytes.min(UNANSWERED_BYTES_MAX)).expect("bounded just before")
}

#[tonic::async_trait]
impl<SM: RaftStateMachine<TypeConfig, SnapshotData = Manifest>> Member for RaftMember<SM> {
    fn identity(&self) -> &MemberIdentity {
        &self.parts.identity
    }

    /// Ends at the first request that cannot be used, and at whatever else Raft ends it for: the
    /// leader begins anew from what it knows to be here.
    fn append(
        &self,
        requests: Streaming<proto::AppendRequest>,
    ) -> Responses<proto::AppendResponse> {
        let fed: Unanswered = Arc::default();
        let (role, trim_upto) = (self.parts.role, self.parts.trim_upto.clone());
        let doubt = Arc::clone(&self.parts.doubt);
        if let Err(lost) = lost(&doubt, role) {
            return Box::pin(futures::stream::once(std::future::ready(Err(lost))));
        }
        let asking = Arc::clone(&doubt);
        let (unanswered, feeding) = (Arc::clone(&self.unanswered), Arc::clone(&fed));
        let broken = Arc::clone(&self.parts.broken);
        let requests = requests.then(move |request| {
            let (unanswered, feeding) = (Arc::clone(&unanswered), Arc::clone(&feeding));
            let (trim_upto, broken) = (trim_upto.clone(), Arc::clone(&broken));
            let doubt = Arc::clone(&asking);
            async move {
                let request = request.inspect_err(|status| {
                    tracing::debug!(%status, "a stream of appends broke");
                    broken.notify_one();
                });
                let request = request.ok()?;
                let permit = match request_bytes(&request) {
                    // Heartbeats and probes never wait behind entries.
                    0 => None,
                    bytes => Some(unanswered.acquire_many_owned(bytes).await.ok()?),
                };
                let trim = request.trim_upto.as_ref().map(wire::id_from_wire);
                let term = request.vote.map_or(Term::ZERO, |vote| Term::new(vote.term));
                let owed = Owed { term, end: EntryIndex::new(request.answered_end) };
                // Looked at before Raft sees the request: if it takes it then, no newer leader has
                // cut the log, and what is missing is lost.
                let lacked = Some(owed).filter(|owed| doubt.is_short(*owed));
                let request = wire::append_from_wire(request, role).inspect_err(|error| {
                    tracing::error!(%error, "entries of the leader cannot be used");
                });
                let request = request.ok()?;
                if let (Some(told), Some(trim)) = (&trim_upto, trim) {
                    told.send_if_modified(|upto| {
                        let rises = upto.is_none_or(|upto| trim.index > upto.index);
                        if rises {
                            *upto = Some(trim);
                        }
                        rises
                    });
                }
                feeding.lock().push_back(Fed { _permit: permit, lacked });
                Some(request)
            }
        });
        let requests = requests.take_while(|request| std::future::ready(request.is_some()));
        let requests = requests.filter_map(std::future::ready);
        let answers = self.raft.stream_append(requests).map(move |answer| {
            let fed = fed.lock().pop_front();
            let answer = answer.map_err(fatal)?;
            if let Some(Fed { lacked, .. }) = fed
                && !matches!(answer, Err(StreamAppendError::HigherVote(_)))
            {
                doubt.taken();
                if let Some(owed) = lacked {
                    doubt.raise(owed);
                    lost(&doubt, role)?;
                }
            }
            Ok(wire::appended_to_wire(&answer))
        });
        Box::pin(answers)
    }

    async fn pre_vote(&self, request: proto::VoteRequest) -> Result<proto::VoteResponse, Status> {
        self.check_candidate(&request)?;
        let request = wire::vote_request_from_wire(request).map_err(invalid)?;
        let response = self.raft.pre_vote(request).await.map_err(fatal)?;
        Ok(wire::vote_response_to_wire(&response))
    }

    async fn vote(&self, request: proto::VoteRequest) -> Result<proto::VoteResponse, Status> {
        self.check_candidate(&request)?;
        let request = wire::vote_request_from_wire(request).map_err(invalid)?;
        let response = self.raft.vote(request).await.map_err(fatal)?;
        Ok(wire::vote_response_to_wire(&response))
    }

    async fn transfer_leadership(
        &self,
        request: proto::TransferLeadershipRequest,
    ) -> Result<proto::TransferLeadershipResponse, Status> {
        if self.parts.role == Role::Witness && request.to == self.parts.identity.node_id {
            return Err(Status::failed_precondition("a witness may not lead"));
        }
        if request.to == self.parts.identity.node_id {
            self.check_fence()?;
        }
        let request = wire::transfer_from_wire(request).map_err(invalid)?;
        let taken = self.raft.handle_transfer_leader(request).await.map_err(fatal)?;
        taken.map_err(|refused| Status::aborted(refused.to_string()))?;
        Ok(proto::TransferLeadershipResponse {})
    }

    /// A witness takes what the request says; a data member needs the files first.
    async fn seed(&self, request: proto::SeedRequest) -> Result<proto::SeedResponse, Status> {
        if self.parts.role != Role::Witness {
            return self.seeding()?.seed(request).await;
        }
        lost(&self.parts.doubt, self.parts.role)?;
        let (vote, meta) = wire::seed_from_wire(&request).map_err(invalid)?;
        let snapshot = Snapshot { meta, snapshot: Manifest };
        let installed = self.raft.install_full_snapshot(vote, snapshot).await.map_err(fatal)?;
        Ok(wire::seeded_to_wire(&installed.vote))
    }

    async fn pull(
        &self,
        request: proto::PullRequest,
    ) -> Result<Responses<proto::PullResponse>, Status> {
        self.seeding()?.pull(request).await
    }

    async fn entries(
        &self,
        request: proto::EntriesRequest,
    ) -> Result<proto::EntriesResponse, Status> {
        self.seeding()?.entries(request).await
    }

    fn state(&self) -> proto::StateResponse {
        (self.parts.state)()
    }
}
