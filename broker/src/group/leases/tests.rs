use drumlin_proto::ids::{QueueId, QueueKey, TopicId};
use proptest::prelude::*;

use super::*;
use crate::command::GroupId;

const LEASE_MS: u64 = 1_000;
const ALICE: ClientKey = ClientKey(1);
const BOB: ClientKey = ClientKey(2);

fn at(raw: u64) -> QueueOffset {
    QueueOffset::new(raw)
}

fn offsets(raw: &[u64]) -> Vec<QueueOffset> {
    raw.iter().copied().map(at).collect()
}

fn plan(from: u64, skip_to: u64, fresh: &[u64], again: &[u64]) -> Lease {
    Lease {
        group: GroupId(1),
        queue: QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) },
        client: ALICE,
        auto_renew: false,
        invisible_ms: LEASE_MS,
        from: at(from),
        skip_to: at(skip_to),
        fresh: offsets(fresh),
        again: offsets(again),
        unwanted: Vec::new(),
    }
}

fn granted(grants: &[(u64, u16)]) -> Vec<Granted> {
    let grant = |(offset, attempt): &(u64, u16)| Granted { offset: at(*offset), attempt: *attempt };
    grants.iter().map(grant).collect()
}

fn pairs(records: &[(u64, u64)]) -> Vec<(QueueOffset, LeaseId)> {
    records.iter().map(|(offset, lease)| (at(*offset), LeaseId(*lease))).collect()
}

fn due(leases: &QueueLeases, now_ms: u64) -> Vec<u64> {
    leases.due(now_ms, &BTreeSet::new(), 99).iter().map(|offset| offset.get()).collect()
}

/// Records 0..4 leased under 10 until 1_000.
fn four_leased() -> QueueLeases {
    let mut leases = QueueLeases::starting_at(at(0));
    leases.lease(&plan(0, 4, &[0, 1, 2, 3], &[]), LeaseId(10), 0);
    leases
}

#[test]
fn what_the_filter_skips_counts_as_consumed() {
    let mut leases = QueueLeases::starting_at(at(5));
    let grants = leases.lease(&plan(5, 12, &[7, 9], &[]), LeaseId(3), 100);
    assert_eq!(grants, granted(&[(7, 1), (9, 1)]));
    assert_eq!((leases.committed(), leases.next()), (at(7), at(12)));
    assert_eq!(leases.ack(&pairs(&[(7, 3), (9, 3)]), 200), [Ok(()), Ok(())]);
    assert_eq!(leases.committed(), at(12));
}

#[test]
fn a_record_is_due_when_its_lease_ends_and_comes_again_with_a_higher_attempt() {
    let mut leases = four_leased();
    assert_eq!(leases.next_due_ms(0), Some(LEASE_MS));
    assert_eq!(due(&leases, LEASE_MS - 1), [0u64; 0]);
    assert_eq!(due(&leases, LEASE_MS), [0, 1, 2, 3]);
    assert_eq!(leases.next_due_ms(LEASE_MS), None);
    let grants = leases.lease(&plan(4, 4, &[], &[1, 2]), LeaseId(11), LEASE_MS);
    assert_eq!(grants, granted(&[(1, 2), (2, 2)]));
    assert_eq!(due(&leases, LEASE_MS), [0, 3]);
    let flight = leases.flight(at(1)).unwrap();
    assert_eq!((flight.first_delivered_ms, flight.delivered_ms), (0, LEASE_MS));
    let third = leases.lease(&plan(4, 4, &[], &[1]), LeaseId(12), 2 * LEASE_MS);
    assert_eq!(third, granted(&[(1, 3)]));
}

#[test]
fn records_that_are_not_due_are_left_out_of_a_grant() {
    let mut leases = four_leased();
    leases.lease(&plan(4, 4, &[], &[0]), LeaseId(11), LEASE_MS);
    let grants = leases.lease(&plan(4, 4, &[], &[0, 1, 9]), LeaseId(12), LEASE_MS);
    assert_eq!(grants, granted(&[(1, 2)]));
}

