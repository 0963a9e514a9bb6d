//! The checker against histories of a model that keeps every promise, as they are and with one
//! thing changed that must not be.

// All changes have one type, whether they add lines or not.
#![allow(clippy::ptr_arg)]

use std::time::{Duration, Instant};

use super::*;
use crate::event::{Process, Queue, Seen, Step, What, from_lines, to_lines};

const NODES: [[&str; 2]; 2] = [["a-0", "a-1"], ["b-0", "b-1"]];
const GROUPS: [&str; 2] = ["a", "b"];

/// A cluster that keeps its promises, and its clients.
struct Model {
    rng: fastrand::Rng,
    t_ns: u64,
    events: Vec<Event>,
    queues: Vec<(Queue, Vec<String>)>,
    committed: Vec<Option<u64>>,
    idle: Vec<Process>,
    open: Vec<(Process, Open)>,
    /// Sends of unknown outcome that may still arrive.
    stray: Vec<(usize, String)>,
    processes: Process,
    values: u64,
}

enum Open {
    /// Queue, value, and its offset once it is there.
    Send(usize, String, Option<u64>),
    Read(usize),
    MaxOffset(usize, Option<u64>),
    Commit(usize, u64, bool),
    Committed(usize, Option<Option<u64>>),
}

impl Model {
    fn new(seed: u64) -> Self {
        let queues: Vec<_> = (0..4)
            .map(|id| (Queue::new("t", GROUPS[usize::from(id >= 2)], id % 2), Vec::new()))
            .collect();
        Self {
            rng: fastrand::Rng::with_seed(seed),
            t_ns: 0,
            events: Vec::new(),
            committed: vec![None; queues.len()],
            queues,
            idle: (1..=6).collect(),
            open: Vec::new(),
            stray: Vec::new(),
            processes: 6,
            values: 0,
        }
    }

    fn line(&mut self, process: Process, step: Step, what: What) {
        self.t_ns += self.rng.u64(100_000..1_000_000);
        self.events.push(Event { t_ns: self.t_ns, process, step, what });
    }

    fn history(mut self, steps: usize) -> Vec<Event> {
        self.line(0, Step::Ok, leader("a", "a-0", 1));
        self.line(0, Step::Ok, leader("b", "b-0", 1));
        for step in 0..steps {
            if step == steps / 3 {
                let (name, group) = ("kill".to_owned(), Some("a".to_owned()));
                let fault = What::Fault { name, group, ok_within_ms: Some(5_000) };
                self.line(0, Step::Ok, fault);
                self.line(0, Step::Ok, leader("a", "a-1", 2));
            } else if step == steps * 2 / 3 {
                self.line(0, Step::Ok, What::FaultEnds { name: "kill".into() });
                self.line(0, Step::Ok, What::Healed { ok_within_ms: 15_000 });
            }
            self.step(step > steps / 3 && step < steps * 2 / 3);
        }
        while !self.open.is_empty() {
            self.end_one(false);
        }
        for queue in 0..self.queues.len() {
            self.idle.sort_unstable();
            let process = self.idle[0];
            self.begin_send(process, queue);
            self.end_one(false);
        }
        self.finish();
        self.events
    }

    fn step(&mut self, faulty: bool) {
        if !self.idle.is_empty() && self.rng.bool() {
            self.begin_one();
        } else if !self.open.is_empty() {
            self.advance();
            self.end_one(faulty);
        }
        if !self.stray.is_empty() && self.rng.u8(..10) == 0 {
            let (queue, value) = self.stray.swap_remove(0);
            self.queues[queue].1.push(value);
        }
    }

