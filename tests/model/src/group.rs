//! A broker group of two data nodes and a witness, step by step: Raft, and the gate of the leader.
//!
//! What a leader ever sent can arrive at any time, in order for each receiver, also after the leader
//! crashed or was deposed. An answer is read where it is given: whatever a leader does before it
//! reads one, it can do before the step. Nothing waits for time, so silence, elections and gate
//! entries may come at any moment. A crash includes the restart, and recovery syncs what it finds.
//! A node that is lost is one that takes no further step; that the others can go on without it is
//! a property of every state (see `properties`).

use crate::log::{DATA_NODES, Entry, Kind, Log, Nodes, WITNESS};
use crate::rules::{Bounds, Without};

/// Room for terms in a state.
pub const TERMS: usize = 6;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    Follower,
    /// Has these votes.
    Candidate(Nodes),
    Leader,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DataNode {
    pub log: Log,
    /// What the disk holds. After a cut that is not synced yet it is no prefix of `log`.
    pub disk: Log,
    pub term: u8,
    pub voted: Option<u8>,
    pub role: Role,
    /// What it knows of its log to be the leader's, of this term.
    pub verified_end: u8,
    /// As leader: what each node answered as synced, in this term.
    pub matched: [u8; DATA_NODES + 1],
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Witness {
    /// Synced with each step.
    pub log: Log,
    pub term: u8,
    pub voted: Option<u8>,
}

/// A message that was acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ack {
    pub index: u8,
    pub term: u8,
    /// Term of the leader that acknowledged it.
    pub by: u8,
    /// Told as kept by two.
    pub two_copies: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Group {
    pub data: [DataNode; DATA_NODES],
    pub witness: Witness,
    /// All that the leader of a term ever had, by term.
    pub led: [Log; TERMS],
    /// How far the leader of a term fed the witness.
    pub fed_end: [u8; TERMS],
    pub leaders: [Nodes; TERMS],
    pub acks: Vec<Ack>,
    pub messages_left: u8,
    pub crashes_left: u8,
    pub gates_left: u8,
    pub replacement_left: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Append {
        leader: usize,
        kind: Kind,
    },
    Sync {
        node: usize,
    },
    /// One entry more may be on its way to the witness.
    Feed {
        leader: usize,
    },
    /// A node takes the next entry of what the leader of a term sent, or learns of the term.
    Receive {
        term: u8,
        node: usize,
    },
    /// Comes back with its disk as it is, or with the first entries of its log.
    Crash {
        node: usize,
        kept_end: Option<u8>,
    },
    Campaign {
        node: usize,
    },
    Vote {
        candidate: usize,
        voter: usize,
    },
    /// Learns of a higher term and leads no more.
    Yield {
        node: usize,
        from: usize,
    },
}

impl Group {
    /// Node 0 leads term 1, by the vote of the witness or of node 1.
    pub fn first(bounds: Bounds) -> Vec<Self> {
        [1, WITNESS].map(|voter| Self::led_by_vote_of(voter, bounds)).into()
    }

    fn led_by_vote_of(voter: usize, bounds: Bounds) -> Self {
        let node = DataNode {
            log: Log::EMPTY,
            disk: Log::EMPTY,
            term: 0,
            voted: None,
            role: Role::Follower,
            verified_end: 0,
            matched: [0; DATA_NODES + 1],
        };
        let mut group = Self {
            data: [node.clone(), node.clone(), node],
            witness: Witness { log: Log::EMPTY, term: 0, voted: None },
            led: [Log::EMPTY; TERMS],
            fed_end: [0; TERMS],
            leaders: [0; TERMS],
            acks: Vec::new(),
            messages_left: bounds.messages,
            crashes_left: bounds.crashes,
            gates_left: bounds.gates,
            replacement_left: bounds.replacement,
        };
        group.campaign(0);
        group.vote(0, voter);
        group
    }

    fn term_of(&self, node: usize) -> u8 {
        if node == WITNESS { self.witness.term } else { self.data[node].term }
    }

    fn log_of(&self, node: usize) -> &Log {
        if node == WITNESS { &self.witness.log } else { &self.data[node].log }
    }

    /// What the other data voters of either set have all answered as synced.
    pub fn matched_end(&self, leader: usize) -> u8 {
        let node = &self.data[leader];
        let matched = node.log.voters().other_data(leader).map(|peer| node.matched[peer]);
        matched.min().unwrap_or(u8::MAX)
    }

    /// What a leader has synced of its own log.
    fn own_end(&self, leader: usize) -> u8 {
        self.data[leader].log.common_end(&self.data[leader].disk)
    }

    /// Rules 2 and 3: how far the witness may be fed.
    fn feed_end(&self, leader: usize, without: Without) -> u8 {
        let log = &self.data[leader].log;
        let (own_end, matched_end) = (self.own_end(leader), self.matched_end(leader));
        let open =
            log.alone_at().is_some_and(|at| own_end >= at || without == Without::AloneSynced);
        match (open, without) {
            (true, _) => own_end,
            (false, Without::OwnEndWhilePaired) => log.end().min(matched_end),
            (false, _) => own_end.min(matched_end),
        }
    }

    /// Rule 4: whether `paired` may be appended.
    fn may_close(&self, leader: usize, without: Without) -> bool {
        let node = &self.data[leader];
        let first_own = node.log.first_of(node.term).unwrap_or(u8::MAX);
        let matched_end = self.matched_end(leader);
        let own_term = matched_end >= first_own || without == Without::OwnTermBeforePaired;
        matched_end >= self.fed_end[usize::from(node.term)] && own_term
    }

    /// Highest committed index that the leader knows of; 0 for none.
    pub fn committed_end(&self, leader: usize) -> u8 {
        let node = &self.data[leader];
        let voters = node.log.voters();
        let own_end = self.own_end(leader);
        let is_committed = |index: u8| {
            let has = |id: usize| if id == leader { own_end } else { node.matched[id] } >= index;
            let nodes = (0..=WITNESS).filter(|id| has(*id)).fold(0, |set, id| set | 1 << id);
            node.log.get(index).term == node.term && voters.is_quorum(nodes)
        };
        (1..=node.log.end()).rev().find(|index| is_committed(*index)).unwrap_or(0)
    }

    pub fn steps(&self, bounds: Bounds, without: Without) -> Vec<Step> {
        let mut steps = Vec::with_capacity(24);
        for node in 0..DATA_NODES {
            if self.data[node].role == Role::Leader {
                self.leader_steps(node, without, &mut steps);
            }
            self.node_steps(node, bounds, without, &mut steps);
        }
        for term in (1..=bounds.terms).filter(|term| self.led[usize::from(*term)].end() > 0) {
            let takes = |node: &usize| self.can_receive(term, *node);
            let nodes = (0..=WITNESS).filter(takes);
            steps.extend(nodes.map(|node| Step::Receive { term, node }));
        }
        steps
    }

    fn leader_steps(&self, leader: usize, without: Without, steps: &mut Vec<Step>) {
        let log = &self.data[leader].log;
        let voters = log.voters();
        let mut append = |kind| steps.push(Step::Append { leader, kind });
        if self.messages_left > 0 {
            append(Kind::Message);
        }
        if self.gates_left > 0 && log.alone_at().is_none() {
            append(Kind::Alone);
        }
        if self.gates_left > 0 && log.alone_at().is_some() && self.may_close(leader, without) {
            append(Kind::Paired);
        }
        let membership_committed = self.committed_end(leader) >= log.membership_at();
        let in_own_term = self.committed_end(leader) > 0;
        // One that is voted out hands over first: else what it alone had synced of its own leaving
        // could keep the others from electing.
        let stays = voters.new & 1 << leader != 0;
        if voters.is_joint() && membership_committed && stays {
            append(Kind::Settled);
        } else if self.replacement_left && log.membership_at() == 0 && leader < 2 && in_own_term {
            append(Kind::Joint { out: 1 - leader });
        }
        if self.fed_end[usize::from(self.data[leader].term)] < self.feed_end(leader, without) {
            steps.push(Step::Feed { leader });
        }
    }

    fn node_steps(&self, node: usize, bounds: Bounds, without: Without, steps: &mut Vec<Step>) {
        let DataNode { log, disk, term, role, .. } = &self.data[node];
        if log != disk {
            steps.push(Step::Sync { node });
        }
        if self.crashes_left > 0 && (log != disk || *role != Role::Follower) {
            steps.push(Step::Crash { node, kept_end: None });
            // Of what was not synced any part may be there, cut or not.
            let from = log.common_end(disk) + u8::from(log.common_end(disk) == disk.end());
            let kept = (from..=log.end()).map(|end| Step::Crash { node, kept_end: Some(end) });
            steps.extend(kept);
        }
        let synced = log == disk || without == Without::CandidateSynced;
        if *role != Role::Leader && *term < bounds.terms && synced && log.voters().contains(node) {
            steps.push(Step::Campaign { node });
        }
        if let Role::Candidate(votes) = role {
            let voters = (0..=WITNESS).filter(|id| votes & 1 << id == 0 && self.grants(node, *id));
            steps.extend(voters.map(|voter| Step::Vote { candidate: node, voter }));
        }
        if *role != Role::Follower {
            let higher = (0..=WITNESS).find(|id| self.term_of(*id) > *term);
            steps.extend(higher.map(|from| Step::Yield { node, from }));
        }
    }

    fn grants(&self, candidate: usize, voter: usize) -> bool {
        let DataNode { term, log, .. } = &self.data[candidate];
        let voted = if voter == WITNESS { self.witness.voted } else { self.data[voter].voted };
        let free = self.term_of(voter) < *term || (self.term_of(voter) == *term && voted.is_none());
        free && log.voters().contains(voter) && self.log_of(voter).last() <= log.last()
    }

    /// How much of a term's log was sent to a node: a data node gets what it is a member for, the
    /// witness what it was fed.
    fn sent_end(&self, term: u8, node: usize) -> u8 {
        let led = &self.led[usize::from(term)];
        if node == WITNESS {
            return self.fed_end[usize::from(term)];
        }
        // Whoever is voted out gets nothing from the entry on that says so.
        let leaves = |index: &u8| {
            led.get(*index).kind == Kind::Settled && !led.upto(*index).voters().contains(node)
        };
        (1..=led.end()).find(leaves).map_or(led.end(), |index| index - 1)
    }

    /// Data node 2 takes part only where a replacement is explored.
    fn can_receive(&self, term: u8, node: usize) -> bool {
        let idle = node == 2 && !self.replacement_left && self.led_membership() == 0;
        let leads = self.leaders[usize::from(term)] & 1 << node != 0;
        if idle || leads || self.term_of(node) > term {
            return false;
        }
        if self.term_of(node) < term {
            return true;
        }
        let verified_end = self.log_of(node).common_end(&self.led[usize::from(term)]);
        let learns = node != WITNESS && self.data[node].verified_end < verified_end;
        verified_end < self.sent_end(term, node) || learns
    }

    fn led_membership(&self) -> u8 {
        self.led.iter().map(Log::membership_at).max().unwrap_or(0)
    }

    pub fn take(&mut self, step: Step) {
        match step {
            Step::Append { leader, kind } => self.append(leader, kind),
            Step::Sync { node } => {
                self.data[node].disk = self.data[node].log;
                self.answer(node);
            }
            Step::Feed { leader } => {
                let term = usize::from(self.data[leader].term);
                self.fed_end[term] += 1;
            }
            Step::Receive { term, node } if node == WITNESS => self.witness_receives(term),
            Step::Receive { term, node } => self.data_receives(term, node),
            Step::Crash { node, kept_end } => self.crash(node, kept_end),
            Step::Campaign { node } => self.campaign(node),
            Step::Vote { candidate, voter } => self.vote(candidate, voter),
            Step::Yield { node, from } => {
                self.data[node].term = self.term_of(from);
                self.data[node].voted = None;
                self.step_down(node);
            }
        }
        self.acknowledge();
    }

    fn append(&mut self, leader: usize, kind: Kind) {
        let term = self.data[leader].term;
        self.data[leader].log.push(Entry { term, kind });
        self.led[usize::from(term)] = self.data[leader].log;
        match kind {
            Kind::Message => self.messages_left -= 1,
            Kind::Alone | Kind::Paired => self.gates_left -= 1,
            Kind::Joint { .. } => self.replacement_left = false,
            Kind::Blank | Kind::Settled | Kind::None => {}
        }
    }

    fn step_down(&mut self, node: usize) {
        let node = &mut self.data[node];
        node.role = Role::Follower;
        node.verified_end = 0;
        node.matched = [0; DATA_NODES + 1];
    }

    fn data_receives(&mut self, term: u8, node: usize) {
        if self.data[node].term < term {
            self.data[node].term = term;
            self.data[node].voted = None;
            self.step_down(node);
        }
        // Also a candidate of this term that another won.
        self.data[node].role = Role::Follower;
        let led = self.led[usize::from(term)];
        let sent_end = self.sent_end(term, node);
        let log = &mut self.data[node].log;
        let mut verified_end = log.common_end(&led);
        if verified_end < sent_end {
            log.cut(verified_end);
            verified_end += 1;
            log.push(led.get(verified_end));
        }
        self.data[node].verified_end = verified_end;
        self.answer(node);
    }

    fn witness_receives(&mut self, term: u8) {
        let led = self.led[usize::from(term)];
        let witness = &mut self.witness;
        if witness.term < term {
            witness.term = term;
            witness.voted = None;
        }
        let mut verified_end = witness.log.common_end(&led);
        if verified_end < self.fed_end[usize::from(term)] {
            witness.log.cut(verified_end);
            verified_end += 1;
            witness.log.push(led.get(verified_end));
        }
        self.matched(term, WITNESS, verified_end);
    }

    /// A follower tells its leader what is synced of what it knows to be the leader's.
    fn answer(&mut self, node: usize) {
        let DataNode { log, disk, term, verified_end, role, .. } = &self.data[node];
        if *role == Role::Follower {
            let synced_end = log.common_end(disk).min(*verified_end);
            self.matched(*term, node, synced_end);
        }
    }

    fn matched(&mut self, term: u8, node: usize, end: u8) {
        for leader in &mut self.data {
            if leader.role == Role::Leader && leader.term == term {
                leader.matched[node] = leader.matched[node].max(end);
            }
        }
    }

    fn crash(&mut self, node: usize, kept_end: Option<u8>) {
        self.crashes_left -= 1;
        let crashed = &mut self.data[node];
        if let Some(end) = kept_end {
            crashed.disk = crashed.log.upto(end);
        }
        crashed.log = crashed.disk;
        self.step_down(node);
    }

    fn campaign(&mut self, node: usize) {
        self.step_down(node);
        let candidate = &mut self.data[node];
        candidate.term += 1;
        candidate.voted = u8::try_from(node).ok();
        candidate.role = Role::Candidate(1 << node);
    }

    fn vote(&mut self, candidate: usize, voter: usize) {
        let term = self.data[candidate].term;
        let voted = u8::try_from(candidate).ok();
        if voter == WITNESS {
            (self.witness.term, self.witness.voted) = (term, voted);
        } else {
            if self.data[voter].term < term {
                self.step_down(voter);
            }
            self.data[voter].term = term;
            self.data[voter].voted = voted;
        }
        let Role::Candidate(votes) = self.data[candidate].role else { return };
        let votes = votes | 1 << voter;
        self.data[candidate].role = Role::Candidate(votes);
        if self.data[candidate].log.voters().is_quorum(votes) {
            self.data[candidate].role = Role::Leader;
            self.leaders[usize::from(term)] |= 1 << candidate;
            self.append(candidate, Kind::Blank);
        }
    }

    /// Every ack is given as soon as it may be, with the most that may be claimed.
    fn acknowledge(&mut self) {
        for leader in 0..DATA_NODES {
            if self.data[leader].role != Role::Leader {
                continue;
            }
            let by = self.data[leader].term;
            let end = self.committed_end(leader).min(self.own_end(leader));
            let matched_end = self.matched_end(leader);
            let log = self.data[leader].log.upto(end);
            for (index, entry) in log.entries().filter(|(_, entry)| entry.kind == Kind::Message) {
                let two_copies = matched_end >= index;
                let ack = Ack { index, term: entry.term, by, two_copies };
                let same = |known: &&mut Ack| (known.index, known.term) == (index, entry.term);
                match self.acks.iter_mut().find(same) {
                    Some(known) => known.two_copies |= two_copies,
                    None => self.acks.push(ack),
                }
            }
        }
        self.acks.sort_by_key(|ack| (ack.index, ack.term));
    }
}
