//! What may be forgotten, and how full the disk is: decisions, and the one reading of the disk.
//! Proposing the trim and refusing writes is others' business.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::statvfs;

use crate::position::EntryIndex;

/// A segment of the log as retention sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSpan {
    pub first: EntryIndex,
    /// Inclusive.
    pub last: EntryIndex,
    /// Leader clock of its newest entry, ms since the epoch.
    pub newest_ms: u64,
    pub bytes: u64,
}

/// How long entries are kept.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub age_max: Duration,
    /// Of all segments together.
    pub bytes_max: Option<u64>,
}

/// Below which entry the log is to be trimmed; `None` if nothing may go.
///
/// `segments` are ascending and the last one is still written to, so it never goes. `limit` is the
/// entry that the older durable checkpoint has applied. `now_ms` is the leader clock: a wall clock
/// that jumps trims nothing.
pub fn trim_below(
    segments: &[SegmentSpan],
    now_ms: u64,
    policy: Policy,
    limit: Option<EntryIndex>,
) -> Option<EntryIndex> {
    let limit = limit?;
    let age_ms_max = u64::try_from(policy.age_max.as_millis()).unwrap_or(u64::MAX);
    let mut kept_bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
    let mut below = None;
    for pair in segments.windows(2) {
        let [segment, next] = pair else { break };
        let is_old = now_ms.saturating_sub(segment.newest_ms) > age_ms_max;
        let is_surplus = policy.bytes_max.is_some_and(|bytes_max| kept_bytes > bytes_max);
        if !(is_old || is_surplus) || next.first > limit {
            break;
        }
        kept_bytes -= segment.bytes;
        below = Some(next.first);
    }
    below
}

/// How full the disk is, and what follows from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskLevel {
    #[default]
    Fine,
    /// An alarm; everything works.
    Warn,
    /// Users' records are refused; commands and trims pass.
    Refuse,
}

/// Percent of the disk from which on each level holds.
#[derive(Clone, Copy, Debug)]
pub struct DiskThresholds {
    pub warn_percent: u8,
    pub refuse_percent: u8,
}

/// A level is left only this far below where it begins, so that it does not flap.
const RELIEF_PERCENT: u8 = 2;

/// The level that follows `before`. An empty `total_bytes` counts as full.
pub fn disk_level(
    before: DiskLevel,
    used_bytes: u64,
    total_bytes: u64,
    thresholds: DiskThresholds,
) -> DiskLevel {
    let reaches =
        |percent: u8| u128::from(used_bytes) * 100 >= u128::from(total_bytes) * u128::from(percent);
    let holds = |level: DiskLevel, percent: u8| {
        let relief = if before >= level { RELIEF_PERCENT } else { 0 };
        reaches(percent.saturating_sub(relief))
    };
    if holds(DiskLevel::Refuse, thresholds.refuse_percent) {
        DiskLevel::Refuse
    } else if holds(DiskLevel::Warn, thresholds.warn_percent) {
        DiskLevel::Warn
    } else {
        DiskLevel::Fine
    }
}

/// Space of the file system under a directory, as `df` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskSpace {
    pub used_bytes: u64,
    /// Without what is reserved for root.
    pub total_bytes: u64,
}

/// Of the file system under `dir`, now.
pub fn disk_space(dir: &Path) -> io::Result<DiskSpace> {
    let stat = statvfs(dir)?;
    let used_blocks = stat.f_blocks.saturating_sub(stat.f_bfree);
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(DiskSpace {
        used_bytes: bytes(used_blocks),
        total_bytes: bytes(used_blocks.saturating_add(stat.f_bavail)),
    })
}

/// Looks at the disk of a data directory; its owner calls it every second or so.
#[derive(Clone, Debug)]
pub struct DiskWatch {
    dir: PathBuf,
    thresholds: DiskThresholds,
    level: DiskLevel,
}

impl DiskWatch {
    pub fn new(dir: PathBuf, thresholds: DiskThresholds) -> Self {
        Self { dir, thresholds, level: DiskLevel::default() }
    }

    /// Reads the disk; the level stays as it was if that fails.
    pub fn look(&mut self) -> io::Result<(DiskLevel, DiskSpace)> {
        let space = disk_space(&self.dir)?;
        self.level = disk_level(self.level, space.used_bytes, space.total_bytes, self.thresholds);
        Ok((self.level, space))
    }