#[test]
fn one_entry_grants_a_record_once() {
    let mut leases = QueueLeases::starting_at(at(0));
    let at_once = Lease { invisible_ms: 0, ..plan(0, 1, &[0], &[]) };
    leases.lease(&at_once, LeaseId(10), 0);
    assert_eq!(due(&leases, 0), [0]);
    assert_eq!(leases.lease(&plan(1, 1, &[], &[0]), LeaseId(10), 0), []);
    assert_eq!(leases.lease(&plan(1, 1, &[], &[0]), LeaseId(11), 0), granted(&[(0, 2)]));
}

#[test]
fn a_redelivery_that_the_filter_does_not_want_is_consumed() {
    let mut leases = four_leased();
    let unwanted = Lease { unwanted: offsets(&[0, 1]), ..plan(4, 4, &[], &[2]) };
    leases.lease(&unwanted, LeaseId(11), LEASE_MS - 1);
    assert_eq!(leases.committed(), at(0), "nothing was due");
    leases.lease(&unwanted, LeaseId(12), LEASE_MS);
    assert_eq!(leases.committed(), at(2));
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let check = |plan: Lease| QueueLeases::check_plan(&plan, at(4), at(8));
    assert_eq!(check(plan(4, 8, &[4, 7], &[0, 3])), Ok(()));
    let outdated = Refusal::LeaseOutdated { planned: at(3), actual: at(4) };
    assert_eq!(check(plan(3, 8, &[4], &[])), Err(outdated));
    assert_eq!(check(plan(3, 3, &[], &[0])), Ok(()), "only redeliveries: the offset is of no use");
    let beyond = Refusal::OffsetOutOfRange { asked: at(9), min: at(4), end: at(8) };
    assert_eq!(check(plan(4, 9, &[4], &[])), Err(beyond));
    for malformed in [
        plan(4, 8, &[5, 5], &[]),
        plan(4, 8, &[6, 5], &[]),
        plan(4, 8, &[], &[1, 0]),
        plan(4, 8, &[8], &[]),
        plan(4, 8, &[3], &[]),
        plan(4, 3, &[], &[]),
    ] {
        assert!(matches!(check(malformed), Err(Refusal::Malformed { .. })));
    }
}

#[test]
fn acking_twice_is_fine_with_the_same_lease_only() {
    let mut leases = four_leased();
    let acks = pairs(&[(1, 10), (1, 10), (1, 9), (2, 9), (7, 10)]);
    let gone = Err(LeaseRefusal::Gone);
    assert_eq!(leases.ack(&acks, 1), [Ok(()), Ok(()), gone, gone, gone]);
    assert_eq!(leases.ack(&pairs(&[(1, 10)]), LEASE_MS * 99), [Ok(())], "also much later");
    assert_eq!(due(&leases, LEASE_MS), [0, 2, 3]);
}

#[test]
fn an_ack_after_the_lease_ended_is_refused() {
    let mut leases = four_leased();
    assert_eq!(leases.ack(&pairs(&[(0, 10)]), LEASE_MS), [Err(LeaseRefusal::Gone)]);
    assert_eq!(leases.ack(&pairs(&[(0, 10)]), LEASE_MS - 1), [Ok(())]);
    leases.lease(&plan(4, 4, &[], &[1]), LeaseId(11), LEASE_MS);
    let results = leases.ack(&pairs(&[(1, 10), (1, 11)]), LEASE_MS);
    assert_eq!(results, [Err(LeaseRefusal::Gone), Ok(())]);
}

#[test]
fn the_memory_of_acks_is_bounded() {
    let count = ACKED_MAX as u64 + 1;
    let mut leases = QueueLeases::starting_at(at(0));
    let all: Vec<u64> = (0..count).collect();
    leases.lease(&plan(0, count, &all, &[]), LeaseId(1), 0);
    for offset in 0..count {
        assert_eq!(leases.ack(&pairs(&[(offset, 1)]), 1), [Ok(())]);
    }
    assert_eq!(leases.acked().len(), ACKED_MAX);
    let results = leases.ack(&pairs(&[(0, 1), (1, 1)]), 1);
    assert_eq!(results, [Err(LeaseRefusal::Gone), Ok(())]);
}

