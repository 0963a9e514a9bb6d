//! What everyone sees of the log: settled segments, the tail behind them, and how far is synced.
//! Held under one lock, briefly, never across I/O. *Settled* is what counts as kept by this node:
//! what is synced, or what is written where syncs are deferred.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::segment::Segment;
use super::tail::Tail;
use super::{DurableEnd, LogClosed, LogMetrics, Vote};
use crate::position::{EntryId, EntryIndex, LogOffset};

/// Sealed segments whose entry tables are kept.
const TABLES_MAX: usize = 16;

/// Behind an entry, as index and as position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) index: EntryIndex,
    pub(super) position: LogOffset,
}

/// The parts that change together.
#[derive(Debug)]
pub(super) struct View {
    /// Ascending by base; each ends where the next begins, the last at the tail's base.
    pub(super) segments: VecDeque<Arc<Segment>>,
    pub(super) tail: Tail,
    /// Of the tail's base.
    pub(super) settled: LogOffset,
    pub(super) purged: Option<EntryId>,
    /// The last entry, or the last purged one.
    pub(super) last: Option<EntryId>,
    /// Rises with every cut; what the writer publishes for an older one is dropped.
    pub(super) epoch: u64,
    pub(super) vote: Option<Vote>,
    pub(super) closed: Option<LogClosed>,
    /// Entries that had been settled may be gone.
    pub(super) fenced: bool,
    /// Segments that have an entry table, the least recently filled first.
    tables: VecDeque<Arc<Segment>>,
}

/// Shared by the writer and all handles.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) view: Mutex<View>,
    pub(super) settled: watch::Sender<DurableEnd>,
    pub(super) durable: watch::Sender<DurableEnd>,
    pub(super) disk_full: watch::Sender<bool>,
    pub(super) closed: watch::Sender<Option<LogClosed>>,
    pub(super) metrics: LogMetrics,
}

impl Published {
    /// All of `segments` up to `end` is synced.
    pub(super) fn new(
        segments: VecDeque<Arc<Segment>>,
        end: End,
        purged: Option<EntryId>,
        last: Option<EntryId>,
        vote: Option<Vote>,
        metrics: LogMetrics,
    ) -> Self {
        let epoch = segments.back().map_or(0, |segment| segment.header().incarnation);
        let durable = DurableEnd { incarnation: epoch, index: end.index, position: end.position };
        Self {
            view: Mutex::new(View {
                segments,
                tail: Tail::new(end.index, end.position),
                settled: end.position,
                purged,
                last,
                epoch,
                vote,
                closed: None,
                fenced: false,
                tables: VecDeque::new(),
            }),
            settled: watch::Sender::new(durable),
            durable: watch::Sender::new(durable),
            disk_full: watch::Sender::new(false),
            closed: watch::Sender::new(None),
            metrics,
        }
    }

    /// Moves what is settled up to `end` from the tail to the disk, and tells those who wait for
    /// it, or for the sync that came as far as `synced`. Does nothing, and says so, if a cut came
    /// in between: then a later call covers it.
    pub(super) fn settle(&self, epoch: u64, end: End, synced: End, begun: &[Arc<Segment>]) -> bool {
        let mut view = self.view.lock();
        if view.epoch != epoch {
            return false;
        }
        for segment in begun {
            view.push_segment(Arc::clone(segment));
        }
        let tail_base = view.tail.base();
        assert!(
            end.index >= tail_base,
            "the settled end went back to {} from {tail_base}",
            end.index
        );
        view.tail.drop_front(end.index);
        view.settled = end.position;
        if let Some(active) = view.segments.back()
            && let Some(at) = active.file_at(end.position)
        {
            active.set_end_at(at);
        }
        self.metrics.tail_bytes.set(i64::try_from(view.tail.bytes()).unwrap_or(i64::MAX));
        raise(&self.settled, epoch, end);
        raise(&self.durable, epoch, synced);
        true
    }

    /// Everything from `from` on is gone, and both ends count under a new epoch. `anew`: the log
    /// begins there.
    pub(super) fn lower(&self, epoch: u64, from: End, anew: bool) {
        for sender in [&self.durable, &self.settled] {
            sender.send_modify(|end| {
                *end = DurableEnd {
                    incarnation: epoch,
                    index: if anew { from.index } else { end.index.min(from.index) },
                    position: if anew { from.position } else { end.position.min(from.position) },
                };
            });
        }
    }

