//! What waits becomes one entry: merges proposals, keeps a small window of entries that are not
//! durable yet, and tells each proposer what became of its item.
//!
//! One task proposes, a second one answers; both in the order of the calls. No timer delays an
//! item: a lone one waits for nothing, and entries grow by themselves while the window is full.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::ids::QueueKey;
use drumlin_proto::record::Run;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::ProgressResponder;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::clock_source::ClockSource;
use super::gate::GateView;
use super::published::Published;
use super::raft_types::{Payload, Raft};
use super::{Applied, Item, ProposeError, RaftStatus};
use crate::command::Refusal;
use crate::entry::{ALIGN_BYTES, PAYLOAD_BYTES_MAX};
use crate::item;
use crate::log::LogClosed;
use crate::position::Term;

mod answering;
mod chain;
mod copies;
mod merge;

use answering::{Outcome, Proposed, answer_all};
pub use chain::Chain;
use chain::Link;
pub(crate) use copies::Copies;
use merge::{build, merge};

/// An entry is closed once it has this much.
const ENTRY_BYTES_TARGET: usize = 256 << 10;
/// Bytes of payload that no entry exceeds, and no item.
const ENTRY_BYTES_MAX: usize = 8 << 20;
const _: () = assert!(ENTRY_BYTES_MAX <= PAYLOAD_BYTES_MAX);
/// Runs of one queue are merged up to this.
const MERGED_BYTES_MAX: usize = 256 << 10;
/// Entries that may be not durable here.
const WINDOW_ENTRIES: usize = 4;
/// Between two looks at the deadlines of what waits for the window.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// What an item costs beside its bytes.
const ITEM_OVERHEAD_BYTES: usize = 256;
/// Entries that wait to be answered; openraft holds fewer.
const UNANSWERED_ENTRIES_MAX: usize = 1024;
/// Between two tries to propose an entry while no quorum has answered for a while.
const LEASE_RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// How long it is tried.
const LEASE_PATIENCE: Duration = Duration::from_secs(1);
/// How long items wait while nobody leads.
pub(crate) const ELECTION_PATIENCE: Duration = Duration::from_secs(1);

/// Why runs of users are refused now; `None` while they are not.
pub(crate) type RunsRefused = Option<Arc<str>>;

/// The way in; clones share the queue.
#[derive(Clone, Debug)]
pub(crate) struct ProposerHandle {
    /// Bounded by `permits`: whatever lies in it holds its bytes.
    queue: mpsc::UnboundedSender<Waiting>,
    permits: Arc<Semaphore>,
    bytes_max: u64,
    refused: watch::Receiver<RunsRefused>,
    stop: CancellationToken,
}

/// An item as its entry will hold it.
#[derive(Debug)]
enum Content {
    Run {
        queue: QueueKey,
        run: Run,
    },
    /// Encoded: what it takes is known, and the one task that builds entries need not do it.
    Command(Bytes),
}

impl Content {
    /// What it adds to a payload at most: runs that are merged share a header.
    fn payload_bytes(&self) -> usize {
        let bytes = match self {
            Self::Run { run, .. } => run.as_bytes().len(),
            Self::Command(item) => item.len(),
        };
        bytes.next_multiple_of(ALIGN_BYTES)
    }
}

impl From<Item> for Content {
    fn from(item: Item) -> Self {
        match item {
            Item::Run { queue, run } => Self::Run { queue, run },
            Item::Command(command) => Self::Command(item::command_item(&command)),
        }
    }
}

/// An item that waits for its entry.
#[derive(Debug)]
struct Waiting {
    content: Content,
    since: Instant,
    deadline: Option<Instant>,
    reply: Reply,
}

impl Waiting {
    /// Answers an item that was not proposed.
    fn refuse(self, error: ProposeError) {
        self.reply.fail(error);
    }
}

/// The way back to one proposer; its bytes count as in flight until it is used.
#[derive(Debug)]
struct Reply {
    sender: oneshot::Sender<Result<Applied, ProposeError>>,
    link: Option<Link>,
    /// An acknowledgement must mean two copies.
    needs_two: bool,
    _in_flight: OwnedSemaphorePermit,
}

impl Reply {
    fn send(self, result: Result<Applied, ProposeError>) {
        // A proposer that no longer waits does not care.
        self.sender.send(result).ok();
    }

    /// Tells that it was not stored, or may not be; what follows in its chain must not be, then.
    fn fail(self, error: ProposeError) {
        if let Some(link) = &self.link {
            link.break_chain();
        }
        self.send(Err(error));
    }
}

