use proptest::prelude::*;

use super::*;

const P: u64 = 2;
const SILENCE_MS: u64 = 2_000;
const NEW_LEADER_MS: u64 = 300;

fn patience() -> Patience {
    Patience {
        silence_max: Duration::from_millis(SILENCE_MS),
        new_leader_silence_max: Duration::from_millis(NEW_LEADER_MS),
    }
}

fn index(raw: u64) -> EntryIndex {
    EntryIndex::new(raw)
}

/// A gate, the time, and calls without newtypes.
struct Bench {
    gate: Gate,
    now: Instant,
}

impl Bench {
    /// Leads term 3 from entry 10 on, with P as the other data voter.
    fn leading(mode: Mode) -> Self {
        let now = Instant::now();
        let mut gate = Gate::new(patience(), Mode::Paired);
        gate.set_voters(BTreeSet::from([P]), now);
        gate.begin_term(Term::new(3), index(10), mode, now);
        Self { gate, now }
    }

    /// The same, in step, with everything below 20 synced on both.
    fn in_step() -> Self {
        let mut bench = Self::leading(Mode::Paired);
        bench.own(20);
        bench.matched(20);
        bench
    }

    fn own(&mut self, end: u64) {
        self.gate.own_end(index(end), self.now);
        self.gate.own_durable_end(index(end), self.now);
    }

    fn matched(&mut self, end: u64) {
        self.matched_since(self.gate.losses(P), end);
    }

    /// Over a connection that began when its log had gone back so often.
    fn matched_since(&mut self, losses: LossCount, end: u64) -> Matched {
        self.gate.peer_matched(P, Term::new(3), losses, index(end), self.now)
    }

    fn conflict(&mut self, term: u64, at: u64) -> Conflict {
        let losses = self.gate.losses(P);
        self.gate.peer_conflict(P, Term::new(term), losses, index(at), self.now)
    }

    fn mode(&mut self, mode: Mode) {
        self.gate.set_mode(mode, self.now);
    }

    fn alone_at(&mut self, at: u64) {
        self.mode(Mode::Alone { at: index(at) });
    }

    fn feed(&mut self, end: u64) {
        self.gate.sent(Term::new(3), index(end));
    }

    fn may_feed(&self, last: u64) -> bool {
        self.gate.may_feed(Term::new(3), index(last))
    }

    fn next(&mut self) -> Decision {
        self.gate.next(self.now)
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }
}

#[test]
fn paired_witness_gets_what_both_disks_have() {
    let mut bench = Bench::leading(Mode::Paired);
    bench.own(15);
    bench.matched(13);
    assert!(bench.may_feed(12));
    assert!(!bench.may_feed(13));
    bench.gate.own_end(index(30), bench.now);
    bench.matched(30);
    assert!(bench.may_feed(14));
    assert!(!bench.may_feed(15), "not synced by the leader itself");
}

#[test]
fn nothing_is_fed_without_lead_or_in_another_term() {
    let mut bench = Bench::in_step();
    assert!(bench.may_feed(19));
    assert!(!bench.gate.may_feed(Term::new(2), index(0)));
    bench.gate.end_term();
    assert!(!bench.may_feed(0));
    assert_eq!(bench.next(), Decision::Wait(None));
}

#[test]
fn what_was_matched_in_an_older_term_says_nothing() {
    let mut bench = Bench::in_step();
    bench.gate.begin_term(Term::new(4), index(20), Mode::Paired, bench.now);
    assert_eq!(bench.gate.matched_end(), EntryIndex::ZERO);
    assert!(!bench.gate.may_feed(Term::new(4), index(0)));
    bench.matched(25);
    assert_eq!(bench.gate.matched_end(), EntryIndex::ZERO);
    assert_eq!(bench.gate.view(bench.now).sent_end, EntryIndex::ZERO);
}

#[test]
fn alone_opens_only_once_its_entry_is_synced() {
    let mut bench = Bench::in_step();
    bench.gate.peer_refused(P, bench.now);
    assert_eq!(bench.next(), Decision::AppendAlone);
    bench.gate.own_end(index(21), bench.now);
    bench.alone_at(20);
    assert_eq!(bench.next(), Decision::Wait(None));
    bench.gate.own_end(index(23), bench.now);
    assert!(!bench.may_feed(20));
    bench.gate.own_durable_end(index(21), bench.now);
    assert!(bench.may_feed(20));
    assert!(!bench.may_feed(21), "beyond the leader's own synced end");
}

