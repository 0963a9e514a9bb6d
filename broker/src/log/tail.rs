//! Entries that the disk does not hold yet, readable at once. Knows no files.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::entry::{Entry, FRAME_HEADER_BYTES};
use crate::position::{EntryIndex, LogOffset};

/// Consecutive entries behind what is settled on disk.
#[derive(Debug)]
pub(super) struct Tail {
    entries: VecDeque<(LogOffset, Entry)>,
    /// Of the first entry, or of the next one if there is none.
    base: EntryIndex,
    /// Behind the last entry.
    end: LogOffset,
    bytes: u64,
}

impl Tail {
    pub(super) fn new(base: EntryIndex, position: LogOffset) -> Self {
        Self { entries: VecDeque::new(), base, end: position, bytes: 0 }
    }

    pub(super) fn base(&self) -> EntryIndex {
        self.base
    }

    /// Index of the next entry.
    pub(super) fn next(&self) -> EntryIndex {
        EntryIndex::new(self.base.get() + self.entries.len() as u64)
    }

    /// Behind the last entry.
    pub(super) fn end(&self) -> LogOffset {
        self.end
    }

    /// Bytes of the frames of all entries.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Panics unless the entry follows the last one.
    pub(super) fn push(&mut self, entry: Entry) {
        let next = self.next();
        assert!(entry.id.index == next, "entry {} was appended where {next} is next", entry.id);
        let frame_bytes = entry.frame_bytes();
        let position = self.end;
        self.bytes += frame_bytes;
        self.end = position.advance(frame_bytes);
        self.entries.push_back((position, entry));
    }

    /// Drops the entries below `end`, which the disk holds now.
    pub(super) fn drop_front(&mut self, end: EntryIndex) {
        while self.base < end {
            let Some((_, entry)) = self.entries.pop_front() else { break };
            self.bytes -= entry.frame_bytes();
            self.base = self.base.next();
        }
        assert!(self.base >= end, "the disk holds entries up to {end} that were never appended");
    }

    /// Drops the entries from `from` on.
    pub(super) fn cut(&mut self, from: EntryIndex) {
        assert!(from >= self.base, "cut at {from} lies before the tail's {}", self.base);
        while self.next() > from {
            let Some((position, entry)) = self.entries.pop_back() else { break };
            self.bytes -= entry.frame_bytes();
            self.end = position;
        }
    }

    pub(super) fn get(&self, index: EntryIndex) -> Option<&(LogOffset, Entry)> {
        let at = index.get().checked_sub(self.base.get())?;
        self.entries.get(usize::try_from(at).ok()?)
    }

    /// Payload bytes at a position; `None` if they do not lie within one entry's payload.
    pub(super) fn read(&self, at: LogOffset, bytes: u32) -> Option<Bytes> {
        let behind = self.entries.partition_point(|(position, _)| *position <= at);
        let (position, entry) = self.entries.get(behind.checked_sub(1)?)?;
        let within = usize::try_from(at.bytes_since(*position)?).ok()?;
        let start = within.checked_sub(FRAME_HEADER_BYTES)?;
        let end = start.checked_add(usize::try_from(bytes).ok()?)?;
        (end <= entry.payload.len()).then(|| entry.payload.slice(start..end))
    }
}
