//! Puts a replica together: log, state machine, Raft and the tasks around them; takes it apart.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::{SnapshotPolicy, StepDownPolicy};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::bootstrap::{self, Plan};
use super::checkpoint::Opened;
use super::checkpointing;
use super::clock_source::ClockSource;
use super::committed_hint::committed_hint;
use super::digests::{Digesting, Digests, Samples};
use super::doubt::Doubt;
use super::fence::{self, Fence, Fencing};
use super::gate::Patience;
use super::gating::{Driving, Gating};
use super::leadership::Leadership;
use super::log_store::{LogFacts, LogStore};
use super::membership::{BrokerNode, Role};
use super::network::{LinkParts, Links};
use super::own_state::{OwnState, member_identity};
use super::peers::{self, PeerStates};
use super::proposer::{self, ProposerParts};
use super::published::{AppliedEnd, Published};
use super::raft_types::Raft;
use super::restore::{RestoreError, Restored, restore};
use super::seeding::{Giving, Seeding};
use super::state::{GateMode, Limits};
use super::state_machine::StateMachine;
use super::status::{Following, StatusSenders};
use super::succession::Succession;
use super::trimming::Trimming;
use super::{ProposeError, RaftStatus, Replica, Shared};
use crate::data_dir::Identity;
use crate::fault::{Fault, injected};
use crate::log::{CheckpointMark, Log, OpenError};
use crate::position::EntryId;

/// Between two reports of a start that takes long.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the log's last write may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// As `peer_silence_max`, for a new leader that has heard nothing yet: until then nothing commits.
const NEW_LEADER_SILENCE_MAX: Duration = Duration::from_millis(300);

/// What a replica is started with.
#[derive(Debug)]
pub struct Options {
    /// Of the data directory.
    pub identity: Identity,
    /// Of the group's first start; `None`: an empty log becomes a group of this node alone.
    pub(crate) plan: Option<Plan>,
    /// `host:port` where other members reach this node; empty without a peer port.
    pub peer_address: String,
    /// `host:port` of members by name; they win over those that the membership has.
    pub addresses: BTreeMap<String, String>,
    /// Name of the node that leads when it is in step.
    pub preferred_leader: Option<String>,
    /// On the disk whose fill other members are told.
    pub data_dir: PathBuf,
    /// File of the committed index, a hint.
    pub hint_path: PathBuf,
    /// To all members together that take files of this one.
    pub seed_bytes_per_second_max: Option<u64>,
    /// Log bytes between two checkpoints.
    pub checkpoint_interval_bytes: u64,
    pub limits: Limits,
    pub in_flight_bytes_max: u64,
    pub clock_step_max: Duration,
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
    /// A peer that is owed entries and takes none for so long is given up.
    pub peer_silence_max: Duration,
    /// How long a stop waits for what is under way before it gives it up.
    pub settle_timeout: Duration,
    /// From the proposal of an entry until it is readable.
    pub commit_seconds: Histogram,
    /// Leaders seen.
    pub elections: Counter,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("replica I/O failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("raft cannot start: {0}")]
    Raft(String),
    #[error(
        "the log is empty, but entries of it were committed here: restore it, or empty the data \
         directory and make this node a new member with `drumlin cluster add`"
    )]
    LogLost,
}

impl StartError {
    /// What is wrong with the log, if that is the reason.
    pub(crate) fn into_log(self) -> Result<OpenError, Self> {
        match self {
            Self::Restore(RestoreError::Log(error)) => Ok(error),
            other => Err(other),
        }
    }
}

impl From<OpenError> for StartError {
    fn from(error: OpenError) -> Self {
        Self::Restore(RestoreError::Log(error))
    }
}

/// Why a broker's run is over though nobody stopped it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The process must end: what went wrong would go wrong again, or is not known.
    Failed(String),
    /// The broker must begin anew on what lies on its disk.
    Restart(String),
}

impl Ended {
    pub fn reason(&self) -> &str {
        match self {
            Self::Failed(reason) | Self::Restart(reason) => reason,
        }
    }
}

/// A replica's tasks, and the way to end them.
#[derive(Debug)]
pub struct Running {
    replica: Replica,
    stop: CancellationToken,
    proposing: [JoinHandle<()>; 2],
    following: Vec<JoinHandle<()>>,
    checkpointing: JoinHandle<()>,
    ended: watch::Receiver<Option<Ended>>,
    /// Whether this node is the only voter, as it was at the start.
    alone: bool,
    settle_timeout: Duration,
}