#[test]
fn silence_counts_from_the_last_progress_and_only_while_entries_are_owed() {
    let mut bench = Bench::in_step();
    bench.pass(10 * SILENCE_MS);
    assert_eq!(bench.next(), Decision::Wait(None), "nothing is owed");
    bench.own(24);
    bench.pass(SILENCE_MS - 1);
    assert!(matches!(bench.next(), Decision::Wait(Some(_))));
    bench.matched(22);
    let at = bench.now + Duration::from_millis(SILENCE_MS);
    assert_eq!(bench.next(), Decision::Wait(Some(at)));
    bench.pass(SILENCE_MS);
    assert_eq!(bench.next(), Decision::AppendAlone);
    assert_eq!(bench.gate.view(bench.now).gone, BTreeMap::from([(P, Gone::Silent)]));
}

#[test]
fn answers_without_progress_do_not_end_a_silence() {
    let mut bench = Bench::in_step();
    bench.own(21);
    bench.pass(SILENCE_MS);
    bench.gate.peer_heard(P, bench.now);
    bench.matched(20);
    assert_eq!(bench.next(), Decision::AppendAlone);
}

#[test]
fn new_leader_waits_less_for_a_silent_peer() {
    let mut bench = Bench::leading(Mode::Paired);
    bench.pass(NEW_LEADER_MS - 1);
    assert!(matches!(bench.next(), Decision::Wait(Some(_))));
    bench.pass(1);
    assert_eq!(bench.next(), Decision::AppendAlone);
}

#[test]
fn new_leader_that_has_heard_its_peer_waits_as_any_other() {
    let mut bench = Bench::leading(Mode::Paired);
    bench.matched(3);
    bench.pass(NEW_LEADER_MS);
    assert!(matches!(bench.next(), Decision::Wait(Some(_))));
}

#[test]
fn stopping_and_full_peers_open_the_gate_at_once() {
    let mut bench = Bench::in_step();
    bench.gate.peer_stopping(P, true, bench.now);
    assert_eq!(bench.next(), Decision::AppendAlone);
    bench.gate.peer_stopping(P, false, bench.now);
    assert_eq!(bench.next(), Decision::Wait(None));
    bench.gate.peer_disk_full(P, true, bench.now);
    assert_eq!(bench.next(), Decision::AppendAlone);
    bench.gate.begin_term(Term::new(4), index(20), Mode::Paired, bench.now);
    assert_eq!(bench.next(), Decision::AppendAlone, "a full disk is full in any term");
}

#[test]
fn closing_waits_for_all_that_the_witness_was_sent() {
    let mut bench = Bench::in_step();
    bench.gate.peer_refused(P, bench.now);
    bench.own(30);
    bench.alone_at(20);
    bench.feed(30);
    bench.gate.peer_heard(P, bench.now);
    bench.matched(29);
    assert!(matches!(bench.next(), Decision::Wait(Some(_))));
    bench.own(35);
    assert!(!bench.may_feed(30), "held while it closes");
    bench.matched(30);
    assert_eq!(bench.next(), Decision::AppendPaired);
}

#[test]
fn closing_waits_for_the_first_entry_of_the_term() {
    let mut bench = Bench::leading(Mode::Alone { at: index(4) });
    bench.own(11);
    bench.matched(10);
    assert!(matches!(bench.next(), Decision::Wait(Some(_))));
    bench.matched(11);
    assert_eq!(bench.next(), Decision::AppendPaired);
}

#[test]
fn peer_far_behind_does_not_hold_the_witness() {
    let mut bench = Bench::leading(Mode::Alone { at: index(4) });
    bench.own(1_000);
    bench.feed(1_000);
    bench.matched(100);
    assert!(bench.may_feed(999));
    assert!(!bench.gate.view(bench.now).closing);
    bench.matched(1_000 - CLOSE_LAG_ENTRIES_MAX);
    bench.own(1_001);
    assert!(!bench.may_feed(1_000));
    assert!(bench.gate.view(bench.now).closing);
}

