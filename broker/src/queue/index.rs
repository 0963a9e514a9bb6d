//! Queue offset to log position: one 32-byte line per run.

use drumlin_proto::ids::{QueueKey, QueueOffset, TopicId};

use crate::position::LogOffset;

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
}

/// The lines of all queues.
#[derive(Debug, Default)]
pub struct Index {}

impl Index {
    /// Adds a line behind the queue's last.
    pub fn append(&mut self, _queue: QueueKey, _line: Line) {
        unimplemented!()
    }

    /// The line that holds `offset`.
    pub fn locate(&self, _queue: QueueKey, _offset: QueueOffset) -> std::io::Result<Option<Line>> {
        unimplemented!()
    }

    /// Up to `lines_max` lines from the one that holds `from` (or, if it is below the oldest, from
    /// the oldest).
    pub fn lines_from(
        &self,
        _queue: QueueKey,
        _from: QueueOffset,
        _lines_max: usize,
    ) -> std::io::Result<Vec<Line>> {
        unimplemented!()
    }

    /// The first line whose newest time is at or after `time_ms`: the leftmost of equals.
    pub fn locate_time(&self, _queue: QueueKey, _time_ms: u64) -> std::io::Result<Option<Line>> {
        unimplemented!()
    }

    /// The first line at or behind `position`.
    pub fn first_from(
        &self,
        _queue: QueueKey,
        _position: LogOffset,
    ) -> std::io::Result<Option<Line>> {
        unimplemented!()
    }

    /// Drops lines that lie wholly below `position`, of all queues.
    pub fn trim(&mut self, _below: LogOffset) -> std::io::Result<()> {
        unimplemented!()
    }

    pub fn drop_topic(&mut self, _topic: TopicId) {
        unimplemented!()
    }
}