/// Starts a replica on what was found in its data directory. Without a plan a log without a vote
/// and entries becomes a group of one voter: this node. With one, [`bootstrap::complete`] makes it.
///
/// `open_log` blocks while it recovers.
pub async fn start(
    options: Options,
    opened: Opened,
    open_log: impl FnOnce(Option<CheckpointMark>) -> Result<Log, OpenError> + Send + 'static,
) -> Result<(Replica, Running), StartError> {
    let broker_group = options.identity.broker_group.clone();
    let restoring = move || restore(opened, open_log, &broker_group);
    let restored = tokio::task::spawn_blocking(restoring).await.map_err(io::Error::other)??;
    let Restored { log, applying, newest, checkpointer } = restored;
    let unused = log.last().is_none() && log.vote().is_none();
    if unused && committed_hint(&options.hint_path)?.is_some() {
        // Under its old id it would vote twice, and lack what it has answered for.
        return Err(StartError::LogLost);
    }
    let fence = Fence::of(&log);
    let applied = AppliedEnd { id: applying.state.applied(), position: applying.state.end() };
    let trimmed = applying.state.trimmed();
    let said_gate = applying.state.applied().map(|at| (at, applying.state.gate()));
    let membership = newest.as_ref().map(|newest| newest.membership.clone()).unwrap_or_default();
    let published = Arc::new(Published::new(applying, applied, log.settled_end()));
    let (ended_sender, ended) = watch::channel(None);
    let (handle, checkpoints, checkpointing) = checkpointing::start(
        newest,
        options.checkpoint_interval_bytes,
        applied.position,
        checkpointing::Writing {
            checkpointer,
            group_uuid: options.identity.log_uuid(),
            log: log.clone(),
            published: Arc::clone(&published),
            ended: ended_sender.clone(),
        },
    );
    let (trim_sender, trimmed) = watch::channel(trimmed);
    let (samples, sampled) = Samples::new();
    let machine = StateMachine::new(
        Arc::clone(&published),
        options.limits,
        membership,
        trim_sender,
        handle,
        samples,
    );
    let giving = Arc::new(Giving::new(
        log.clone(),
        checkpoints.clone(),
        options.data_dir.join("checkpoint"),
        options.seed_bytes_per_second_max,
    ));
    let doubt = Arc::new(Doubt::new(Role::Data, log.clone()));
    let towards = (Arc::clone(&giving), Arc::clone(&doubt));
    let OpenRaft { raft, links, gating, facts } =
        open_raft(&options, &log, said_gate, machine, towards).await?;
    let seeding = Arc::new(Seeding::new(giving, &options, raft.clone(), links.clone()));
    let stop = CancellationToken::new();
    let clock = Arc::new(ClockSource::new(options.clock_step_max));
    let (status_sender, status) = watch::channel(RaftStatus::default());
    let (jump_sender, clock_jump_ms) = watch::channel(0);
    let (refused, refused_seen) = watch::channel(None);
    let (proposer, proposing) = proposer::start(ProposerParts {
        raft: raft.clone(),
        status: status.clone(),
        clock: Arc::clone(&clock),
        published: Arc::clone(&published),
        gate: gating.view(),
        log_closed: log.closed(),
        refused: refused_seen,
        in_flight_bytes_max: options.in_flight_bytes_max,
        commit_seconds: options.commit_seconds.clone(),
        stop: stop.child_token(),
    });
    let (peers_sender, peers) = watch::channel(PeerStates::default());
    let senders = StatusSenders {
        status: status_sender,
        clock_jump_ms: jump_sender,
        ended: ended_sender.clone(),
        elections: options.elections.clone(),
    };
    let following_raft = Following {
        raft: raft.clone(),
        published: Arc::clone(&published),
        clock: Arc::clone(&clock),
        senders,
        peers: peers.clone(),
        log_closed: log.closed(),
        // No other node is elected before: voters hold to a leader for the longest timeout, and a
        // follower waits for at least the shortest one more.
        quorum_silence_max: options.election_timeout_max + options.election_timeout_min,
        stop: stop.clone(),
    };
    let trimming = Trimming {
        raft: raft.clone(),
        log: log.clone(),
        checkpoints: checkpoints.clone(),
        trimmed,
        stop: stop.child_token(),
    };
    let driving = Driving {
        gating: gating.clone(),
        raft: raft.clone(),
        facts,
        settled: log.settled_end(),
        peers: peers.clone(),
        stop: stop.child_token(),
    };
    let digests = Digests::default();
    let digesting = Digesting {
        digests: digests.clone(),
        samples: sampled,
        published: Arc::clone(&published),
        peers: peers.clone(),
        status: status.clone(),
        node_id: options.identity.node_id,
        stop: stop.child_token(),
    };
    let broken = Arc::new(Notify::new());
    let succession = Succession {
        raft: raft.clone(),
        links: links.clone(),
        fence: fence.clone(),
        broken: Arc::clone(&broken),
        stop: stop.child_token(),
    };
    let mut following = vec![
        tokio::spawn(digesting.run()),
        tokio::spawn(driving.run()),
        tokio::spawn(succession.run()),
        tokio::spawn(peers::follow(raft.clone(), links.clone(), peers_sender, stop.child_token())),
        tokio::spawn(following_raft.run()),
        tokio::spawn(Arc::clone(&published).follow_settled(stop.child_token())),
        tokio::spawn(trimming.run()),
        tokio::spawn(Arc::clone(&seeding).run(ended_sender.clone(), stop.child_token())),
    ];
    let alone = begin(&raft, &options, &fence, &log).await?;
    let fencing = Fencing {
        fence: fence.clone(),
        log: log.clone(),
        raft: raft.clone(),
        status: status.clone(),
        peers: peers.clone(),
        applied: published.applied(),
        stop: stop.child_token(),
    };
    following.push(tokio::spawn(fencing.run()));
    if let Some(plan) = options.plan.clone() {
        let (raft, identity) = (raft.clone(), options.identity.clone());
        let stop = stop.child_token();
        let completing = async move {
            let completed = bootstrap::complete(&plan, &identity, &raft);
            if let Some(Err(reason)) = stop.run_until_cancelled(completed).await {
                tracing::error!(reason, "the broker group is not complete");
            }
        };
        following.push(tokio::spawn(completing));
    }
    let shared = Shared {
        published,
        log,
        raft,
        proposer,
        clock,
        status,
        refused,
        checkpoints,
        clock_jump_ms,
        ended: ended_sender,
        broken,
        fence,
        seeding,
        gate: gating.view(),
        peers,
        changing: tokio::sync::Mutex::default(),
        given_away: parking_lot::Mutex::default(),
        election_timeout: options.election_timeout_max,
        own: OwnState::new(options.identity.clone(), options.data_dir.clone()),
        digests,
        doubt,
    };
    let replica = Replica { shared: Arc::new(shared) };
    let leadership = Leadership {
        replica: replica.clone(),
        preferred: options.preferred_leader,
        election_timeout: options.election_timeout_max,
        stop: stop.child_token(),
    };
    following.push(tokio::spawn(leadership.run()));
    let running = Running {
        replica: replica.clone(),
        stop,
        proposing,
        following,
        checkpointing,
        ended,
        alone,
        settle_timeout: options.settle_timeout,
    };
    Ok((replica, running))
}

