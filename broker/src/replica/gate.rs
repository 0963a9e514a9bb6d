//! The witness gate: how far a leader may feed the witness, and when the group stands on one copy.
//! Pure: facts and the time come in as arguments, decisions go out.
//!
//! A witness keeps no payload, so an entry that only the leader and the witness hold is committed
//! with one copy, and the witness then refuses its vote to the other data replica. The gate keeps
//! the witness's log within both data logs while the group is *paired*, and lets it run with the
//! leader's own log while it stands *alone*, which is said by an entry of the log itself.
//!
//! Whoever holds the gate asks [`Gate::may_feed`] and calls [`Gate::sent`] under one lock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::fault::{Fault, injected};
use crate::position::{EntryIndex, Term};

/// How far behind a peer may be for the witness to be held until it has caught up. Farther behind,
/// commits would wait long; so the group stays alone until the peer is this near.
const CLOSE_LAG_ENTRIES_MAX: u64 = 64;

/// What the last gate entry of a log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every commit is on both data replicas. So it is in a log without any gate entry.
    #[default]
    Paired,
    /// The `alone` entry lies at `at`.
    Alone { at: EntryIndex },
}

/// When a peer counts as silent.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Without progress while entries are owed.
    pub silence_max: Duration,
    /// The same for a new leader that has heard nothing yet in its term.
    pub new_leader_silence_max: Duration,
}

/// What the leader has to do for the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Propose an `alone` entry.
    AppendAlone,
    /// Propose a `paired` entry. Until its append is told by [`Gate::set_mode`], or its failure by
    /// [`Gate::paired_failed`], the witness is held, and this stays the answer.
    AppendPaired,
    /// Nothing, until a fact changes or this time comes.
    Wait(Option<Instant>),
}

/// Why a peer is not counted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It does not take connections.
    Refuses,
    Stopping,
    DiskFull,
    /// Its log went back behind what it had answered as synced: it must be seeded anew.
    Lost,
    Silent,
}

/// What an answer that entries are there means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matched {
    Usual,
    /// The peer was lost and has all again that it had.
    Back,
    /// It was on its way when the peer's log went back, and says nothing of what it is now.
    Stale,
}

/// What an answer at a conflict means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// The peer's log is being brought in line.
    Usual,
    /// The peer's log went back.
    Lost,
    /// It was on its way when the peer's log went back, and says nothing of what it is now.
    Stale,
}

/// How often a member's log was seen to go back. What is said over a connection counts only if that
/// began after the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LossCount(u32);

/// What became of a peer, as far as the leader knows.
#[derive(Clone, Debug, Default)]
struct Peer {
    /// Answered as synced to this leader in this term; exclusive.
    matched_end: EntryIndex,
    refuses: bool,
    stopping: bool,
    disk_full: bool,
    /// What it had answered as synced when its log went back; exclusive. `None` once it has that
    /// much again.
    lost_end: Option<EntryIndex>,
    losses: LossCount,
    /// When it last made progress, or began to owe; `None` while it owes nothing.
    owed_since: Option<Instant>,
    /// It was a voter when the term began, and has not been heard of since.
    unheard: bool,
}

/// The gate as health and metrics show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GateView {
    /// `None` while this node does not lead.
    pub term: Option<Term>,
    pub mode: Mode,
    /// The peers are back and the witness is held until they have all that it has.
    pub closing: bool,
    /// What all other data voters have synced; exclusive.
    pub matched_end: EntryIndex,
    pub own_durable_end: EntryIndex,
    /// What the witness was sent in this term; exclusive.
    pub sent_end: EntryIndex,
    /// What the witness may be sent now; exclusive.
    pub feed_end: EntryIndex,
    /// Data voters that are not counted on, and any member that is lost.
    pub gone: BTreeMap<u64, Gone>,
}

/// The gate of one node; closed to all while the node does not lead.
#[derive(Clone, Debug)]
pub struct Gate {
    patience: Patience,
    leading: Option<Leading>,
    /// What the witness was sent in the last term that this node led; exclusive.
    last_sent: (Term, EntryIndex),
    mode: Mode,
    /// Data voters of either configuration but this node.
    voters: BTreeSet<u64>,
    peers: BTreeMap<u64, Peer>,
    /// Answers of a term that this node leads already, but was not told of yet.
    early: BTreeMap<u64, (Term, LossCount, EntryIndex)>,
    own_durable_end: EntryIndex,
    own_end: EntryIndex,
}

#[derive(Clone, Copy, Debug)]
struct Leading {
    term: Term,
    /// Its blank entry.
    first_own: EntryIndex,
    /// Sent to the witness in this term; exclusive.
    sent_end: EntryIndex,
    /// A `paired` entry is on its way into the log.
    pairing: bool,
    /// The peers are near enough for the witness to be held.
    closing: bool,
    /// The injected fault: open without an `alone` entry.
    opened_by_fault: bool,
}

