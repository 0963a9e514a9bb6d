//! Space ahead of the writer, so that it overwrites instead of extending files, which makes a sync
//! cheaper: zeros in front of it in the active segment, and the file of the next one.
//!
//! A thread beside the writer. It touches only bytes that the writer has not claimed, and the writer
//! never waits for more than one step. Where the writer has caught up, it appends unprepared.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::files::Files;
use super::storage::{StorageFile, fill_zeros, is_full};

/// One step of filling; also how far it stays ahead of a writer that has caught up.
const STEP_BYTES: u64 = 1 << 20;
/// A log that is little used needs no more in front of it.
const WINDOW_BYTES_MIN: u64 = 4 << 20;

/// Shared by the writer and the thread.
#[derive(Debug)]
pub(super) struct Ahead {
    files: Arc<Files>,
    segment_bytes: u64,
    window_bytes_max: u64,
    /// Then what space there is must not go into zeros.
    disk_full: watch::Receiver<bool>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The active segment's file, by a handle of its own: an error of the writer's pages must be
    /// reported to the writer.
    file: Option<Arc<dyn StorageFile>>,
    /// The writer may have written up to here.
    claimed_end: u64,
    filled_end: u64,
    /// Being filled now.
    filling: Option<Range<u64>>,
    /// Claimed since the log was opened: what is written much gets a large window.
    claimed_bytes: u64,
    /// The next segment's file is there, or cannot be.
    next_made: bool,
    stopped: bool,
}

/// What there is to do.
enum Step {
    Fill(Arc<dyn StorageFile>, Range<u64>),
    MakeNext(u64),
}

impl Ahead {
    pub(super) fn new(
        files: Arc<Files>,
        segment_bytes: u64,
        window_bytes_max: u64,
        disk_full: watch::Receiver<bool>,
    ) -> Self {
        Self {
            files,
            segment_bytes,
            window_bytes_max,
            disk_full,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }
    }

    /// Turns to another segment. Waits for a step on the one before to end, so that nothing is
    /// filled in a file that may be used again.
    pub(super) fn follow(&self, name: &str, claimed_end: u64) -> io::Result<()> {
        if self.window_bytes_max == 0 {
            return Ok(());
        }
        let file = self.files.storage().open(name)?;
        let filled_end = file.file_bytes()?;
        let mut state = self.state.lock();
        while state.filling.is_some() {
            self.changed.wait(&mut state);
        }
        state.file = Some(file);
        state.claimed_end = claimed_end;
        state.filled_end = filled_end;
        state.next_made = false;
        self.changed.notify_all();
        Ok(())
    }

    /// Says that the writer is about to write up to `end`. Waits if just that is being filled.
    pub(super) fn claim(&self, end: u64) {
        let mut state = self.state.lock();
        state.claimed_bytes += end.saturating_sub(state.claimed_end);
        state.claimed_end = state.claimed_end.max(end);
        while state.filling.as_ref().is_some_and(|filling| filling.start < end) {
            self.changed.wait(&mut state);
        }
        let ahead = state.filled_end.saturating_sub(end);
        if ahead < self.window(&state) / 2 {
            self.changed.notify_all();
        }
    }

    pub(super) fn stop(&self) {
        self.state.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Prepares until it is stopped.
    pub(super) fn run(&self) {
        loop {
            let step = {
                let mut state = self.state.lock();
                loop {
                    if state.stopped {
                        return;
                    }
                    match self.next_step(&mut state) {
                        Some(step) => break step,
                        None => self.changed.wait(&mut state),
                    }
                }
            };
            match step {
                Step::Fill(file, range) => self.fill(file.as_ref(), range),
                Step::MakeNext(bytes) => {
                    if let Err(error) = self.files.make_next(bytes) {
                        note_failure(&error);
                    }
                }
            }
        }
    }

    fn window(&self, state: &State) -> u64 {
        state.claimed_bytes.max(WINDOW_BYTES_MIN).min(self.window_bytes_max)
    }

    fn next_step(&self, state: &mut State) -> Option<Step> {
        let file = Arc::clone(state.file.as_ref()?);
        if *self.disk_full.borrow() {
            return None;
        }
        let window = self.window(state);
        let window_end = state.claimed_end + window;
        let start = if state.filled_end < state.claimed_end {
            // The writer has caught up: leave it room, or it would have to wait for every step.
            (state.claimed_end + STEP_BYTES).next_multiple_of(STEP_BYTES)
        } else {
            state.filled_end
        };
        let end = (start + STEP_BYTES).min(self.segment_bytes);
        if start < end && end <= window_end.next_multiple_of(STEP_BYTES) {
            state.filling = Some(start..end);
            return Some(Step::Fill(file, start..end));
        }
        if !state.next_made && window_end > self.segment_bytes {
            state.next_made = true;
            return Some(Step::MakeNext(window.min(self.segment_bytes)));
        }
        None
    }

    fn fill(&self, file: &dyn StorageFile, range: Range<u64>) {
        let result = fill_zeros(file, range.start, range.end).and_then(|()| file.sync());
        let mut state = self.state.lock();
        state.filling = None;
        state.filled_end = match result {
            Ok(()) => range.end,
            Err(error) => {
                note_failure(&error);
                // Not tried again in this segment; its writer does without.
                self.segment_bytes.max(range.end)
            }
        };
        self.changed.notify_all();
    }
}

/// Preparing is a matter of speed only; what is wrong with the disk the writer finds out.
fn note_failure(error: &io::Error) {
    if is_full(error) {
        tracing::debug!("no space to prepare ahead of the log");
    } else {
        tracing::warn!(%error, "space ahead of the log could not be prepared");
    }
}
