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

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::{QueueId, TopicId};

    use super::*;

    const QUEUE: QueueKey = queue(1);
    const DELETED: QueueKey = queue(2);

    const fn queue(topic: u32) -> QueueKey {
        QueueKey { topic: TopicId::new(topic), queue: QueueId::new(0) }
    }

    /// Runs of 1, 2, 3, 1, ... records and 100 bytes; every third is of a deleted topic, and every
    /// fifth entry has no clock.
    fn runs(count: u32) -> Vec<ScannedRun> {
        let run = |n: u32| ScannedRun {
            queue: if n % 3 == 2 { DELETED } else { QUEUE },
            position: LogOffset::new(u64::from(n) * 100),
            bytes: 100,
            count: 1 + n % 3,
            clock_ms: if n % 5 == 4 { 0 } else { u64::from(n) },
        };
        (0..count).map(run).collect()
    }

    /// What apply makes of the runs.
    fn applied(runs: &[ScannedRun], refused: impl Fn(&ScannedRun) -> bool) -> Index {
        let mut index = Index::default();
        let (mut end, mut clock_ms) = (QueueOffset::ZERO, 0);
        for run in runs {
            clock_ms = run.clock_ms.max(clock_ms);
            if run.queue == DELETED || refused(run) {
                continue;
            }
            let &ScannedRun { position, bytes, count, .. } = run;
            let line = Line { base_offset: end, position, bytes, count, newest_ms: clock_ms };
            end = line.end_offset();
            index.append(QUEUE, line);
        }
        index
    }

    fn ends(index: &Index) -> BTreeMap<QueueKey, QueueOffset> {
        BTreeMap::from([(QUEUE, index.end_offset(QUEUE).unwrap())])
    }

    fn lines(index: &Index) -> Vec<Line> {
        index.lines_from(QUEUE, QueueOffset::ZERO, usize::MAX).unwrap()
    }

    fn scanned(runs: &[ScannedRun]) -> impl Iterator<Item = io::Result<ScannedRun>> {
        runs.iter().copied().map(Ok)
    }

    #[test]
    fn a_scan_of_the_whole_log_gives_what_apply_gave() {
        let runs = runs(1000);
        let index = applied(&runs, |_| false);
        let rebuilt = rebuild(scanned(&runs), &ends(&index), LogOffset::ZERO, |_| true).unwrap();
        assert_eq!(lines(&rebuilt), lines(&index));
        assert!(rebuilt.locate(DELETED, QueueOffset::ZERO).unwrap().is_none());
    }

    #[test]
    fn after_a_trim_offsets_are_counted_from_the_end() {
        let runs = runs(1000);
        let mut index = applied(&runs, |_| false);
        let ends = ends(&index);
        let floor = LogOffset::new(40_000);
        index.trim(floor).unwrap();
        // Scans begin at a segment, which may lie before the trim point.
        for first in [395, 400] {
            let rebuilt = rebuild(scanned(&runs[first..]), &ends, floor, |_| true).unwrap();
            assert_eq!(lines(&rebuilt), lines(&index));
        }
    }

    #[test]
    fn refused_runs_take_no_offset() {
        let runs = runs(1000);
        let refused = |run: &ScannedRun| run.position.get().is_multiple_of(700);
        let index = applied(&runs, refused);
        let took = |run: &ScannedRun| !refused(run);
        let rebuilt = rebuild(scanned(&runs), &ends(&index), LogOffset::ZERO, took).unwrap();
        assert_eq!(lines(&rebuilt), lines(&index));
    }

    #[test]
    fn more_records_than_the_queue_ever_had_are_an_error() {
        let ends = BTreeMap::from([(QUEUE, QueueOffset::new(5))]);
        let error = rebuild(scanned(&runs(10)), &ends, LogOffset::ZERO, |_| true).unwrap_err();
        assert!(matches!(error, RebuildError::TooMany { .. }), "{error}");
    }

    #[test]
    fn a_scan_that_fails_is_passed_on() {
        let failing = [Err(io::ErrorKind::InvalidData.into())];
        let error = rebuild(failing, &BTreeMap::new(), LogOffset::ZERO, |_| true).unwrap_err();
        assert!(matches!(error, RebuildError::Scan(_)), "{error}");
    }
}