#[test]
fn a_nack_replaces_the_lease_and_its_end() {
    let mut leases = four_leased();
    leases.change((at(1), LeaseId(10)), LeaseId(20), 50, 100).unwrap();
    assert_eq!(due(&leases, 149), [0u64; 0]);
    assert_eq!(due(&leases, 150), [1]);
    let gone = Err(LeaseRefusal::Gone);
    assert_eq!(leases.ack(&pairs(&[(1, 10)]), 120), [gone]);
    assert_eq!(leases.change((at(1), LeaseId(10)), LeaseId(21), 0, 120), gone);
    assert_eq!(leases.lease(&plan(4, 4, &[], &[1]), LeaseId(22), 150), granted(&[(1, 2)]));
    assert_eq!(leases.change((at(1), LeaseId(20)), LeaseId(23), 0, 150), gone);
}

#[test]
fn a_longer_lease_keeps_the_attempt() {
    let mut leases = four_leased();
    leases.change((at(1), LeaseId(10)), LeaseId(20), 5_000, 100).unwrap();
    assert_eq!(due(&leases, LEASE_MS), [0, 2, 3]);
    assert_eq!(leases.ack(&pairs(&[(1, 20)]), 5_000), [Ok(())]);
    assert_eq!(leases.flight(at(0)).unwrap().attempt, 1);
}

#[test]
fn renewals_extend_in_place_and_pass_over_what_is_gone() {
    let mut leases = four_leased();
    leases.ack(&pairs(&[(2, 10)]), 1);
    leases.renew(&pairs(&[(0, 10), (1, 9), (2, 10), (8, 10)]), LEASE_MS, 500);
    leases.renew(&pairs(&[(3, 10)]), LEASE_MS, LEASE_MS);
    leases.renew(&pairs(&[(0, 10)]), 1, 500);
    assert_eq!(due(&leases, LEASE_MS), [1, 3], "0 goes on, and 3 had ended before");
    assert_eq!(due(&leases, 1_500), [0, 1, 3]);
    assert_eq!(leases.ack(&pairs(&[(0, 10)]), 1_499), [Ok(())]);
}

#[test]
fn releasing_a_client_cuts_its_renewed_leases_only() {
    let mut leases = QueueLeases::starting_at(at(0));
    let renewed = Lease { auto_renew: true, ..plan(0, 1, &[0], &[]) };
    leases.lease(&renewed, LeaseId(1), 0);
    leases.lease(&Lease { client: BOB, from: at(1), ..plan(1, 2, &[1], &[]) }, LeaseId(2), 0);
    leases.lease(
        &Lease { from: at(2), skip_to: at(3), fresh: offsets(&[2]), ..renewed },
        LeaseId(3),
        0,
    );
    assert!(leases.has_renewed_leases_of(ALICE));
    assert!(!leases.has_renewed_leases_of(BOB));
    leases.release(ALICE, 10, 100);
    assert_eq!(due(&leases, 110), [0, 2]);
    assert!(!leases.has_renewed_leases_of(ALICE));
    assert_eq!(leases.ack(&pairs(&[(0, 1)]), 109), [Ok(())], "it may still finish");
}

#[test]
fn the_renewer_sees_leases_that_end_soon() {
    let mut leases = QueueLeases::starting_at(at(0));
    leases.lease(&Lease { auto_renew: true, ..plan(0, 1, &[0], &[]) }, LeaseId(1), 0);
    leases.lease(&Lease { auto_renew: true, ..plan(1, 2, &[1], &[]) }, LeaseId(2), 400);
    leases.lease(&plan(2, 3, &[2], &[]), LeaseId(3), 0);
    let ending = |now_ms, until_ms| {
        leases.ending(now_ms, until_ms).map(|(offset, _)| offset.get()).collect::<Vec<_>>()
    };
    assert_eq!(ending(500, 999), [0u64; 0]);
    assert_eq!(ending(500, 1_000), [0]);
    assert_eq!(ending(500, 1_400), [0, 1]);
    assert_eq!(ending(1_000, 1_400), [1], "what has ended is not extended");
}

#[test]
fn reserved_records_are_not_planned_twice() {
    let leases = four_leased();
    let reserved = BTreeSet::from([at(0), at(2)]);
    assert_eq!(leases.due(LEASE_MS, &reserved, 1), [at(1)]);
    assert_eq!(leases.due(LEASE_MS, &reserved, 9), [at(1), at(3)]);
}

