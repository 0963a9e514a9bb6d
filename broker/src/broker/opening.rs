//! From the configuration and the data directory to a running replica: what is put in place, opened
//! and mended first.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::StartError;
use crate::config::{Config, Flush};
use crate::data_dir::{Bootstrap, Claim, DataDir, DataDirError, Found};
use crate::disk::RealDisk;
use crate::log::{CheckpointMark, Log, LogMetrics, LogOptions, OpenError};
use crate::metrics::Metrics;
use crate::replica::Replica;
use crate::replica::bootstrap::Plan;
use crate::replica::checkpoint::{CheckpointError, Checkpointer, Opened};
use crate::replica::committed_hint;
use crate::replica::repairing::Repairing;
use crate::replica::start::{self, Running};
use crate::replica::state::Limits;
use crate::seed::Receiver;
use crate::seed::install::{InstallOptions, install};

/// Raft's name of a group's first node.
const FIRST_NODE_ID: u64 = 1;
/// File of the committed index within the data directory.
const HINT_FILE: &str = "committed";
/// How long entries under way and the last checkpoint may take then.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Locks the data directory; an empty one becomes this node's, as a group by itself.
pub(crate) fn open_data_dir(config: &Config) -> Result<DataDir, DataDirError> {
    find_data_dir(config)?.or_claim(new_group)
}

/// Of a node that is a group by itself.
pub(super) fn new_group() -> Bootstrap {
    Bootstrap {
        group_uuid: Uuid::now_v7(),
        succeeds: Vec::new(),
        directory_uuid: Uuid::new_v4(),
        node_id: FIRST_NODE_ID,
    }
}

pub(crate) fn find_data_dir(config: &Config) -> Result<Found, DataDirError> {
    let claim = Claim {
        cluster: config.cluster.clone(),
        broker_group: config.broker_group.clone(),
        node: config.node.clone(),
    };
    DataDir::open(&config.data_dir, &claim)
}

/// The replica of an open data directory. A log that is damaged where it had been durable is mended
/// with what other data nodes have.
pub(crate) async fn start_replica(
    config: &Config,
    data_dir: &DataDir,
    metrics: &Metrics,
) -> Result<(Replica, Running), StartError> {
    put_seed_in_place(config, data_dir).await?;
    let log_metrics = LogMetrics::default();
    metrics.register_log(&log_metrics);
    loop {
        let error = match open_replica(config, data_dir, metrics, log_metrics.clone()).await {
            Err(StartError::Replica(error)) => error.into_log()?,
            opened => return opened,
        };
        let mended = repairing(config, data_dir)?.mend(error).await;
        mended.map_err(|error| StartError::Replica(error.into()))?;
    }
}

/// How a damaged log may be mended.
fn repairing(config: &Config, data_dir: &DataDir) -> Result<Repairing, StartError> {
    let opened = open_checkpoints(data_dir)?;
    let meta = opened.checkpoint.as_ref().map(|checkpoint| &checkpoint.meta);
    let configured = config.replicas.iter().map(|node| (node.name.clone(), node.address.clone()));
    Ok(Repairing::new(
        data_dir.identity().clone(),
        &data_dir.log_dir(),
        meta.map(|meta| (meta.mark(), meta.membership.as_slice())),
        configured.collect(),
        addresses(config),
        config.quarantine_bytes_max,
    ))
}

async fn open_replica(
    config: &Config,
    data_dir: &DataDir,
    metrics: &Metrics,
    log_metrics: LogMetrics,
) -> Result<(Replica, Running), StartError> {
    let identity = data_dir.identity();
    let (commit_seconds, elections) = metrics.of_replica();
    let options = start::Options {
        identity: identity.clone(),
        plan: Plan::of(config),
        peer_address: own_address(config),
        addresses: addresses(config),
        preferred_leader: preferred_leader(config),
        data_dir: data_dir.root().to_owned(),
        hint_path: data_dir.root().join(HINT_FILE),
        seed_bytes_per_second_max: config.seed_bytes_per_second_max,
        checkpoint_interval_bytes: config.checkpoint_bytes.min(config.segment_bytes),
        limits: Limits { topics_max: config.topics_max, groups_max: config.groups_max },
        in_flight_bytes_max: config.in_flight_bytes_max,
        clock_step_max: config.clock_step_max,
        heartbeat_interval: config.heartbeat_interval,
        election_timeout_min: config.election_timeout_min,
        election_timeout_max: config.election_timeout_max,
        peer_silence_max: config.peer_silence_max,
        settle_timeout: SETTLE_TIMEOUT,
        commit_seconds,
        elections,
    };
    let opened = open_checkpoints(data_dir)?;
    Ok(start::start(options, opened, log_opener(config, data_dir, log_metrics)).await?)
}