#[test]
fn peer_that_falls_silent_while_closing_lets_the_witness_go_on() {
    let mut bench = Bench::leading(Mode::Alone { at: index(4) });
    bench.own(20);
    bench.feed(20);
    bench.matched(15);
    bench.own(25);
    assert!(!bench.may_feed(24));
    bench.pass(SILENCE_MS);
    assert_eq!(bench.next(), Decision::Wait(None));
    assert!(bench.may_feed(24));
}

#[test]
fn witness_is_held_until_the_paired_entry_is_in_the_log() {
    let mut bench = Bench::leading(Mode::Alone { at: index(4) });
    bench.own(20);
    bench.matched(20);
    assert_eq!(bench.next(), Decision::AppendPaired);
    bench.own(25);
    bench.gate.peer_refused(P, bench.now);
    assert_eq!(bench.next(), Decision::AppendPaired, "it was asked for and is not there yet");
    assert!(!bench.may_feed(20), "or `paired` would lie before what only the witness has");
    bench.alone_at(4);
    assert!(!bench.may_feed(20));
    bench.mode(Mode::Paired);
    assert!(!bench.may_feed(20));
    assert_eq!(bench.next(), Decision::AppendAlone);
}

#[test]
fn paired_entry_that_failed_leaves_the_group_alone() {
    let mut bench = Bench::leading(Mode::Alone { at: index(4) });
    bench.own(20);
    bench.matched(20);
    assert_eq!(bench.next(), Decision::AppendPaired);
    bench.gate.peer_refused(P, bench.now);
    bench.gate.paired_failed(bench.now);
    bench.own(25);
    assert!(bench.may_feed(24));
}

#[test]
fn conflict_below_what_was_synced_means_a_lost_peer() {
    let mut bench = Bench::in_step();
    assert_eq!(bench.conflict(3, 20), Conflict::Usual);
    assert_eq!(bench.conflict(2, 4), Conflict::Usual);
    assert_eq!(bench.conflict(3, 19), Conflict::Lost);
    assert_eq!(bench.gate.matched_end(), EntryIndex::ZERO);
    assert_eq!(bench.gate.answered_end(P, Term::new(3)), index(20));
    assert_eq!(bench.next(), Decision::AppendAlone);
    assert_eq!(bench.gate.view(bench.now).gone, BTreeMap::from([(P, Gone::Lost)]));
}

#[test]
fn lost_peer_counts_again_once_it_has_what_it_had_answered() {
    let mut bench = Bench::in_step();
    bench.conflict(3, 19);
    bench.own(30);
    bench.alone_at(20);
    let since = bench.gate.losses(P);
    assert_eq!(bench.matched_since(since, 19), Matched::Usual);
    assert_eq!(bench.gate.matched_end(), index(19));
    assert!(bench.gate.view(bench.now).gone.contains_key(&P), "it lacks an entry still");
    assert_eq!(bench.matched_since(since, 20), Matched::Back);
    assert!(bench.gate.view(bench.now).gone.is_empty());
    assert_eq!(bench.conflict(3, 19), Conflict::Lost, "it may go back again");
}

#[test]
fn what_was_said_before_a_loss_says_nothing() {
    let mut bench = Bench::in_step();
    let before = bench.gate.losses(P);
    bench.conflict(3, 19);
    assert_eq!(bench.matched_since(before, 20), Matched::Stale);
    assert_eq!(bench.gate.matched_end(), EntryIndex::ZERO);
    bench.matched(20);
    let late = bench.gate.peer_conflict(P, Term::new(3), before, index(12), bench.now);
    assert_eq!(late, Conflict::Stale);
    assert_eq!(bench.gate.matched_end(), index(20));
}

#[test]
fn member_that_says_it_is_lost_is_shown_whether_it_votes_or_not() {
    let mut bench = Bench::in_step();
    bench.gate.peer_matched(9, Term::new(3), LossCount::default(), index(20), bench.now);
    assert!(bench.gate.peer_lost(9, bench.now));
    assert!(!bench.gate.peer_lost(9, bench.now), "no news");
    assert_eq!(bench.gate.view(bench.now).gone, BTreeMap::from([(9, Gone::Lost)]));
    assert_eq!(bench.gate.answered_end(9, Term::new(3)), index(20));
    assert_eq!(bench.next(), Decision::Wait(None), "a witness does not open the gate");
    bench.gate.set_members(&BTreeSet::from([1, P]));
    assert!(bench.gate.view(bench.now).gone.is_empty(), "it was replaced");
}