    fn begin_one(&mut self) {
        let process = self.idle.swap_remove(self.rng.usize(..self.idle.len()));
        let number = self.rng.usize(..self.queues.len());
        let queue = self.queues[number].0.clone();
        let end = u64::try_from(self.queues[number].1.len()).unwrap();
        match self.rng.u8(..10) {
            0..5 => {
                self.idle.push(process);
                self.begin_send(process, number);
            }
            5..7 => {
                self.line(process, Step::Invoke, What::Read { queue, seen: Vec::new() });
                self.open.push((process, Open::Read(number)));
            }
            7 => {
                self.line(process, Step::Invoke, What::MaxOffset { queue, offset: None });
                self.open.push((process, Open::MaxOffset(number, None)));
            }
            8 if self.committed[number].unwrap_or(0) < end && !self.commits(number) => {
                let offset = self.rng.u64(self.committed[number].map_or(0, |at| at + 1)..=end);
                let what = What::Commit { consumers: "g".into(), queue, offset };
                self.line(process, Step::Invoke, what);
                self.open.push((process, Open::Commit(number, offset, false)));
            }
            _ => {
                let what = What::Committed { consumers: "g".into(), queue, offset: None };
                self.line(process, Step::Invoke, what);
                self.open.push((process, Open::Committed(number, None)));
            }
        }
    }

    /// One at a time: two could arrive in another order than they end.
    fn commits(&self, number: usize) -> bool {
        self.open
            .iter()
            .any(|(_, open)| matches!(open, Open::Commit(other, ..) if *other == number))
    }

    fn begin_send(&mut self, process: Process, number: usize) {
        self.idle.retain(|idle| *idle != process);
        self.values += 1;
        let value = format!("v{}", self.values);
        self.line(process, Step::Invoke, send(&value, None));
        self.open.push((process, Open::Send(number, value, None)));
    }

    /// Something that is under way takes effect.
    fn advance(&mut self) {
        let one = self.rng.usize(..self.open.len());
        match &mut self.open[one].1 {
            Open::Send(queue, value, offset @ None) => {
                let log = &mut self.queues[*queue].1;
                *offset = Some(u64::try_from(log.len()).unwrap());
                log.push(value.clone());
            }
            Open::MaxOffset(queue, end @ None) => {
                *end = Some(u64::try_from(self.queues[*queue].1.len()).unwrap());
            }
            Open::Commit(queue, offset, done @ false) => {
                self.committed[*queue] = Some(*offset);
                *done = true;
            }
            Open::Committed(queue, at @ None) => *at = Some(self.committed[*queue]),
            _ => {}
        }
    }

    fn end_one(&mut self, faulty: bool) {
        let (process, open) = self.open.swap_remove(self.rng.usize(..self.open.len()));
        match open {
            Open::Send(queue, value, offset) => {
                self.end_send(process, queue, value, offset, faulty)
            }
            Open::Read(queue) => {
                let log = &self.queues[queue].1;
                let from = self.rng.usize(..=log.len());
                let to = self.rng.usize(from..=log.len().min(from + 50));
                let seen = seen(from, &log[from..to]);
                let queue = self.queues[queue].0.clone();
                self.line(process, Step::Ok, What::Read { queue, seen });
                self.idle.push(process);
            }
            Open::MaxOffset(queue, end) => {
                let end = end.or(Some(u64::try_from(self.queues[queue].1.len()).unwrap()));
                let queue = self.queues[queue].0.clone();
                self.line(process, Step::Ok, What::MaxOffset { queue, offset: end });
                self.idle.push(process);
            }
            Open::Commit(number, offset, done) => {
                if !done {
                    self.committed[number] = Some(offset);
                }
                let queue = self.queues[number].0.clone();
                let what = What::Commit { consumers: "g".into(), queue, offset };
                self.line(process, Step::Ok, what);
                self.idle.push(process);
            }
            Open::Committed(number, at) => {
                let offset = at.unwrap_or(self.committed[number]);
                let queue = self.queues[number].0.clone();
                let what = What::Committed { consumers: "g".into(), queue, offset };
                self.line(process, Step::Ok, what);
                self.idle.push(process);
            }
        }
    }

    fn end_send(
        &mut self,
        process: Process,
        queue: usize,
        value: String,
        offset: Option<u64>,
        faulty: bool,
    ) {
        if offset.is_none() && faulty && self.rng.bool() {
            if self.rng.bool() {
                self.line(process, Step::Fail, send(&value, None));
                self.idle.push(process);
            } else {
                self.line(process, Step::Info, send(&value, None));
                self.processes += 1;
                self.idle.push(self.processes);
                self.stray.push((queue, value));
            }
            return;
        }
        let log = &mut self.queues[queue].1;
        let offset = offset.unwrap_or_else(|| {
            log.push(value.clone());
            u64::try_from(log.len()).unwrap() - 1
        });
        let place = Some((self.queues[queue].0.clone(), offset));
        self.line(process, Step::Ok, send(&value, place));
        self.idle.push(process);
    }

