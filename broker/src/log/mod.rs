//! Ordered bytes on disk: segments, the in-memory tail, one writer. Knows no topics, no Raft roles.
//!
//! Invariants: nothing is called durable before a sync that covers it has returned, nor settled
//! unless syncs are deferred, and then not before it is written (I1); no byte is overwritten and no segment shortened, a tail is dropped by quarantine and roll (I2); a failed
//! sync, or any failed write but for a full disk, ends all writing (I3).

mod commands;
mod export;
#[cfg(test)]
pub(crate) mod faulty;
mod fence;
mod files;
pub mod inspect;
mod mapping;
mod metrics;
mod prepare;
mod published;
mod quarantine;
mod reader;
mod recovery;
pub mod repair;
mod scan;
mod segment;
mod slots;
pub mod staged;
mod storage;
mod tail;
#[cfg(test)]
mod tests;
mod unsynced;
mod vote;
mod writer;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{oneshot, watch};

use self::commands::{Command, Cut, Waiting};
pub use self::export::{Export, ExportedSegment};
use self::files::Files;
pub use self::mapping::Mapping;
pub use self::metrics::LogMetrics;
use self::prepare::Ahead;
use self::published::{End, Published, View};
pub use self::segment::{SegmentError, SegmentHeader};
pub use self::storage::{Directory, Space, Storage, StorageFile};
use self::writer::Writer;
use crate::entry::Entry;
use crate::position::{EntryId, EntryIndex, LogOffset, Term};

/// Sizes and limits of a log. Make it with [`LogOptions::new`] and change what differs.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Made at bootstrap, in every segment header.
    pub group_uuid: uuid::Uuid,
    pub segment_bytes: u64,
    /// Zero-filled space ahead of the writer.
    pub prepared_bytes: u64,
    pub quarantine_bytes_max: u64,
    /// Space held back for when the disk is full; at most a segment.
    pub reserve_bytes: u64,
    /// Appends beyond it close the log. What may be in flight must be bounded well below.
    pub tail_bytes_max: u64,
    /// Which boot of the machine this is; nil: [`Log::open`] asks the kernel.
    pub boot_id: uuid::Uuid,
    /// Entries are settled once they are written, and synced a little later. Votes, membership
    /// and gate entries are always synced, and all that precedes them with them.
    pub defer_syncs: bool,
    pub metrics: LogMetrics,
}

impl LogOptions {
    pub fn new(group_uuid: uuid::Uuid) -> Self {
        Self {
            group_uuid,
            segment_bytes: 64 << 20,
            prepared_bytes: 64 << 20,
            quarantine_bytes_max: 1 << 30,
            reserve_bytes: 64 << 20,
            tail_bytes_max: 2 << 30,
            boot_id: uuid::Uuid::nil(),
            defer_syncs: false,
            metrics: LogMetrics::default(),
        }
    }
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

/// How far the log is synced, or settled; rises in the order of its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurableEnd {
    /// Rises with every cut.
    pub incarnation: u64,
    /// Exclusive.
    pub index: EntryIndex,
    /// Behind the last such frame.
    pub position: LogOffset,
}

/// What was found and done at start.
#[derive(Clone, Debug, Default)]
pub struct RecoveryReport {
    pub scanned_entries: u64,
    pub scanned_bytes: u64,
    /// First index and bytes of a torn tail that went to quarantine.
    pub torn_tail: Option<(EntryIndex, u64)>,
    /// The log was closed behind its last entry, or is new.
    pub clean: bool,
    /// The machine was started anew since the log was last open.
    pub rebooted: bool,
    /// Entries that this node had settled may be gone: see [`Log::is_fenced`].
    pub fenced: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("log I/O failed")]
    Io(#[from] io::Error),
    #[error("entry {index} in {segment} at byte {at} is corrupt, though it was durable: {reason}")]
    Corrupt { index: EntryIndex, segment: String, at: u64, reason: String },
    #[error("segment {segment} cannot be read: {reason}")]
    Segment { segment: String, reason: SegmentError },
    #[error("segment {segment} belongs to group {found}, not to {expected}")]
    OtherGroup { segment: String, found: uuid::Uuid, expected: uuid::Uuid },
    #[error("a part of the log is missing: {reason}")]
    Missing { reason: String },
    #[error("file {file} cannot be used: {reason}")]
    State { file: &'static str, reason: String },
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

/// Handle of a log; clones share it. When the last one goes without [`Log::close`], what is queued
/// is still written, unless the disk is full.
#[derive(Clone, Debug)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    published: Arc<Published>,
    files: Arc<Files>,
    tail_bytes_max: u64,
    defers_syncs: bool,
    closing: Arc<AtomicBool>,
    /// Used under the view's lock only, so that the queue has the order of the log. `None` once the
    /// last handle goes. Unbounded, but what it holds is counted below, and bounded.
    commands: Option<Sender<Command>>,
    /// Bytes of entries that were neither written nor refused, cut off since or not.
    queued_bytes: Arc<AtomicU64>,
    writer: Mutex<Option<JoinHandle<()>>>,
    ahead: Arc<Ahead>,
    preparer: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("published", &self.published).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Else a writer that waits for space would be waited for.
        self.closing.store(true, Ordering::Release);
        self.commands = None;
        self.join();
    }
}

