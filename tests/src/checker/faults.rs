//! Leaders, faults, and whether anything went on meanwhile and afterwards.

use std::collections::{BTreeMap, BTreeSet};

use super::book::{At, Book};
use super::{Class, Plan, Report};
use crate::event::{Process, Step, What};

pub(super) fn check(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    leaders(book, plan, report);
    windows(book, plan, report);
    for (at, event) in book.events.iter().enumerate() {
        match &event.what {
            What::Fault { name, group: Some(group), ok_within_ms: Some(limit_ms) }
                if event.step == Step::Ok =>
            {
                goes_on(book, at, name, group, *limit_ms, report);
            }
            What::Healed { ok_within_ms } => recovers(book, at, *ok_within_ms, report),
            _ => {}
        }
    }
}

fn leaders(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    let mut known: BTreeMap<(&str, u64), &str> = BTreeMap::new();
    for event in book.events {
        let What::Leader { group, node, term } = &event.what else { continue };
        let first = *known.entry((group, *term)).or_insert(node);
        if first != node {
            let text = format!("{group} has {first} and {node} in term {term}");
            report.add(Class::TwoLeaders, text);
        }
    }
    let mut last: BTreeMap<&str, &str> = BTreeMap::new();
    let mut changes = 0;
    for (&(group, _), &node) in &known {
        let before = last.insert(group, node);
        // A leader that restarts and is elected again is a change as well, in a new term.
        changes += usize::from(before.is_some());
    }
    report.counts.leader_changes = changes;
    if changes < plan.leader_changes_min {
        let wanted = plan.leader_changes_min;
        report.doubts.push(format!("leaders changed {changes} times, not {wanted}"));
    }
}

/// Which faults were there, and how many sends were acknowledged meanwhile.
fn windows(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut current: BTreeMap<&str, usize> = BTreeMap::new();
    for event in book.events {
        match &event.what {
            What::Fault { name, .. } if event.step == Step::Ok => {
                *seen.entry(name).or_default() += 1;
                *current.entry(name).or_default() += 1;
            }
            What::FaultEnds { name } => {
                current.remove(name.as_str());
            }
            What::Healed { .. } => current.clear(),
            What::Send { .. } if event.step == Step::Ok && !current.is_empty() => {
                report.counts.in_faults += 1;
            }
            _ => {}
        }
    }
    for (name, &wanted) in &plan.faults {
        let times = seen.get(name.as_str()).copied().unwrap_or(0);
        if times < wanted {
            report.doubts.push(format!("{name} was there {times} times, not {wanted}"));
        }
    }
    if report.counts.in_faults < plan.sends_in_faults_min {
        report.doubts.push(format!(
            "{} sends were acknowledged during faults, not {}",
            report.counts.in_faults, plan.sends_in_faults_min
        ));
    }
}

fn until(book: &Book<'_>, at: At, limit_ms: u64) -> u64 {
    book.events[at].t_ns.saturating_add(limit_ms.saturating_mul(1_000_000))
}

/// A send that began after the fault is acknowledged in time.
fn goes_on(book: &Book<'_>, at: At, name: &str, group: &str, limit_ms: u64, report: &mut Report) {
    let until_ns = until(book, at, limit_ms);
    let mut began: BTreeSet<Process> = BTreeSet::new();
    for event in book.events[at..].iter().take_while(|event| event.t_ns <= until_ns) {
        let What::Send { queue, .. } = &event.what else { continue };
        match event.step {
            Step::Invoke => {
                began.insert(event.process);
            }
            Step::Ok => {
                let here = queue.as_ref().is_some_and(|queue| &*queue.group == group);
                if here && began.contains(&event.process) {
                    return;
                }
            }
            Step::Fail | Step::Info => {}
        }
    }
    let text = format!("line {at}: {group} acknowledged nothing within {limit_ms} ms of {name}");
    report.add(Class::Liveness, text);
}

/// Every group acknowledges again in time, and from then on every send does until the next fault.
fn recovers(book: &Book<'_>, at: At, limit_ms: u64, report: &mut Report) {
    let until_ns = until(book, at, limit_ms);
    let mut groups: BTreeSet<&str> = book.queues.iter().map(|queue| &*queue.group).collect();
    let mut in_time: BTreeSet<Process> = BTreeSet::new();
    let mut late: BTreeSet<Process> = BTreeSet::new();
    for (line, event) in book.events.iter().enumerate().skip(at) {
        if let What::Fault { .. } = event.what {
            break;
        }
        let What::Send { queue, value, .. } = &event.what else { continue };
        match event.step {
            Step::Invoke if event.t_ns <= until_ns => {
                in_time.insert(event.process);
            }
            Step::Invoke => {
                late.insert(event.process);
            }
            Step::Ok if in_time.contains(&event.process) && event.t_ns <= until_ns => {
                groups.retain(|group| queue.as_ref().is_none_or(|queue| &*queue.group != *group));
            }
            Step::Fail | Step::Info if late.contains(&event.process) => {
                let text =
                    format!("line {line}: {value} failed {limit_ms} ms after the last fault");
                report.add(Class::Liveness, text);
            }
            _ => {}
        }
    }
    for group in groups {
        let text =
            format!("line {at}: {group} acknowledged nothing {limit_ms} ms after the last fault");
        report.add(Class::Liveness, text);
    }
}