impl Gate {
    pub fn new(patience: Patience, mode: Mode) -> Self {
        Self {
            patience,
            leading: None,
            last_sent: (Term::ZERO, EntryIndex::ZERO),
            mode,
            voters: BTreeSet::new(),
            peers: BTreeMap::new(),
            early: BTreeMap::new(),
            own_durable_end: EntryIndex::ZERO,
            own_end: EntryIndex::ZERO,
        }
    }

    /// This node leads `term`; its log says `mode` and `first_own` is where its own entries begin.
    /// A term that is not newer than the last one is passed over.
    pub fn begin_term(&mut self, term: Term, first_own: EntryIndex, mode: Mode, now: Instant) {
        if self.leading.is_some_and(|leading| leading.term >= term) {
            return;
        }
        self.mode = mode;
        // Should it be told twice of one term, with an end of it between.
        let (last_term, last_sent_end) = self.last_sent;
        let sent_end = if last_term == term { last_sent_end } else { EntryIndex::ZERO };
        self.leading = Some(Leading {
            term,
            first_own,
            sent_end,
            pairing: false,
            closing: false,
            opened_by_fault: false,
        });
        self.own_end = self.own_end.max(first_own.next());
        for peer in self.peers.values_mut() {
            let Peer { stopping, disk_full, losses, .. } = *peer;
            *peer = Peer { stopping, disk_full, losses, ..Peer::default() };
        }
        for voter in &self.voters {
            let peer = self.peers.entry(*voter).or_default();
            peer.unheard = true;
            peer.owed_since = Some(now);
        }
        for (id, (early_term, losses, end)) in std::mem::take(&mut self.early) {
            if early_term == term {
                self.peer_matched(id, term, losses, end, now);
            }
        }
        self.judge(now);
    }

    /// This node leads no more.
    pub fn end_term(&mut self) {
        self.leading = None;
    }

    /// The other data voters of either configuration.
    pub fn set_voters(&mut self, voters: BTreeSet<u64>, now: Instant) {
        self.voters = voters;
        for voter in &self.voters {
            let peer = self.peers.entry(*voter).or_default();
            if peer.owed_since.is_none() && peer.matched_end < self.own_end {
                peer.owed_since = Some(now);
            }
        }
        self.judge(now);
    }

    /// All members of the group; what was known of others is forgotten.
    pub fn set_members(&mut self, members: &BTreeSet<u64>) {
        self.peers.retain(|id, _| members.contains(id));
    }

    /// The last gate entry of this node's log: told on every append and truncation that changes it.
    pub fn set_mode(&mut self, mode: Mode, now: Instant) {
        // An `alone` may still come in while a `paired` is on its way behind it.
        if let Some(leading) = &mut self.leading
            && mode == Mode::Paired
        {
            leading.pairing = false;
        }
        self.mode = mode;
        self.judge(now);
    }

    /// The `paired` entry asked for is not in the log and will not be.
    pub fn paired_failed(&mut self, now: Instant) {
        if let Some(leading) = &mut self.leading {
            leading.pairing = false;
        }
        self.judge(now);
    }

    /// This node's log reaches up to `end`, synced or not.
    pub fn own_end(&mut self, end: EntryIndex, now: Instant) {
        self.own_end = end;
        for peer in self.peers.values_mut() {
            if peer.owed_since.is_none() && peer.matched_end < end {
                peer.owed_since = Some(now);
            }
        }
        self.judge(now);
    }

    /// This node's log is synced up to `end`; written, where syncs are deferred: there the answers
    /// of peers mean no more, and only gate entries are synced before they count.
    pub fn own_durable_end(&mut self, end: EntryIndex, now: Instant) {
        self.own_durable_end = end;
        self.judge(now);
    }

    /// A member answered that it has synced the leader's log of `term` up to `end`. Answers of older
    /// terms, and from before a loss, say nothing.
    pub fn peer_matched(
        &mut self,
        id: u64,
        term: Term,
        losses: LossCount,
        end: EntryIndex,
        now: Instant,
    ) -> Matched {
        match self.leading {
            Some(leading) if leading.term == term => {}
            Some(leading) if leading.term > term => return Matched::Usual,
            Some(_) | None => {
                self.early.insert(id, (term, losses, end));
                return Matched::Usual;
            }
        }
        let own_end = self.own_end;
        let peer = self.peers.entry(id).or_default();
        if peer.losses != losses {
            return Matched::Stale;
        }
        peer.refuses = false;
        if end > peer.matched_end {
            peer.matched_end = end;
            peer.unheard = false;
            peer.owed_since = (end < own_end).then_some(now);
        }
        let is_back = peer.lost_end.is_some_and(|lost_end| peer.matched_end >= lost_end);
        if is_back {
            peer.lost_end = None;
        }
        self.judge(now);
        if is_back { Matched::Back } else { Matched::Usual }
    }