impl ProposerHandle {
    /// Queues an item; see [`super::Replica::propose`].
    pub(crate) fn propose(
        &self,
        item: Item,
        deadline: Option<Instant>,
        chain: Option<&Chain>,
    ) -> impl Future<Output = Result<Applied, ProposeError>> + Send + use<> {
        let content = Content::from(item);
        let link = chain.map(Chain::next_link);
        let queued = self.reserve(&content).and_then(|in_flight| {
            let (sender, answer) = oneshot::channel();
            let reply = Reply { sender, link, needs_two: false, _in_flight: in_flight };
            let waiting = Waiting { content, since: Instant::now(), deadline, reply };
            let stopped = || ProposeError::Stopped("the proposer has ended".into());
            self.queue.send(waiting).map(|()| answer).map_err(|_| stopped())
        });
        if let (Err(_), Some(chain)) = (&queued, chain) {
            chain.break_here();
        }
        async move {
            match queued {
                Ok(answer) => answer.await.unwrap_or(Err(ProposeError::UnknownOutcome)),
                Err(error) => Err(error),
            }
        }
    }

    /// Takes the bytes of an item, or says why it cannot wait.
    fn reserve(&self, content: &Content) -> Result<OwnedSemaphorePermit, ProposeError> {
        let bytes = content.payload_bytes();
        if bytes > ENTRY_BYTES_MAX {
            return Err(Refusal::Malformed { field: "size" }.into());
        }
        if matches!(content, Content::Run { .. })
            && let Some(reason) = self.refused.borrow().as_deref()
        {
            return Err(ProposeError::DiskFull(reason.to_owned()));
        }
        let cost = u32::try_from(bytes + ITEM_OVERHEAD_BYTES).unwrap_or(u32::MAX);
        Arc::clone(&self.permits).try_acquire_many_owned(cost).map_err(|_| ProposeError::Busy {
            waiting_bytes: self.in_flight_bytes(),
            bytes_max: self.bytes_max,
        })
    }

    /// Takes no more; what waits is answered with "stopped", what is under way with its outcome.
    pub(crate) fn close(&self) {
        self.stop.cancel();
    }

    /// Bytes of items whose outcome is not known yet.
    pub(crate) fn in_flight_bytes(&self) -> u64 {
        let free = u64::try_from(self.permits.available_permits()).unwrap_or(u64::MAX);
        self.bytes_max.saturating_sub(free)
    }
}

/// What the proposer works with.
#[derive(Debug)]
pub(crate) struct ProposerParts {
    pub(crate) raft: Raft,
    pub(crate) status: watch::Receiver<RaftStatus>,
    pub(crate) clock: Arc<ClockSource>,
    pub(crate) published: Arc<Published>,
    pub(crate) gate: watch::Receiver<GateView>,
    pub(crate) log_closed: watch::Receiver<Option<LogClosed>>,
    pub(crate) refused: watch::Receiver<RunsRefused>,
    pub(crate) in_flight_bytes_max: u64,
    /// From the proposal of an entry until it is readable.
    pub(crate) commit_seconds: Histogram,
    pub(crate) stop: CancellationToken,
}

/// Its two tasks, to be joined by whoever started them.
pub(crate) type ProposerTasks = [tokio::task::JoinHandle<()>; 2];

/// Starts the two tasks. They end when `stop` is cancelled or Raft has stopped.
pub(crate) fn start(parts: ProposerParts) -> (ProposerHandle, ProposerTasks) {
    let (queue, waiting) = mpsc::unbounded_channel();
    let (proposed, unanswered) = mpsc::channel(UNANSWERED_ENTRIES_MAX);
    let permits = usize::try_from(parts.in_flight_bytes_max)
        .map_or(Semaphore::MAX_PERMITS, |bytes| bytes.min(Semaphore::MAX_PERMITS));
    let handle = ProposerHandle {
        queue,
        permits: Arc::new(Semaphore::new(permits)),
        bytes_max: parts.in_flight_bytes_max,
        refused: parts.refused.clone(),
        stop: parts.stop.clone(),
    };
    let copies = Copies::new(parts.raft.clone(), parts.gate.clone());
    let answering = answering::Answering {
        unanswered,
        readable: parts.published.readable(),
        status: parts.status.clone(),
        log_closed: parts.log_closed.clone(),
        copies: copies.clone(),
        commit_seconds: parts.commit_seconds.clone(),
    };
    let answering = tokio::spawn(answer_all(answering));
    let proposer = Proposer {
        parts,
        copies,
        backlog: Backlog::of(waiting),
        window: Arc::new(Semaphore::new(WINDOW_ENTRIES)),
        proposed,
    };
    (handle, [tokio::spawn(proposer.run()), answering])
}

