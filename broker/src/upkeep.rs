//! What runs beside the edges: watches the disk, proposes trims.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::broker::Context;
use crate::command::Command;
use crate::log::Log;
use crate::position::{EntryIndex, LogOffset};
use crate::replica::Item;
use crate::replica::peers::PeerState;
use crate::retention::{
    DiskLevel, DiskSpace, DiskThresholds, DiskWatch, Policy, SegmentSpan, trim_below,
};

/// Between two looks at the disk.
const TICK: Duration = Duration::from_secs(1);
/// Between two looks at what is too old.
const RETENTION_INTERVAL: Duration = Duration::from_secs(10);
const TRIM_TIMEOUT: Duration = Duration::from_secs(10);
/// Raft's own entries have no clock; a segment holds a few of them in a row at most.
const CLOCKLESS_MAX: u64 = 64;

/// The upkeep of one broker.
#[derive(Debug)]
pub(crate) struct Upkeep {
    disk: Disk,
    retention: Retention,
}

impl Upkeep {
    pub(crate) fn new(context: Arc<Context>, data_dir: PathBuf) -> Self {
        let thresholds = DiskThresholds {
            warn_percent: context.config.disk_warn_percent,
            refuse_percent: context.config.disk_refuse_percent,
        };
        let watch = DiskWatch::new(data_dir, thresholds);
        Self {
            disk: Disk { context: Arc::clone(&context), watch },
            retention: Retention { context, ages: Ages::default() },
        }
    }

    /// Runs until `stop`. Trims may wait for a full disk, which must be watched meanwhile.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let both = async { tokio::join!(self.disk.run(), self.retention.run()) };
        stop.run_until_cancelled(both).await;
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// The other data replica with the fullest disk, and its fill in percent; those that do not answer
/// now say nothing.
fn fullest_peer(peers: &BTreeMap<u64, PeerState>) -> Option<(&str, u32)> {
    let heard = peers.values().filter(|peer| peer.fresh && !peer.state.witness);
    let fills = heard.map(|peer| (peer.state.node.as_str(), peer.state.disk_percent));
    fills.max_by_key(|(_, percent)| *percent)
}

/// Refuses runs while the disk is full, or that of another replica, which must take them, too.
#[derive(Debug)]
struct Disk {
    context: Arc<Context>,
    watch: DiskWatch,
}

impl Disk {
    /// Runs until the log is gone.
    async fn run(&mut self) {
        let mut looks = every(TICK);
        let mut full = self.context.replica.log().disk_full();
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                changed = full.changed() => if changed.is_err() { break },
            }
            let out_of_space = *full.borrow_and_update();
            self.watch_disk(out_of_space).await;
        }
    }

    async fn watch_disk(&mut self, out_of_space: bool) {
        let before = self.watch.level();
        let (level, space) = match self.look().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::error!(%error, "the data disk cannot be looked at");
                return;
            }
        };
        let (used_bytes, total_bytes) = (space.used_bytes, space.total_bytes);
        if level != before {
            match level {
                DiskLevel::Fine => tracing::info!(used_bytes, total_bytes, "the disk has space"),
                DiskLevel::Warn => tracing::warn!(used_bytes, total_bytes, "the disk fills up"),
                DiskLevel::Refuse => {
                    tracing::error!(used_bytes, total_bytes, "the disk is full: sends are refused");
                }
            }
        }
        let reason = if out_of_space {
            Some("a write found no space".to_owned())
        } else if level == DiskLevel::Refuse {
            let percent = self.context.config.disk_refuse_percent;
            Some(format!("{used_bytes} of {total_bytes} bytes are used, {percent} % are the limit"))
        } else {
            self.peer_is_full()
        };
        self.context.replica.refuse_runs(reason);
    }

    fn peer_is_full(&self) -> Option<String> {
        let percent_max = u32::from(self.context.config.disk_refuse_percent);
        let peers = self.context.replica.peers();
        let peers = peers.borrow();
        let (node, percent) =
            fullest_peer(&peers).filter(|(_, percent)| *percent >= percent_max)?;
        Some(format!("the disk of {node} is {percent} % full, {percent_max} % are the limit"))
    }

    /// A disk that does not answer must not hold up a worker.
    async fn look(&mut self) -> io::Result<(DiskLevel, DiskSpace)> {
        let mut watch = self.watch.clone();
        let looking = tokio::task::spawn_blocking(move || {
            let seen = watch.look();
            (watch, seen)
        });
        let (watch, seen) = looking.await.map_err(io::Error::other)?;
        self.watch = watch;
        seen
    }
}

/// Trims what is too old or too much.
#[derive(Debug)]
struct Retention {
    context: Arc<Context>,
    ages: Ages,
}

