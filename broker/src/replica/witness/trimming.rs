//! Keeps a witness small: what the leader says that nobody needs any more is given up, a segment
//! at a time, once what was applied of it is on disk.

use std::io;

use openraft::RaftMetrics;
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::WitnessRaft;
use crate::log::Log;
use crate::position::{EntryId, EntryIndex};
use crate::replica::raft_types::{LogId, TypeConfig};

/// What trimming works with.
#[derive(Debug)]
pub(super) struct Trimming {
    pub(super) raft: WitnessRaft,
    pub(super) log: Log,
    /// What the leader's requests said last.
    pub(super) upto: watch::Receiver<Option<EntryId>>,
    pub(super) stop: CancellationToken,
}

impl Trimming {
    /// Runs until `stop` or the end of Raft.
    pub(super) async fn run(mut self) {
        loop {
            let upto = *self.upto.borrow_and_update();
            if let Some(last) = upto.and_then(|upto| self.droppable(upto.index))
                && !self.forget(last).await
            {
                return;
            }
            match self.stop.run_until_cancelled(self.upto.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    }

    /// Last entry of the segments that lie wholly at or below `upto` and below what was applied.
    fn droppable(&self, upto: EntryIndex) -> Option<EntryIndex> {
        let applied = self.raft.metrics().borrow_watched().last_applied.as_ref().map(|id| id.index);
        let limit = upto.min(EntryIndex::new(applied?));
        let bases = self.log.segment_bases();
        let behind = bases.iter().skip(1).map(|(base, _)| *base);
        behind.take_while(|base| *base <= limit).last()?.previous()
    }

    /// False once Raft has ended.
    async fn forget(&self, last: EntryIndex) -> bool {
        let behind = |id: &Option<LogId>| id.as_ref().is_some_and(|id| id.index >= last.get());
        if !behind(&self.raft.metrics().borrow_watched().snapshot) {
            let triggered = self.raft.trigger().snapshot().await.is_ok();
            if !triggered || !self.until(|metrics| behind(&metrics.snapshot)).await {
                return false;
            }
        }
        let triggered = self.raft.trigger().purge_log(last.get()).await.is_ok();
        if !triggered || !self.until(|metrics| behind(&metrics.purged)).await {
            return false;
        }
        let log = self.log.clone();
        let dropping = tokio::task::spawn_blocking(move || log.retain_from(last.next()));
        match dropping.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => tracing::debug!(upto = %last, "trimmed the witness's log"),
            Err(error) => tracing::error!(upto = %last, %error, "segments cannot be dropped"),
        }
        true
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
