//! A lane: what waits for one queue, in order. Pure: no socket, no clock.
//!
//! Messages wait one by one, are cut into runs, and runs are in flight until they are answered.
//! Once a run fails, the broker refuses those behind it on the same stream; the lane lets all of
//! them come back and then sends them again from the failed one, so that the order stays.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::ids::QueueOffset;
use drumlin_proto::native::ProduceResponse;
use drumlin_proto::record::{RUN_HEADER_BYTES, RunBuilder};
use tokio::time::Instant;

use super::window::{Ledger, Waiter};
use crate::connection::Backoff;
use crate::error::{Code, Error};
use crate::message::{Place, Receipt, Sealed};

/// Runs of one queue that may be in flight at once: enough to keep the broker's disk busy while an
/// answer is on its way.
const RUNS_IN_FLIGHT_MAX: usize = 4;
/// Records of one run.
const RUN_RECORDS_MAX: usize = 8192;
/// How long an answer may be late before its messages are given up.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// A message that was not yet cut into a run.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) sealed: Sealed,
    pub(super) record_bytes: usize,
    pub(super) accepted_at: Instant,
    pub(super) deadline: Instant,
    pub(super) waiter: Waiter,
    /// A queue that it belonged to before may have stored it.
    pub(super) maybe_stored: bool,
}

impl Pending {
    fn movable(&self) -> bool {
        self.sealed.message_group.is_none()
    }

    pub(super) fn too_late(&self, reason: String) -> Error {
        too_late(self.maybe_stored, reason)
    }
}

fn too_late(maybe_stored: bool, reason: String) -> Error {
    match maybe_stored {
        true => Error::UnknownOutcome { reason },
        false => Error::DeadlineExceeded { reason },
    }
}

/// A run on its way.
#[derive(Debug)]
pub(super) struct OpenRun {
    pub(super) bytes: Bytes,
    pub(super) deadline: Instant,
    /// Empty once they were given up.
    waiters: Vec<Waiter>,
    /// No record has a message group, so it may go to another queue.
    movable: bool,
    /// What it was cut of, where it is not movable: its message groups may come to belong elsewhere.
    parts: Vec<Part>,
    /// An earlier attempt may have stored it.
    maybe_stored: bool,
}

impl OpenRun {
    /// Tells its messages that they failed, while the run itself keeps its place in the order.
    fn give_up(&mut self, error: &Error, ledger: &mut Ledger) {
        for waiter in self.waiters.drain(..) {
            ledger.settle(waiter, Err(error.clone()));
        }
    }
}

/// A message of a run, without its waiter.
#[derive(Debug)]
struct Part {
    sealed: Sealed,
    record_bytes: usize,
    accepted_at: Instant,
    deadline: Instant,
}

/// Which stream a lane's runs in flight are on.
pub(super) type LinkId = u64;

/// What to do with a run that came back.
enum Verdict {
    Again { maybe_stored: bool },
    GiveUp,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) place: Place,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    /// Cut and to be sent next, in order.
    ready: VecDeque<OpenRun>,
    in_flight: VecDeque<(u64, OpenRun)>,
    /// Came back failed while others are still in flight.
    returned: VecDeque<OpenRun>,
    link: Option<LinkId>,
    resume: bool,
    retry_at: Option<Instant>,
    backoff: Backoff,
    last_failure: Option<String>,
}

impl Lane {
    pub(super) fn new(place: Place) -> Self {
        Self {
            place,
            pending: VecDeque::new(),
            pending_bytes: 0,
            ready: VecDeque::new(),
            in_flight: VecDeque::new(),
            returned: VecDeque::new(),
            link: None,
            resume: false,
            retry_at: None,
            backoff: Backoff::new(),
            last_failure: None,
        }
    }

    pub(super) fn push(&mut self, message: Pending) {
        self.pending_bytes += message.record_bytes;
        self.pending.push_back(message);
    }

    /// Whether runs can be expected to pass now.
    pub(super) fn healthy(&self) -> bool {
        self.retry_at.is_none() && self.returned.is_empty()
    }