impl Inner {
    fn join(&self) {
        self.ahead.stop();
        if let Some(preparer) = self.preparer.lock().take()
            && preparer.join().is_err()
        {
            tracing::warn!("the thread that prepares space panicked");
        }
        let Some(writer) = self.writer.lock().take() else { return };
        // A callback may hold the last handle.
        if writer.thread().id() == std::thread::current().id() {
            return;
        }
        if writer.join().is_err() {
            self.published.close("its writer panicked");
        }
    }
}

impl Log {
    /// Recovers what is on disk in `dir` and starts the writer thread.
    ///
    /// The caller holds the data directory's lock and refuses a log without checkpoint whose first
    /// entry is not 0.
    pub fn open(
        dir: &Path,
        mut options: LogOptions,
        mark: Option<CheckpointMark>,
    ) -> Result<(Self, RecoveryReport), OpenError> {
        if options.boot_id.is_nil() {
            options.boot_id = fence::boot_id()?;
        }
        Self::open_with(Arc::new(Directory::open(dir)?), options, mark)
    }

    /// The same on any storage.
    pub fn open_with(
        storage: Arc<dyn Storage>,
        options: LogOptions,
        mark: Option<CheckpointMark>,
    ) -> Result<(Self, RecoveryReport), OpenError> {
        let (mut inner, writer, queue, report) = assemble(storage, options, mark)?;
        let thread =
            std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || {
                let _guard = CloseOnPanic(writer.published());
                writer.run(&queue);
            })?;
        inner.writer = Mutex::new(Some(thread));
        let ahead = Arc::clone(&inner.ahead);
        let preparer = std::thread::Builder::new().name("log-prepare".to_owned());
        inner.preparer = Mutex::new(Some(preparer.spawn(move || ahead.run())?));
        Ok((Self { inner: Arc::new(inner) }, report))
    }

    /// The same with a writer that works only when it is told to.
    #[cfg(test)]
    fn open_stepped(
        storage: Arc<dyn Storage>,
        options: LogOptions,
        mark: Option<CheckpointMark>,
    ) -> Result<(Self, RecoveryReport, Stepper), OpenError> {
        let (inner, writer, queue, report) = assemble(storage, options, mark)?;
        Ok((Self { inner: Arc::new(inner) }, report, Stepper { writer, queue }))
    }

    /// Makes entries readable at once and queues them to the writer. Never waits for the disk.
    ///
    /// Panics if they do not follow the last entry, or their term goes back.
    pub fn append(&self, entries: Vec<Entry>, flushed: Flushed) -> Result<(), LogClosed> {
        let mut view = self.view_for_write()?;
        let bytes: u64 = entries.iter().map(Entry::frame_bytes).sum();
        let queued = self.inner.queued_bytes.load(Ordering::Relaxed);
        let waiting = view.tail.bytes().max(queued);
        if waiting + bytes > self.inner.tail_bytes_max {
            drop(view);
            let reason = format!("{waiting} bytes wait to be written, {bytes} more came");
            return Err(self.inner.published.close(&reason));
        }
        for entry in &entries {
            let last_term = view.last.map_or(Term::ZERO, |last| last.term);
            assert!(entry.id.term >= last_term, "entry {} follows term {last_term}", entry.id);
            view.tail.push(entry.clone());
            view.last = Some(entry.id);
        }
        let waiting = i64::try_from(view.tail.bytes()).unwrap_or(i64::MAX);
        self.inner.published.metrics.tail_bytes.set(waiting);
        let waiting = Waiting::new(flushed, bytes, &self.inner.queued_bytes);
        self.queue(&mut view, Command::Append { entries, waiting })
    }

    /// Drops all entries behind `last`; `None` drops all. The durable end is lowered, under a new
    /// incarnation, before it returns; the files follow in the background.
    ///
    /// Panics if `last` lies before the purged entries. Called by whoever appends, not beside it.
    pub fn truncate_after(&self, last: Option<EntryIndex>) -> Result<(), LogClosed> {
        let (purged, end) = {
            let view = self.view_for_write()?;
            (view.purged, view.end())
        };
        let first = purged.map_or(EntryIndex::ZERO, |purged| purged.index.next());
        let from = last.map_or(first, EntryIndex::next);
        assert!(from >= first, "entries from {from} on are cut, {first} is the first");
        if from >= end.index {
            return Ok(());
        }
        let failed = |error: io::Error| self.inner.published.close(&error.to_string());
        let position = self.position_of(from).map_err(failed)?.unwrap_or(end.position);
        let before = match from.previous() {
            Some(before) => self.id_of(before).map_err(failed)?,
            None => None,
        };
        let mut view = self.view_for_write()?;
        if from >= view.tail.base() {
            view.tail.cut(from);
        } else {
            view.tail = tail::Tail::new(from, position);
            view.settled = position;
        }
        assert!(view.tail.end() == position, "the cut at {position} left {}", view.tail.end());
        view.last = before;
        let base_term = before.map_or(Term::ZERO, |id| id.term);
        self.cut(&mut view, End { index: from, position }, base_term, false)
    }

    /// Moves Raft's first index behind `upto`, logically. With `upto` beyond the end, or where
    /// another entry is, the log begins anew behind it, at `position`.
    pub fn purge(&self, upto: EntryId, position: LogOffset) -> Result<(), LogClosed> {
        let failed = |error: io::Error| self.inner.published.close(&error.to_string());
        let held = self.id_of(upto.index).map_err(failed)?;
        let mut view = self.view_for_write()?;
        if view.purged.is_some_and(|purged| purged.index >= upto.index) {
            return Ok(());
        }
        view.purged = Some(upto);
        if held == Some(upto) {
            return Ok(());
        }
        let from = upto.index.next();
        view.tail = tail::Tail::new(from, position);
        view.settled = position;
        view.last = Some(upto);
        self.cut(&mut view, End { index: from, position }, upto.term, true)
    }

    fn cut(
        &self,
        view: &mut MutexGuard<'_, View>,
        from: End,
        base_term: Term,
        anew: bool,
    ) -> Result<(), LogClosed> {
        view.epoch += 1;
        let taken_from = if anew { EntryIndex::ZERO } else { from.index };
        let segments = view.take_segments_from(taken_from);
        let previous = view.segments.back().map_or(0, |segment| segment.header().incarnation);
        self.inner.published.lower(view.epoch, from, anew);
        let cut = Cut {
            from: from.index,
            position: from.position,
            base_term,
            epoch: view.epoch,
            segments,
            previous,
            anew,
        };
        self.queue(view, Command::Cut(cut))
    }

    /// Stores a vote behind everything queued before it; resolves when synced.
    pub fn save_vote(&self, vote: Vote) -> Result<oneshot::Receiver<io::Result<()>>, LogClosed> {
        let (done, synced) = oneshot::channel();
        let mut view = self.view_for_write()?;
        self.queue(&mut view, Command::Vote { vote, done })?;
        Ok(synced)
    }

    /// The last synced vote.
    pub fn vote(&self) -> Option<Vote> {
        self.view().vote
    }

    /// Id of the last entry, or of the last purged one where none is left.
    pub fn last(&self) -> Option<EntryId> {
        self.view().last
    }

    pub fn purged(&self) -> Option<EntryId> {
        self.view().purged
    }

    /// The oldest position that can be read; Raft's first entry may lie behind it.
    pub fn oldest(&self) -> LogOffset {
        self.view().oldest().position
    }

    /// Behind the last entry, synced or not.
    pub fn end(&self) -> LogOffset {
        self.view().end().position
    }

    /// How far the log is synced.
    pub fn durable_end(&self) -> watch::Receiver<DurableEnd> {
        self.inner.published.durable.subscribe()
    }

    /// How far this node keeps the log, by which it is answered for, read and acknowledged: as far
    /// as it is synced, or written where syncs are deferred.
    pub fn settled_end(&self) -> watch::Receiver<DurableEnd> {
        self.inner.published.settled.subscribe()
    }

    /// Whether entries are settled before they are synced.
    pub fn defers_syncs(&self) -> bool {
        self.inner.defers_syncs
    }

    /// Whether entries that this node had settled may be gone. It must not vote nor lead before
    /// another node has given them to it again, and [`Log::lift_fence`] was called.
    pub fn is_fenced(&self) -> bool {
        self.view().fenced
    }

    /// Nothing is missing any more; resolves once that is written down, and all before it synced.
    pub fn lift_fence(&self) -> Result<oneshot::Receiver<io::Result<()>>, LogClosed> {
        let (done, synced) = oneshot::channel();
        let mut view = self.view_for_write()?;
        self.queue(&mut view, Command::LiftFence { done })?;
        Ok(synced)
    }

    /// Whether writes wait for space, or live on the reserve.
    pub fn disk_full(&self) -> watch::Receiver<bool> {
        self.inner.published.disk_full.subscribe()
    }

    /// Why writes are refused, once they are.
    pub fn closed(&self) -> watch::Receiver<Option<LogClosed>> {
        self.inner.published.closed.subscribe()
    }

    /// Index of the oldest segment's first entry.
    pub fn oldest_index(&self) -> EntryIndex {
        self.view().oldest().index
    }

    /// First entries of all segments, ascending: where trims take effect.
    pub fn segment_bases(&self) -> Vec<(EntryIndex, LogOffset)> {
        let view = self.view();
        view.segments.iter().map(|s| (s.base(), s.header().base_position)).collect()
    }

    /// Unlinks or recycles the segments that lie wholly below `index`, and below what Raft has not
    /// purged; never the last one.
    pub fn retain_from(&self, index: EntryIndex) -> io::Result<()> {
        let segments = {
            let mut view = self.view();
            let first = view.purged.map_or(EntryIndex::ZERO, |purged| purged.index.next());
            view.take_segments_below(index.min(first))
        };
        for segment in segments {
            self.inner.files.retire(segment)?;
        }
        Ok(())
    }

    /// Writes what is queued, syncs, marks the log cleanly closed and joins the writer.
    pub fn close(&self) {
        self.inner.closing.store(true, Ordering::Release);
        {
            let _in_order = self.view();
            // Also if the log refuses writes by now: its writer may still run. If that is gone,
            // there is nothing to close.
            if let Some(queue) = &self.inner.commands {
                queue.send(Command::Close).ok();
            }
        }
        self.inner.join();
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.inner.published.view.lock()
    }

    fn view_for_write(&self) -> Result<MutexGuard<'_, View>, LogClosed> {
        let view = self.view();
        match &view.closed {
            Some(closed) => Err(closed.clone()),
            None => Ok(view),
        }
    }

    fn queue(&self, view: &mut MutexGuard<'_, View>, command: Command) -> Result<(), LogClosed> {
        let refused = match &self.inner.commands {
            Some(queue) => queue.send(command).err().map(|refused| refused.0),
            None => Some(command),
        };
        match refused {
            None => return Ok(()),
            Some(Command::Append { waiting, .. }) => waiting.forget(),
            Some(
                Command::Cut(_) | Command::Vote { .. } | Command::LiftFence { .. } | Command::Close,
            ) => {}
        }
        let closed = LogClosed { reason: "its writer is gone".to_owned() };
        view.closed.get_or_insert(closed.clone());
        Err(closed)
    }
}

