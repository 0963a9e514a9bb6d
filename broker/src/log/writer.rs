//! The single writer: owns the active segment and the vote, groups what waits into one sync, rolls,
//! and drops tails by rolling (I2). Knows no readers.
//!
//! A plain struct with [`Writer::commit`]; production gives it a thread. A full disk is waited out;
//! any other failed write, and every failed sync, is final (I3).

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::commands::{Command, Cut, Waiting, answer, closed, drain, refuse, refuse_all};
use super::files::{Files, NewSegment};
use super::prepare::Ahead;
use super::published::{End, Published};
use super::quarantine;
use super::segment::{HEADER_BYTES, Segment};
use super::slots::Slots;
use super::storage::{StorageFile, copy_error, write_all_at};
use super::unsynced::Unsynced;
use super::vote::{Local, write_local, write_vote};
use super::{LogOptions, Vote};
use crate::entry::{ALIGN_BYTES, Entry, FrameHeader, FrameKey};
use crate::fault::{Fault, injected};
use crate::position::{EntryIndex, LogOffset, Term};

/// One `pwrite`; larger ones are slower through the page cache.
const BLOCK_BYTES: usize = 256 << 10;
/// How often the reserve is tried to be put back.
const RESERVE_RETRY: Duration = Duration::from_millis(500);

/// The segment that is written to.
pub(super) struct Active {
    pub(super) segment: Arc<Segment>,
    pub(super) file: Arc<dyn StorageFile>,
}

/// Where recovery left off.
pub(super) struct Start {
    pub(super) active: Active,
    pub(super) end: End,
    pub(super) last_term: Term,
    pub(super) next_incarnation: u64,
    pub(super) vote_slots: Slots,
    pub(super) local_slots: Slots,
    pub(super) local: Local,
    pub(super) epoch: u64,
}

pub(super) struct Writer {
    options: LogOptions,
    key: FrameKey,
    files: Arc<Files>,
    ahead: Arc<Ahead>,
    published: Arc<Published>,
    closing: Arc<AtomicBool>,
    active: Active,
    /// Segments begun that readers do not see yet.
    begun: Vec<Arc<Segment>>,
    /// Behind the last frame encoded.
    end: End,
    /// Behind the last frame synced.
    synced: End,
    last_term: Term,
    epoch: u64,
    next_incarnation: u64,
    /// Frames not yet given to the file, which go to `block_at`.
    block: Vec<u8>,
    block_at: u64,
    unsynced: Unsynced,
    waiting: Vec<Waiting>,
    vote_slots: Slots,
    local_slots: Slots,
    local: Local,
    reserve_tried: Instant,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("end", &self.end).finish_non_exhaustive()
    }
}

/// How a group ended.
enum After {
    GoOn,
    Closed,
}

impl Writer {
    pub(super) fn new(
        files: Arc<Files>,
        ahead: Arc<Ahead>,
        options: LogOptions,
        published: Arc<Published>,
        closing: Arc<AtomicBool>,
        start: Start,
    ) -> Self {
        let block_at = start.active.segment.file_at(start.end.position).unwrap_or(HEADER_BYTES);
        Self {
            key: FrameKey::of_group(options.group_uuid),
            options,
            files,
            ahead,
            published,
            closing,
            active: start.active,
            begun: Vec::new(),
            end: start.end,
            synced: start.end,
            last_term: start.last_term,
            epoch: start.epoch,
            next_incarnation: start.next_incarnation,
            block: Vec::with_capacity(BLOCK_BYTES),
            block_at,
            unsynced: Unsynced::default(),
            waiting: Vec::new(),
            vote_slots: start.vote_slots,
            local_slots: start.local_slots,
            local: start.local,
            reserve_tried: Instant::now(),
        }
    }

    pub(super) fn published(&self) -> Arc<Published> {
        Arc::clone(&self.published)
    }