#[test]
fn answers_before_the_term_is_told_count_in_it() {
    let mut bench = Bench::in_step();
    let losses = bench.gate.losses(P);
    bench.gate.peer_matched(P, Term::new(4), losses, index(21), bench.now);
    assert_eq!(bench.gate.matched_end(), index(20));
    bench.gate.begin_term(Term::new(4), index(20), Mode::Paired, bench.now);
    assert_eq!(bench.gate.matched_end(), index(21));
}

#[test]
fn term_that_is_told_again_keeps_what_was_sent() {
    let mut bench = Bench::in_step();
    bench.feed(20);
    bench.gate.end_term();
    bench.gate.begin_term(Term::new(3), index(10), Mode::Paired, bench.now);
    assert_eq!(bench.gate.view(bench.now).sent_end, index(20));
    bench.gate.begin_term(Term::new(4), index(20), Mode::Paired, bench.now);
    assert_eq!(bench.gate.view(bench.now).sent_end, EntryIndex::ZERO);
}

#[test]
fn every_data_voter_of_either_configuration_counts() {
    let mut bench = Bench::in_step();
    bench.gate.peer_matched(7, Term::new(3), LossCount::default(), index(12), bench.now);
    assert_eq!(bench.gate.matched_end(), index(20), "a learner does not count");
    bench.gate.set_voters(BTreeSet::from([P, 7]), bench.now);
    assert_eq!(bench.gate.matched_end(), index(12));
    assert!(!bench.may_feed(12));
    bench.gate.peer_refused(7, bench.now);
    assert_eq!(bench.next(), Decision::AppendAlone);
}

#[test]
#[should_panic(expected = "past the gate")]
fn feeding_past_the_gate_is_a_bug() {
    let mut bench = Bench::in_step();
    bench.feed(21);
}

#[derive(Clone, Copy, Debug)]
enum Fact {
    Append(u64),
    Sync(u64),
    Match(u64),
    /// The peer's log goes back, and what was on its way before says that it has everything.
    Lose,
    Refuse,
    Hear,
    Pass(u64),
    /// Feed the witness this many entries more, or as many as it may have.
    Feed(u64),
    Decide,
    /// What was decided is appended, or fails.
    Land(bool),
    Elect,
}

fn fact() -> impl Strategy<Value = Fact> {
    prop_oneof![
        (1u64..4).prop_map(Fact::Append),
        (1u64..4).prop_map(Fact::Sync),
        (1u64..5).prop_map(Fact::Match),
        Just(Fact::Lose),
        Just(Fact::Refuse),
        Just(Fact::Hear),
        (1u64..1_500).prop_map(Fact::Pass),
        (1u64..6).prop_map(Fact::Feed),
        Just(Fact::Decide),
        any::<bool>().prop_map(Fact::Land),
        Just(Fact::Elect),
    ]
}

/// The log of a leader and what it knows of its peer: rules 2 to 4 and 8 in their own words.
#[derive(Debug, Default)]
struct Restated {
    term: u64,
    /// The leader's log; `Some(true)` is an `alone` entry, `Some(false)` a `paired` one.
    log: Vec<Option<bool>>,
    synced_count: u64,
    matched_count: u64,
    /// What the peer had, where it has not got so much again.
    lost_count: u64,
    fed_count: u64,
    first_own: u64,
}

impl Restated {
    fn len(&self) -> u64 {
        u64::try_from(self.log.len()).unwrap()
    }

    fn alone_at(&self) -> Option<u64> {
        let last = self.log.iter().rposition(Option::is_some)?;
        (self.log[last] == Some(true)).then(|| u64::try_from(last).unwrap())
    }

    /// The most that the rules allow, as a count of entries.
    fn allowed_count(&self) -> u64 {
        match self.alone_at() {
            Some(at) if self.synced_count > at => self.synced_count,
            _ => self.synced_count.min(self.matched_count),
        }
    }