    pub(super) fn has_work(&self) -> bool {
        !self.pending.is_empty() || !self.ready.is_empty()
    }

    /// Whether a run may be sent over this stream now, as far as order and pauses go.
    pub(super) fn may_send(&self, link: LinkId, now: Instant) -> bool {
        let in_order = self.in_flight.is_empty() || self.link == Some(link);
        in_order
            && self.returned.is_empty()
            && self.in_flight.len() < RUNS_IN_FLIGHT_MAX
            && self.retry_at.is_none_or(|at| at <= now)
    }

    /// The next run and whether it resumes; cuts one where none is ready.
    ///
    /// While a run is in flight only full ones are cut: the rest forms the next batch behind it.
    pub(super) fn next_run(&mut self, batching: &Batching, now: Instant) -> Option<OpenRun> {
        if let Some(run) = self.ready.pop_front() {
            return Some(run);
        }
        let oldest = self.pending.front()?;
        let full = self.pending_bytes + RUN_HEADER_BYTES >= batching.run_bytes_max
            || self.pending.len() >= RUN_RECORDS_MAX;
        let waited = batching.hurry || now >= oldest.accepted_at + batching.linger;
        (full || (waited && self.in_flight.is_empty()))
            .then(|| self.cut(batching.run_bytes_max, now))
    }

    /// Takes it back: it could not be handed to the stream.
    pub(super) fn unsend(&mut self, run: OpenRun) {
        self.ready.push_front(run);
    }

    pub(super) fn resume(&self) -> bool {
        self.resume
    }

    pub(super) fn sent(&mut self, link: LinkId, sequence: u64, run: OpenRun) {
        self.link = Some(link);
        self.resume = false;
        self.retry_at = None;
        self.in_flight.push_back((sequence, run));
    }

    /// A run ends by its first message's deadline, so none joins that would lose more than half of
    /// its own time by that.
    fn cut(&mut self, run_bytes_max: usize, now: Instant) -> OpenRun {
        let mut bytes = RUN_HEADER_BYTES;
        let left = |message: &Pending| message.deadline.saturating_duration_since(now);
        let first_left = self.pending.front().map(left).unwrap_or_default();
        let fits = |message: &&Pending| {
            bytes += message.record_bytes;
            bytes <= run_bytes_max && left(message) / 2 <= first_left
        };
        let count = self.pending.iter().take(RUN_RECORDS_MAX).take_while(fits).count().max(1);
        let mut builder = RunBuilder::with_capacity(run_bytes_max.min(self.pending_bytes + 48));
        let mut waiters = Vec::with_capacity(count);
        let movable = self.pending.iter().take(count).all(Pending::movable);
        let (mut deadline, mut maybe_stored, mut parts) = (None, false, Vec::new());
        for message in self.pending.drain(..count) {
            let Pending { sealed, record_bytes, accepted_at, waiter, .. } = message;
            builder.push(&sealed.fields());
            self.pending_bytes -= record_bytes;
            maybe_stored |= message.maybe_stored;
            deadline.get_or_insert(message.deadline);
            waiters.push(waiter);
            if !movable {
                let deadline = message.deadline;
                parts.push(Part { sealed, record_bytes, accepted_at, deadline });
            }
        }
        OpenRun {
            bytes: builder.finish(),
            deadline: deadline.expect("a run is cut of at least one message"),
            waiters,
            movable,
            parts,
            maybe_stored,
        }
    }

    /// Takes the answer for a run in flight.
    pub(super) fn answered(
        &mut self,
        link: LinkId,
        answer: &ProduceResponse,
        now: Instant,
        ledger: &mut Ledger,
    ) {
        let asked = self.in_flight.iter().position(|(sequence, _)| *sequence == answer.sequence);
        let Some((_, mut run)) = asked.and_then(|at| self.in_flight.remove(at)) else {
            tracing::warn!(sequence = answer.sequence, "answer to no request");
            return;
        };
        debug_assert_eq!(self.link, Some(link));
        match Error::of_native(answer.status.as_ref()) {
            None => {
                self.backoff.reset();
                self.last_failure = None;
                settle_stored(&self.place, run, answer, ledger);
            }
            Some(error) => {
                self.resume = true;
                match verdict(&error, run.movable) {
                    Verdict::Again { maybe_stored } => {
                        run.maybe_stored |= maybe_stored;
                        if error.code() != Code::OutOfOrder {
                            self.last_failure = Some(error.to_string());
                        }
                        self.returned.push_back(run);
                    }
                    Verdict::GiveUp => settle_failed(run, &error, ledger),
                }
            }
        }
        if self.in_flight.is_empty() {
            self.take_back(now);
        }
    }