type Assembled = (Inner, Writer, Receiver<Command>, RecoveryReport);

/// A recovered log and its writer, which has no thread yet.
fn assemble(
    storage: Arc<dyn Storage>,
    options: LogOptions,
    mark: Option<CheckpointMark>,
) -> Result<Assembled, OpenError> {
    let recovered = recovery::recover(storage, &options, mark)?;
    recovered.files.retake_reserve()?;
    let reserve = recovered.files.restore_reserve()?;
    if !reserve {
        tracing::warn!("the disk is full: only what needs no space is served");
    }
    let published = Arc::new(Published::new(
        recovered.segments,
        recovered.start.end,
        recovered.purged,
        recovered.last,
        recovered.vote,
        options.metrics.clone(),
    ));
    published.disk_full.send_replace(!reserve);
    published.view.lock().fenced = recovered.report.fenced;
    let files = Arc::new(recovered.files);
    let ahead = Arc::new(Ahead::new(
        Arc::clone(&files),
        options.segment_bytes,
        options.prepared_bytes,
        published.disk_full.subscribe(),
    ));
    let active = &recovered.start.active.segment;
    ahead.follow(active.name(), active.end_at())?;
    let closing = Arc::new(AtomicBool::new(false));
    let (commands, queue) = crossbeam_channel::unbounded();
    let inner = Inner {
        published: Arc::clone(&published),
        files: Arc::clone(&files),
        tail_bytes_max: options.tail_bytes_max,
        defers_syncs: options.defer_syncs,
        closing: Arc::clone(&closing),
        commands: Some(commands),
        queued_bytes: Arc::default(),
        writer: Mutex::new(None),
        ahead: Arc::clone(&ahead),
        preparer: Mutex::new(None),
    };
    let writer = Writer::new(files, ahead, options, published, closing, recovered.start);
    Ok((inner, writer, queue, recovered.report))
}

/// Runs a writer by hand.
#[cfg(test)]
#[derive(Debug)]
struct Stepper {
    writer: Writer,
    queue: Receiver<Command>,
}

#[cfg(test)]
impl Stepper {
    /// Commits what waits as one group; false once the log is closed.
    fn step(&mut self) -> bool {
        match self.queue.try_recv() {
            Ok(first) => self.writer.serve(first, &self.queue),
            Err(_) => true,
        }
    }
}

/// A writer that panics must not leave a log that seems to work.
struct CloseOnPanic(Arc<Published>);

impl Drop for CloseOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close("its writer panicked");
        }
    }
}