    pub fn level(&self) -> DiskLevel {
        self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    /// Segments of ten entries and 100 bytes, one an hour.
    fn segments(count: u64) -> Vec<SegmentSpan> {
        let segment = |n: u64| SegmentSpan {
            first: EntryIndex::new(n * 10),
            last: EntryIndex::new(n * 10 + 9),
            newest_ms: n * HOUR_MS,
            bytes: 100,
        };
        (0..count).map(segment).collect()
    }

    fn policy(hours: u64, bytes_max: Option<u64>) -> Policy {
        Policy { age_max: Duration::from_hours(hours), bytes_max }
    }

    fn below(now_hours: u64, policy: Policy, limit: u64) -> Option<u64> {
        let limit = Some(EntryIndex::new(limit));
        trim_below(&segments(5), now_hours * HOUR_MS, policy, limit).map(EntryIndex::get)
    }

    #[test]
    fn a_segment_goes_once_its_newest_entry_is_older_than_retention() {
        assert_eq!(below(3, policy(3, None), 100), None);
        assert_eq!(below(4, policy(3, None), 100), Some(10));
        assert_eq!(below(6, policy(3, None), 100), Some(30));
    }

    #[test]
    fn the_segment_that_is_written_to_never_goes() {
        assert_eq!(below(1000, policy(3, Some(0)), 100), Some(40));
        assert_eq!(trim_below(&[], 0, policy(0, None), Some(EntryIndex::new(9))), None);
    }

    #[test]
    fn nothing_goes_beyond_the_older_checkpoint() {
        assert_eq!(below(1000, policy(3, None), 29), Some(20));
        assert_eq!(below(1000, policy(3, None), 30), Some(30));
        assert_eq!(below(1000, policy(3, None), 9), None);
        assert_eq!(trim_below(&segments(5), 1000 * HOUR_MS, policy(3, None), None), None);
    }

    #[test]
    fn surplus_bytes_go_oldest_first_whatever_their_age() {
        assert_eq!(below(0, policy(72, Some(500)), 100), None);
        assert_eq!(below(0, policy(72, Some(499)), 100), Some(10));
        assert_eq!(below(0, policy(72, Some(250)), 100), Some(30));
    }

    #[test]
    fn a_clock_behind_the_newest_entries_trims_nothing() {
        assert_eq!(below(0, policy(3, None), 100), None);
    }

    #[test]
    fn writes_are_refused_until_the_disk_is_clearly_below_the_threshold() {
        let thresholds = DiskThresholds { warn_percent: 85, refuse_percent: 90 };
        let steps = [
            (84, DiskLevel::Fine),
            (85, DiskLevel::Warn),
            (84, DiskLevel::Warn),
            (90, DiskLevel::Refuse),
            (89, DiskLevel::Refuse),
            (88, DiskLevel::Refuse),
            (87, DiskLevel::Warn),
            (89, DiskLevel::Warn),
            (83, DiskLevel::Warn),
            (82, DiskLevel::Fine),
            (100, DiskLevel::Refuse),
            (10, DiskLevel::Fine),
        ];
        let mut level = DiskLevel::Fine;
        for (percent, expected) in steps {
            level = disk_level(level, percent * 1000, 100_000, thresholds);
            assert_eq!(level, expected, "at {percent} %");
        }
    }

    #[test]
    fn a_disk_of_any_size_does_not_overflow() {
        let thresholds = DiskThresholds { warn_percent: 85, refuse_percent: 90 };
        let level = disk_level(DiskLevel::Fine, u64::MAX, u64::MAX, thresholds);
        assert_eq!(level, DiskLevel::Refuse);
        assert_eq!(disk_level(DiskLevel::Fine, 0, 0, thresholds), DiskLevel::Refuse);
    }

    #[test]
    fn the_real_disk_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let thresholds = DiskThresholds { warn_percent: 101, refuse_percent: 102 };
        let mut watch = DiskWatch::new(dir.path().to_owned(), thresholds);
        let (level, space) = watch.look().unwrap();
        assert_eq!(level, DiskLevel::Fine);
        assert!(space.total_bytes > space.used_bytes);
        DiskWatch::new(dir.path().join("none"), thresholds).look().unwrap_err();
    }
}