/// What waits to be proposed, in order.
struct Backlog {
    queue: mpsc::UnboundedReceiver<Waiting>,
    /// Taken from the queue before there was room for them; they come first.
    taken: VecDeque<Waiting>,
}

impl Backlog {
    fn of(queue: mpsc::UnboundedReceiver<Waiting>) -> Self {
        Self { queue, taken: VecDeque::new() }
    }

    /// Waits until there is something; false once nothing can come any more.
    async fn filled(&mut self) -> bool {
        if self.taken.is_empty() {
            self.taken.extend(self.queue.recv().await);
        }
        !self.taken.is_empty()
    }

    fn next(&mut self) -> Option<Waiting> {
        self.taken.pop_front().or_else(|| self.queue.try_recv().ok())
    }

    /// What waits now, up to an entry's size.
    fn gather(&mut self) -> Vec<Waiting> {
        let mut bytes = 0;
        let mut items = Vec::new();
        while bytes < ENTRY_BYTES_TARGET {
            let Some(next) = self.next() else { break };
            let next_bytes = next.content.payload_bytes();
            if bytes + next_bytes > ENTRY_BYTES_MAX {
                self.taken.push_front(next);
                break;
            }
            bytes += next_bytes;
            items.push(next);
        }
        items
    }

    /// Answers what cannot be proposed any more, though there is no room for the rest yet.
    fn sweep(&mut self, now: Instant, refused: Option<&str>) {
        while let Ok(waiting) = self.queue.try_recv() {
            self.taken.push_back(waiting);
        }
        let waiting = std::mem::take(&mut self.taken);
        self.taken = admit(waiting, now, refused, None).into();
    }

    /// Takes no more and answers what waits.
    fn refuse_all(mut self, error: &ProposeError) {
        self.queue.close();
        while let Some(waiting) = self.next() {
            waiting.refuse(error.clone());
        }
    }
}

struct Proposer {
    parts: ProposerParts,
    copies: Copies,
    backlog: Backlog,
    window: Arc<Semaphore>,
    proposed: mpsc::Sender<Proposed>,
}

impl Proposer {
    async fn run(mut self) {
        let stop = self.parts.stop.clone();
        let reason = loop {
            let window = tokio::select! {
                () = stop.cancelled() => break "shutdown",
                window = self.room() => window,
            };
            let Some(window) = window else { break "no proposer is left" };
            let items = self.backlog.gather();
            if !items.is_empty() && !self.propose(items, window).await {
                break "raft has stopped";
            }
        };
        self.backlog.refuse_all(&ProposeError::Stopped(reason.into()));
    }

    /// Waits for items and for room to propose them; deadlines hold meanwhile. `None` once nothing
    /// can come any more.
    async fn room(&mut self) -> Option<OwnedSemaphorePermit> {
        if !self.backlog.filled().await {
            return None;
        }
        let room = Arc::clone(&self.window).acquire_owned();
        let mut room = std::pin::pin!(room);
        loop {
            tokio::select! {
                biased;
                room = &mut room => return room.ok(),
                () = tokio::time::sleep(SWEEP_INTERVAL) => {
                    let refused = self.parts.refused.borrow().clone();
                    self.backlog.sweep(Instant::now(), refused.as_deref());
                }
            }
        }
    }

    /// False once Raft has stopped.
    async fn propose(&mut self, items: Vec<Waiting>, window: OwnedSemaphorePermit) -> bool {
        // What has waited behind others is not held for as long again.
        let oldest = items.iter().map(|waiting| waiting.since).min().unwrap_or_else(Instant::now);
        let term = match self.wait_until_serving(oldest + ELECTION_PATIENCE).await {
            Ok(term) => term,
            Err(leader) => {
                for waiting in items {
                    waiting.refuse(ProposeError::NotLeader { leader });
                }
                return true;
            }
        };
        let refused = self.parts.refused.borrow().clone();
        let items = admit(items, Instant::now(), refused.as_deref(), Some(term));
        let items = self.demand_copies(items);
        if items.is_empty() {
            return true;
        }
        let ticket = Arc::new(Ticket::new(window));
        let clock_ms = self.parts.clock.entry_ms();
        let (payload, replies) = build(merge(items), clock_ms, Arc::clone(&ticket));
        let fail = |replies: Vec<merge::Replies>, error: &ProposeError| {
            replies.into_iter().for_each(|waiting| waiting.fail(error));
        };
        match self.append(payload, &ticket, oldest + LEASE_PATIENCE).await {
            Ok(outcome) => {
                drop(ticket);
                let proposed_at = Instant::now();
                let proposed = Proposed { outcome, replies, term, proposed_at };
                self.proposed.send(proposed).await.is_ok()
            }
            Err(Unproposed::Stopped(reason)) => {
                fail(replies, &ProposeError::Stopped(reason));
                false
            }
            Err(Unproposed::Refused(error)) => {
                fail(replies, &error);
                true
            }
        }
    }

