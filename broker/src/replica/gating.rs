//! The gate at work: who waits at it, and the task that tells it the facts and carries out what it
//! decides. What may pass is decided in [`super::gate`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::alias::OneshotReceiverOf;
use openraft::async_runtime::WatchReceiver;
use openraft::metrics::RaftServerMetrics;
use openraft::raft::ClientWriteResult;
use openraft::raft::responder::ProgressResponder;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::gate::{Conflict, Decision, Gate, GateView, Gone, Mode, Patience};
use super::log_store::LogFacts;
use super::membership::Role;
use super::peers::PeerStates;
use super::raft_types::{Payload, Raft, TypeConfig};
use crate::entry::EntryKind;
use crate::log::DurableEnd;
use crate::position::{EntryIndex, Term};

/// Between two tries to append a gate entry: a new leader's are refused until a quorum has answered.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The gate of this node, and those who wait at it; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Gating {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// The witness may perhaps be fed more.
    opened: Notify,
    /// There is something to decide.
    told: Notify,
    view: watch::Sender<GateView>,
}

#[derive(Debug)]
struct Inner {
    gate: Gate,
    /// Lost peers whose next conflict Raft was told to take.
    allowed: BTreeSet<u64>,
}

impl Gating {
    /// Closed until this node leads.
    pub(crate) fn new(patience: Patience) -> Self {
        let inner = Inner { gate: Gate::new(patience, Mode::Paired), allowed: BTreeSet::new() };
        let shared = Shared {
            inner: Mutex::new(inner),
            opened: Notify::new(),
            told: Notify::new(),
            view: watch::Sender::new(GateView::default()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// What acks, health and metrics go by.
    pub(crate) fn view(&self) -> watch::Receiver<GateView> {
        self.shared.view.subscribe()
    }

    /// Waits until the witness may be sent what ends with `last`, and counts it as sent. For ever,
    /// if that term is over: its streams end from elsewhere.
    pub(crate) async fn pass(&self, term: Term, last: EntryIndex) {
        loop {
            let mut opened = std::pin::pin!(self.shared.opened.notified());
            // Before looking: what changes from here on wakes it.
            opened.as_mut().enable();
            {
                let mut inner = self.shared.inner.lock();
                if inner.gate.may_feed(term, last) {
                    inner.gate.sent(term, last.next());
                    return;
                }
            }
            opened.await;
        }
    }

    /// What all other data voters have synced of this leader's log; `None` in another term.
    pub(crate) fn matched_end(&self, term: Term) -> Option<EntryIndex> {
        let inner = self.shared.inner.lock();
        inner.gate.leads(term).then(|| inner.gate.matched_end())
    }

    /// A member has synced this leader's log of `term` up to `end`.
    pub(crate) fn matched(&self, member: u64, term: Term, end: EntryIndex) {
        self.tell(|inner, now| inner.gate.peer_matched(member, term, end, now));
    }

    /// A member does not hold the entry at `index`. True if its log went back, and Raft must not
    /// hear of it yet.
    pub(crate) fn conflict(&self, member: u64, term: Term, index: EntryIndex) -> bool {
        let is_lost = self.tell(|inner, now| {
            let conflict = inner.gate.peer_conflict(member, term, index, now);
            if conflict == Conflict::Usual {
                return false;
            }
            let is_allowed = inner.allowed.remove(&member);
            if is_allowed {
                inner.gate.peer_seeded(member, now);
            }
            !is_allowed
        });
        if is_lost {
            tracing::error!(member, %term, %index, "a member lost entries it had answered as synced");
        }
        is_lost
    }

    pub(crate) fn heard(&self, member: u64) {
        self.tell(|inner, now| inner.gate.peer_heard(member, now));
    }

    pub(crate) fn refused(&self, member: u64) {
        self.tell(|inner, now| inner.gate.peer_refused(member, now));
    }

    fn tell<T>(&self, fact: impl FnOnce(&mut Inner, Instant) -> T) -> T {
        let told = self.change(fact);
        self.shared.told.notify_one();
        told
    }

    fn change<T>(&self, fact: impl FnOnce(&mut Inner, Instant) -> T) -> T {
        let now = Instant::now();
        let mut inner = self.shared.inner.lock();
        let told = fact(&mut inner, now);
        let view = inner.gate.view(now);
        let is_changed = self.shared.view.send_if_modified(|seen| {
            let changes = *seen != view;
            *seen = view;
            changes
        });
        drop(inner);
        if is_changed {
            self.shared.opened.notify_waiters();
        }
        told
    }
}

/// What the driver of a gate goes by.
#[derive(Debug)]
pub(crate) struct Driving {
    pub(crate) gating: Gating,
    pub(crate) raft: Raft,
    pub(crate) facts: watch::Receiver<LogFacts>,
    /// Of this node's log. Where syncs are deferred, so is the gate's own end; but gate entries
    /// are always synced before they settle.
    pub(crate) settled: watch::Receiver<DurableEnd>,
    pub(crate) peers: watch::Receiver<PeerStates>,
    pub(crate) stop: CancellationToken,
}

/// A gate entry on its way into the log.
struct Proposed {
    kind: EntryKind,
    outcome: OneshotReceiverOf<TypeConfig, ClientWriteResult<TypeConfig>>,
}

/// What Raft says of this node's part in the group.
struct Part {
    term: Option<Term>,
    voters: BTreeSet<u64>,
    has_witness: bool,
}

impl Driving {
    /// Runs until `stop`, or the end of Raft or of its log.
    pub(crate) async fn run(mut self) {
        let mut metrics = self.raft.server_metrics();
        let mut proposed: Option<Proposed> = None;
        let mut retry_at: Option<Instant> = None;
        loop {
            let part = part(*self.raft.node_id(), &metrics.borrow_and_update());
            self.allow_lost().await;
            let (mode, decision) = self.decide(&part);
            let appended = match mode {
                Mode::Alone { .. } => EntryKind::Alone,
                Mode::Paired => EntryKind::Paired,
            };
            // It is in the log: whether it is committed shows by itself.
            if proposed.as_ref().is_some_and(|proposed| proposed.kind == appended) {
                proposed = None;
            }
            let is_due = retry_at.is_none_or(|at| at <= Instant::now());
            let wanted = match decision {
                Decision::AppendAlone => Some(EntryKind::Alone),
                Decision::AppendPaired => Some(EntryKind::Paired),
                Decision::Wait(_) => None,
            };
            if let Some(kind) = wanted
                && is_due
                && proposed.is_none()
            {
                retry_at = None;
                match self.propose(kind).await {
                    Some(outcome) => proposed = Some(Proposed { kind, outcome }),
                    None => return,
                }
            }
            let wake_at = match decision {
                Decision::Wait(at) => at,
                _ => retry_at,
            };
            let sleep = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = metrics.changed() => if changed.is_err() { return },
                changed = self.facts.changed() => if changed.is_err() { return },
                changed = self.settled.changed() => if changed.is_err() { return },
                Ok(()) = self.peers.changed() => {}
                () = self.gating.shared.told.notified() => {}
                () = sleep => {}
                outcome = outcome(&mut proposed) => {
                    if let Some((kind, Err(reason))) = outcome {
                        retry_at = Some(Instant::now() + RETRY_INTERVAL);
                        tracing::debug!(?kind, reason, "a gate entry was not appended");
                        if kind == EntryKind::Paired {
                            self.gating.change(|inner, now| inner.gate.paired_failed(now));
                        }
                    }
                }
            }
        }
    }

    /// Tells the gate where everything stands, and asks it.
    fn decide(&mut self, part: &Part) -> (Mode, Decision) {
        let facts = *self.facts.borrow_and_update();
        let settled_end = self.settled.borrow_and_update().index;
        let peers = self.peers.borrow_and_update().clone();
        let decision = self.gating.change(|inner, now| {
            let gate = &mut inner.gate;
            gate.set_voters(part.voters.clone(), now);
            match (part.term, facts.term_start) {
                (Some(term), Some(first)) if first.term == term => {
                    gate.begin_term(term, first.index, facts.mode, now);
                }
                (Some(_), _) => {}
                (None, _) => {
                    gate.end_term();
                    inner.allowed.clear();
                }
            }
            gate.set_mode(facts.mode, now);
            gate.own_end(facts.end, now);
            gate.own_durable_end(settled_end, now);
            for (id, peer) in peers.iter().filter(|(_, peer)| peer.fresh) {
                gate.peer_stopping(*id, peer.state.stopping, now);
                gate.peer_disk_full(*id, peer.state.disk_full, now);
            }
            if part.has_witness { gate.next(now) } else { Decision::Wait(None) }
        });
        (facts.mode, decision)
    }

    /// Lets Raft take a lost peer's conflict, so that it brings the peer's log in line anew.
    async fn allow_lost(&self) {
        let lost: Vec<u64> = {
            let inner = self.gating.shared.inner.lock();
            let gone = inner.gate.view(Instant::now()).gone;
            let lost = gone.into_iter().filter(|(_, gone)| *gone == Gone::Lost).map(|(id, _)| id);
            lost.filter(|id| !inner.allowed.contains(id)).collect()
        };
        for member in lost {
            let allowed = self.raft.trigger().allow_next_revert(&member, true).await;
            match allowed {
                Ok(Ok(())) => {
                    tracing::warn!(member, "a lost member is replicated to from the beginning");
                    self.gating.shared.inner.lock().allowed.insert(member);
                }
                Ok(Err(error)) => tracing::error!(member, %error, "a lost member stays lost"),
                Err(error) => tracing::error!(member, %error, "raft has ended"),
            }
        }
    }

    /// `None` once Raft has ended.
    async fn propose(
        &self,
        kind: EntryKind,
    ) -> Option<OneshotReceiverOf<TypeConfig, ClientWriteResult<TypeConfig>>> {
        // Like Raft's own entries it does not move the clock.
        let payload = Payload {
            kind,
            clock_ms: 0,
            item_count: 0,
            payload_crc: crc32fast::hash(&[]),
            payload: Bytes::new(),
            ticket: None,
        };
        let (responder, outcome) = ProgressResponder::complete_only();
        self.raft.client_write_ff(payload, Some(responder)).await.ok()?;
        Some(outcome)
    }
}

fn part(me: u64, metrics: &RaftServerMetrics<TypeConfig>) -> Part {
    let members = metrics.membership_config.membership();
    let role = |id: u64| members.get_node(&id).map_or(Role::Data, |node| node.role);
    let others: BTreeSet<u64> = members.voter_ids().filter(|id| *id != me).collect();
    Part {
        term: metrics.state.is_leader().then(|| Term::new(metrics.vote.leader_id.term)),
        has_witness: others.iter().any(|id| role(*id) == Role::Witness),
        voters: others.into_iter().filter(|id| role(*id) == Role::Data).collect(),
    }
}

/// What became of the proposal, which is then gone; never resolves without one.
async fn outcome(proposed: &mut Option<Proposed>) -> Option<(EntryKind, Result<(), String>)> {
    let Some(waiting) = proposed.as_mut() else { return std::future::pending().await };
    let outcome = match (&mut waiting.outcome).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("raft has ended".to_owned()),
    };
    proposed.take().map(|proposed| (proposed.kind, outcome))
}