pub(crate) fn open_checkpoints(data_dir: &DataDir) -> Result<Opened, CheckpointError> {
    Checkpointer::open(
        Arc::new(RealDisk),
        &data_dir.checkpoint_dir(),
        &data_dir.index_dir(),
        data_dir.identity().log_uuid(),
    )
}

/// Opens the log; it blocks while it recovers.
pub(crate) fn log_opener(
    config: &Config,
    data_dir: &DataDir,
    metrics: LogMetrics,
) -> impl FnOnce(Option<CheckpointMark>) -> Result<Log, OpenError> + Send + use<> {
    let options = LogOptions {
        segment_bytes: config.segment_bytes,
        prepared_bytes: config.prepared_bytes,
        quarantine_bytes_max: config.quarantine_bytes_max,
        defer_syncs: config.flush == Flush::Async,
        metrics,
        ..LogOptions::new(data_dir.identity().log_uuid())
    };
    let dir = data_dir.log_dir();
    move |mark| {
        let (log, report) = Log::open(&dir, options, mark)?;
        let (scanned_entries, scanned_bytes) = (report.scanned_entries, report.scanned_bytes);
        let (clean, last) = (report.clean, log.last().map(tracing::field::display));
        tracing::info!(last, clean, scanned_entries, scanned_bytes, "opened the log");
        if let Some((index, bytes)) = report.torn_tail {
            tracing::warn!(%index, bytes, "a tail that was never synced went to quarantine");
        }
        Ok(log)
    }
}

/// File of the committed index.
pub(crate) fn hint_path(data_dir: &DataDir) -> PathBuf {
    data_dir.root().join(HINT_FILE)
}

/// Before anything is opened: a complete re-seed takes the place of log and checkpoints.
async fn put_seed_in_place(config: &Config, data_dir: &DataDir) -> Result<(), StartError> {
    let identity = data_dir.identity();
    let options = InstallOptions {
        root: data_dir.root().to_owned(),
        receiver: Receiver {
            group_uuid: identity.log_uuid(),
            directory_uuid: identity.directory_uuid,
        },
        hint_file: HINT_FILE,
        committed: committed_hint(&data_dir.root().join(HINT_FILE))?,
        quarantine_bytes_max: config.quarantine_bytes_max,
    };
    let installing = tokio::task::spawn_blocking(move || install(&options));
    installing.await.map_err(io::Error::other)??;
    Ok(())
}

/// Where the configuration says that others reach this node; empty if it does not.
pub(crate) fn own_address(config: &Config) -> String {
    let listed = config.replicas.iter().find(|node| node.name == config.node);
    let advertised = config.peers.as_ref().and_then(|peers| peers.advertised.as_ref());
    match (listed, advertised) {
        (Some(node), _) => node.address.clone(),
        (None, Some((host, port))) => format!("{host}:{port}"),
        (None, None) => {
            config.peers.as_ref().map(|peers| peers.bind.to_string()).unwrap_or_default()
        }
    }
}

/// Who leads when it is in step: by configuration, or the first by name.
fn preferred_leader(config: &Config) -> Option<String> {
    let first = || config.replicas.iter().map(|node| &node.name).min().cloned();
    config.preferred_leader.clone().or_else(first)
}

/// Of the members that the configuration names.
pub(crate) fn addresses(config: &Config) -> BTreeMap<String, String> {
    let members = config.replicas.iter().chain(&config.witness);
    members.map(|member| (member.name.clone(), member.address.clone())).collect()
}
