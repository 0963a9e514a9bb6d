//! Forgets what was trimmed: purges Raft's log, then lets the log drop whole segments, once both
//! checkpoints of this node cover it.

use std::io;

use openraft::RaftMetrics;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::checkpointing::Checkpoints;
use super::raft_types::{LogId, Raft, TypeConfig};
use super::state::TrimPoint;
use crate::log::Log;
use crate::position::EntryIndex;

/// What trimming works with.
#[derive(Debug)]
pub(crate) struct Trimming {
    pub(crate) raft: Raft,
    pub(crate) log: Log,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) trimmed: watch::Receiver<TrimPoint>,
    pub(crate) stop: CancellationToken,
}

impl Trimming {
    /// Runs until `stop` or the end of Raft.
    pub(crate) async fn run(mut self) {
        let mut kept = self.checkpoints.changes();
        let mut done = EntryIndex::ZERO;
        loop {
            let below = self.trimmed.borrow_and_update().below;
            let limit = kept.borrow_and_update().limit;
            if below > done && limit.is_some_and(|limit| below <= limit) {
                if !self.forget(below).await {
                    break;
                }
                done = below;
            }
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = self.trimmed.changed() => if changed.is_err() { break },
                changed = kept.changed() => if changed.is_err() { break },
            }
        }
    }

    /// False once Raft has ended.
    async fn forget(&self, below: EntryIndex) -> bool {
        let Some(last) = below.previous() else { return true };
        if !self.purge(last).await {
            return false;
        }
        // Large files take a while to unlink.
        let log = self.log.clone();
        let dropping = tokio::task::spawn_blocking(move || log.retain_from(below));
        match dropping.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => tracing::info!(%below, "trimmed the log"),
            Err(error) => tracing::error!(%below, %error, "trimmed segments cannot be dropped"),
        }
        true
    }

    /// Purging waits for the snapshot: Raft forgets only what one covers.
    async fn purge(&self, last: EntryIndex) -> bool {
        let behind = |id: &Option<LogId>| id.as_ref().is_some_and(|id| id.index >= last.get());
        if !behind(&self.raft.metrics().borrow_watched().snapshot) {
            let triggered = self.raft.trigger().snapshot().await.is_ok();
            if !triggered || !self.until(|metrics| behind(&metrics.snapshot)).await {
                return false;
            }
        }
        let triggered = self.raft.trigger().purge_log(last.get()).await.is_ok();
        triggered && self.until(|metrics| behind(&metrics.purged)).await
    }

    async fn until(&self, reached: impl Fn(&RaftMetrics<TypeConfig>) -> bool) -> bool {
        let mut metrics = self.raft.metrics();
        while !reached(&metrics.borrow_and_update()) {
            match self.stop.run_until_cancelled(metrics.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return false,
            }
        }
        true
    }
}