    /// The stream of the runs in flight ended. `reached` tells whether they may have arrived.
    pub(super) fn link_down(&mut self, link: LinkId, reached: bool, reason: &str, now: Instant) {
        if self.link != Some(link) {
            return;
        }
        self.link = None;
        self.resume = false;
        self.last_failure = Some(reason.to_owned());
        for (_, mut run) in std::mem::take(&mut self.in_flight) {
            run.maybe_stored |= reached;
            self.returned.push_back(run);
        }
        self.take_back(now);
    }

    /// Makes what came back the next to be sent, after a pause.
    fn take_back(&mut self, now: Instant) {
        if self.returned.is_empty() {
            return;
        }
        for run in std::mem::take(&mut self.returned).into_iter().rev() {
            // Those without waiters were given up; to store them now would surprise.
            if !run.waiters.is_empty() {
                self.ready.push_front(run);
            }
        }
        self.retry_at = Some(now + self.backoff.pause(fastrand::f64()));
    }

    /// Another broker leads the queue now: what failed at the last one says nothing of it.
    pub(super) fn leader_changed(&mut self) {
        self.retry_at = None;
        self.backoff.reset();
    }

    /// Forgets the pause when it is over.
    pub(super) fn wake(&mut self, now: Instant) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
        }
    }

    /// Gives up what has waited beyond its deadline.
    pub(super) fn expire(&mut self, now: Instant, ledger: &mut Ledger) {
        while self.pending.front().is_some_and(|message| message.deadline <= now) {
            let Some(message) = self.pending.pop_front() else { return };
            self.pending_bytes -= message.record_bytes;
            ledger.settle(message.waiter, Err(self.too_late(message.maybe_stored)));
        }
        while self.ready.front().is_some_and(|run| run.deadline <= now) {
            let Some(run) = self.ready.pop_front() else { return };
            let error = self.too_late(run.maybe_stored);
            settle_failed(run, &error, ledger);
        }
        // Those that came back wait for runs whose answers may be long in coming.
        let mut returned = std::mem::take(&mut self.returned);
        for run in returned.iter_mut().filter(|run| run.deadline <= now) {
            run.give_up(&self.too_late(run.maybe_stored), ledger);
        }
        self.returned = returned;
        let error = self.too_late(true);
        for (_, run) in &mut self.in_flight {
            if run.deadline + ANSWER_GRACE <= now {
                run.give_up(&error, ledger);
            }
        }
    }

    /// Gives everything up.
    pub(super) fn close(&mut self, ledger: &mut Ledger) {
        let pending = self.pending.drain(..).map(|message| message.waiter);
        let in_flight = self.in_flight.drain(..).map(|(_, run)| run);
        let runs = self.ready.drain(..).chain(self.returned.drain(..)).chain(in_flight);
        let waiters: Vec<_> = pending.chain(runs.flat_map(|run| run.waiters)).collect();
        self.pending_bytes = 0;
        waiters.into_iter().for_each(|waiter| ledger.settle(waiter, Err(Error::Closed)));
    }

    /// Gives away what is surely not stored and need not stay in this queue.
    pub(super) fn give_away(&mut self) -> (VecDeque<OpenRun>, VecDeque<Pending>) {
        let ready = std::mem::take(&mut self.ready).into_iter();
        let (runs, kept) = ready.partition(|run| run.movable && !run.maybe_stored);
        self.ready = kept;
        let pending = std::mem::take(&mut self.pending).into_iter();
        let (messages, kept) = pending.partition(Pending::movable);
        self.pending = kept;
        self.pending_bytes = self.pending.iter().map(|message| message.record_bytes).sum();
        (runs, messages)
    }

    /// Whether messages with a message group wait here or are on their way.
    pub(super) fn has_ordered(&self) -> bool {
        let runs = self.ready.iter().chain(&self.returned);
        let mut runs = runs.chain(self.in_flight.iter().map(|(_, run)| run));
        runs.any(|run| !run.movable) || self.pending.iter().any(|message| !message.movable())
    }

    /// Gives away all messages that have, or were cut together with, a message group, in their
    /// order; `None` while some are on their way.
    pub(super) fn give_away_ordered(&mut self) -> Option<Vec<Pending>> {
        if !self.in_flight.is_empty() || !self.returned.is_empty() {
            return None;
        }
        let ready = std::mem::take(&mut self.ready).into_iter();
        let (kept, runs): (VecDeque<_>, VecDeque<_>) = ready.partition(|run| run.movable);
        self.ready = kept;
        let mut messages = Vec::new();
        for OpenRun { parts, waiters, maybe_stored, .. } in runs {
            messages.extend(parts.into_iter().zip(waiters).map(|(part, waiter)| {
                let Part { sealed, record_bytes, accepted_at, deadline } = part;
                Pending { sealed, record_bytes, accepted_at, deadline, waiter, maybe_stored }
            }));
        }
        let pending = std::mem::take(&mut self.pending).into_iter();
        let (kept, ordered): (VecDeque<_>, VecDeque<_>) = pending.partition(Pending::movable);
        self.pending = kept;
        self.pending_bytes = self.pending.iter().map(|message| message.record_bytes).sum();
        messages.extend(ordered);
        Some(messages)
    }

    pub(super) fn take_run(&mut self, run: OpenRun) {
        self.ready.push_back(run);
    }

    fn too_late(&self, maybe_stored: bool) -> Error {
        let reason = self.last_failure.clone().unwrap_or_else(|| "no answer".into());
        too_late(maybe_stored, reason)
    }
}

