//! Queue offset to log position: one 32-byte line per run.
//!
//! Owns the lines of all queues: the newest of each queue in memory, older ones in blocks that may
//! lie on disk. Knows nothing of entries, runs or checkpoints: it is fed lines in log order, so
//! offsets, positions and newest times of a queue only rise, and every lookup is a binary search.
//! Trimming moves one floor: it reads nothing, lines below the floor are passed over.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset, TopicId};

use super::blocks::{PageFiles, Written};
use super::page::Slot;
use crate::position::LogOffset;

/// Lines of a full block: what fits a page beside the two headers.
pub(super) const BLOCK_LINES_MAX: usize = 126;
/// Lines that a queue's first block has room for; a block doubles until it is full.
const BLOCK_LINES_MIN: usize = 8;

/// One run of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Offset of the run's first record.
    pub base_offset: QueueOffset,
    /// Where the run (its header) begins in the log.
    pub position: LogOffset,
    /// Of the run, header included.
    pub bytes: u32,
    pub count: u32,
    /// Store clock, a running maximum over the queue, ms since the epoch.
    pub newest_ms: u64,
}

impl Line {
    /// Behind the run's last record.
    pub fn end_offset(&self) -> QueueOffset {
        self.base_offset.advance(u64::from(self.count))
    }

    /// Behind the run's last byte.
    pub fn end_position(&self) -> LogOffset {
        self.position.advance(u64::from(self.bytes))
    }
}

/// What a search needs to know of a block without its lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) first_offset: QueueOffset,
    pub(super) end_offset: QueueOffset,
    pub(super) end_position: LogOffset,
    pub(super) newest_ms: u64,
    pub(super) line_count: u8,
}

impl Summary {
    pub(super) fn of(lines: &[Line]) -> Option<Self> {
        let (first, last) = (lines.first()?, lines.last()?);
        Some(Self {
            first_offset: first.base_offset,
            end_offset: last.end_offset(),
            end_position: last.end_position(),
            newest_ms: last.newest_ms,
            line_count: u8::try_from(lines.len()).ok()?,
        })
    }
}

/// Where a full block's lines are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Not yet in a durable checkpoint.
    Memory(Arc<Vec<Line>>),
    Disk(Slot),
}

#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) summary: Summary,
    pub(super) place: Place,
}

/// The lines of one queue, ascending; shared with captures, copied when it changes under one.
#[derive(Clone, Debug, Default)]
pub(super) struct QueueLines {
    pub(super) blocks: Arc<VecDeque<Block>>,
    /// Behind all blocks, never full.
    pub(super) tail: Arc<Vec<Line>>,
    /// Where the tail lies on disk, while nothing was added since.
    pub(super) tail_slot: Option<Slot>,
}

impl QueueLines {
    fn last_end(&self) -> Option<(QueueOffset, LogOffset, u64)> {
        if let Some(line) = self.tail.last() {
            return Some((line.end_offset(), line.end_position(), line.newest_ms));
        }
        let summary = &self.blocks.back()?.summary;
        Some((summary.end_offset, summary.end_position, summary.newest_ms))
    }

    fn push(&mut self, line: Line) {
        self.tail_slot = None;
        let tail = Arc::make_mut(&mut self.tail);
        if tail.len() == tail.capacity() {
            let room = (tail.len() * 2).clamp(BLOCK_LINES_MIN, BLOCK_LINES_MAX);
            tail.reserve_exact(room - tail.len());
        }
        tail.push(line);
        if self.tail.len() == BLOCK_LINES_MAX {
            let lines = std::mem::take(&mut self.tail);
            let summary = Summary::of(&lines).expect("a full block has lines");
            let block = Block { summary, place: Place::Memory(lines) };
            Arc::make_mut(&mut self.blocks).push_back(block);
        }
    }