    /// Returns once the entry is in the log, and only then: the next one must not overtake it. A
    /// lease that has lapsed for a moment is waited for.
    async fn append(
        &self,
        payload: Payload,
        ticket: &Ticket,
        give_up_at: Instant,
    ) -> Result<Outcome, Unproposed> {
        loop {
            let (responder, mut outcome) = ProgressResponder::complete_only();
            let proposed = self.parts.raft.client_write_ff(payload.clone(), Some(responder)).await;
            proposed.map_err(|fatal| Unproposed::Stopped(fatal.to_string()))?;
            let refused = tokio::select! {
                biased;
                () = ticket.appended.notified() => return Ok(outcome),
                refused = &mut outcome => refused,
            };
            let Ok(Err(ClientWriteError::ForwardToLeader(to))) = refused else {
                return Err(Unproposed::Refused(ProposeError::UnknownOutcome));
            };
            let lapsed = to.reason == ForwardReason::LeaseExpired;
            if !lapsed || Instant::now() >= give_up_at || self.parts.stop.is_cancelled() {
                let error = ProposeError::NotLeader { leader: to.leader_id };
                return Err(Unproposed::Refused(error));
            }
            tokio::time::sleep(LEASE_RETRY_INTERVAL).await;
        }
    }

    /// Refuses runs of topics that need two copies while there can be only one; marks the others.
    fn demand_copies(&self, items: Vec<Waiting>) -> Vec<Waiting> {
        let is_possible = self.copies.two_are_possible();
        let applying = self.parts.published.applying.read();
        let needs_two = |content: &Content| match content {
            Content::Run { queue, .. } => applying.state.min_copies(queue.topic) >= 2,
            Content::Command(_) => false,
        };
        let mut admitted = Vec::with_capacity(items.len());
        for mut waiting in items {
            waiting.reply.needs_two = needs_two(&waiting.content);
            if waiting.reply.needs_two && !is_possible {
                waiting.refuse(ProposeError::TooFewCopies);
            } else {
                admitted.push(waiting);
            }
        }
        admitted
    }

    /// Waits while nobody is known to lead; returns the term. Errors: who leads instead, if known.
    async fn wait_until_serving(&mut self, until: Instant) -> Result<Term, Option<u64>> {
        let me = *self.parts.raft.node_id();
        let decided = |status: &RaftStatus| {
            status.serving || status.leader.is_some_and(|leader| leader != me)
        };
        let decided = tokio::time::timeout_at(until, self.parts.status.wait_for(decided));
        let status = match decided.await {
            Ok(Ok(status)) => *status,
            Ok(Err(_)) | Err(_) => return Err(None),
        };
        if status.serving { Ok(status.term) } else { Err(status.leader) }
    }
}

/// Answers those whose deadline has passed or whose chain is broken, and runs while they are
/// refused; returns the others, which are to be proposed in `term` if it is known.
fn admit(
    items: impl IntoIterator<Item = Waiting>,
    now: Instant,
    refused: Option<&str>,
    term: Option<Term>,
) -> Vec<Waiting> {
    let items = items.into_iter();
    let mut admitted = Vec::with_capacity(items.size_hint().0);
    for waiting in items {
        let link = waiting.reply.link.as_ref();
        let too_late = |link: &Link| term.is_some_and(|term| !link.holds_in(term));
        if link.is_some_and(|link| link.follows_a_break() || too_late(link)) {
            waiting.refuse(ProposeError::OutOfOrder);
        } else if waiting.deadline.is_some_and(|deadline| deadline <= now) {
            waiting.refuse(ProposeError::Expired);
        } else if let (Some(reason), Content::Run { .. }) = (refused, &waiting.content) {
            waiting.refuse(ProposeError::DiskFull(reason.to_owned()));
        } else {
            admitted.push(waiting);
        }
    }
    admitted
}

/// Why an entry is not in the log.
enum Unproposed {
    /// Raft has stopped.
    Stopped(String),
    Refused(ProposeError),
}

/// An entry's hold on its proposer's window, until it is durable here.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Told once the log has the entry.
    appended: Notify,
    _window: OwnedSemaphorePermit,
}

impl Ticket {
    fn new(window: OwnedSemaphorePermit) -> Self {
        Self { appended: Notify::new(), _window: window }
    }

    /// The log has the entry, though it may not be durable yet.
    pub(crate) fn appended(&self) {
        self.appended.notify_one();
    }
}

#[cfg(test)]
mod tests;