    /// A member answered that it does not hold the leader's entry at `index`.
    pub fn peer_conflict(
        &mut self,
        id: u64,
        term: Term,
        losses: LossCount,
        index: EntryIndex,
        now: Instant,
    ) -> Conflict {
        if self.leading.is_none_or(|leading| leading.term != term) {
            return Conflict::Usual;
        }
        let peer = self.peers.entry(id).or_default();
        if peer.losses != losses {
            return Conflict::Stale;
        }
        peer.refuses = false;
        let is_lost = index < peer.matched_end;
        if is_lost {
            self.peer_lost(id, now);
        }
        self.judge(now);
        if is_lost { Conflict::Lost } else { Conflict::Usual }
    }

    /// A member's log went back behind what it had answered as synced. True if that is news.
    pub fn peer_lost(&mut self, id: u64, now: Instant) -> bool {
        let peer = self.peers.entry(id).or_default();
        let is_news = peer.lost_end.is_none() || peer.matched_end > EntryIndex::ZERO;
        if is_news {
            let answered_end = peer.lost_end.unwrap_or_default().max(peer.matched_end);
            peer.lost_end = Some(answered_end);
            peer.losses.0 += 1;
            peer.matched_end = EntryIndex::ZERO;
            peer.owed_since = Some(now);
        }
        self.judge(now);
        is_news
    }

    /// What a connection to a member that begins now is to be known by.
    pub fn losses(&self, id: u64) -> LossCount {
        self.peers.get(&id).map(|peer| peer.losses).unwrap_or_default()
    }

    /// What a member has ever answered as synced in that term; exclusive, zero in any other.
    pub fn answered_end(&self, id: u64, term: Term) -> EntryIndex {
        let peer = self.peers.get(&id).filter(|_| self.leads(term));
        peer.map_or(EntryIndex::ZERO, |peer| {
            peer.lost_end.unwrap_or_default().max(peer.matched_end)
        })
    }

    /// A connection to it was refused or reset: nobody is there.
    pub fn peer_refused(&mut self, id: u64, now: Instant) {
        self.peers.entry(id).or_default().refuses = true;
        self.judge(now);
    }

    /// It answered something, whatever it was.
    pub fn peer_heard(&mut self, id: u64, now: Instant) {
        self.peers.entry(id).or_default().refuses = false;
        self.judge(now);
    }

    /// It said whether it is about to stop.
    pub fn peer_stopping(&mut self, id: u64, stopping: bool, now: Instant) {
        self.peers.entry(id).or_default().stopping = stopping;
        self.judge(now);
    }

    /// It said whether it can write.
    pub fn peer_disk_full(&mut self, id: u64, disk_full: bool, now: Instant) {
        self.peers.entry(id).or_default().disk_full = disk_full;
        self.judge(now);
    }

    /// Whether the witness may be sent entries of `term` up to and with `last`, or a snapshot that
    /// ends with it.
    pub fn may_feed(&self, term: Term, last: EntryIndex) -> bool {
        let Some(leading) = self.leading.filter(|leading| leading.term == term) else {
            return false;
        };
        injected(Fault::UngatedWitness) || last < self.feed_end(&leading)
    }

    /// The witness is being sent entries of this term up to `end`, exclusive.
    ///
    /// Panics if the gate does not allow it.
    pub fn sent(&mut self, term: Term, end: EntryIndex) {
        let Some(last) = end.previous() else { return };
        let again = self.leading.is_some_and(|l| l.term == term && end <= l.sent_end);
        assert!(
            again || self.may_feed(term, last),
            "the witness is sent entries up to {end} of term {term} past the gate"
        );
        if let Some(leading) = &mut self.leading {
            leading.sent_end = leading.sent_end.max(end);
            self.last_sent = (term, leading.sent_end);
        }
    }

    /// What the leader has to do now. To be asked again after every fact and at the time it names.
    pub fn next(&mut self, now: Instant) -> Decision {
        self.judge(now);
        let Some(leading) = self.leading else { return Decision::Wait(None) };
        let gone = self.voters.iter().any(|id| self.gone(*id, now).is_some());
        match self.mode {
            _ if leading.pairing => Decision::AppendPaired,
            Mode::Paired if gone => {
                if injected(Fault::GateWithoutAlone) {
                    self.leading = Some(Leading { opened_by_fault: true, ..leading });
                    return Decision::Wait(None);
                }
                Decision::AppendAlone
            }
            Mode::Alone { .. } if gone => Decision::Wait(None),
            Mode::Alone { .. } if self.in_step(&leading) => {
                self.leading = Some(Leading { pairing: true, ..leading });
                Decision::AppendPaired
            }
            Mode::Paired | Mode::Alone { .. } => Decision::Wait(self.silent_at()),
        }
    }