    fn finish(&mut self) {
        for (queue, log) in self.queues.clone() {
            for node in NODES[usize::from(&*queue.group == "b")] {
                let (queue, seen) = (queue.clone(), seen(0, &log));
                self.line(0, Step::Ok, What::FinalRead { node: node.into(), queue, min: 0, seen });
            }
        }
        for (group, nodes) in GROUPS.into_iter().zip(NODES) {
            for node in nodes {
                let (node, group) = (node.to_owned(), group.to_owned());
                let digest = What::Digest { node, group, index: 99, digest: "abc".into() };
                self.line(0, Step::Ok, digest);
            }
            let [one, other] = nodes.map(str::to_owned);
            let (group, difference) = (group.to_owned(), None);
            let compared = What::Compared { group, one, other, entries: 99, difference };
            self.line(0, Step::Ok, compared);
        }
    }
}

fn leader(group: &str, node: &str, term: u64) -> What {
    What::Leader { group: group.into(), node: node.into(), term }
}

fn send(value: &str, place: Option<(Queue, u64)>) -> What {
    let (queue, offset) = place.unzip();
    What::Send { value: value.into(), queue, offset, degraded: false, repeats: false }
}

fn seen(from: usize, log: &[String]) -> Vec<Seen> {
    let values = (u64::try_from(from).unwrap()..).zip(log);
    values.map(|(offset, value)| Seen { offset, value: value.clone(), intact: true }).collect()
}

fn plan() -> Plan {
    let replicas = GROUPS.into_iter().zip(NODES);
    let replicas =
        replicas.map(|(group, nodes)| (group.to_owned(), nodes.map(str::to_owned).into()));
    let plan = Plan {
        sends_in_faults_min: 5,
        leader_changes_min: 1,
        replicas: replicas.collect(),
        logs_compared_min: 1,
        ..Plan::default()
    };
    plan.fault("kill", 1)
}

fn history(seed: u64) -> Vec<Event> {
    Model::new(seed).history(600)
}

#[test]
fn a_hundred_true_histories_are_valid() {
    for seed in 0..100 {
        let report = check(&history(seed), &plan());
        assert_eq!(report.verdict(), Verdict::Valid, "seed {seed}: {report}");
    }
}

#[test]
fn lines_come_back_as_they_were_written() {
    let events = history(7);
    assert_eq!(from_lines(&to_lines(&events)).unwrap(), events);
}

/// A change, and what it must be recognised as.
type Mutation = (&'static str, fn(&mut Vec<Event>, &mut fastrand::Rng), &'static [Class]);

const MUTATIONS: &[Mutation] = &[
    ("drop the tail of a queue everywhere", drop_tail, &[Class::Lost]),
    ("drop one record, keep the offsets", drop_middle, &[Class::Gap]),
    ("drop one record, close the gap", drop_and_close, &[Class::Lost]),
    ("drop the tail on one replica", drop_tail_once, &[Class::Divergence]),
    ("store a value twice", duplicate, &[Class::Duplicate]),
    ("swap two records", swap, &[Class::InconsistentOffset]),
    ("swap two acknowledgements everywhere", swap_order, &[Class::Reorder, Class::RealTime]),
    ("put a value that nobody sent at the end", phantom, &[Class::Phantom]),
    ("say refused to a stored send", refuse_stored, &[Class::Phantom]),
    ("alter a body", alter, &[Class::Corrupt]),
    ("let a queue's end go back", regress_end, &[Class::MaxOffset]),
    ("let a committed offset go back", regress_committed, &[Class::Committed]),
    ("commit what nobody committed", committed_beyond, &[Class::Committed]),
    ("acknowledge one offset twice", reuse_offset, &[Class::InconsistentOffset]),
    ("let a consumer see what is gone later", vanish, &[Class::Vanished]),
    ("let replicas' states differ", differ, &[Class::Divergence]),
    ("let logs differ", differ_on_disk, &[Class::Divergence]),
    ("let a reader skip a record", skip, &[Class::Skipped]),
    ("elect two in one term", elect_two, &[Class::TwoLeaders]),
    ("acknowledge nothing after the fault", block, &[Class::Liveness]),
];