/// Raft and what goes with it on the way to other members.
struct OpenRaft {
    raft: Raft,
    links: Links,
    gating: Gating,
    facts: watch::Receiver<LogFacts>,
}

async fn open_raft(
    options: &Options,
    log: &Log,
    said_gate: Option<(EntryId, GateMode)>,
    machine: StateMachine,
    (giving, doubt): (Arc<Giving>, Arc<Doubt>),
) -> Result<OpenRaft, StartError> {
    let config = openraft::Config { enable_elect: !log.is_fenced(), ..raft_config(options) };
    let config = config.validate().map_err(|e| StartError::Raft(e.to_string()))?;
    let store = LogStore::new(log.clone(), &options.hint_path, said_gate)?;
    let facts = store.facts();
    let gating = Gating::new(Patience {
        silence_max: options.peer_silence_max,
        new_leader_silence_max: NEW_LEADER_SILENCE_MAX,
    });
    let identity = &options.identity;
    let links = Links::new(LinkParts {
        identity: member_identity(identity),
        role: Role::Data,
        addresses: options.addresses.clone(),
        heartbeat_interval: options.heartbeat_interval,
        gating: gating.clone(),
        giving: Some(giving),
        doubt,
    });
    let raft = Raft::new(identity.node_id, Arc::new(config), links.clone(), store, machine);
    let raft = raft.await.map_err(|fatal| StartError::Raft(fatal.to_string()))?;
    Ok(OpenRaft { raft, links, gating, facts })
}

fn raft_config(options: &Options) -> openraft::Config {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    openraft::Config {
        heartbeat_interval: ms(options.heartbeat_interval),
        election_timeout_min: ms(options.election_timeout_min),
        election_timeout_max: ms(options.election_timeout_max),
        max_payload_entries: 64,
        max_append_entries: Some(256),
        // Entries are large: the default depths would be no back-pressure.
        api_channel_size: Some(1024),
        notification_channel_size: Some(8192),
        state_machine_channel_size: Some(256),
        // Only retention purges; else taking a snapshot would.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: 200,
        install_snapshot_timeout: 30_000,
        enable_pre_vote: Some(true),
        // A leader that restarts may have lost what it had sent: it starts as a follower.
        enable_leader_restore: Some(injected(Fault::LeaderRestored)),
        removed_leader_step_down: StepDownPolicy::After(1000),
        allow_log_reversion: None,
        ..openraft::Config::default()
    }
}