#[test]
fn the_backlog_tells_ready_from_leased_and_given_back() {
    let mut leases = four_leased();
    leases.change((at(0), LeaseId(10)), LeaseId(20), 0, 1).unwrap();
    leases.change((at(1), LeaseId(10)), LeaseId(21), 9_000, 1).unwrap();
    leases.ack(&pairs(&[(2, 10)]), 1);
    let backlog = leases.backlog(2, at(9));
    assert_eq!(backlog, Backlog { ready: 5, in_flight: 2, in_retry: 1 });
    assert_eq!(backlog.lag(), 8);
    assert_eq!(leases.backlog(LEASE_MS, at(9)).in_retry, 2);
}

#[test]
fn a_commit_begins_anew() {
    let mut leases = four_leased();
    leases.commit(at(2));
    assert_eq!((leases.committed(), leases.next()), (at(2), at(2)));
    assert_eq!(leases.ack(&pairs(&[(2, 10)]), 1), [Err(LeaseRefusal::Gone)]);
    assert_eq!(leases.lease(&plan(2, 3, &[2], &[]), LeaseId(30), 1), granted(&[(2, 1)]));
}

#[test]
fn a_trim_ends_what_lies_below() {
    let mut leases = four_leased();
    leases.ack(&pairs(&[(0, 10), (3, 10)]), 1);
    assert_eq!(leases.trim(at(2)), 1);
    assert_eq!((leases.committed(), leases.next()), (at(2), at(4)));
    assert_eq!(leases.ack(&pairs(&[(0, 10), (1, 10)]), 1), [Err(LeaseRefusal::Gone); 2]);
    assert_eq!(leases.trim(at(20)), 1);
    assert_eq!((leases.committed(), leases.next()), (at(20), at(20)));
    assert_eq!(leases.next_due_ms(0), None);
}

#[test]
fn a_clock_that_jumps_ends_leases_at_once_and_none_early() {
    let mut leases = QueueLeases::starting_at(at(0));
    let year_ms = 365 * 24 * 3_600_000;
    leases.lease(&plan(0, 2, &[0, 1], &[]), LeaseId(1), year_ms);
    assert_eq!(due(&leases, 1), [0u64; 0], "a reader's clock behind the entry's ends nothing");
    assert_eq!(due(&leases, year_ms + LEASE_MS), [0, 1]);
    let for_ever = Lease { invisible_ms: u64::MAX, ..plan(2, 3, &[2], &[]) };
    leases.lease(&for_ever, LeaseId(2), 2 * year_ms);
    assert_eq!(leases.flight(at(2)).unwrap().expires_ms, u64::MAX);
    assert_eq!(leases.next_due_ms(u64::MAX - 1), Some(u64::MAX));
    assert_eq!(leases.next_due_ms(u64::MAX), None);
}

#[test]
fn attempts_stop_rising_at_their_width() {
    let flight =
        Flight { attempt: u16::MAX, expires_ms: 0, ..*four_leased().flight(at(0)).unwrap() };
    let mut progress = Progress::starting_at(at(0));
    progress.hand_out_to(at(1));
    let mut leases = QueueLeases::from_parts(progress, [(at(0), flight)], []).unwrap();
    let grants = leases.lease(&plan(1, 1, &[], &[0]), LeaseId(99), 1);
    assert_eq!(grants, granted(&[(0, u16::MAX)]));
}

#[derive(Clone, Debug)]
enum Act {
    Produce(u64),
    /// Greedy ones also ask for what is leased, as plans that come too late do.
    Poll {
        batch: usize,
        invisible_ms: u64,
        auto_renew: bool,
        wanted: u64,
        greedy: bool,
    },
    Ack(usize),
    Nack(usize, u64),
    Renew(usize, u64),
    Release(u64),
    Commit(u64),
    Trim(u64),
    Wait(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1u64..6).prop_map(Act::Produce),
        8 => (1usize..6, 0u64..300, any::<bool>(), 1u64..4, any::<bool>()).prop_map(
            |(batch, invisible_ms, auto_renew, wanted, greedy)| {
                Act::Poll { batch, invisible_ms, auto_renew, wanted, greedy }
            }
        ),
        8 => any::<usize>().prop_map(Act::Ack),
        4 => (any::<usize>(), 0u64..200).prop_map(|(which, ms)| Act::Nack(which, ms)),
        2 => (any::<usize>(), 0u64..500).prop_map(|(which, ms)| Act::Renew(which, ms)),
        1 => (0u64..100).prop_map(Act::Release),
        1 => (0u64..40).prop_map(Act::Commit),
        1 => (0u64..40).prop_map(Act::Trim),
        6 => (0u64..250).prop_map(Act::Wait),
    ]
}

