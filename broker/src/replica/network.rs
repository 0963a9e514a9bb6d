//! The way to other members: openraft's client half over tonic. One long-lived stream of appends
//! per member, votes and heartbeats on a connection of their own.
//!
//! A link tells the gate what it hears of its member. It never decides anything but when a
//! connection is given up.

use std::collections::{BTreeMap, VecDeque};
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native as proto;
use drumlin_proto::native::peer_client::PeerClient;
use drumlin_proto::native::seed_response::Result as Seeded;
use futures::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::gating::Gating;
use super::membership::{BrokerNode, Role};
use super::peer_service::MemberIdentity;
use super::raft_types::{RaftVote, TypeConfig, entry_id};
use super::seeding::Giving;
use super::state_machine::Manifest;
use super::wire::{self, Caller, MESSAGE_BYTES_MAX, StreamAppendResult};
use crate::fault::{Fault, injected};
use crate::position::{EntryIndex, Term};

const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const FRAME_BYTES_MAX: u32 = 1 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection whose member owes an answer for so long is given up; a multiple of heartbeats.
const IDLE_HEARTBEATS: u32 = 10;
/// The slowest way on which what is in flight is waited for.
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;
/// Between two tries to connect where nobody is there.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Calls in a row without an answer after which their connection is made anew.
const UNANSWERED_CALLS_MAX: u32 = 5;
/// How long it may take a member to show that it is there.
const GONE_TIMEOUT: Duration = Duration::from_millis(300);
/// Between two questions whether a member has pulled all of a seed.
const SEED_POLL_INTERVAL: Duration = Duration::from_secs(1);

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
}

#[derive(Debug)]
struct Shared {
    parts: LinkParts,
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

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Entries, on a connection of their own.
    Entries,
    /// Heartbeats, votes, seeds: short calls.
    Control,
}

/// The link to one other member.
#[derive(Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    target: u64,
    node: BrokerNode,
    purpose: Purpose,
    /// For entries; `None`: to be connected.
    channel: Option<Channel>,
    /// Nobody tries to connect before.
    retry_at: Option<Instant>,
    /// Whether the last report said that it cannot be reached.
    reported_away: bool,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("member {name} has no address")]
    NoAddress { name: String },
    #[error("member {name} at {address} refuses: {reason}")]
    Refused { name: String, address: String, reason: String },
    #[error("member {name} at {address} does not answer: {reason}")]
    Silent { name: String, address: String, reason: String },
    #[error("the connection to member {name} at {address} broke: {reason}")]
    Broken { name: String, address: String, reason: String },
    #[error("member {name} answers what cannot be used: {reason}")]
    Invalid { name: String, reason: String },
    #[error("member {name} lost entries that it had answered as synced")]
    Lost { name: String },
    #[error("a witness does not lead")]
    Witness,
}

impl From<LinkError> for Unreachable<TypeConfig> {
    fn from(error: LinkError) -> Self {
        Self::new(&error)
    }
}

impl From<LinkError> for RPCError<TypeConfig> {
    fn from(error: LinkError) -> Self {
        Self::Unreachable(error.into())
    }
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