    /// Lets no more writes in. The first reason stands.
    pub(super) fn close(&self, reason: &str) -> LogClosed {
        let mut view = self.view.lock();
        let closed = view.closed.get_or_insert_with(|| LogClosed { reason: reason.to_owned() });
        let closed = closed.clone();
        self.closed.send_replace(Some(closed.clone()));
        closed
    }
}

fn raise(sender: &watch::Sender<DurableEnd>, epoch: u64, end: End) {
    let end = DurableEnd { incarnation: epoch, index: end.index, position: end.position };
    sender.send_if_modified(|published| {
        assert!(
            end >= *published,
            "an end may not go back within {epoch}: {published:?} -> {end:?}"
        );
        let rises = end > *published;
        *published = end;
        rises
    });
}

impl View {
    /// Behind the last entry.
    pub(super) fn end(&self) -> End {
        End { index: self.tail.next(), position: self.tail.end() }
    }

    /// The oldest entry that is still there, for consumers; Raft's first may lie behind it.
    pub(super) fn oldest(&self) -> End {
        match self.segments.front() {
            Some(first) => End { index: first.base(), position: first.header().base_position },
            None => End { index: self.tail.base(), position: self.settled },
        }
    }

    /// The segment that holds a settled entry, and the index at which its part ends.
    pub(super) fn segment_of(&self, index: EntryIndex) -> Option<(Arc<Segment>, EntryIndex)> {
        if index >= self.tail.base() {
            return None;
        }
        let behind = self.segments.partition_point(|segment| segment.base() <= index);
        let segment = self.segments.get(behind.checked_sub(1)?)?;
        let end = self.segments.get(behind).map_or(self.tail.base(), |next| next.base());
        Some((Arc::clone(segment), end))
    }

    /// The segment that holds a settled position, and the position at which its part ends.
    pub(super) fn segment_at(&self, at: LogOffset) -> Option<(Arc<Segment>, LogOffset)> {
        if at >= self.settled {
            return None;
        }
        let behind = self.segments.partition_point(|s| s.header().base_position <= at);
        let segment = self.segments.get(behind.checked_sub(1)?)?;
        let end = self.segments.get(behind).map_or(self.settled, |s| s.header().base_position);
        Some((Arc::clone(segment), end))
    }

    /// An empty last segment gives way to one with the same base.
    fn push_segment(&mut self, segment: Arc<Segment>) {
        while self.segments.back().is_some_and(|last| last.base() >= segment.base()) {
            self.segments.pop_back();
        }
        if let Some(sealed) = self.segments.back().cloned() {
            self.keep_table(sealed);
        }
        self.segments.push_back(segment);
    }

    /// The active segment's table is always kept, one that is gone must not be held any more.
    pub(super) fn keep_table_of_sealed(&mut self, segment: &Arc<Segment>) {
        let at = self.segments.partition_point(|other| other.base() < segment.base());
        let is_there = self.segments.get(at).is_some_and(|other| Arc::ptr_eq(other, segment));
        if is_there && at + 1 < self.segments.len() {
            self.keep_table(Arc::clone(segment));
        }
    }

    /// Bounds how many sealed segments have a table of their entries.
    fn keep_table(&mut self, segment: Arc<Segment>) {
        if self.tables.iter().any(|kept| Arc::ptr_eq(kept, &segment)) {
            return;
        }
        self.tables.push_back(segment);
        if self.tables.len() > TABLES_MAX
            && let Some(oldest) = self.tables.pop_front()
        {
            oldest.forget_lines();
        }
    }

    /// Takes the segments out that lie wholly at or behind `from`, and that which holds it too.
    pub(super) fn take_segments_from(&mut self, from: EntryIndex) -> Vec<Arc<Segment>> {
        let mut taken = Vec::new();
        while let Some(last) = self.segments.back() {
            if last.base() < from {
                // Keeps its part below the cut.
                taken.push(Arc::clone(last));
                break;
            }
            taken.push(Arc::clone(last));
            self.segments.pop_back();
        }
        self.tables.retain(|kept| !taken.iter().any(|segment| Arc::ptr_eq(kept, segment)));
        taken.reverse();
        taken
    }

    /// Takes the segments out that lie wholly below `index`, never the last one.
    pub(super) fn take_segments_below(&mut self, index: EntryIndex) -> Vec<Arc<Segment>> {
        let mut taken = Vec::new();
        while self.segments.get(1).is_some_and(|second| second.base() <= index)
            && let Some(first) = self.segments.pop_front()
        {
            taken.push(first);
        }
        self.tables.retain(|kept| !taken.iter().any(|segment| Arc::ptr_eq(kept, segment)));
        taken
    }
}
