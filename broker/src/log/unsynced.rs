//! What was written since the last sync, and when the next one is due.

use std::time::{Duration, Instant};

use crate::entry::EntryKind;

/// What may be written and not synced; bounds recovery's search behind a hole.
pub(super) const UNSYNCED_BYTES_MAX: u64 = 32 << 20;
/// What is left of it where syncs are deferred, once its entries are settled: in bytes, and in time.
const DEFERRED_BYTES_MAX: u64 = 8 << 20;
const DEFERRED_MAX: Duration = Duration::from_millis(500);

/// Counted from the last sync; made anew with each.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unsynced {
    bytes: u64,
    /// When the first of them was encoded.
    since: Option<Instant>,
    /// Something among them is never deferred.
    must_sync: bool,
}

impl Unsynced {
    pub(super) fn add(&mut self, kind: EntryKind, frame_bytes: u64, now: Instant) {
        self.bytes += frame_bytes;
        self.since.get_or_insert(now);
        self.must_sync |= never_deferred(kind);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether so much more may be written before a sync.
    pub(super) fn has_room(&self, frame_bytes: u64) -> bool {
        self.bytes == 0 || self.bytes + frame_bytes <= UNSYNCED_BYTES_MAX
    }

    /// Whether it may settle before it is synced, where that is wanted.
    pub(super) fn may_wait(&self) -> bool {
        !self.must_sync
    }

    /// Whether a sync was deferred for as much, or as long, as it may be.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.bytes >= DEFERRED_BYTES_MAX || self.until_due(now) == Some(Duration::ZERO)
    }

    /// `None`: there is nothing to sync.
    pub(super) fn until_due(&self, now: Instant) -> Option<Duration> {
        let since = self.since?;
        Some(DEFERRED_MAX.saturating_sub(now.saturating_duration_since(since)))
    }
}

/// What Raft and the gate decide by, so that a lost tail cannot take it back.
fn never_deferred(kind: EntryKind) -> bool {
    match kind {
        EntryKind::Membership | EntryKind::Paired | EntryKind::Alone => true,
        EntryKind::Blank | EntryKind::Batch => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_is_due_by_bytes_and_by_the_age_of_the_first() {
        let begun = Instant::now();
        let mut unsynced = Unsynced::default();
        assert_eq!((unsynced.until_due(begun), unsynced.is_due(begun)), (None, false));
        unsynced.add(EntryKind::Batch, 100, begun);
        unsynced.add(EntryKind::Batch, 100, begun + Duration::from_millis(400));
        assert!(!unsynced.is_due(begun + Duration::from_millis(499)));
        assert!(unsynced.is_due(begun + DEFERRED_MAX));
        unsynced.add(EntryKind::Batch, DEFERRED_BYTES_MAX, begun);
        assert!(unsynced.is_due(begun));
    }
}
