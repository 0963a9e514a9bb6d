//! What runs beside the edges: watches the disk, proposes trims.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::broker::Context;
use crate::command::Command;
use crate::position::{EntryIndex, LogOffset};
use crate::replica::Item;
use crate::retention::{DiskLevel, DiskThresholds, DiskWatch, Policy, SegmentSpan, trim_below};

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
    context: Arc<Context>,
    disk: DiskWatch,
    /// Newest clock of each sealed segment, by its first entry.
    newest_ms: BTreeMap<EntryIndex, u64>,
}

impl Upkeep {
    pub(crate) fn new(context: Arc<Context>, data_dir: PathBuf) -> Self {
        let thresholds = DiskThresholds {
            warn_percent: context.config.disk_warn_percent,
            refuse_percent: context.config.disk_refuse_percent,
        };
        Self { context, disk: DiskWatch::new(data_dir, thresholds), newest_ms: BTreeMap::new() }
    }

    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let every = |period| {
            let mut ticks = tokio::time::interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        let (mut looks, mut trims) = (every(TICK), every(RETENTION_INTERVAL));
        let mut full = self.context.replica.log().disk_full();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = trims.tick() => {
                    if let Err(error) = self.trim().await {
                        tracing::warn!(error, "nothing was trimmed");
                    }
                    continue;
                }
                _ = looks.tick() => {}
                changed = full.changed() => if changed.is_err() { break },
            }
            let out_of_space = *full.borrow_and_update();
            self.watch_disk(out_of_space);
        }
    }

    fn watch_disk(&mut self, out_of_space: bool) {
        let before = self.disk.level();
        let (level, space) = match self.disk.look() {
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
            None
        };
        self.context.replica.refuse_runs(reason);
    }

    /// Proposes what retention asks for, if anything.
    async fn trim(&mut self) -> Result<(), String> {
        let context = Arc::clone(&self.context);
        let replica = &context.replica;
        if !replica.raft_status().borrow().serving {
            return Ok(());
        }
        let bases = replica.log().segment_bases();
        let segments = self.spans(&bases).map_err(|error| error.to_string())?;
        let policy = self.policy();
        let trimmed = replica.view().state.trimmed().below;
        let below = trim_below(&segments, replica.clock_ms(), policy, replica.trim_limit());
        let Some(below) = below.filter(|below| *below > trimmed) else { return Ok(()) };
        let position = bases.iter().find(|(first, _)| *first == below).map(|(_, at)| *at);
        let Some(position) = position else { return Ok(()) };
        let deadline = Some(Instant::now() + TRIM_TIMEOUT);
        let command = Command::Trim { below, position };
        let trimmed = replica.propose(Item::Command(command), deadline).await;
        trimmed.map(drop).map_err(|error| error.to_string())
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

    /// The segments with their ages, ascending.
    fn spans(&mut self, bases: &[(EntryIndex, LogOffset)]) -> io::Result<Vec<SegmentSpan>> {
        let log = self.context.replica.log().clone();
        let oldest = bases.first().map_or(EntryIndex::ZERO, |(first, _)| *first);
        self.newest_ms = self.newest_ms.split_off(&oldest);
        let mut spans = Vec::with_capacity(bases.len());
        for (at, (first, position)) in bases.iter().enumerate() {
            let next = bases.get(at + 1);
            let end = next.map_or_else(|| log.end(), |(_, position)| *position);
            let last_end = match next {
                Some((first, _)) => *first,
                None => log.last().map_or(*first, |id| id.index.next()),
            };
            let newest_ms = match (next, self.newest_ms.get(first)) {
                (Some(_), Some(known)) => *known,
                (Some(_), None) => newest_clock(&log, *first, last_end)?,
                // Still written to: never trimmed.
                (None, _) => u64::MAX,
            };
            if next.is_some() {
                self.newest_ms.insert(*first, newest_ms);
            }
            spans.push(SegmentSpan {
                first: *first,
                last: last_end.previous().unwrap_or(*first),
                newest_ms,
                bytes: end.bytes_since(*position).unwrap_or(0),
            });
        }
        Ok(spans)
    }
}

/// The clock of a segment's newest entry that has one; the largest there is if none has.
fn newest_clock(log: &crate::log::Log, first: EntryIndex, end: EntryIndex) -> io::Result<u64> {
    let mut at = end;
    for _ in 0..CLOCKLESS_MAX {
        let Some(index) = at.previous().filter(|index| *index >= first) else { break };
        if let Some(entry) = log.entries(index, at, 0)?.first()
            && entry.clock_ms > 0
        {
            return Ok(entry.clock_ms);
        }
        at = index;
    }
    Ok(u64::MAX)
}
