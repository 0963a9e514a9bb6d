//! openraft's log, kept in [`crate::log`]. Calls in here come from inside RaftCore: none of them
//! waits for a disk but the vote.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

use futures::{Stream, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::committed_hint::CommittedHint;
use super::gate::Mode;
use super::raft_types::{
    LogId, RaftEntry, RaftVote, TypeConfig, entry_id, log_id, log_vote, raft_vote, to_log, to_raft,
};
use super::state::GateMode;
use crate::entry::EntryKind;
use crate::fault::{Fault, injected};
use crate::log::{Log, LogClosed};
use crate::position::{EntryId, EntryIndex, Term};

/// One AppendEntries request: at most this, or one entry.
const REPLICATE_BYTES_MAX: u64 = 1 << 20;
/// What apply reads at a time.
const APPLY_BYTES_MAX: u64 = 8 << 20;

/// What the gate goes by, as of the last append or truncation; synced or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LogFacts {
    /// Of the last gate entry.
    pub(crate) mode: Mode,
    /// Behind the last entry.
    pub(crate) end: EntryIndex,
    /// The first entry of the last term, if that began since the start.
    pub(crate) term_start: Option<EntryId>,
}

/// The commitlog as openraft sees it; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct LogStore {
    log: Log,
    hint: Arc<CommittedHint>,
    gates: Arc<Gates>,
}

impl LogStore {
    /// `hint_path` is the file of the committed index. `checkpoint`: what the newest one has applied
    /// and the mode it says; the log behind it is searched for gate entries.
    pub(crate) fn new(
        log: Log,
        hint_path: &Path,
        checkpoint: Option<(EntryId, GateMode)>,
    ) -> io::Result<Self> {
        let hint = Arc::new(CommittedHint::open(hint_path)?);
        let gates = Arc::new(Gates::read(&log, checkpoint)?);
        Ok(Self { log, hint, gates })
    }

    /// The mode and the log's end, told before an append or truncation returns.
    pub(crate) fn facts(&self) -> watch::Receiver<LogFacts> {
        self.gates.facts.subscribe()
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
        if let Some(committed) = &committed {
            self.gates.committed(EntryIndex::new(committed.index));
            self.hint.write(entry_id(committed));
        }
        Ok(())
    }

    /// The hint may have outrun the durable log: it is clamped to what is there, if that is of the
    /// term it names. It may be a tail of an older term, which a later leader had cut off already,
    /// though not on the disk yet: Raft would answer for entries in its place without having them.
    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let Some(hint) = self.hint.read()? else { return Ok(None) };
        let Some(last) = self.log.last() else { return Ok(None) };
        if hint.index >= last.index {
            return Ok((last.term == hint.term).then(|| log_id(last)));
        }
        let known = self.log.id_of(hint.index)?;
        Ok((known == Some(hint)).then(|| log_id(hint)))
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let (entries, tickets): (Vec<_>, Vec<_>) = entries.into_iter().map(to_log).unzip();
        let appended: Vec<_> = tickets.iter().flatten().cloned().collect();
        let (early, flushed) = match injected(Fault::AckBeforeSync) {
            true => (Some(flushed), None),
            false => (None, Some(flushed)),
        };
        let done = Box::new(move |result: io::Result<()>| {
            drop(tickets);
            if let Some(flushed) = flushed {
                flushed.io_completed(result);
            }
        });
        let gates = Arc::clone(&self.gates);
        let marks: Vec<_> = entries.iter().map(|entry| (entry.id, entry.kind)).collect();
        self.log.append(entries, done).map_err(closed)?;
        gates.appended(&marks);
        appended.iter().for_each(|ticket| ticket.appended());
        if let Some(flushed) = early {
            flushed.io_completed(Ok(()));
        }
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let last = last.map(|id| EntryIndex::new(id.index));
        self.log.truncate_after(last).map_err(closed)?;
        self.gates.cut(last.map_or(EntryIndex::ZERO, EntryIndex::next));
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let upto = entry_id(&upto);
        let behind = self.log.position_of(upto.index.next())?;
        // Right for the last entry. A snapshot from elsewhere, which reaches beyond the log, would
        // have to say where it ends; this node takes none yet.
        self.log.purge(upto, behind.unwrap_or_else(|| self.log.end())).map_err(closed)?;
        self.gates.purged(upto.index.next());
        Ok(())
    }
}