/// A queue with one group on it, and what the group's consumers were told.
struct World {
    leases: QueueLeases,
    min: u64,
    end: u64,
    clock_ms: u64,
    entry: u64,
    /// Deliveries, the newest of each record valid as far as known: offset, lease, end of lease.
    told: Vec<(u64, u64, u64)>,
    /// Attempt of the last delivery by offset.
    attempts: BTreeMap<u64, u16>,
    acked: BTreeSet<u64>,
}

impl World {
    fn new() -> Self {
        Self {
            leases: QueueLeases::starting_at(at(0)),
            min: 0,
            end: 0,
            clock_ms: 0,
            entry: 0,
            told: Vec::new(),
            attempts: BTreeMap::new(),
            acked: BTreeSet::new(),
        }
    }

    /// Plans as a leader does, with a filter that wants each `wanted`th record.
    fn poll(&mut self, batch: usize, shape: &Lease, wanted: u64, greedy: bool) {
        let mut due = self.leases.due(self.clock_ms, &BTreeSet::new(), batch);
        if greedy {
            due = self.leases.flights().map(|(offset, _)| offset).collect();
        }
        let (again, unwanted): (Vec<_>, Vec<_>) =
            due.into_iter().partition(|offset| offset.get().is_multiple_of(wanted));
        let from = self.leases.next();
        let skip_to = at(self.end.min(from.get() + batch as u64));
        let fresh = (from.get()..skip_to.get()).filter(|offset| offset.is_multiple_of(wanted));
        let fresh: Vec<_> = fresh.map(at).collect();
        let plan = Lease { from, skip_to, fresh, again, unwanted, ..shape.clone() };
        QueueLeases::check_plan(&plan, self.leases.next(), at(self.end)).unwrap();
        for grant in self.leases.lease(&plan, LeaseId(self.entry), self.clock_ms) {
            let offset = grant.offset.get();
            let holder = self.told.iter().find(|(told, ..)| *told == offset);
            assert!(
                holder.is_none_or(|(.., ends_ms)| *ends_ms <= self.clock_ms),
                "record {offset} was granted while leased"
            );
            assert!(!self.acked.contains(&offset), "record {offset} came after its ack");
            let attempts = self.attempts.entry(offset).or_insert(0);
            *attempts += 1;
            assert_eq!(grant.attempt, *attempts, "attempts rise by one");
            self.told.retain(|(told, ..)| *told != offset);
            self.told.push((offset, self.entry, self.clock_ms + plan.invisible_ms));
        }
    }

    fn pick(&self, which: usize) -> Option<(u64, u64, u64)> {
        (!self.told.is_empty()).then(|| self.told[which % self.told.len()])
    }