#[test]
fn a_thousand_false_histories_are_recognised() {
    let mut count = 0;
    for seed in 0..60 {
        let original = history(seed);
        for (number, (name, mutate, classes)) in MUTATIONS.iter().enumerate() {
            let mut events = original.clone();
            let number = u64::try_from(number).unwrap();
            mutate(&mut events, &mut fastrand::Rng::with_seed(seed * 1000 + number));
            assert_ne!(events, original, "seed {seed}: {name}: nothing changed");
            let report = check(&events, &plan());
            assert!(
                classes.iter().any(|class| report.has(*class)),
                "seed {seed}: {name}: not recognised: {report}"
            );
            count += 1;
        }
    }
    assert!(count >= 1_000, "only {count} histories");
}

#[test]
fn a_run_that_saw_too_little_proves_nothing() {
    let events = history(3);
    for plan in [
        plan().fault("power loss", 1),
        Plan { sends_in_faults_min: 10_000, ..plan() },
        Plan { leader_changes_min: 2, ..plan() },
    ] {
        let report = check(&events, &plan);
        assert_eq!(report.verdict(), Verdict::Unknown, "{report}");
    }
    let without = |what: fn(&What) -> bool| {
        let kept = events.iter().filter(|event| !what(&event.what));
        check(&kept.cloned().collect::<Vec<_>>(), &plan()).verdict()
    };
    assert_eq!(without(|what| matches!(what, What::Fault { .. })), Verdict::Unknown);
    let unread = |what: &What| matches!(what, What::FinalRead { node, .. } if node == "a-1");
    assert_eq!(without(unread), Verdict::Unknown);
    let of_a = |what: &What| matches!(what, What::Compared { group, .. } if group == "a");
    assert_eq!(without(of_a), Verdict::Unknown);
    let unplanned = Plan { replicas: BTreeMap::new(), ..plan() };
    assert_eq!(check(&events, &unplanned).verdict(), Verdict::Unknown);
}

#[test]
fn a_million_calls_are_checked_in_seconds() {
    let events = Model::new(1).history(2_000_000);
    let calls = events.iter().filter(|event| event.step == Step::Invoke).count();
    assert!(calls > 900_000, "{calls}");
    let began = Instant::now();
    let report = check(&events, &plan());
    println!("{calls} calls in {:?}: {:?}", began.elapsed(), report.counts);
    assert_eq!(report.verdict(), Verdict::Valid, "{report}");
    assert!(began.elapsed() < Duration::from_secs(60));
}

/// The final reads of one queue, which must be long enough.
fn final_reads(events: &mut [Event], rng: &mut fastrand::Rng) -> Vec<usize> {
    let reads: Vec<(usize, Queue)> = (0..)
        .zip(events.iter())
        .filter_map(|(at, event)| match &event.what {
            What::FinalRead { queue, seen, .. } if seen.len() >= 8 => Some((at, queue.clone())),
            _ => None,
        })
        .collect();
    let queue = reads[rng.usize(..reads.len())].1.clone();
    reads.into_iter().filter(|(_, other)| *other == queue).map(|(at, _)| at).collect()
}

fn seen_mut(event: &mut Event) -> &mut Vec<Seen> {
    match &mut event.what {
        What::FinalRead { seen, .. } | What::Read { seen, .. } => seen,
        other => panic!("{other:?} has read nothing"),
    }
}

fn in_final_reads(
    events: &mut [Event],
    rng: &mut fastrand::Rng,
    mut change: impl FnMut(&mut Vec<Seen>),
) {
    for at in final_reads(events, rng) {
        change(seen_mut(&mut events[at]));
    }
}

