//! How far a consumer group is in a queue: what is consumed, what was handed out.

use std::collections::BTreeMap;

use drumlin_proto::ids::QueueOffset;

/// Consumed and delivered records of one queue, for one group.
///
/// Every record below `floor` is consumed, none at or behind `next` has been handed out. In
/// between, those of `consumed` are done and the others are on their way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    floor: QueueOffset,
    next: QueueOffset,
    /// Ranges above the floor, start to end (exclusive): disjoint, not adjacent to each other.
    consumed: BTreeMap<QueueOffset, QueueOffset>,
}

impl Progress {
    pub fn starting_at(start: QueueOffset) -> Self {
        Self { floor: start, next: start, consumed: BTreeMap::new() }
    }

    /// The committed offset: all records below are consumed.
    pub fn floor(&self) -> QueueOffset {
        self.floor
    }

    /// The delivery offset: all records from here on are new to the group.
    pub fn next(&self) -> QueueOffset {
        self.next
    }

    /// Consumed ranges above the floor, ascending, ends exclusive.
    pub fn consumed(&self) -> impl ExactSizeIterator<Item = (QueueOffset, QueueOffset)> {
        self.consumed.iter().map(|(start, end)| (*start, *end))
    }

    pub fn is_consumed(&self, offset: QueueOffset) -> bool {
        offset < self.floor
            || self.consumed.range(..=offset).next_back().is_some_and(|(_, end)| offset < *end)
    }

    /// Records handed out but not consumed.
    pub fn open_count(&self) -> u64 {
        let consumed: u64 = self.consumed.iter().map(|(start, end)| start.count_to(*end)).sum();
        self.floor.count_to(self.next) - consumed
    }

    /// Moves the delivery offset on; the records passed are on their way.
    pub(super) fn hand_out_to(&mut self, next: QueueOffset) {
        assert!(next >= self.next, "the delivery offset may not go back: {} -> {next}", self.next);
        self.next = next;
        self.close_up();
    }

    /// Counts `start..end` as consumed, wholly or in part already so.
    ///
    /// The range must have been handed out.
    pub(super) fn consume(&mut self, start: QueueOffset, end: QueueOffset) {
        assert!(end <= self.next, "record {end} and later ones are not handed out yet");
        let (mut start, mut end) = (start.max(self.floor), end);
        if start >= end {
            return;
        }
        // Neighbours that overlap or touch become part of the new range.
        if let Some((before, before_end)) = self.consumed.range(..start).next_back()
            && *before_end >= start
        {
            (start, end) = (*before, end.max(*before_end));
        }
        while let Some((within, within_end)) = self.consumed.range(start..=end).next() {
            end = end.max(*within_end);
            let within = *within;
            self.consumed.remove(&within);
        }
        self.consumed.insert(start, end);
        self.close_up();
    }

    /// Counts everything below `min` as consumed, handed out or not.
    pub(super) fn raise(&mut self, min: QueueOffset) {
        self.next = self.next.max(min);
        self.consume(self.floor, min);
    }

    fn close_up(&mut self) {
        while let Some(first) = self.consumed.first_entry()
            && *first.key() <= self.floor
        {
            self.floor = self.floor.max(first.remove());
        }
        debug_assert!(self.floor <= self.next, "the floor may not pass the delivery offset");
    }

    /// `None` if the numbers contradict each other.
    pub(crate) fn from_parts(
        floor: QueueOffset,
        next: QueueOffset,
        ranges: impl IntoIterator<Item = (QueueOffset, QueueOffset)>,
    ) -> Option<Self> {
        let mut last_end = floor;
        let mut consumed = BTreeMap::new();
        for (start, end) in ranges {
            if start <= last_end || end <= start {
                return None;
            }
            consumed.insert(start, end);
            last_end = end;
        }
        (last_end <= next).then_some(Self { floor, next, consumed })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn at(raw: u64) -> QueueOffset {
        QueueOffset::new(raw)
    }

    fn ranges(progress: &Progress) -> Vec<(u64, u64)> {
        progress.consumed().map(|(start, end)| (start.get(), end.get())).collect()
    }

    #[test]
    fn the_floor_advances_as_ranges_close_up() {
        let mut progress = Progress::starting_at(at(10));
        progress.hand_out_to(at(20));
        progress.consume(at(12), at(13));
        progress.consume(at(14), at(16));
        assert_eq!((progress.floor(), ranges(&progress)), (at(10), vec![(12, 13), (14, 16)]));
        progress.consume(at(13), at(14));
        assert_eq!(ranges(&progress), [(12, 16)]);
        assert_eq!(progress.open_count(), 6);
        progress.consume(at(10), at(12));
        assert_eq!((progress.floor(), ranges(&progress)), (at(16), vec![]));
    }

    #[test]
    fn raising_the_minimum_passes_what_was_open() {
        let mut progress = Progress::starting_at(at(0));
        progress.hand_out_to(at(10));
        progress.consume(at(5), at(7));
        progress.raise(at(6));
        assert_eq!((progress.floor(), progress.next()), (at(7), at(10)));
        progress.raise(at(30));
        assert_eq!((progress.floor(), progress.next()), (at(30), at(30)));
    }

    #[test]
    fn contradicting_parts_are_refused() {
        let parts = |floor, next, ranges: &[(u64, u64)]| {
            let ranges = ranges.iter().map(|(start, end)| (at(*start), at(*end)));
            Progress::from_parts(at(floor), at(next), ranges)
        };
        assert!(parts(1, 9, &[(2, 3), (5, 9)]).is_some());
        assert!(parts(1, 9, &[(1, 3)]).is_none(), "touches the floor");
        assert!(parts(1, 9, &[(3, 3)]).is_none(), "empty range");
        assert!(parts(1, 9, &[(2, 4), (4, 5)]).is_none(), "adjacent ranges");
        assert!(parts(1, 9, &[(2, 10)]).is_none(), "behind next");
        assert!(parts(2, 1, &[]).is_none(), "next below the floor");
    }

    proptest! {
        #[test]
        fn ranges_say_the_same_as_a_set(consumed in prop::collection::vec((0u64..60, 0u64..9), 0..40)) {
            let mut progress = Progress::starting_at(at(3));
            progress.hand_out_to(at(70));
            let mut set: BTreeSet<u64> = (0..3).collect();
            for (start, count) in consumed {
                progress.consume(at(start), at(start + count));
                set.extend(start..start + count);
                for offset in 0..70 {
                    prop_assert_eq!(progress.is_consumed(at(offset)), set.contains(&offset));
                }
                let floor = (0..).find(|offset| !set.contains(offset)).unwrap();
                prop_assert_eq!(progress.floor().get(), floor);
                prop_assert_eq!(progress.open_count(), 70 - set.len() as u64);
                let (floor, next) = (progress.floor(), progress.next());
                let same = Progress::from_parts(floor, next, progress.consumed());
                prop_assert_eq!(same, Some(progress.clone()));
            }
        }
    }
}
