//! The lines of all queues out of a scan of the log. Pure.
//!
//! The log holds no offsets, so they are counted backwards from where each queue ends.

use std::collections::BTreeMap;
use std::io;

use drumlin_proto::ids::{QueueKey, QueueOffset};

use super::index::{Index, Line};
use crate::position::LogOffset;

/// One run as it lies in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScannedRun {
    pub queue: QueueKey,
    /// Where the run (its header) begins.
    pub position: LogOffset,
    /// Header included.
    pub bytes: u32,
    pub count: u32,
    /// Of the entry, as logged.
    pub clock_ms: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("the log cannot be scanned")]
    Scan(#[from] io::Error),
    #[error("{queue:?} ends at {end}, but the log holds {counted} records of it")]
    TooMany { queue: QueueKey, end: QueueOffset, counted: u64 },
}

/// Makes the index that applying the scanned entries had left.
///
/// `runs` are all runs from the trim point up to the checkpoint's applied index, in log order;
/// `ends` are the ends of all queues at that index; lines that end at or below `floor` count as
/// trimmed. Queues that are not in `ends` belong to deleted topics and get nothing.
///
/// A run that apply refused (its guard failed) took no offset, and the log does not tell: such runs
/// must be known to `took_offsets`, or all older offsets of the queue would be wrong.
pub fn rebuild(
    runs: impl IntoIterator<Item = io::Result<ScannedRun>>,
    ends: &BTreeMap<QueueKey, QueueOffset>,
    floor: LogOffset,
    mut took_offsets: impl FnMut(&ScannedRun) -> bool,
) -> Result<Index, RebuildError> {
    let mut found: BTreeMap<QueueKey, Vec<ScannedRun>> = BTreeMap::new();
    let mut clock_ms = 0;
    for run in runs {
        let run = run?;
        // The state's clock never goes back, and entries of Raft's own have none.
        clock_ms = run.clock_ms.max(clock_ms);
        if ends.contains_key(&run.queue) && took_offsets(&run) {
            found.entry(run.queue).or_default().push(ScannedRun { clock_ms, ..run });
        }
    }
    let mut index = Index::default();
    for (queue, runs) in found {
        let end = ends[&queue];
        let counted = runs.iter().map(|run| u64::from(run.count)).sum();
        let first = end.get().checked_sub(counted);
        let mut offset =
            QueueOffset::new(first.ok_or(RebuildError::TooMany { queue, end, counted })?);
        for run in runs {
            let line = Line {
                base_offset: offset,
                position: run.position,
                bytes: run.bytes,
                count: run.count,
                newest_ms: run.clock_ms,
            };
            offset = line.end_offset();
            index.append(queue, line);
        }
    }
    index.trim(floor)?;
    Ok(index)
}
