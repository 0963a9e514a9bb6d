//! One witness: its log, its Raft, and the tasks around them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use openraft::SnapshotPolicy;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::machine::{AppliedFile, Machine};
use super::mute::Mute;
use super::trimming::Trimming;
use super::{WitnessError, WitnessRaft, directory};
use crate::data_dir::Identity;
use crate::fault::{Fault, injected};
use crate::log::{Log, Vote};
use crate::position::{EntryId, Term};
use crate::replica::doubt::{Doubt, Owed};
use crate::replica::log_store::LogStore;
use crate::replica::membership::Role;

/// The pace of the brokers: a voter that heard its leader within the longest election timeout
/// votes for nobody else.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(100),
            election_timeout_min: Duration::from_millis(500),
            election_timeout_max: Duration::from_millis(900),
        }
    }
}

/// A running witness.
#[derive(Debug)]
pub(super) struct Voter {
    dir: PathBuf,
    identity: Identity,
    log: Log,
    raft: WitnessRaft,
    trim_upto: watch::Sender<Option<EntryId>>,
    doubt: Arc<Doubt>,
    stop: CancellationToken,
    tasks: [JoinHandle<()>; 3],
}

/// What was found on disk.
struct Found {
    identity: Identity,
    log: Log,
    applied: AppliedFile,
}

impl Voter {
    /// Starts what lies in `dir`.
    pub(super) async fn open(dir: &Path, pace: Pace) -> Result<Self, WitnessError> {
        let dir = dir.to_owned();
        let reading = dir.clone();
        let reading = tokio::task::spawn_blocking(move || read(&reading));
        let failed = |reason: String| WitnessError::Raft { dir: dir.clone(), reason };
        let found = reading.await.map_err(|error| failed(error.to_string()))??;
        let Found { identity, log, applied } = found;
        if injected(Fault::WitnessKeepsNoVote) {
            forget_vote(&log).await.map_err(failed)?;
        }
        let io = |error| WitnessError::Io { dir: dir.clone(), error };
        let store = LogStore::new(log.clone(), &directory::hint_path(&dir), None).map_err(io)?;
        let config = raft_config(pace).validate().map_err(|error| failed(error.to_string()))?;
        let machine = Machine::new(applied);
        let raft = WitnessRaft::new(identity.node_id, Arc::new(config), Mute, store, machine);
        let raft = raft.await.map_err(|error| failed(error.to_string()))?;
        let stop = CancellationToken::new();
        let (trim_upto, upto) = watch::channel(None);
        let trimming = Trimming { raft: raft.clone(), log: log.clone(), upto, stop: stop.clone() };
        let watching = report_end(raft.clone(), identity.clone(), stop.clone());
        let doubt = Arc::new(Doubt::new(Role::Witness, log.clone()));
        let keeping = keep_loss(dir.clone(), doubt.owed(), stop.clone());
        let tasks = [tokio::spawn(trimming.run()), tokio::spawn(watching), tokio::spawn(keeping)];
        Ok(Self { dir, identity, log, raft, trim_upto, doubt, stop, tasks })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn raft(&self) -> &WitnessRaft {
        &self.raft
    }

    pub(super) fn log(&self) -> &Log {
        &self.log
    }

    /// Where what the leader's requests say of trimming goes.
    pub(super) fn trim_upto(&self) -> &watch::Sender<Option<EntryId>> {
        &self.trim_upto
    }

    /// Whether it lost what it had answered, so that it takes no part any more.
    pub(super) fn doubt(&self) -> &Arc<Doubt> {
        &self.doubt
    }

    /// Whether it votes, as far as it knows.
    pub(super) async fn votes(&self) -> bool {
        let id = self.identity.node_id;
        let asked = self.raft.with_raft_state(move |state| {
            state.membership_state.effective().voter_ids().any(|voter| voter == id)
        });
        // One that has failed may still be counted on by the others.
        asked.await.unwrap_or(true)
    }

    /// Answers nothing more and closes the log.
    pub(super) async fn shutdown(self) {
        let Self { log, raft, stop, tasks, .. } = self;
        stop.cancel();
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task of a witness ended badly");
            }
        }
        if let Err(error) = raft.shutdown().await {
            tracing::error!(%error, "a witness's raft did not end in order");
        }
        if let Err(error) = tokio::task::spawn_blocking(move || log.close()).await {
            tracing::error!(%error, "a witness's log was not closed");
        }
    }
}

fn read(dir: &Path) -> Result<Found, WitnessError> {
    let identity = directory::check(dir)?;
    let group_uuid = identity.group_uuid;
    if dir.file_name().is_none_or(|name| *name != *group_uuid.to_string()) {
        return Err(WitnessError::OtherOwner {
            dir: dir.to_owned(),
            what: "group",
            found: group_uuid.to_string(),
            own: dir.file_name().unwrap_or_default().display().to_string(),
        });
    }
    let applied = AppliedFile::open(dir, group_uuid)?;
    let opened = Log::open(&directory::log_dir(dir), directory::log_options(group_uuid), None);
    let (log, report) = opened.map_err(|error| WitnessError::Log { dir: dir.to_owned(), error })?;
    if log.purged().is_some_and(|purged| applied.kept().and_then(|kept| kept.last) < Some(purged)) {
        let what = "the file of what it had applied";
        return Err(WitnessError::Forgot { dir: dir.to_owned(), what });
    }
    tracing::info!(group = %identity.broker_group, node_id = identity.node_id,
        last = log.last().map(tracing::field::display), ?report, "opened the log of a witness");
    Ok(Found { identity, log, applied })
}

/// The injected fault: as if it had never voted.
async fn forget_vote(log: &Log) -> Result<(), String> {
    let vote = Vote { term: Term::ZERO, node: 0, committed: false };
    let synced = log.save_vote(vote).map_err(|error| error.to_string())?;
    synced.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

fn raft_config(pace: Pace) -> openraft::Config {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    openraft::Config {
        heartbeat_interval: ms(pace.heartbeat_interval),
        election_timeout_min: ms(pace.election_timeout_min),
        election_timeout_max: ms(pace.election_timeout_max),
        api_channel_size: Some(1024),
        notification_channel_size: Some(8192),
        state_machine_channel_size: Some(256),
        // What may be forgotten comes with the leader's requests.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        allow_log_reversion: None,
        enable_elect: false,
        ..openraft::Config::default()
    }
}

/// Says when a witness ends by itself: the group then has one voter less until a restart.
async fn report_end(raft: WitnessRaft, identity: Identity, stop: CancellationToken) {
    let mut metrics = raft.metrics();
    loop {
        if let Err(error) = &metrics.borrow_and_update().running_state {
            if !stop.is_cancelled() {
                tracing::error!(group = %identity.broker_group, node_id = identity.node_id, %error,
                    "a witness has failed; it votes again once this process is started anew");
            }
            return;
        }
        match stop.run_until_cancelled(metrics.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) | None => return,
        }
    }
}

/// Keeps over restarts that this witness lost what it had answered.
async fn keep_loss(dir: PathBuf, mut owed: watch::Receiver<Option<Owed>>, stop: CancellationToken) {
    stop.run_until_cancelled(async { owed.wait_for(Option::is_some).await.is_ok() }).await;
    // Also if it was told at the very end.
    let Some(Owed { term, end }) = *owed.borrow() else { return };
    let keeping = tokio::task::spawn_blocking(move || directory::mark_lost(&dir, term, end));
    match keeping.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "that this witness lost entries is not kept"),
        Err(error) => tracing::error!(%error, "that this witness lost entries is not kept"),
    }
}
