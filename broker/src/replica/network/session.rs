//! One stream of requests to a member: what it owes answers to, and until when it may.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::position::Term;
use crate::replica::gate::LossCount;

/// The slowest way on which what is in flight is waited for.
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;

/// What was sent on a stream and not answered yet.
#[derive(Debug)]
pub(super) struct Session {
    /// Of the member when the stream began.
    pub(super) losses: LossCount,
    state: Mutex<SessionState>,
}

#[derive(Debug, Default)]
struct SessionState {
    term: Term,
    /// Bytes of each request, oldest first.
    unanswered: VecDeque<u64>,
    unanswered_bytes: u64,
    /// When the last answer came, or the oldest request went out.
    since: Option<Instant>,
    answered: bool,
}

impl Session {
    pub(super) fn new(losses: LossCount) -> Self {
        Self { losses, state: Mutex::default() }
    }

    /// A request of so many bytes goes out.
    pub(super) fn sent(&self, term: Term, bytes: u64) {
        let mut state = self.state.lock();
        state.term = term;
        if state.unanswered.is_empty() {
            state.since = Some(Instant::now());
        }
        state.unanswered.push_back(bytes);
        state.unanswered_bytes += bytes;
    }

    /// The oldest request was answered; returns the term of the newest one.
    pub(super) fn answered(&self) -> Term {
        let mut state = self.state.lock();
        let bytes = state.unanswered.pop_front().unwrap_or(0);
        state.unanswered_bytes -= bytes;
        state.since = (!state.unanswered.is_empty()).then(Instant::now);
        state.answered = true;
        state.term
    }

    pub(super) fn was_answered(&self) -> bool {
        self.state.lock().answered
    }

    /// Until when an answer is waited for; `None` while none is owed.
    pub(super) fn deadline(&self, idle: Duration) -> Option<Instant> {
        let state = self.state.lock();
        let transfer_ms = state.unanswered_bytes * 1000 / SLOWEST_BYTES_PER_SECOND;
        state.since.map(|since| since + idle + Duration::from_millis(transfer_ms))
    }
}