/// The gate entries that may still be cut off, and the mode before them.
#[derive(Debug)]
struct Gates {
    inner: Mutex<GateEntries>,
    facts: watch::Sender<LogFacts>,
}

#[derive(Debug, Default)]
struct GateEntries {
    settled: Mode,
    /// Ascending.
    unsettled: VecDeque<(EntryIndex, Mode)>,
    last_term: Term,
}

/// What the log is read by when it is searched for gate entries.
const SEARCH_BYTES_MAX: u64 = 16 << 20;

impl Gates {
    fn read(log: &Log, checkpoint: Option<(EntryId, GateMode)>) -> io::Result<Self> {
        let purged = log.purged().map(|id| id.index);
        let settled = match checkpoint {
            Some((at, GateMode::Alone)) => Mode::Alone { at: at.index },
            Some((_, GateMode::Paired)) | None => Mode::Paired,
        };
        let mut next = checkpoint
            .map(|(at, _)| at.index)
            .max(purged)
            .map_or(EntryIndex::ZERO, EntryIndex::next);
        let last_term = log.last().map_or(Term::ZERO, |id| id.term);
        let end = log.last().map_or(EntryIndex::ZERO, |id| id.index.next());
        let mut unsettled = VecDeque::new();
        while next < end {
            let entries = log.entries(next, end, SEARCH_BYTES_MAX)?;
            let Some(last) = entries.last() else { break };
            next = last.id.index.next();
            unsettled.extend(entries.iter().filter_map(|e| mode_of(e.id.index, e.kind)));
        }
        let inner = GateEntries { settled, unsettled, last_term };
        let facts = LogFacts { mode: inner.mode(), end, term_start: None };
        Ok(Self { inner: Mutex::new(inner), facts: watch::Sender::new(facts) })
    }

    fn appended(&self, marks: &[(EntryId, EntryKind)]) {
        let Some((last, _)) = marks.last() else { return };
        let mut inner = self.inner.lock();
        let mut term_start = self.facts.borrow().term_start;
        for (id, kind) in marks {
            if id.term > inner.last_term {
                inner.last_term = id.term;
                term_start = Some(*id);
            }
            inner.unsettled.extend(mode_of(id.index, *kind));
        }
        let facts = LogFacts { mode: inner.mode(), end: last.index.next(), term_start };
        self.facts.send_replace(facts);
    }

    /// Everything from `end` on is gone.
    fn cut(&self, end: EntryIndex) {
        let mut inner = self.inner.lock();
        while inner.unsettled.back().is_some_and(|(at, _)| *at >= end) {
            inner.unsettled.pop_back();
        }
        let mode = inner.mode();
        self.facts.send_modify(|facts| {
            let term_start = facts.term_start.filter(|first| first.index < end);
            *facts = LogFacts { mode, end: end.min(facts.end), term_start };
        });
    }

    /// What is committed is cut off no more.
    fn committed(&self, upto: EntryIndex) {
        let mut inner = self.inner.lock();
        while let Some((_, mode)) = inner.unsettled.front().copied().filter(|(at, _)| *at <= upto) {
            inner.settled = mode;
            inner.unsettled.pop_front();
        }
    }

    /// The log begins at `first`, or behind it.
    fn purged(&self, first: EntryIndex) {
        self.facts.send_if_modified(|facts| {
            let rises = first > facts.end;
            facts.end = facts.end.max(first);
            rises
        });
    }
}

impl GateEntries {
    fn mode(&self) -> Mode {
        self.unsettled.back().map_or(self.settled, |(_, mode)| *mode)
    }
}

fn mode_of(at: EntryIndex, kind: EntryKind) -> Option<(EntryIndex, Mode)> {
    match kind {
        EntryKind::Alone => Some((at, Mode::Alone { at })),
        EntryKind::Paired => Some((at, Mode::Paired)),
        EntryKind::Blank | EntryKind::Membership | EntryKind::Batch => None,
    }
}

#[cfg(test)]
pub(super) mod tests;