    /// Runs until the log is closed or all handles are gone.
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let is_open = match commands.recv_timeout(self.pause()) {
                Ok(first) => self.serve(first, commands),
                Err(RecvTimeoutError::Timeout) => self.tend(commands),
                Err(RecvTimeoutError::Disconnected) => {
                    if let Err(error) = self.sync() {
                        tracing::error!(%error, "the log's last entries were not synced");
                    }
                    return;
                }
            };
            if !is_open {
                return;
            }
        }
    }

    /// Commits a command with all that waits behind it; false once the log is closed.
    pub(super) fn serve(&mut self, first: Command, commands: &Receiver<Command>) -> bool {
        match self.commit(drain(first, commands)) {
            Ok(After::GoOn) => {
                self.restore_reserve();
                return true;
            }
            Ok(After::Closed) => {}
            Err(error) => tracing::error!(%error, "a write failed, the log is closed for good"),
        }
        refuse_all(commands);
        false
    }

    /// Does what is due while nobody asks for anything; false once the log is closed.
    fn tend(&mut self, commands: &Receiver<Command>) -> bool {
        self.restore_reserve();
        let Err(error) = self.sync_deferred() else { return true };
        tracing::error!(%error, "a deferred sync failed, the log is closed for good");
        self.published.close(&format!("a deferred sync failed: {error}"));
        refuse_all(commands);
        false
    }

    /// Only a full disk, or a deferred sync, gives the writer something to do by itself.
    fn pause(&self) -> Duration {
        let full = *self.published.disk_full.borrow();
        let pause = if full { RESERVE_RETRY } else { Duration::from_secs(3600) };
        self.unsynced.until_due(Instant::now()).map_or(pause, |until| until.min(pause))
    }

    /// Writes a group and syncs it once, or a little later, then completes everyone in order.
    ///
    /// Errors: final. Everyone who waits, of this group too, has been told.
    fn commit(&mut self, group: Vec<Command>) -> io::Result<After> {
        let mut group = group.into_iter();
        let mut after = Ok(After::GoOn);
        for command in group.by_ref() {
            after = self.execute(command);
            if !matches!(after, Ok(After::GoOn)) {
                break;
            }
        }
        let after = after.and_then(|after| self.complete().map(|()| after));
        match &after {
            Ok(After::GoOn) => {}
            // What came behind the end in the same group.
            Ok(After::Closed) => group.for_each(|command| refuse(command, &closed())),
            Err(error) => {
                self.published.close(&format!("a write failed: {error}"));
                for waiting in self.waiting.drain(..) {
                    waiting.tell(Err(copy_error(error)));
                }
                group.for_each(|command| refuse(command, error));
            }
        }
        after
    }

    fn execute(&mut self, command: Command) -> io::Result<After> {
        match command {
            Command::Append { entries, waiting } => {
                // Registered first, so that a failure half-way reaches it.
                self.waiting.push(waiting);
                for entry in &entries {
                    self.write_entry(entry)?;
                }
            }
            Command::Cut(cut) => {
                self.complete_synced()?;
                self.cut(cut)?;
            }
            Command::Vote { vote, done } => {
                let result = self.complete_synced().and_then(|()| self.save_vote(vote));
                answer(done, result)?;
                // So that damage to it cannot pass as a vote that was never answered.
                self.write_mark(false)?;
            }
            Command::LiftFence { done } => {
                let result = self.complete_synced().and_then(|()| self.lift_fence());
                answer(done, result)?;
            }
            Command::Close => {
                self.complete_synced()?;
                // After a failure elsewhere it is only the end.
                if self.published.view.lock().closed.is_none() {
                    self.write_mark(true)?;
                }
                self.published.close("it was closed");
                return Ok(After::Closed);
            }
        }
        Ok(After::GoOn)
    }

    fn write_entry(&mut self, entry: &Entry) -> io::Result<()> {
        assert!(
            entry.id.index == self.end.index,
            "entry {} goes where {} is next",
            entry.id,
            self.end.index
        );
        assert!(
            entry.id.term >= self.last_term,
            "entry {} follows one of term {}",
            entry.id,
            self.last_term
        );
        if crc32fast::hash(&entry.payload) != entry.payload_crc {
            let reason = format!("the payload of entry {} does not match its checksum", entry.id);
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        let frame_bytes = entry.frame_bytes();
        if !self.unsynced.has_room(frame_bytes) {
            self.sync()?;
        }
        let at = self.block_at + self.block.len() as u64;
        if at > HEADER_BYTES && at + frame_bytes > self.options.segment_bytes {
            self.roll()?;
        }
        let at = self.block_at + self.block.len() as u64;
        self.active.segment.note(entry.id.index, at);
        let incarnation = self.active.segment.header().incarnation;
        let header = FrameHeader::new(entry, self.end.position, incarnation, self.synced.index);
        self.push_bytes(&header.encode(self.key))?;
        self.push_bytes(&entry.payload)?;
        let padding = frame_bytes - header_and_payload_bytes(entry);
        let padding = usize::try_from(padding).expect("less than the alignment");
        self.push_bytes(&[0; ALIGN_BYTES][..padding])?;
        self.unsynced.add(entry.kind, frame_bytes, Instant::now());
        self.last_term = entry.id.term;
        self.end =
            End { index: self.end.index.next(), position: self.end.position.advance(frame_bytes) };
        Ok(())
    }

    fn push_bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = BLOCK_BYTES - self.block.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.extend_from_slice(now);
            bytes = later;
            if self.block.len() == BLOCK_BYTES {
                self.write_block()?;
            }
        }
        Ok(())
    }

    fn write_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::take(&mut self.block);
        let file = Arc::clone(&self.active.file);
        let at = self.block_at;
        self.ahead.claim(at + block.len() as u64);
        let written = self.with_space(|| write_all_at(file.as_ref(), &block, at));
        self.block = block;
        written?;
        self.block_at += self.block.len() as u64;
        self.block.clear();
        Ok(())
    }

    /// Makes all that was encoded durable.
    fn sync(&mut self) -> io::Result<()> {
        self.write_block()?;
        if self.unsynced.is_empty() {
            return Ok(());
        }
        if injected(Fault::AckBeforeSync) {
            // A quick disk would hide that nobody waits for it.
            std::thread::sleep(Duration::from_millis(100));
        }
        let begun = Instant::now();
        if let Err(error) = self.active.file.sync() {
            self.fence_lost();
            return Err(error);
        }
        let metrics = &self.published.metrics;
        metrics.fsync_seconds.observe(begun.elapsed().as_secs_f64());
        #[allow(clippy::cast_precision_loss, reason = "a histogram needs no more")]
        metrics.fsync_bytes.observe(self.unsynced.bytes() as f64);
        self.unsynced = Unsynced::default();
        assert!(
            self.end.index >= self.synced.index,
            "synced up to {} and written up to {}",
            self.synced.index,
            self.end.index
        );
        self.synced = self.end;
        self.active.segment.set_end_at(self.block_at);
        Ok(())
    }

    /// Writes what was encoded, syncs it unless that may wait, publishes it, and calls everyone who
    /// waited for it.
    fn complete(&mut self) -> io::Result<()> {
        if self.options.defer_syncs && self.unsynced.may_wait() {
            self.write_block()?;
            self.active.segment.set_end_at(self.block_at);
        } else {
            self.sync()?;
        }
        self.publish();
        if !self.waiting.is_empty() {
            let metrics = &self.published.metrics;
            #[allow(clippy::cast_precision_loss, reason = "a histogram needs no more")]
            metrics.group_commit_waiters.observe(self.waiting.len() as f64);
        }
        for waiting in self.waiting.drain(..) {
            let took = waiting.queued.elapsed();
            self.published.metrics.append_seconds.observe(took.as_secs_f64());
            waiting.tell(Ok(()));
        }
        self.sync_deferred()
    }

    /// The same, and nothing is deferred.
    fn complete_synced(&mut self) -> io::Result<()> {
        self.sync()?;
        self.complete()
    }

    /// Makes up for what was deferred, once that is much, or long ago.
    fn sync_deferred(&mut self) -> io::Result<()> {
        if !self.unsynced.is_due(Instant::now()) {
            return Ok(());
        }
        self.sync()?;
        self.publish();
        Ok(())
    }

    /// Shows what is encoded and written as settled, and how far all is synced.
    fn publish(&mut self) {
        if self.published.settle(self.epoch, self.end, self.synced, &self.begun) {
            self.begun.clear();
        }
    }

    /// What was settled may be gone with a sync that failed: the next start must know. That disk
    /// may not take even this.
    fn fence_lost(&mut self) {
        if !self.options.defer_syncs {
            return;
        }
        self.local.fenced = true;
        self.local.clean = false;
        let written = write_local(&mut self.local_slots, &self.local);
        if let Err(error) = written.and_then(|()| self.local_slots.sync()) {
            tracing::error!(%error, "that entries may be lost could not be written down");
        }
    }

    fn lift_fence(&mut self) -> io::Result<()> {
        self.local.fenced = false;
        self.write_mark(false)?;
        self.published.view.lock().fenced = false;
        Ok(())
    }

    /// Begins a new segment behind the last entry; the old one is synced first.
    fn roll(&mut self) -> io::Result<()> {
        self.sync()?;
        let new = NewSegment {
            base: self.end.index,
            base_term: self.last_term,
            base_position: self.end.position,
            previous: self.active.segment.header().incarnation,
            anew: false,
        };
        self.begin_segment(new)?;
        self.write_mark(false)
    }

    fn begin_segment(&mut self, new: NewSegment) -> io::Result<()> {
        assert!(self.block.is_empty(), "{} bytes are left to write", self.block.len());
        let incarnation = self.next_incarnation;
        self.next_incarnation += 1;
        let active = self.with_space(|| self.files.begin(new, incarnation))?;
        self.with_space(|| self.ahead.follow(active.segment.name(), HEADER_BYTES))?;
        self.begun.push(Arc::clone(&active.segment));
        self.active = active;
        self.block_at = HEADER_BYTES;
        Ok(())
    }

    /// Quarantine, sync, roll: no byte is overwritten and no segment gets shorter (I2).
    fn cut(&mut self, cut: Cut) -> io::Result<()> {
        assert!(cut.epoch > self.epoch, "cut {} came behind {}", cut.epoch, self.epoch);
        if injected(Fault::TruncateInMemory) && !cut.anew && self.cut_in_memory(&cut) {
            return self.complete();
        }
        let mut held = cut.segments;
        for segment in self.begun.iter().chain([&self.active.segment]) {
            if !held.iter().any(|other| Arc::ptr_eq(other, segment)) {
                held.push(Arc::clone(segment));
            }
        }
        if !cut.anew {
            let dropped = self.end.index.get().saturating_sub(cut.from.get());
            for (at, segment) in held.iter().enumerate() {
                let end = held.get(at + 1).map(|later| later.header().base_position);
                self.quarantine(segment, cut.from, cut.position, end)?;
            }
            self.published.metrics.quarantined_entries.inc_by(dropped);
            self.with_space(|| {
                quarantine::bound(self.files.storage(), self.options.quarantine_bytes_max)
            })?;
        }
        self.begun.retain(|segment| !cut.anew && segment.base() < cut.from);
        let begun = self.begun.last().map(|segment| segment.header().incarnation);
        let previous = if cut.anew { 0 } else { begun.unwrap_or(cut.previous) };
        self.end = End { index: cut.from, position: cut.position };
        self.synced = self.end;
        self.last_term = cut.base_term;
        self.epoch = cut.epoch;
        // What the log began anew with may be replaced, what lay before it stays forgotten.
        let began_here = |s: &Arc<Segment>| s.header().anew && s.base() == cut.from;
        let new = NewSegment {
            base: cut.from,
            base_term: cut.base_term,
            base_position: cut.position,
            previous,
            anew: cut.anew || held.iter().any(began_here),
        };
        self.begin_segment(new)?;
        // What is left of the others keeps its end: whoever found it before the cut may read on.
        for segment in held {
            if cut.anew || segment.base() >= cut.from {
                self.files.remove(segment.name())?;
            }
        }
        self.files.storage().sync_folder("")?;
        self.write_mark(false)?;
        self.complete()
    }

    /// The fault: the next entries go over those to be cut, whose rest a restart finds again. Not
    /// where the cut lies in another segment.
    fn cut_in_memory(&mut self, cut: &Cut) -> bool {
        if cut.from <= self.active.segment.base() {
            return false;
        }
        let Some(at) = self.active.segment.file_at(cut.position) else { return false };
        self.end = End { index: cut.from, position: cut.position };
        self.synced = self.end;
        self.last_term = cut.base_term;
        self.epoch = cut.epoch;
        self.block_at = at;
        self.active.segment.forget_lines();
        true
    }

    /// `end`: of the segment's part of the log, if not its last frame's.
    fn quarantine(
        &self,
        segment: &Arc<Segment>,
        from: EntryIndex,
        position: LogOffset,
        end: Option<LogOffset>,
    ) -> io::Result<()> {
        let at = segment.file_at(position).unwrap_or(HEADER_BYTES);
        let part_end_at = end.and_then(|end| segment.file_at(end)).unwrap_or(u64::MAX);
        let end_at = segment.end_at().min(part_end_at);
        if at >= end_at {
            return Ok(());
        }
        let first = from.max(segment.base());
        tracing::info!(
            segment = segment.name(),
            first = first.get(),
            bytes = end_at - at,
            "cut entries go to quarantine"
        );
        self.with_space(|| {
            quarantine::copy(self.files.storage(), segment.header(), first, at..end_at)
        })
    }

    fn save_vote(&mut self, vote: Vote) -> io::Result<()> {
        assert!(self.unsynced.is_empty(), "a vote goes behind what was queued before it");
        let slots = &mut self.vote_slots;
        let closing = &self.closing;
        self.files.until_space(&self.published, closing, || write_vote(slots, vote))?;
        self.vote_slots.sync()?;
        self.published.view.lock().vote = Some(vote);
        Ok(())
    }

    /// Writes down how far the log is durable. A hint that only raises what recovery knows.
    fn write_mark(&mut self, clean: bool) -> io::Result<()> {
        self.local = Local {
            incarnation: self.active.segment.header().incarnation,
            durable_end: self.synced.index,
            vote_sequence: self.vote_slots.sequence(),
            clean,
            ..self.local
        };
        let (slots, local) = (&mut self.local_slots, self.local);
        let closing = &self.closing;
        self.files.until_space(&self.published, closing, || write_local(slots, &local))?;
        self.local_slots.sync()
    }

    fn with_space<T>(&self, operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.files.until_space(&self.published, &self.closing, operation)
    }

    /// Takes the reserve's space back once there is enough, which ends the full state.
    fn restore_reserve(&mut self) {
        if !*self.published.disk_full.borrow() || self.reserve_tried.elapsed() < RESERVE_RETRY {
            return;
        }
        self.reserve_tried = Instant::now();
        match self.files.restore_reserve() {
            Ok(true) => {
                tracing::info!("the disk has space again");
                self.published.disk_full.send_replace(false);
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the reserve file cannot be put back yet"),
        }
    }
}

fn header_and_payload_bytes(entry: &Entry) -> u64 {
    (crate::entry::FRAME_HEADER_BYTES + entry.payload.len()) as u64
}