    fn link(&self, target: u64, node: &BrokerNode, purpose: Purpose) -> Link {
        Link {
            shared: Arc::clone(&self.shared),
            target,
            node: node.clone(),
            purpose,
            channel: None,
            retry_at: None,
            reported_away: false,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Links {
    type Network = Link;

    /// Connects with the first entries; votes, which go through it too, use the other connection.
    async fn new_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        self.link(target, node, Purpose::Entries)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        self.link(target, node, Purpose::Control)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &BrokerNode) -> Link {
        self.link(target, node, Purpose::Control)
    }
}

/// What a connection to another member needs for streams of large entries.
pub(crate) fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .tcp_nodelay(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// The calls to members over a connection.
pub(crate) fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

impl Shared {
    /// Where a member is: as the local configuration has its name, else as the membership says.
    fn address(&self, node: &BrokerNode) -> Result<String, LinkError> {
        let configured = self.parts.addresses.get(&node.name);
        let address = configured.unwrap_or(&node.address);
        if address.is_empty() {
            return Err(LinkError::NoAddress { name: node.name.clone() });
        }
        Ok(address.clone())
    }

    fn endpoint(&self, node: &BrokerNode) -> Result<(String, Endpoint), LinkError> {
        let address = self.address(node)?;
        let endpoint = endpoint(&address).map_err(|error| LinkError::Invalid {
            name: node.name.clone(),
            reason: format!("address {address}: {error}"),
        })?;
        Ok((address, endpoint))
    }

    fn control(&self, target: u64, node: &BrokerNode) -> Result<PeerClient<Channel>, LinkError> {
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

    fn answered(&self, target: u64) {
        if let Some(control) = self.controls.lock().get_mut(&target) {
            control.unanswered_count = 0;
        }
    }

    fn request<T>(&self, target: u64, message: T) -> Request<T> {
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

/// What was sent on a stream and not answered yet.
#[derive(Debug, Default)]
struct Session {
    state: Mutex<SessionState>,
}

#[derive(Debug, Default)]
struct SessionState {
    term: Term,
    /// Bytes of each request, oldest first.
    unanswered: VecDeque<u64>,
    unanswered_bytes: u64,
    /// When the last answer came, or the oldest request went out.
    since: Option<Instant>,
    answered: bool,
}

impl Session {
    fn sent(&self, term: Term, bytes: u64) {
        let mut state = self.state.lock();
        state.term = term;
        if state.unanswered.is_empty() {
            state.since = Some(Instant::now());
        }
        state.unanswered.push_back(bytes);
        state.unanswered_bytes += bytes;
    }

    fn answered(&self) -> Term {
        let mut state = self.state.lock();
        let bytes = state.unanswered.pop_front().unwrap_or(0);
        state.unanswered_bytes -= bytes;
        state.since = (!state.unanswered.is_empty()).then(Instant::now);
        state.answered = true;
        state.term
    }

    fn was_answered(&self) -> bool {
        self.state.lock().answered
    }

    /// Until when an answer is waited for; `None` while none is owed.
    fn deadline(&self, idle: Duration) -> Option<Instant> {
        let state = self.state.lock();
        let transfer_ms = state.unanswered_bytes * 1000 / SLOWEST_BYTES_PER_SECOND;
        state.since.map(|since| since + idle + Duration::from_millis(transfer_ms))
    }
}

impl Link {
    fn name(&self) -> String {
        self.node.name.clone()
    }

    fn gating(&self) -> &Gating {
        &self.shared.parts.gating
    }

    fn idle(&self) -> Duration {
        self.shared.parts.heartbeat_interval * IDLE_HEARTBEATS
    }

    fn control(&self) -> Result<PeerClient<Channel>, LinkError> {
        self.shared.control(self.target, &self.node)
    }

    /// A connection for entries, paced where nobody is there.
    async fn connect(&mut self) -> Result<PeerClient<Channel>, LinkError> {
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
    fn judge(&self, status: &Status, heard: bool) -> LinkError {
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
        if is_refused || said_so {
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
    fn failed(&mut self, error: LinkError) -> LinkError {
        self.channel = None;
        let pause = match &error {
            LinkError::Broken { .. } => Duration::ZERO,
            _ => RETRY_INTERVAL,
        };
        self.retry_at = Some(Instant::now() + pause);
        if matches!(error, LinkError::Refused { .. }) {
            self.gating().refused(self.target);
        }
        if !std::mem::replace(&mut self.reported_away, true) {
            tracing::warn!(%error, "a member gets no entries");
        }
        error
    }

    /// The requests as they go out, those to a witness once the gate lets them.
    fn outgoing<S>(
        &self,
        requests: S,
        session: Arc<Session>,
    ) -> impl Stream<Item = proto::AppendRequest> + Send + 'static
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let (shared, role) = (Arc::clone(&self.shared), self.node.role);
        requests.then(move |request| {
            let (shared, session) = (Arc::clone(&shared), Arc::clone(&session));
            async move {
                let term = Term::new(request.vote.leader_id.term);
                let is_witness = role == Role::Witness;
                if is_witness && let Some(last) = request.entries.last() {
                    shared.parts.gating.pass(term, EntryIndex::new(last.log_id.index)).await;
                }
                // What is committed and on all data nodes is of no use to a witness.
                let committed = request.leader_commit.as_ref().map(entry_id);
                let trim_upto = committed.filter(|committed| {
                    is_witness && shared.parts.gating.matched_end(term) > Some(committed.index)
                });
                let wire = wire::append_to_wire(request, role, trim_upto);
                let bytes = wire.entries.iter().map(|entry| entry.payload.len() as u64).sum();
                session.sent(term, bytes);
                wire
            }
        })
    }

    /// The next answer; `None` once the member has ended the stream in order.
    async fn next_answer(
        &mut self,
        session: &Session,
        answers: &mut Streaming<proto::AppendResponse>,
    ) -> Option<Result<StreamAppendResult, RPCError<TypeConfig>>> {
        let idle = self.idle();
        loop {
            let wake_at = session.deadline(idle).unwrap_or_else(|| Instant::now() + idle);
            let answer = tokio::select! {
                biased;
                answer = answers.message() => answer,
                () = tokio::time::sleep_until(wake_at) => {
                    if session.deadline(idle).is_some_and(|at| at <= Instant::now()) {
                        let address = self.shared.address(&self.node).unwrap_or_default();
                        let reason = format!("nothing for {idle:?} while answers are owed");
                        let silent = LinkError::Silent { name: self.name(), address, reason };
                        return Some(Err(self.failed(silent).into()));
                    }
                    continue;
                }
            };
            return match answer {
                Ok(None) => None,
                Ok(Some(answer)) => Some(self.take(session, answer).map_err(Into::into)),
                Err(status) => {
                    let error = self.judge(&status, session.was_answered());
                    Some(Err(self.failed(error).into()))
                }
            };
        }
    }

    /// Tells the gate what an answer says.
    fn take(
        &mut self,
        session: &Session,
        answer: proto::AppendResponse,
    ) -> Result<StreamAppendResult, LinkError> {
        let term = session.answered();
        let answer = wire::appended_from_wire(answer).map_err(|error| {
            let invalid = LinkError::Invalid { name: self.name(), reason: error.to_string() };
            self.failed(invalid)
        })?;
        if self.purpose == Purpose::Control {
            self.shared.answered(self.target);
        }
        if std::mem::replace(&mut self.reported_away, false) {
            tracing::info!(member = self.node.name, "a member is back");
        }
        match &answer {
            // What a heartbeat matches is known already.
            Ok(Some(id)) if self.purpose == Purpose::Entries => {
                let end = entry_id(id).index.next();
                self.gating().matched(self.target, term, end);
            }
            Err(StreamAppendError::Conflict(id)) => {
                if self.gating().conflict(self.target, term, entry_id(id).index) {
                    let lost = LinkError::Lost { name: self.name() };
                    return Err(self.failed(lost));
                }
            }
            Ok(_) | Err(StreamAppendError::HigherVote(_)) => self.gating().heard(self.target),
        }
        Ok(answer)
    }

    /// A short call, bounded in time.
    async fn call<T, F>(&self, option: &RPCOption, call: F) -> Result<T, LinkError>
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
                let error = self.judge(&status, true);
                if matches!(error, LinkError::Refused { .. }) {
                    self.gating().refused(self.target);
                }
                Err(error)
            }
            Err(_) => {
                let address = self.shared.address(&self.node).unwrap_or_default();
                let reason = format!("nothing for {:?}", option.hard_ttl());
                Err(LinkError::Silent { name: self.name(), address, reason })
            }
        }
    }

    fn invalid(&self, error: &wire::WireError) -> LinkError {
        LinkError::Invalid { name: self.name(), reason: error.to_string() }
    }

    fn is_witness(&self) -> bool {
        self.node.role == Role::Witness
    }

    /// A member that is not to lead can ask for no votes, whatever made it a candidate.
    fn may_campaign(&self) -> Result<(), LinkError> {
        if self.shared.parts.role == Role::Witness { Err(LinkError::Witness) } else { Ok(()) }
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
        if injected(Fault::ReadUncommitted) && self.is_witness() {
            // Nobody is asked: what the leader alone has counts as committed, and is shown.
            let taken_for_granted = input.map(|request: AppendEntriesRequest<TypeConfig>| {
                let last = request.entries.last().map(|entry| entry.log_id);
                Ok(Ok(last.or(request.prev_log_id)))
            });
            return Box::pin(async { Ok(Box::pin(taken_for_granted) as BoxStream<'s, _>) });
        }
        Box::pin(async move {
            let mut client = match self.purpose {
                Purpose::Entries => self.connect().await?,
                Purpose::Control => self.control()?,
            };
            let session = Arc::new(Session::default());
            let outgoing = self.outgoing(input, Arc::clone(&session));
            let call = client.append(self.shared.request(self.target, outgoing));
            let answers = match tokio::time::timeout(self.idle(), call).await {
                Ok(Ok(answers)) => answers.into_inner(),
                Ok(Err(status)) => {
                    let error = self.judge(&status, self.purpose == Purpose::Control);
                    return Err(self.failed(error).into());
                }
                Err(_) => {
                    let address = self.shared.address(&self.node).unwrap_or_default();
                    let reason = format!("no stream after {:?}", self.idle());
                    let silent = LinkError::Silent { name: self.name(), address, reason };
                    return Err(self.failed(silent).into());
                }
            };
            let state = Some((self, session, answers));
            let answers = stream::unfold(state, |state| async move {
                let (link, session, mut answers) = state?;
                let answer = link.next_answer(&session, &mut answers).await?;
                let more = matches!(answer, Ok(Ok(_)));
                Some((answer, more.then_some((link, session, answers))))
            });
            Ok(Box::pin(answers) as BoxStream<'s, _>)
        })
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

fn causes<'e>(
    error: &'e (dyn StdError + 'static),
) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let cause = next?;
        next = cause.source();
        Some(cause)
    })
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    causes(error).find_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()))
}

fn refused(error: &(dyn StdError + 'static)) -> bool {
    io_kind(error) == Some(io::ErrorKind::ConnectionRefused)
}

/// Also when nobody answered the connection's pings.
fn timed_out(error: &(dyn StdError + 'static)) -> bool {
    io_kind(error) == Some(io::ErrorKind::TimedOut)
        || causes(error).any(|cause| cause.to_string().contains("timed out"))
}

#[cfg(test)]
mod tests;
