//! Ordered bytes on disk: segments, the in-memory tail, one writer. Knows no topics, no Raft roles.

use std::io;
use std::path::Path;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::entry::Entry;
use crate::position::{EntryId, EntryIndex, LogOffset, Term};

/// Sizes and limits of a log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Made at bootstrap, in every segment header.
    pub group_uuid: uuid::Uuid,
    pub segment_bytes: u64,
    /// Zero-filled space ahead of the writer.
    pub prepared_bytes: u64,
    pub quarantine_bytes_max: u64,
}

/// What the newest valid checkpoint proves to have been durable.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointMark {
    pub applied: EntryId,
    /// Behind the applied entry's frame.
    pub end: LogOffset,
}

/// Who was voted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vote {
    pub term: Term,
    pub node: u64,
    pub committed: bool,
}

/// How far the log is synced; rises in the order of its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurableEnd {
    pub incarnation: u64,
    /// Exclusive.
    pub index: EntryIndex,
    /// Behind the last synced frame.
    pub position: LogOffset,
}

/// What was found and done at start.
#[derive(Clone, Debug, Default)]
pub struct RecoveryReport {
    pub scanned_entries: u64,
    pub scanned_bytes: u64,
    /// First index and bytes of a torn tail that went to quarantine.
    pub torn_tail: Option<(EntryIndex, u64)>,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("log I/O failed")]
    Io(#[from] io::Error),
    #[error("entry {index} in {segment} at byte {at} is corrupt, though it was durable: {reason}")]
    Corrupt { index: EntryIndex, segment: String, at: u64, reason: String },
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("log position {asked} is below the oldest retained {oldest}")]
    Trimmed { asked: LogOffset, oldest: LogOffset },
    #[error("log position {asked} is behind the end {end}")]
    BeyondEnd { asked: LogOffset, end: LogOffset },
    #[error("log I/O failed")]
    Io(#[from] io::Error),
}

/// The log refuses writes: it was closed, or a write or sync failed for good.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the log is closed: {reason}")]
pub struct LogClosed {
    pub reason: String,
}

/// Called once, in the order of the appends, when the entries are synced (or never will be).
pub type Flushed = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Handle of a log; clones share it.
#[derive(Clone, Debug)]
pub struct Log {}

impl Log {
    /// Recovers what is on disk in `dir` and starts the writer thread.
    pub fn open(
        _dir: &Path,
        _options: LogOptions,
        _mark: Option<CheckpointMark>,
    ) -> Result<(Self, RecoveryReport), OpenError> {
        unimplemented!()
    }

    /// Makes entries readable at once and queues them to the writer. Never waits for the disk.
    pub fn append(&self, _entries: Vec<Entry>, _flushed: Flushed) -> Result<(), LogClosed> {
        unimplemented!()
    }

    /// Drops all entries behind `last`; `None` drops all.
    pub fn truncate_after(&self, _last: Option<EntryIndex>) -> Result<(), LogClosed> {
        unimplemented!()
    }

    /// Moves Raft's first index behind `upto`, logically. With `upto` at or behind the end, the log
    /// begins anew behind it, at `position`.
    pub fn purge(&self, _upto: EntryId, _position: LogOffset) -> Result<(), LogClosed> {
        unimplemented!()
    }

    /// Stores a vote behind everything queued before it; resolves when synced.
    pub fn save_vote(&self, _vote: Vote) -> Result<oneshot::Receiver<io::Result<()>>, LogClosed> {
        unimplemented!()
    }

    /// The last synced vote.
    pub fn vote(&self) -> Option<Vote> {
        unimplemented!()
    }

    /// Id of the last entry, or of the last purged one where none is left.
    pub fn last(&self) -> Option<EntryId> {
        unimplemented!()
    }

    pub fn purged(&self) -> Option<EntryId> {
        unimplemented!()
    }

    /// Entries of `from..end` as far as they exist, at most `bytes_max` of payload but at least one.
    pub fn entries(
        &self,
        _from: EntryIndex,
        _end: EntryIndex,
        _bytes_max: u64,
    ) -> io::Result<Vec<Entry>> {
        unimplemented!()
    }

    pub fn id_of(&self, _index: EntryIndex) -> io::Result<Option<EntryId>> {
        unimplemented!()
    }

    /// Where the entry's frame begins.
    pub fn position_of(&self, _index: EntryIndex) -> io::Result<Option<LogOffset>> {
        unimplemented!()
    }

    /// Bytes at a position, within one entry: a view of the tail or of a map.
    pub fn read(&self, _at: LogOffset, _bytes: u32) -> Result<Bytes, ReadError> {
        unimplemented!()
    }

    /// Behind the last entry, synced or not.
    pub fn end(&self) -> LogOffset {
        unimplemented!()
    }

    pub fn durable_end(&self) -> watch::Receiver<DurableEnd> {
        unimplemented!()
    }

    /// Index and base of the segment boundary at or below `index`: what [`Log::retain_from`] keeps.
    /// Unlinks or recycles the segments that lie wholly below `index` (never the last one).
    pub fn retain_from(&self, _index: EntryIndex) -> io::Result<()> {
        unimplemented!()
    }

    /// Writes what is queued, syncs, marks the log cleanly closed and joins the writer.
    pub fn close(&self) {
        unimplemented!()
    }
}