/// How runs are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batching {
    pub(super) run_bytes_max: usize,
    pub(super) linger: Duration,
    /// Someone flushes: linger no more.
    pub(super) hurry: bool,
}

fn verdict(error: &Error, movable: bool) -> Verdict {
    match error.code() {
        // Its message group belongs to another queue by now: the route is about to say so.
        Code::PreconditionFailed if !movable => Verdict::Again { maybe_stored: false },
        Code::NotLeader
        | Code::Busy
        | Code::Unavailable
        | Code::OutOfOrder
        | Code::DeadlineExceeded => Verdict::Again { maybe_stored: false },
        Code::UnknownOutcome | Code::Internal => Verdict::Again { maybe_stored: true },
        Code::InvalidArgument
        | Code::TopicNotFound
        | Code::GroupNotFound
        | Code::AlreadyExists
        | Code::Unsupported
        | Code::OffsetOutOfRange
        | Code::PreconditionFailed
        | Code::LeaseEnded
        | Code::WindowFull
        | Code::Closed => Verdict::GiveUp,
    }
}

fn settle_stored(place: &Place, run: OpenRun, answer: &ProduceResponse, ledger: &mut Ledger) {
    let mut offset = QueueOffset::new(answer.base_offset);
    for mut waiter in run.waiters {
        let receipt = Receipt {
            message_id: std::mem::take(&mut waiter.message_id),
            topic: Arc::clone(&place.topic),
            broker_group: Arc::clone(&place.broker_group),
            queue_id: place.queue_id,
            offset,
            store_time_ms: answer.store_time_ms,
            degraded: answer.degraded,
        };
        ledger.settle(waiter, Ok(receipt));
        offset = offset.advance(1);
    }
}

fn settle_failed(run: OpenRun, error: &Error, ledger: &mut Ledger) {
    for waiter in run.waiters {
        ledger.settle(waiter, Err(error.clone()));
    }
}

#[cfg(test)]
mod tests;
