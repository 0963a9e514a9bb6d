//! Puts a replica together: log, state machine, Raft and the tasks around them; takes it apart.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::BrokerGroupName;
use openraft::{SnapshotPolicy, StepDownPolicy};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::checkpoint::Opened;
use super::checkpointing;
use super::clock_source::ClockSource;
use super::log_store::LogStore;
use super::membership::{BrokerNode, Role};
use super::network::Links;
use super::proposer::{self, ProposerParts};
use super::published::{AppliedEnd, Published};
use super::raft_types::Raft;
use super::restore::{RestoreError, Restored, restore};
use super::state::Limits;
use super::state_machine::StateMachine;
use super::status::{self, StatusSenders};
use super::trimming::Trimming;
use super::{ProposeError, RaftStatus, Replica, Shared};
use crate::log::{CheckpointMark, Log, OpenError};

/// Between two reports of a start that takes long.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the log's last write may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a replica is started with.
#[derive(Debug)]
pub struct Options {
    /// Issued at bootstrap, kept with the data directory.
    pub node_id: u64,
    pub group_uuid: Uuid,
    pub broker_group: BrokerGroupName,
    /// Unique within the cluster.
    pub node_name: String,
    /// File of the committed index, a hint.
    pub hint_path: PathBuf,
    /// Log bytes between two checkpoints.
    pub checkpoint_interval_bytes: u64,
    pub limits: Limits,
    pub in_flight_bytes_max: u64,
    pub clock_step_max: Duration,
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
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
}

/// A replica's tasks, and the way to end them.
#[derive(Debug)]
pub struct Running {
    replica: Replica,
    stop: CancellationToken,
    proposing: [JoinHandle<()>; 2],
    following: [JoinHandle<()>; 3],
    checkpointing: JoinHandle<()>,
    failed: watch::Receiver<Option<String>>,
    settle_timeout: Duration,
}

/// Starts a replica on what was found in its data directory. A log without a vote and entries
/// becomes a group of one voter: this node.
///
/// `open_log` blocks while it recovers.
pub async fn start(
    options: Options,
    opened: Opened,
    open_log: impl FnOnce(Option<CheckpointMark>) -> Result<Log, OpenError> + Send + 'static,
) -> Result<(Replica, Running), StartError> {
    let broker_group = options.broker_group.clone();
    let restoring = move || restore(opened, open_log, &broker_group);
    let restored = tokio::task::spawn_blocking(restoring).await.map_err(io::Error::other)??;
    let Restored { log, applying, newest, checkpointer } = restored;
    let durable = log.durable_end();
    let applied = AppliedEnd { id: applying.state.applied(), position: applying.state.end() };
    let trimmed = applying.state.trimmed();
    let membership = newest.as_ref().map(|newest| newest.membership.clone()).unwrap_or_default();
    let published = Arc::new(Published::new(applying, applied, durable));
    let (failed_sender, failed) = watch::channel(None);
    let (handle, checkpoints, checkpointing) = checkpointing::start(
        newest,
        options.checkpoint_interval_bytes,
        applied.position,
        checkpointing::Writing {
            checkpointer,
            group_uuid: options.group_uuid,
            log: log.clone(),
            published: Arc::clone(&published),
            failed: failed_sender.clone(),
        },
    );
    let (trim_sender, trimmed) = watch::channel(trimmed);
    let machine =
        StateMachine::new(Arc::clone(&published), options.limits, membership, trim_sender, handle);
    let raft = open_raft(&options, &log, machine).await?;
    let stop = CancellationToken::new();
    let clock = Arc::new(ClockSource::new(options.clock_step_max));
    let (status_sender, status) = watch::channel(RaftStatus::default());
    let (jump_sender, clock_jump_ms) = watch::channel(0);
    let (refused, refused_seen) = watch::channel(None);
    let (proposer, proposing) = proposer::start(ProposerParts {
        raft: raft.clone(),
        status: status.clone(),
        clock: Arc::clone(&clock),
        readable: published.readable(),
        log_closed: log.closed(),
        refused: refused_seen,
        in_flight_bytes_max: options.in_flight_bytes_max,
        commit_seconds: options.commit_seconds.clone(),
        stop: stop.child_token(),
    });
    let senders = StatusSenders {
        status: status_sender,
        clock_jump_ms: jump_sender,
        failed: failed_sender,
        elections: options.elections.clone(),
    };
    let trimming = Trimming {
        raft: raft.clone(),
        log: log.clone(),
        checkpoints: checkpoints.clone(),
        trimmed,
        stop: stop.child_token(),
    };
    let following = [
        tokio::spawn(status::follow(
            raft.clone(),
            Arc::clone(&published),
            Arc::clone(&clock),
            senders,
            log.closed(),
            stop.clone(),
        )),
        tokio::spawn(Arc::clone(&published).follow_durable(stop.child_token())),
        tokio::spawn(trimming.run()),
    ];
    bootstrap(&raft, &options).await?;
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
    };
    let replica = Replica { shared: Arc::new(shared) };
    let running = Running {
        replica: replica.clone(),
        stop,
        proposing,
        following,
        checkpointing,
        failed,
        settle_timeout: options.settle_timeout,
    };
    Ok((replica, running))
}