    fn act(&mut self, act: &Act) {
        self.entry += 1;
        match *act {
            Act::Produce(count) => self.end += count,
            Act::Wait(ms) => self.clock_ms += ms,
            Act::Poll { batch, invisible_ms, auto_renew, wanted, greedy } => {
                let shape = Lease { invisible_ms, auto_renew, ..plan(0, 0, &[], &[]) };
                self.poll(batch, &shape, wanted, greedy);
            }
            Act::Ack(which) => {
                let Some((offset, lease, ends_ms)) = self.pick(which) else { return };
                let result = self.leases.ack(&pairs(&[(offset, lease)]), self.clock_ms)[0];
                let known = ends_ms > self.clock_ms || self.acked.contains(&offset);
                assert_eq!(result.is_ok(), known, "ack of {offset} under {lease}");
                if result.is_ok() {
                    self.acked.insert(offset);
                }
            }
            Act::Nack(which, ms) => {
                let Some((offset, lease, ends_ms)) = self.pick(which) else { return };
                let (now_ms, id) = (self.clock_ms, LeaseId(self.entry));
                let result = self.leases.change((at(offset), LeaseId(lease)), id, ms, now_ms);
                let held = ends_ms > now_ms && !self.acked.contains(&offset);
                assert_eq!(result.is_ok(), held, "nack of {offset} under {lease}");
                if held {
                    self.told.retain(|(told, ..)| *told != offset);
                    self.told.push((offset, self.entry, now_ms + ms));
                }
            }
            Act::Renew(which, ms) => {
                let Some((offset, lease, ends_ms)) = self.pick(which) else { return };
                self.leases.renew(&pairs(&[(offset, lease)]), ms, self.clock_ms);
                if ends_ms > self.clock_ms {
                    let told = self.told.iter_mut().find(|(told, ..)| *told == offset).unwrap();
                    told.2 = ends_ms.max(self.clock_ms + ms);
                }
            }
            Act::Release(ms) => {
                let renewed: Vec<u64> = self
                    .leases
                    .flights()
                    .filter(|(_, flight)| flight.auto_renew)
                    .map(|(offset, _)| offset.get())
                    .collect();
                self.leases.release(ALICE, ms, self.clock_ms);
                for (offset, _, ends_ms) in &mut self.told {
                    if renewed.contains(offset) {
                        *ends_ms = (*ends_ms).min(self.clock_ms + ms);
                    }
                }
            }
            Act::Commit(offset) => {
                self.leases.commit(at(offset.clamp(self.min, self.end)));
                self.told.clear();
                self.attempts.clear();
                self.acked.clear();
            }
            Act::Trim(min) => {
                self.min = self.min.max(min.min(self.end));
                self.leases.trim(at(self.min));
                let min = self.min;
                self.told.retain(|(offset, ..)| *offset >= min);
                self.acked.retain(|offset| *offset >= min);
            }
        }
        self.check();
    }

    fn check(&self) {
        let leases = &self.leases;
        let progress = leases.progress();
        assert!(leases.committed() <= leases.next() && leases.next() <= at(self.end));
        assert!(at(self.min) <= leases.next());
        assert_eq!(progress.open_count(), leases.flights().len() as u64);
        assert!(leases.flights().all(|(offset, _)| !progress.is_consumed(offset)));
        for offset in self.acked.iter().filter(|offset| **offset < leases.next().get()) {
            assert!(progress.is_consumed(at(*offset)), "the ack of {offset} was lost");
        }
        let same = QueueLeases::from_parts(
            progress.clone(),
            leases.flights().map(|(offset, flight)| (offset, *flight)),
            leases.acked(),
        );
        assert_eq!(same.as_ref(), Some(leases), "parts make up the whole");
    }

    /// Polls and acks until nothing is left.
    fn drain(&mut self) {
        for _ in 0..1_000 {
            if self.leases.committed() == at(self.end) {
                return;
            }
            self.clock_ms += 1_000;
            self.entry += 1;
            self.poll(32, &plan(0, 0, &[], &[]), 1, false);
            for which in 0..self.told.len() {
                self.act(&Act::Ack(which));
            }
        }
        panic!("records stay behind: {:?}", self.leases);
    }
}

proptest! {
    #[test]
    fn any_history_keeps_the_promises_of_leases(acts in prop::collection::vec(act(), 1..120)) {
        let mut world = World::new();
        for act in &acts {
            world.act(act);
        }
        world.drain();
    }
}

#[test]
fn room_for_new_records_ends_with_those_in_flight_and_comes_back() {
    let count = u64::try_from(IN_FLIGHT_MAX).unwrap();
    let mut leases = QueueLeases::starting_at(at(0));
    assert_eq!(leases.room(), IN_FLIGHT_MAX);
    let fresh: Vec<u64> = (0..count + 5).collect();
    leases.lease(&plan(0, count + 5, &fresh, &[]), LeaseId(3), 0);
    assert_eq!(leases.room(), 0);
    leases.ack(&pairs(&[(0, 3), (1, 3), (2, 3), (3, 3), (4, 3), (5, 3)]), 10);
    assert_eq!(leases.room(), 1);
}