impl Retention {
    async fn run(&mut self) {
        let mut trims = every(RETENTION_INTERVAL);
        loop {
            trims.tick().await;
            if let Err(error) = self.trim().await {
                tracing::warn!(error, "nothing was trimmed");
            }
        }
    }

    /// Proposes what retention asks for, if anything.
    async fn trim(&mut self) -> Result<(), String> {
        let context = Arc::clone(&self.context);
        let replica = &context.replica;
        if !replica.raft_status().borrow().serving {
            return Ok(());
        }
        let bases = replica.log().segment_bases();
        let policy = self.policy();
        let segments =
            self.spans(bases.clone(), policy).await.map_err(|error| error.to_string())?;
        let trimmed = replica.view().state.trimmed().below;
        let below = trim_below(&segments, replica.clock_ms(), policy, replica.trim_limit());
        let Some(below) = below.filter(|below| *below > trimmed) else { return Ok(()) };
        let position = bases.iter().find(|(first, _)| *first == below).map(|(_, at)| *at);
        let Some(position) = position else { return Ok(()) };
        if replica.trims_wait() {
            tracing::info!(%below, "a trim waits for a member that is being re-seeded");
            return Ok(());
        }
        let deadline = Instant::now() + TRIM_TIMEOUT;
        let command = Command::Trim { below, position };
        let trimmed = replica.propose(Item::Command(command), Some(deadline));
        match tokio::time::timeout_at(deadline, trimmed).await {
            Ok(trimmed) => trimmed.map(drop).map_err(|error| error.to_string()),
            Err(_) => Err("the trim is not durable in time".to_owned()),
        }
    }

    async fn spans(
        &mut self,
        bases: Vec<(EntryIndex, LogOffset)>,
        policy: Policy,
    ) -> io::Result<Vec<SegmentSpan>> {
        let replica = &self.context.replica;
        let age_ms_max = u64::try_from(policy.age_max.as_millis()).unwrap_or(u64::MAX);
        let young_ms = replica.clock_ms().saturating_sub(age_ms_max);
        let log = replica.log().clone();
        let mut ages = std::mem::take(&mut self.ages);
        let reading = tokio::task::spawn_blocking(move || {
            let spans = ages.spans(&log, &bases, young_ms);
            (ages, spans)
        });
        let (ages, spans) = reading.await.map_err(io::Error::other)?;
        self.ages = ages;
        spans
    }

    /// Age counts for nothing after an election that moved the clock by half the retention.
    fn policy(&self) -> Policy {
        let config = &self.context.config;
        let jump_ms = self.context.replica.clock_jump_ms();
        let age_max = if u128::from(jump_ms) * 2 > config.retention.as_millis() {
            tracing::warn!(jump_ms, "the clock jumped while nobody led: nothing is trimmed by age");
            Duration::MAX
        } else {
            config.retention
        };
        Policy { age_max, bytes_max: config.retention_bytes_max }
    }
}

/// How old sealed segments are.
#[derive(Debug, Default)]
struct Ages {
    /// No entry of the segment is newer, by its first entry.
    newest_ms: BTreeMap<EntryIndex, u64>,
}

impl Ages {
    /// The segments, ascending. From the first one on that holds anything as new as `young_ms`,
    /// all count as new, and none is looked into. Reads from the disk.
    fn spans(
        &mut self,
        log: &Log,
        bases: &[(EntryIndex, LogOffset)],
        young_ms: u64,
    ) -> io::Result<Vec<SegmentSpan>> {
        let oldest = bases.first().map_or(EntryIndex::ZERO, |(first, _)| *first);
        self.newest_ms = self.newest_ms.split_off(&oldest);
        let mut spans = Vec::with_capacity(bases.len());
        let mut all_old = true;
        for (at, (first, position)) in bases.iter().enumerate() {
            let next = bases.get(at + 1);
            let end = next.map_or_else(|| log.end(), |(_, position)| *position);
            let last_end = match next {
                Some((first, _)) => *first,
                None => log.last().map_or(*first, |id| id.index.next()),
            };
            let newest_ms = match next {
                Some((next, _)) if all_old => self.newest(log, *first, *next)?,
                // Still written to: never trimmed.
                Some(_) | None => u64::MAX,
            };
            all_old &= newest_ms < young_ms;
            spans.push(SegmentSpan {
                first: *first,
                last: last_end.previous().unwrap_or(*first),
                newest_ms,
                bytes: end.bytes_since(*position).unwrap_or(0),
            });
        }
        Ok(spans)
    }

