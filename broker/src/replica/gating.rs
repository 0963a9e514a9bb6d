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

use super::gate::{Conflict, Decision, Gate, GateView, LossCount, Matched, Mode, Patience};
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
    /// The term that the following is about.
    term: Option<Term>,
    /// Members of which Raft would take it that their logs went back, once.
    armed: BTreeSet<u64>,
    /// Members of which Raft is being told just that. Armed again before it has heard it, it would
    /// not be afterwards; that it has shows in the next entries that are there.
    reverting: BTreeSet<u64>,
    /// Lost members of which Raft has not heard it yet.
    unreported: BTreeSet<u64>,
}

impl Gating {
    /// Closed until this node leads.
    pub(crate) fn new(patience: Patience) -> Self {
        let inner = Inner {
            gate: Gate::new(patience, Mode::Paired),
            term: None,
            armed: BTreeSet::new(),
            reverting: BTreeSet::new(),
            unreported: BTreeSet::new(),
        };
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

    /// What a connection to a member that begins now is to be known by.
    pub(crate) fn losses(&self, member: u64) -> LossCount {
        self.shared.inner.lock().gate.losses(member)
    }

    /// What a member has ever answered as synced in that term; exclusive.
    pub(crate) fn answered_end(&self, member: u64, term: Term) -> EntryIndex {
        self.shared.inner.lock().gate.answered_end(member, term)
    }

    /// A member has synced this leader's log of `term` up to `end`. A stale answer is not for Raft
    /// either.
    pub(crate) fn matched(
        &self,
        member: u64,
        term: Term,
        losses: LossCount,
        end: EntryIndex,
    ) -> Matched {
        let matched = self.tell(|inner, now| {
            let matched = inner.gate.peer_matched(member, term, losses, end, now);
            if matched != Matched::Stale {
                inner.reverting.remove(&member);
            }
            matched
        });
        if matched == Matched::Back {
            tracing::info!(member, %term, %end, "a member that had lost entries has them again");
        }
        matched
    }

    /// A member does not hold the entry at `index`. With what that means: whether Raft must not hear
    /// of it, not yet or not at all.
    pub(crate) fn conflict(
        &self,
        member: u64,
        term: Term,
        losses: LossCount,
        index: EntryIndex,
    ) -> (Conflict, bool) {
        self.tell(|inner, now| {
            let conflict = inner.gate.peer_conflict(member, term, losses, index, now);
            if conflict == Conflict::Lost {
                inner.unreported.insert(member);
            }
            let is_held_back = match conflict {
                Conflict::Stale => true,
                Conflict::Usual | Conflict::Lost if !inner.unreported.contains(&member) => false,
                Conflict::Usual | Conflict::Lost if inner.armed.remove(&member) => {
                    inner.reverting.insert(member);
                    false
                }
                Conflict::Usual | Conflict::Lost => true,
            };
            if !is_held_back {
                inner.unreported.remove(&member);
            }
            (conflict, is_held_back)
        })
    }

    /// A member says that it lost entries it had answered as synced, and takes no more. True if that
    /// is news.
    pub(crate) fn lost(&self, member: u64) -> bool {
        self.tell(|inner, now| inner.gate.peer_lost(member, now))
    }

    pub(crate) fn heard(&self, member: u64) {
        self.tell(|inner, now| inner.gate.peer_heard(member, now));
    }

    pub(crate) fn refused(&self, member: u64) {
        self.tell(|inner, now| inner.gate.peer_refused(member, now));
    }

    /// Of which members Raft may be told now to take it that their logs went back.
    fn unarmed(&self, keepers: &BTreeSet<u64>) -> Vec<u64> {
        let inner = self.shared.inner.lock();
        let is_unarmed = |id: &&u64| !inner.armed.contains(*id) && !inner.reverting.contains(*id);
        keepers.iter().filter(is_unarmed).copied().collect()
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
    members: BTreeSet<u64>,
    /// Other members that keep messages, voters or not.
    keepers: BTreeSet<u64>,
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
            let (mode, decision) = self.decide(&part);
            self.arm(&part).await;
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
            gate.set_members(&part.members);
            gate.set_voters(part.voters.clone(), now);
            match (part.term, facts.term_start) {
                (Some(term), Some(first)) if first.term == term => {
                    gate.begin_term(term, first.index, facts.mode, now);
                }
                (Some(_), _) => {}
                (None, _) => gate.end_term(),
            }
            if inner.term != part.term {
                inner.term = part.term;
                inner.armed.clear();
                inner.reverting.clear();
                inner.unreported.clear();
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

    /// Lets Raft take it that a member's log went back: at once when it hears of it, so that it never
    /// counts what is not there any more. It then brings that log in line anew, entry by entry or,
    /// where those are trimmed, by files. Never a witness: that is to be replaced.
    async fn arm(&self, part: &Part) {
        let Some(term) = part.term else { return };
        for member in self.gating.unarmed(&part.keepers) {
            match self.raft.trigger().allow_next_revert(&member, true).await {
                Ok(Ok(())) => {
                    let mut inner = self.gating.shared.inner.lock();
                    if inner.term == Some(term) {
                        inner.armed.insert(member);
                    }
                }
                // It has just lost the lead, or the member was just added: it is asked again.
                Ok(Err(error)) => tracing::debug!(member, %error, "raft does not know a member"),
                Err(error) => tracing::debug!(member, %error, "raft has ended"),
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
    let nodes: BTreeSet<u64> = members.nodes().map(|(id, _)| *id).collect();
    let keeps = |id: &u64| *id != me && role(*id) == Role::Data;
    let others: BTreeSet<u64> = members.voter_ids().filter(|id| *id != me).collect();
    Part {
        term: metrics.state.is_leader().then(|| Term::new(metrics.vote.leader_id.term)),
        keepers: nodes.iter().copied().filter(keeps).collect(),
        members: nodes,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raft_is_armed_again_only_once_it_has_heard_of_a_loss() {
        const MEMBER: u64 = 2;
        let term = Term::new(3);
        let index = EntryIndex::new;
        let (silence_max, new_leader_silence_max) = (Duration::from_secs(2), Duration::ZERO);
        let gating = Gating::new(Patience { silence_max, new_leader_silence_max });
        let keepers = BTreeSet::from([MEMBER]);
        gating.change(|inner, now| {
            inner.gate.set_voters(keepers.clone(), now);
            inner.gate.begin_term(term, index(10), Mode::Paired, now);
        });
        let before = gating.losses(MEMBER);
        gating.matched(MEMBER, term, before, index(20));
        let unarmed = gating.conflict(MEMBER, term, before, index(19));
        assert_eq!(unarmed, (Conflict::Lost, true), "held back");
        assert_eq!(gating.unarmed(&keepers), vec![MEMBER]);
        gating.change(|inner, _| inner.armed.insert(MEMBER));
        let since = gating.losses(MEMBER);
        let told = gating.conflict(MEMBER, term, since, index(19));
        assert_eq!(told, (Conflict::Usual, false), "now Raft is told");
        assert!(gating.unarmed(&keepers).is_empty());
        assert_eq!(gating.matched(MEMBER, term, before, index(20)), Matched::Stale);
        assert!(gating.unarmed(&keepers).is_empty(), "it says nothing of what Raft has heard");
        assert_eq!(gating.matched(MEMBER, term, since, index(5)), Matched::Usual);
        assert_eq!(gating.unarmed(&keepers), vec![MEMBER]);
    }
}