/// The last send of each queue is acknowledged.
fn drop_tail(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let count = rng.usize(1..4);
    in_final_reads(events, rng, |seen| seen.truncate(seen.len() - count));
}

fn drop_middle(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    in_final_reads(events, rng, |seen| {
        seen.remove(seen.len() / 2);
    });
}

fn drop_and_close(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    in_final_reads(events, rng, |seen| {
        seen.remove(seen.len() / 2);
        (0..).zip(seen.iter_mut()).for_each(|(offset, seen)| seen.offset = offset);
    });
}

fn drop_tail_once(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let reads = final_reads(events, rng);
    seen_mut(&mut events[reads[rng.usize(..reads.len())]]).pop();
}

fn duplicate(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    in_final_reads(events, rng, |seen| {
        let mut again = seen.last().unwrap().clone();
        again.offset += 1;
        seen.push(again);
    });
}

fn swap(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let last = rng.usize(1..4);
    in_final_reads(events, rng, |seen| {
        let (one, other) = (seen.len() - 1 - last, seen.len() - 1);
        let value = std::mem::replace(&mut seen[one].value, "x".into());
        seen[one].value = std::mem::replace(&mut seen[other].value, value);
    });
}

/// Swaps two values of one process wherever they are.
fn swap_order(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let acks: Vec<(Process, Queue, String)> = events
        .iter()
        .filter_map(|event| match &event.what {
            What::Send { value, queue: Some(queue), .. } if event.step == Step::Ok => {
                Some((event.process, queue.clone(), value.clone()))
            }
            _ => None,
        })
        .collect();
    let pairs: Vec<(&String, &String)> = acks
        .iter()
        .enumerate()
        .filter_map(|(at, (process, queue, first))| {
            let later = acks[at + 1..].iter().find(|ack| (&ack.0, &ack.1) == (process, queue));
            later.map(|(_, _, second)| (first, second))
        })
        .collect();
    let (first, second) = pairs[rng.usize(..pairs.len())];
    let (first, second) = (first.clone(), second.clone());
    let renamed = |value: &mut String| {
        if *value == first {
            value.clone_from(&second);
        } else if *value == second {
            value.clone_from(&first);
        }
    };
    // The invocations stay, so each value is now where the other was.
    let mut offsets = Vec::new();
    for event in events.iter() {
        if let (Step::Ok, What::Send { value, offset, .. }) = (event.step, &event.what)
            && (*value == first || *value == second)
        {
            offsets.push(*offset);
        }
    }
    for event in events {
        match &mut event.what {
            What::Send { value, offset, .. } if event.step == Step::Ok => {
                if *value == first {
                    *offset = offsets[1];
                } else if *value == second {
                    *offset = offsets[0];
                }
            }
            What::Read { seen, .. } | What::FinalRead { seen, .. } => {
                seen.iter_mut().for_each(|seen| renamed(&mut seen.value));
            }
            _ => {}
        }
    }
}

fn phantom(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    in_final_reads(events, rng, |seen| {
        let offset = seen.last().unwrap().offset + 1;
        seen.push(Seen { offset, value: "never".into(), intact: true });
    });
}

/// Lines that fit, by index.
fn lines(events: &[Event], fits: impl Fn(&Event) -> bool) -> Vec<usize> {
    (0..events.len()).filter(|at| fits(&events[*at])).collect()
}

fn acknowledgements(events: &[Event]) -> Vec<usize> {
    lines(events, |event| event.step == Step::Ok && matches!(event.what, What::Send { .. }))
}

fn refuse_stored(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let acks = acknowledgements(events);
    events[acks[rng.usize(..acks.len())]].step = Step::Fail;
}

fn alter(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let reads = final_reads(events, rng);
    let seen = seen_mut(&mut events[reads[0]]);
    let one = rng.usize(..seen.len());
    seen[one].intact = false;
}

fn regress_end(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let ends = lines(
        events,
        |event| matches!(event.what, What::MaxOffset { offset: Some(offset), .. } if offset > 3),
    );
    match &mut events[*ends.last().unwrap()].what {
        What::MaxOffset { offset, .. } => *offset = Some(0),
        other => panic!("{other:?}"),
    }
}

