//! openraft's log, kept in [`crate::log`]. Calls in here come from inside RaftCore: none of them
//! waits for a disk but the vote.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Bound, RangeBounds};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use futures::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

use super::raft_types::{
    LogId, RaftEntry, RaftVote, TypeConfig, entry_id, log_id, log_vote, raft_vote, to_log, to_raft,
};
use crate::log::{Log, LogClosed};
use crate::position::{EntryId, EntryIndex, Term};

/// One AppendEntries request: at most this, or one entry.
const REPLICATE_BYTES_MAX: u64 = 1 << 20;
/// What apply reads at a time.
const APPLY_BYTES_MAX: u64 = 8 << 20;

/// The commitlog as openraft sees it; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct LogStore {
    log: Log,
    hint: Arc<CommittedHint>,
}

impl LogStore {
    /// `hint_path` is the file of the committed index.
    pub(crate) fn new(log: Log, hint_path: &Path) -> io::Result<Self> {
        Ok(Self { log, hint: Arc::new(CommittedHint::open(hint_path)?) })
    }

    /// First index that Raft may read.
    fn first(&self) -> u64 {
        self.log.purged().map_or(0, |id| id.index.get() + 1)
    }

    fn read(&self, from: u64, end: u64, bytes_max: u64) -> io::Result<Vec<RaftEntry>> {
        let from = from.max(self.first());
        if from >= end {
            return Ok(Vec::new());
        }
        let entries = self.log.entries(EntryIndex::new(from), EntryIndex::new(end), bytes_max)?;
        entries.into_iter().map(to_raft).collect()
    }
}

fn closed(error: LogClosed) -> io::Error {
    io::Error::other(error)
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(index) => index.saturating_add(1),
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    (from, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<RaftEntry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, end) = bounds(&range);
        self.read(from, end, u64::MAX)
    }

    async fn limited_get_log_entries(&mut self, from: u64, end: u64) -> io::Result<Vec<RaftEntry>> {
        self.read(from, end, REPLICATE_BYTES_MAX)
    }

    /// Reads piece by piece: what is to be applied may be the whole log.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, end) = bounds(&range);
        let pieces =
            stream::unfold((self.clone(), from.max(self.first())), move |(store, from)| {
                let piece = store.read(from, end, APPLY_BYTES_MAX);
                let next = match &piece {
                    Ok(entries) => entries.last().map(|entry| entry.log_id.index + 1),
                    Err(_) => Some(end),
                };
                std::future::ready(next.map(|next| (piece, (store, next))))
            });
        futures::StreamExt::flat_map(pieces, |piece| {
            let entries: Vec<io::Result<RaftEntry>> = match piece {
                Ok(entries) => entries.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(entries)
        })
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        Ok(self.log.vote().map(raft_vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        Ok(LogState {
            last_purged_log_id: self.log.purged().map(log_id),
            last_log_id: self.log.last().map(log_id),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        let synced = self.log.save_vote(log_vote(vote)).map_err(closed)?;
        synced.await.map_err(|_| io::Error::other("the log closed before the vote was synced"))?
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.hint.write(committed.as_ref().map(entry_id))
    }

    /// The hint may have outrun the durable log: it is clamped to what is there.
    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let Some(hint) = self.hint.read()? else { return Ok(None) };
        let Some(last) = self.log.last() else { return Ok(None) };
        if hint.index >= last.index {
            return Ok(Some(log_id(last)));
        }
        let known = self.log.id_of(hint.index)?;
        Ok((known == Some(hint)).then(|| log_id(hint)))
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let (entries, windows): (Vec<_>, Vec<_>) = entries.into_iter().map(to_log).unzip();
        let done = Box::new(move |result: io::Result<()>| {
            drop(windows);
            flushed.io_completed(result);
        });
        self.log.append(entries, done).map_err(closed)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.log.truncate_after(last.map(|id| EntryIndex::new(id.index))).map_err(closed)
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let upto = entry_id(&upto);
        let behind = self.log.position_of(upto.index.next())?;
        // Right for the last entry. A snapshot from elsewhere, which reaches beyond the log, would
        // have to say where it ends; this node takes none yet.
        self.log.purge(upto, behind.unwrap_or_else(|| self.log.end())).map_err(closed)
    }
}

/// How far the log was committed when last heard of: 24 bytes, never synced, only a hint.
#[derive(Debug)]
struct CommittedHint {
    file: File,
}

const HINT_BYTES: usize = 24;
const HINT_VERSION: u32 = 1;

impl CommittedHint {
    fn open(path: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file })
    }

    fn write(&self, committed: Option<EntryId>) -> io::Result<()> {
        let Some(id) = committed else { return Ok(()) };
        let mut bytes = [0; HINT_BYTES];
        bytes[..8].copy_from_slice(&id.index.get().to_le_bytes());
        bytes[8..16].copy_from_slice(&id.term.get().to_le_bytes());
        bytes[16..20].copy_from_slice(&HINT_VERSION.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..].copy_from_slice(&crc.to_le_bytes());
        match self.file.write_all_at(&bytes, 0) {
            // Only a hint: a full disk must not stop Raft.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Ok(()),
            result => result,
        }
    }

    /// `None` if there is none or it is torn.
    fn read(&self) -> io::Result<Option<EntryId>> {
        let mut bytes = [0; HINT_BYTES];
        match self.file.read_exact_at(&mut bytes, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let word = |at: usize| {
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of twenty-four"))
        };
        let half = |at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of twenty-four"))
        };
        if half(16) != HINT_VERSION || half(20) != crc32fast::hash(&bytes[..20]) {
            return Ok(None);
        }
        Ok(Some(EntryId { term: Term::new(word(8)), index: EntryIndex::new(word(0)) }))
    }
}

#[cfg(test)]
mod tests;