    /// Drops whole blocks below the floor; what else lies below stays, passed over by lookups.
    /// False once nothing is left.
    fn trim(&mut self, floor: LogOffset) -> bool {
        let below = self.blocks.partition_point(|b| b.summary.end_position <= floor);
        if below > 0 {
            Arc::make_mut(&mut self.blocks).drain(..below);
        }
        let tail_is_below = self.tail.last().is_none_or(|l| l.end_position() <= floor);
        !(self.blocks.is_empty() && tail_is_below)
    }

    fn is_trimmed_by(&self, floor: LogOffset) -> bool {
        let oldest = self.blocks.front().map(|b| b.summary.end_position);
        oldest.or_else(|| self.tail.last().map(Line::end_position)).is_none_or(|end| end <= floor)
    }
}

/// The lines of all queues.
#[derive(Debug, Default)]
pub struct Index {
    queues: BTreeMap<QueueKey, Arc<QueueLines>>,
    /// Lines that end at or below it are gone.
    floor: LogOffset,
    /// Where blocks that are not in memory are read from.
    files: Option<Arc<PageFiles>>,
}

/// The index at one moment: shares everything with it, and keeps its view while it goes on.
#[derive(Clone, Debug)]
pub struct Capture {
    pub(super) queues: BTreeMap<QueueKey, Arc<QueueLines>>,
    pub(super) floor: LogOffset,
}

impl Index {
    /// Adds a line behind the queue's last.
    ///
    /// Panics where offsets are not contiguous, or position or time go back: that would be a second
    /// place that gives offsets.
    pub fn append(&mut self, queue: QueueKey, line: Line) {
        assert!(line.count > 0, "a line of {queue:?} holds no records");
        let lines = Arc::make_mut(self.queues.entry(queue).or_default());
        if let Some((offset, position, newest_ms)) = lines.last_end() {
            assert!(
                line.base_offset == offset,
                "offsets of {queue:?} must be contiguous: {} after {offset}",
                line.base_offset
            );
            assert!(
                line.position >= position,
                "positions of {queue:?} may not go back: {} after {position}",
                line.position
            );
            assert!(
                line.newest_ms >= newest_ms,
                "times of {queue:?} may not go back: {} after {newest_ms}",
                line.newest_ms
            );
        }
        lines.push(line);
    }

    /// The line that holds `offset`.
    pub fn locate(&self, queue: QueueKey, offset: QueueOffset) -> io::Result<Option<Line>> {
        let line =
            self.first(queue, |b| b.end_offset > offset, |line| line.end_offset() > offset)?;
        Ok(line.filter(|line| line.base_offset <= offset))
    }

    /// Up to `lines_max` lines from the one that holds `from` (or, if it is below the oldest, from
    /// the oldest).
    pub fn lines_from(
        &self,
        queue: QueueKey,
        from: QueueOffset,
        lines_max: usize,
    ) -> io::Result<Vec<Line>> {
        let mut found = Vec::new();
        self.visit(
            queue,
            |b| b.end_offset > from,
            |line| line.end_offset() > from,
            |lines| {
                let wanted = lines_max - found.len();
                found.extend(lines.iter().take(wanted));
                found.len() < lines_max
            },
        )?;
        Ok(found)
    }

    /// The first line whose newest time is at or after `time_ms`: the leftmost of equals.
    pub fn locate_time(&self, queue: QueueKey, time_ms: u64) -> io::Result<Option<Line>> {
        self.first(queue, |b| b.newest_ms >= time_ms, |line| line.newest_ms >= time_ms)
    }

    /// The first line at or behind `position`.
    pub fn first_from(&self, queue: QueueKey, position: LogOffset) -> io::Result<Option<Line>> {
        self.first(queue, |b| b.end_position > position, |line| line.position >= position)
    }

    /// Drops lines that lie wholly below `below`, of all queues. Reads nothing from disk.
    pub fn trim(&mut self, below: LogOffset) -> io::Result<()> {
        if below <= self.floor {
            return Ok(());
        }
        self.floor = below;
        self.queues
            .retain(|_, lines| !lines.is_trimmed_by(below) || Arc::make_mut(lines).trim(below));
        Ok(())
    }