fn last_committed(events: &mut [Event]) -> &mut Option<u64> {
    let asked = lines(events, |event| {
        matches!(event.what, What::Committed { offset: Some(1..), .. }) && event.step == Step::Ok
    });
    // The first answer raises the floor for the last, so a queue that was asked twice is needed.
    match &mut events[*asked.last().unwrap()].what {
        What::Committed { offset, .. } => offset,
        other => panic!("{other:?}"),
    }
}

fn regress_committed(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let last =
        lines(events, |event| matches!(event.what, What::Committed { offset: Some(1..), .. }));
    // Asked once more at the end, when whatever was answered before must still hold.
    let again = events[*last.last().unwrap()].clone();
    let (t_ns, What::Committed { consumers, queue, .. }) =
        (events.last().unwrap().t_ns, again.what)
    else {
        panic!("no offset was asked")
    };
    for step in [Step::Invoke, Step::Ok] {
        let what =
            What::Committed { consumers: consumers.clone(), queue: queue.clone(), offset: None };
        events.push(Event { t_ns, process: 1_000, step, what });
    }
}

fn committed_beyond(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    *last_committed(events) = Some(1_000_000);
}

fn reuse_offset(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let acks = acknowledgements(events);
    let of_queue = |at: usize| match &events[at].what {
        What::Send { queue, offset, .. } => (queue.clone(), *offset),
        other => panic!("{other:?}"),
    };
    let one = rng.usize(..acks.len() / 2);
    let (queue, taken) = of_queue(acks[one]);
    let other = acks[one + 1..].iter().copied().find(|at| of_queue(*at).0 == queue).unwrap();
    match &mut events[other].what {
        What::Send { offset, .. } => *offset = taken,
        other => panic!("{other:?}"),
    }
}

fn vanish(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let reads = final_reads(events, rng);
    let (What::FinalRead { queue, .. }, t_ns) =
        (events[reads[0]].what.clone(), events[reads[0]].t_ns)
    else {
        panic!("not a final read")
    };
    let offset = seen_mut(&mut events[reads[0]]).last().unwrap().offset + 1;
    let value = "stray".to_owned();
    let seen = vec![Seen { offset, value: value.clone(), intact: true }];
    let lines = [
        (Step::Invoke, send(&value, None)),
        (Step::Info, send(&value, None)),
        (Step::Invoke, What::Read { queue: queue.clone(), seen: Vec::new() }),
        (Step::Ok, What::Read { queue, seen }),
    ];
    let lines = lines.map(|(step, what)| Event { t_ns, process: 1_000, step, what });
    events.splice(reads[0]..reads[0], lines);
}

fn differ(events: &mut Vec<Event>, rng: &mut fastrand::Rng) {
    let digests = lines(events, |event| matches!(event.what, What::Digest { .. }));
    match &mut events[digests[rng.usize(..digests.len())]].what {
        What::Digest { digest, .. } => digest.push('!'),
        other => panic!("{other:?}"),
    }
}

fn differ_on_disk(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let compared = lines(events, |event| matches!(event.what, What::Compared { .. }));
    match &mut events[compared[0]].what {
        What::Compared { difference, .. } => *difference = Some("entry 7".into()),
        other => panic!("{other:?}"),
    }
}

fn skip(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let what = What::Skipped { queue: Queue::new("t", "a", 0), expected: 3, offset: 4 };
    let t_ns = events.last().unwrap().t_ns;
    events.push(Event { t_ns, process: 0, step: Step::Ok, what });
}

fn elect_two(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let last = events.last().unwrap().t_ns;
    let what = leader("a", "a-0", 2);
    events.push(Event { t_ns: last, process: 0, step: Step::Ok, what });
}

/// From the end of the fault on, outcomes are unknown.
fn block(events: &mut Vec<Event>, _rng: &mut fastrand::Rng) {
    let healed = lines(events, |event| matches!(event.what, What::Healed { .. }))[0];
    for event in &mut events[healed..] {
        if let (Step::Ok, What::Send { queue, offset, .. }) = (event.step, &mut event.what) {
            (*queue, *offset) = (None, None);
            event.step = Step::Info;
        }
    }
}