    fn mode(&self) -> Mode {
        self.alone_at().map_or(Mode::Paired, |at| Mode::Alone { at: index(at) })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn gate_keeps_the_rules(facts in prop::collection::vec(fact(), 1..120)) {
        let mut now = Instant::now();
        let mut gate = Gate::new(patience(), Mode::Paired);
        gate.set_voters(BTreeSet::from([P]), now);
        let mut told = Restated::default();
        let mut decided = None;
        let mut lost_since = false;
        for fact in std::iter::once(Fact::Elect).chain(facts) {
            let term = Term::new(told.term);
            match fact {
                Fact::Append(count) => {
                    for _ in 0..count {
                        told.log.push(None);
                    }
                }
                Fact::Sync(count) => {
                    told.synced_count = told.len().min(told.synced_count + count);
                }
                Fact::Match(count) => {
                    told.matched_count = told.len().min(told.matched_count + count);
                    let end = index(told.matched_count);
                    let matched = gate.peer_matched(P, term, gate.losses(P), end, now);
                    let has_all = told.matched_count >= told.lost_count;
                    let is_back = told.lost_count > 0 && has_all;
                    prop_assert_eq!(matched, if is_back { Matched::Back } else { Matched::Usual });
                    if has_all {
                        told.lost_count = 0;
                    }
                }
                Fact::Lose if told.matched_count == 0 => {}
                Fact::Lose => {
                    let before = gate.losses(P);
                    let found = gate.peer_conflict(P, term, before, EntryIndex::ZERO, now);
                    prop_assert_eq!(found, Conflict::Lost);
                    let late = gate.peer_matched(P, term, before, index(told.len()), now);
                    prop_assert_eq!(late, Matched::Stale);
                    prop_assert_eq!(gate.matched_end(), EntryIndex::ZERO);
                    told.lost_count = told.lost_count.max(told.matched_count);
                    told.matched_count = 0;
                    lost_since = true;
                }
                Fact::Refuse => gate.peer_refused(P, now),
                Fact::Hear => gate.peer_heard(P, now),
                Fact::Pass(ms) => now += Duration::from_millis(ms),
                Fact::Feed(count) => {
                    let mut end = told.fed_count;
                    while end < told.fed_count + count && gate.may_feed(term, index(end)) {
                        end += 1;
                    }
                    gate.sent(term, index(end));
                    let more = end > told.fed_count;
                    told.fed_count = end;
                    prop_assert!(!more || end <= told.allowed_count(), "fed {end}: {told:?}");
                }
                Fact::Decide => match gate.next(now) {
                    Decision::Wait(_) => {}
                    made => {
                        let asked = decided.is_none_or(|before| before == made);
                        prop_assert!(asked || made == Decision::AppendAlone);
                        if decided.is_none() {
                            let pairs = made == Decision::AppendPaired;
                            prop_assert!(!pairs || told.lost_count == 0, "{told:?}");
                            lost_since = false;
                        }
                        decided = Some(made);
                    }
                },
                Fact::Land(appended) => {
                    let Some(made) = decided.take() else { continue };
                    let alone = made == Decision::AppendAlone;
                    if appended {
                        if !alone && !lost_since {
                            prop_assert!(told.matched_count >= told.fed_count, "{told:?}");
                            prop_assert!(told.matched_count > told.first_own, "{told:?}");
                        }
                        told.log.push(Some(alone));
                    } else if !alone {
                        gate.paired_failed(now);
                    }
                }
                Fact::Elect => {
                    told.term += 1;
                    told.first_own = told.len();
                    told.log.push(None);
                    (told.matched_count, told.lost_count, told.fed_count) = (0, 0, 0);
                    decided = None;
                    gate.begin_term(Term::new(told.term), index(told.first_own), told.mode(), now);
                }
            }
            gate.own_end(index(told.len()), now);
            gate.own_durable_end(index(told.synced_count), now);
            gate.set_mode(told.mode(), now);
            // Never less than rule 2 allows, so that a paired group goes on.
            let both_count = told.synced_count.min(told.matched_count);
            let term = Term::new(told.term);
            prop_assert!(both_count == 0 || gate.may_feed(term, index(both_count - 1)));
        }
    }
}