    pub fn drop_topic(&mut self, topic: TopicId) {
        let first = QueueKey { topic, queue: QueueId::new(0) };
        let last = QueueKey { topic, queue: QueueId::new(u16::MAX) };
        let gone: Vec<QueueKey> = self.queues.range(first..=last).map(|(key, _)| *key).collect();
        for key in gone {
            self.queues.remove(&key);
        }
    }

    /// Behind the queue's last record; `None` if it has no lines.
    pub fn end_offset(&self, queue: QueueKey) -> Option<QueueOffset> {
        Some(self.queues.get(&queue)?.last_end()?.0)
    }

    /// A consistent view for the checkpointer: copies no lines, only one pointer per queue.
    ///
    /// One at a time: captured, written, kept, then settled or dropped.
    pub fn capture(&self) -> Capture {
        Capture { queues: self.queues.clone(), floor: self.floor }
    }

    /// Gives up the memory of full blocks that a durable checkpoint holds. Drop the capture before:
    /// what it shares would be copied.
    pub fn settle(&mut self, written: Written) {
        self.files = Some(Arc::clone(&written.files));
        for placed in written.placed {
            let Some(queue) = self.queues.get_mut(&placed.queue) else { continue };
            if Arc::ptr_eq(&queue.tail, &placed.lines) {
                Arc::make_mut(queue).tail_slot = Some(placed.slot);
                continue;
            }
            let at = queue
                .blocks
                .binary_search_by_key(&placed.first_offset, |block| block.summary.first_offset);
            let Ok(at) = at else { continue };
            let is_same = match &queue.blocks[at].place {
                Place::Memory(lines) => Arc::ptr_eq(lines, &placed.lines),
                Place::Disk(_) => false,
            };
            if is_same {
                let blocks = Arc::make_mut(&mut Arc::make_mut(queue).blocks);
                blocks[at].place = Place::Disk(placed.slot);
                written.files.remember(placed.queue, placed.first_offset, placed.lines);
            }
        }
    }

    pub(super) fn from_parts(
        queues: BTreeMap<QueueKey, QueueLines>,
        floor: LogOffset,
        files: Arc<PageFiles>,
    ) -> Self {
        let queues = queues.into_iter().map(|(key, lines)| (key, Arc::new(lines))).collect();
        Self { queues, floor, files: Some(files) }
    }

    fn first(
        &self,
        queue: QueueKey,
        block_reaches: impl Fn(&Summary) -> bool,
        line_reaches: impl Fn(&Line) -> bool,
    ) -> io::Result<Option<Line>> {
        let mut found = None;
        self.visit(queue, block_reaches, line_reaches, |lines| {
            found = lines.first().copied();
            false
        })?;
        Ok(found)
    }

    /// Shows `each` the lines from the first one above the floor that `line_reaches`, block by
    /// block, for as long as it asks for more.
    ///
    /// `block_reaches` is true of every block that holds such a line, and of all behind it.
    fn visit(
        &self,
        queue: QueueKey,
        block_reaches: impl Fn(&Summary) -> bool,
        line_reaches: impl Fn(&Line) -> bool,
        mut each: impl FnMut(&[Line]) -> bool,
    ) -> io::Result<()> {
        let Some(lines) = self.queues.get(&queue) else { return Ok(()) };
        let floor = self.floor;
        let mut show = |lines: &[Line]| {
            let first = lines.partition_point(|l| l.end_position() <= floor || !line_reaches(l));
            first == lines.len() || each(&lines[first..])
        };
        let first = lines
            .blocks
            .partition_point(|b| b.summary.end_position <= floor || !block_reaches(&b.summary));
        for block in lines.blocks.range(first..) {
            if !show(&self.load(queue, block)?) {
                return Ok(());
            }
        }
        show(&lines.tail);
        Ok(())
    }