/// Makes a group of an empty log that nobody has planned more for. A lone voter does not wait for an
/// election timeout, nor for others who had more than it has. Whether this node is one.
async fn begin(
    raft: &Raft,
    options: &Options,
    fence: &Fence,
    log: &Log,
) -> Result<bool, StartError> {
    let failed = |reason: String| StartError::Raft(reason);
    let node_id = options.identity.node_id;
    if !raft.is_initialized().await.map_err(|e| failed(e.to_string()))? {
        if options.plan.is_some() {
            return Ok(false);
        }
        let node = BrokerNode {
            name: options.identity.node.clone(),
            address: options.peer_address.clone(),
            role: Role::Data,
        };
        let members = BTreeMap::from([(node_id, node)]);
        raft.initialize(members).await.map_err(|e| failed(e.to_string()))?;
        tracing::info!(node_id, "bootstrapped a broker group of one node");
        return Ok(true);
    }
    let alone = raft.voter_ids().eq([node_id]);
    if alone {
        if fence.is_closed() {
            tracing::warn!("the power went before deferred syncs were made up for");
            fence::lift(fence, log, raft).await?;
        }
        raft.trigger().elect(false).await.map_err(|e| failed(e.to_string()))?;
    }
    Ok(alone)
}

impl Running {
    /// Waits until this node leads and has applied all that was committed before. What was written
    /// since the last checkpoint comes first, which takes as long as it takes.
    ///
    /// Errors: why that will never be.
    pub async fn until_serving(&self) -> Result<(), String> {
        let replica = &self.replica;
        let mut status = replica.raft_status();
        let serving = async {
            loop {
                let serves = status.wait_for(|status| status.serving).await.map(drop);
                serves.map_err(|_| "the replica has ended".to_owned())?;
                match replica.read_barrier().await {
                    Err(ProposeError::NotLeader { .. }) => {}
                    reached => return reached.map_err(|error| error.to_string()),
                }
            }
        };
        let report_progress = async {
            loop {
                tokio::time::sleep(PROGRESS_INTERVAL).await;
                tracing::info!(progress = ?replica.progress(), "waiting to serve");
            }
        };
        tokio::select! {
            served = serving => served,
            ended = self.ended() => Err(ended.reason().to_owned()),
            () = report_progress => unreachable!("it does not end"),
        }
    }

    /// Resolves once the replica cannot go on: the node must then end.
    pub fn ended(&self) -> impl Future<Output = Ended> + Send + use<> {
        let mut ended = self.ended.clone();
        async move {
            let told = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
            match told {
                Ok(Some(ended)) => ended,
                Ok(None) | Err(_) => std::future::pending().await,
            }
        }
    }

    /// Whether this node is its group's only voter: then it serves as soon as it can.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// Proposes nothing new, answers what is under way, takes a last checkpoint, closes the log.
    ///
    /// A disk that is full or stuck delays it by some seconds: what waits for the disk then has no
    /// known outcome.
    ///
    /// False if the disk does not answer even then: the log must not be opened again before the
    /// process has ended.
    pub async fn shutdown(self) -> bool {
        let Self {
            replica, stop, proposing, following, checkpointing, ended, settle_timeout, ..
        } = self;
        let healthy = !matches!(*ended.borrow(), Some(Ended::Failed(_)));
        replica.shared.proposer.close();
        let mut settling = tokio::spawn(settle(replica.clone(), proposing, healthy));
        match tokio::time::timeout(settle_timeout, &mut settling).await {
            Ok(ended) => report(ended, "what was under way"),
            Err(_) => {
                tracing::warn!("what is under way does not end and is given up");
                if !close(replica.log()).await {
                    return false;
                }
                report(settling.await, "what was under way");
            }
        }
        stop.cancel();
        for task in following {
            report(task.await, "a task of the replica");
        }
        if let Err(error) = replica.shared.raft.shutdown().await {
            tracing::error!(%error, "raft did not end in order");
        }
        report(checkpointing.await, "the checkpointer");
        close(replica.log()).await
    }
}

/// Waits for what is under way, then for a last checkpoint.
async fn settle(replica: Replica, proposing: [JoinHandle<()>; 2], healthy: bool) {
    for task in proposing {
        report(task.await, "the proposer");
    }
    if healthy && let Err(error) = replica.checkpoint().await {
        tracing::warn!(%error, "the last checkpoint was not written; the next start replays");
    }
}

/// Fails what still waits for the disk. False if even that takes too long.
async fn close(log: &Log) -> bool {
    let log = log.clone();
    let closing = tokio::task::spawn_blocking(move || log.close());
    match tokio::time::timeout(CLOSE_TIMEOUT, closing).await {
        Ok(closed) => {
            report(closed, "closing the log");
            true
        }
        Err(_) => {
            tracing::error!("the disk does not answer: the log is left as after a crash");
            false
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>, task: &str) {
    if let Err(error) = ended {
        tracing::error!(task, %error, "a task ended badly");
    }
}