    /// Clocks never go back, so the next segment's first one bounds those of a segment; only where
    /// that has none yet, the segment itself is searched.
    fn newest(&mut self, log: &Log, first: EntryIndex, next: EntryIndex) -> io::Result<u64> {
        if let Some(known) = self.newest_ms.get(&first) {
            return Ok(*known);
        }
        let found = match first_clock(log, next)? {
            None => newest_clock(log, first, next)?,
            found => found,
        };
        if let Some(newest_ms) = found {
            self.newest_ms.insert(first, newest_ms);
        }
        Ok(found.unwrap_or(u64::MAX))
    }
}

/// The clock of the first entry from `first` on that has one.
fn first_clock(log: &Log, first: EntryIndex) -> io::Result<Option<u64>> {
    let mut at = first;
    for _ in 0..CLOCKLESS_MAX {
        let Some(entry) = log.entries(at, at.next(), 0)?.pop() else { break };
        if entry.clock_ms > 0 {
            return Ok(Some(entry.clock_ms));
        }
        at = at.next();
    }
    Ok(None)
}

/// The clock of the last entry of `first..end` that has one.
fn newest_clock(log: &Log, first: EntryIndex, end: EntryIndex) -> io::Result<Option<u64>> {
    let mut at = end;
    for _ in 0..CLOCKLESS_MAX {
        let Some(index) = at.previous().filter(|index| *index >= first) else { break };
        if let Some(entry) = log.entries(index, at, 0)?.first()
            && entry.clock_ms > 0
        {
            return Ok(Some(entry.clock_ms));
        }
        at = index;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use drumlin_proto::native::StateResponse;

    use super::*;
    use crate::entry::{Entry, EntryKind};
    use crate::log::LogOptions;
    use crate::position::{EntryId, Term};

    #[test]
    fn the_fullest_data_replica_that_answers_counts() {
        let peer = |node: &str, disk_percent, witness, fresh| {
            let node = node.to_owned();
            let state = StateResponse { node, disk_percent, witness, ..StateResponse::default() };
            PeerState { state, heard_at: Instant::now(), fresh }
        };
        let mut peers = BTreeMap::new();
        assert_eq!(fullest_peer(&peers), None);
        peers.insert(2, peer("b", 40, false, true));
        peers.insert(3, peer("c", 91, false, true));
        peers.insert(4, peer("w", 99, true, true));
        peers.insert(5, peer("gone", 99, false, false));
        assert_eq!(fullest_peer(&peers), Some(("c", 91)));
    }

    /// Entries `i` with clock `10 * i`, but every fourth has none.
    fn log(dir: &tempfile::TempDir) -> Log {
        let mut options = LogOptions::new(uuid::Uuid::from_u128(7));
        options.segment_bytes = 64 << 10;
        options.prepared_bytes = 0;
        let (log, _) = Log::open(dir.path(), options, None).unwrap();
        let payload = Bytes::from(vec![7; 1000]);
        let entry = |index: u64| Entry {
            id: EntryId { term: Term::new(1), index: EntryIndex::new(index) },
            kind: EntryKind::Batch,
            clock_ms: if index.is_multiple_of(4) { 0 } else { 10 * index },
            item_count: 1,
            payload_crc: crc32fast::hash(&payload),
            payload: payload.clone(),
        };
        let (told, synced) = std::sync::mpsc::channel();
        let flushed = Box::new(move |result: io::Result<()>| told.send(result).unwrap());
        log.append((0..400).map(entry).collect(), flushed).unwrap();
        synced.recv().unwrap().unwrap();
        log
    }

    #[test]
    fn segments_are_as_old_as_what_follows_them() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(&dir);
        let bases = log.segment_bases();
        assert!(bases.len() > 4);
        let spans = Ages::default().spans(&log, &bases, u64::MAX).unwrap();
        let (last, sealed) = spans.split_last().unwrap();
        assert_eq!(last.newest_ms, u64::MAX);
        for span in sealed {
            let first_of_next = span.last.get() + 1;
            let clocked = first_of_next + u64::from(first_of_next.is_multiple_of(4));
            assert_eq!(span.newest_ms, 10 * clocked);
        }
    }

    #[test]
    fn nothing_is_looked_into_behind_the_first_new_segment() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(&dir);
        let bases = log.segment_bases();
        let mut ages = Ages::default();
        let spans = ages.spans(&log, &bases, 10 * bases[1].0.get()).unwrap();
        assert!(spans[0].newest_ms < u64::MAX);
        assert!(spans[1..].iter().all(|span| span.newest_ms == u64::MAX));
        assert_eq!(ages.newest_ms.len(), 1);
    }

    #[test]
    fn a_segment_that_nothing_follows_yet_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(&dir);
        let end = log.last().unwrap().index.next();
        let newest = Ages::default().newest(&log, EntryIndex::new(390), end).unwrap();
        assert_eq!(newest, 10 * 399);
    }
}