    /// What all other data voters have answered as synced in this term; exclusive. An ack below it
    /// means two copies, any other is degraded.
    pub fn matched_end(&self) -> EntryIndex {
        let matched = |id| self.peers.get(id).map_or(EntryIndex::ZERO, |peer| peer.matched_end);
        self.voters.iter().map(matched).min().unwrap_or(EntryIndex::new(u64::MAX))
    }

    /// Whether this node leads that term, as far as the gate was told.
    pub fn leads(&self, term: Term) -> bool {
        self.leading.is_some_and(|leading| leading.term == term)
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn view(&self, now: Instant) -> GateView {
        let lost = self.peers.iter().filter(|(_, peer)| peer.lost_end.is_some());
        let gone = self.voters.iter().filter_map(|id| Some((*id, self.gone(*id, now)?)));
        let gone = lost.map(|(id, _)| (*id, Gone::Lost)).chain(gone);
        GateView {
            term: self.leading.map(|leading| leading.term),
            mode: self.mode,
            closing: self.leading.is_some_and(|leading| leading.closing || leading.pairing),
            matched_end: self.matched_end(),
            own_durable_end: self.own_durable_end,
            sent_end: self.leading.map_or(EntryIndex::ZERO, |leading| leading.sent_end),
            feed_end: self.leading.map_or(EntryIndex::ZERO, |leading| self.feed_end(&leading)),
            gone: gone.collect(),
        }
    }

    /// Exclusive end of what the witness may be sent.
    fn feed_end(&self, leading: &Leading) -> EntryIndex {
        let own = if injected(Fault::WitnessFedUnsynced) {
            self.own_end.max(self.own_durable_end)
        } else {
            self.own_durable_end
        };
        let opened = match self.mode {
            Mode::Alone { at } => at < self.own_durable_end,
            Mode::Paired => leading.opened_by_fault,
        };
        if opened && !leading.closing && !leading.pairing {
            own
        } else {
            own.min(self.matched_end())
        }
    }

    /// What the peers must have before the log may say `paired`: all that the witness was sent in
    /// this term, and the leader's first entry.
    fn in_step_end(leading: &Leading) -> EntryIndex {
        leading.sent_end.max(leading.first_own.next())
    }

    fn in_step(&self, leading: &Leading) -> bool {
        self.matched_end() >= Self::in_step_end(leading)
    }

    /// Whether the witness is held because the peers are about to be in step. It is not kept
    /// beyond the facts: a peer that falls silent again ends it.
    fn judge(&mut self, now: Instant) {
        let Some(leading) = self.leading else { return };
        let heard = |id| self.peers.get(id).is_some_and(|peer: &Peer| !peer.unheard);
        let back = self.voters.iter().all(|id| heard(id) && self.gone(*id, now).is_none());
        let reached = self.matched_end().get();
        let near = Self::in_step_end(&leading).get().saturating_sub(reached);
        let alone = matches!(self.mode, Mode::Alone { .. });
        let closing = alone && back && near <= CLOSE_LAG_ENTRIES_MAX;
        self.leading = Some(Leading { closing, ..leading });
    }

    fn gone(&self, id: u64, now: Instant) -> Option<Gone> {
        let Some(peer) = self.peers.get(&id) else { return Some(Gone::Silent) };
        if peer.lost_end.is_some() {
            Some(Gone::Lost)
        } else if peer.refuses {
            Some(Gone::Refuses)
        } else if peer.stopping {
            Some(Gone::Stopping)
        } else if peer.disk_full {
            Some(Gone::DiskFull)
        } else {
            let silent = self.silent_at_of(peer).is_some_and(|at| now >= at);
            silent.then_some(Gone::Silent)
        }
    }

    fn silent_at_of(&self, peer: &Peer) -> Option<Instant> {
        let patience = if peer.unheard {
            self.patience.new_leader_silence_max
        } else {
            self.patience.silence_max
        };
        peer.owed_since.map(|since| since + patience)
    }

    /// When the first of the voters becomes silent, if none makes progress.
    fn silent_at(&self) -> Option<Instant> {
        let peers = self.voters.iter().filter_map(|id| self.peers.get(id));
        peers.filter_map(|peer| self.silent_at_of(peer)).min()
    }
}

#[cfg(test)]
mod tests;