    fn load(&self, queue: QueueKey, block: &Block) -> io::Result<Arc<Vec<Line>>> {
        match &block.place {
            Place::Memory(lines) => Ok(Arc::clone(lines)),
            Place::Disk(slot) => {
                let files = self.files.as_ref().expect("blocks on disk came with their files");
                files.read(queue, &block.summary, *slot)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: QueueKey = QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) };

    /// Lines of two records and 100 bytes each; times rise every third line.
    fn filled(lines: u64) -> Index {
        let mut index = Index::default();
        for n in 0..lines {
            index.append(QUEUE, line(n));
        }
        index
    }

    fn line(n: u64) -> Line {
        Line {
            base_offset: QueueOffset::new(n * 2),
            position: LogOffset::new(n * 100),
            bytes: 100,
            count: 2,
            newest_ms: n / 3,
        }
    }

    #[test]
    fn every_offset_is_found_in_its_line() {
        let index = filled(1000);
        for n in 0..1000 {
            for offset in [n * 2, n * 2 + 1] {
                let found = index.locate(QUEUE, QueueOffset::new(offset)).unwrap();
                assert_eq!(found, Some(line(n)));
            }
        }
        assert_eq!(index.locate(QUEUE, QueueOffset::new(2000)).unwrap(), None);
    }

    #[test]
    fn equal_times_give_the_leftmost_line() {
        let index = filled(1000);
        for time_ms in 0..=333 {
            assert_eq!(index.locate_time(QUEUE, time_ms).unwrap(), Some(line(time_ms * 3)));
        }
        assert_eq!(index.locate_time(QUEUE, 334).unwrap(), None);
    }

    #[test]
    fn trim_drops_only_lines_that_lie_wholly_below() {
        for below in [0, 1, 100, 12_599, 12_600, 12_601, 50_050, 99_999] {
            let mut index = filled(1000);
            index.trim(LogOffset::new(below)).unwrap();
            let first = index.lines_from(QUEUE, QueueOffset::ZERO, 1).unwrap();
            assert_eq!(first, vec![line(below / 100)], "trimmed below {below}");
            assert_eq!(index.locate_time(QUEUE, 0).unwrap(), Some(line(below / 100)));
        }
        let mut index = filled(1000);
        index.trim(LogOffset::new(100_000)).unwrap();
        assert_eq!(index.lines_from(QUEUE, QueueOffset::ZERO, 1).unwrap(), vec![]);
    }

    #[test]
    fn lines_run_across_blocks_up_to_the_number_asked() {
        let index = filled(1000);
        let found = index.lines_from(QUEUE, QueueOffset::new(101), 500).unwrap();
        assert_eq!(found, (50..550).map(line).collect::<Vec<_>>());
        assert_eq!(index.lines_from(QUEUE, QueueOffset::new(2000), 5).unwrap(), vec![]);
        assert_eq!(index.lines_from(QUEUE, QueueOffset::ZERO, 0).unwrap(), vec![]);
    }

    #[test]
    fn first_from_skips_a_line_that_begins_before() {
        let index = filled(200);
        assert_eq!(index.first_from(QUEUE, LogOffset::new(100)).unwrap(), Some(line(1)));
        assert_eq!(index.first_from(QUEUE, LogOffset::new(12_501)).unwrap(), Some(line(126)));
        assert_eq!(index.first_from(QUEUE, LogOffset::new(19_901)).unwrap(), None);
    }

    #[test]
    fn a_dropped_topic_takes_only_its_own_queues() {
        let other = QueueKey { topic: TopicId::new(2), queue: QueueId::new(0) };
        let mut index = filled(3);
        index.append(other, line(0));
        index.drop_topic(QUEUE.topic);
        assert_eq!(index.locate(QUEUE, QueueOffset::ZERO).unwrap(), None);
        assert_eq!(index.locate(other, QueueOffset::ZERO).unwrap(), Some(line(0)));
    }

    #[test]
    #[should_panic(expected = "contiguous")]
    fn a_gap_in_offsets_is_refused() {
        filled(3).append(QUEUE, line(4));
    }
}