async fn open_raft(
    options: &Options,
    log: &Log,
    machine: StateMachine,
) -> Result<Raft, StartError> {
    let config = raft_config(options).validate().map_err(|e| StartError::Raft(e.to_string()))?;
    let store = LogStore::new(log.clone(), &options.hint_path)?;
    let raft = Raft::new(options.node_id, Arc::new(config), Links, store, machine);
    raft.await.map_err(|fatal| StartError::Raft(fatal.to_string()))
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
        enable_leader_restore: Some(false),
        removed_leader_step_down: StepDownPolicy::After(1000),
        allow_log_reversion: None,
        enable_elect: true,
        ..openraft::Config::default()
    }
}

/// Makes a group of an empty log; a lone voter does not wait for an election timeout.
async fn bootstrap(raft: &Raft, options: &Options) -> Result<(), StartError> {
    let failed = |reason: String| StartError::Raft(reason);
    if !raft.is_initialized().await.map_err(|e| failed(e.to_string()))? {
        let node = BrokerNode {
            name: options.node_name.clone(),
            address: String::new(),
            role: Role::Data,
        };
        let members = BTreeMap::from([(options.node_id, node)]);
        raft.initialize(members).await.map_err(|e| failed(e.to_string()))?;
        tracing::info!(node_id = options.node_id, "bootstrapped a broker group of one node");
    } else if raft.voter_ids().eq([options.node_id]) {
        raft.trigger().elect(false).await.map_err(|e| failed(e.to_string()))?;
    }
    Ok(())
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
            reason = self.failed() => Err(reason),
            () = report_progress => unreachable!("it does not end"),
        }
    }

    /// Resolves with the reason once the replica has failed for good; the node must then end.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let mut failed = self.failed.clone();
        async move {
            let reason = failed.wait_for(Option::is_some).await.map(|reason| reason.clone());
            match reason {
                Ok(reason) => reason.unwrap_or_default(),
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// Proposes nothing new, answers what is under way, takes a last checkpoint, closes the log.
    ///
    /// A disk that is full or stuck delays it by some seconds: what waits for the disk then has no
    /// known outcome.
    pub async fn shutdown(self) {
        let Self { replica, stop, proposing, following, checkpointing, failed, settle_timeout } =
            self;
        let healthy = failed.borrow().is_none();
        replica.shared.proposer.close();
        let mut settling = tokio::spawn(settle(replica.clone(), proposing, healthy));
        match tokio::time::timeout(settle_timeout, &mut settling).await {
            Ok(ended) => report(ended, "what was under way"),
            Err(_) => {
                tracing::warn!("what is under way does not end and is given up");
                if !close(replica.log()).await {
                    return;
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
        close(replica.log()).await;
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
