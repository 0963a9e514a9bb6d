//! What is in the queues: nothing missing, nothing made up, nothing twice, the same everywhere.

use std::collections::{BTreeMap, HashMap};

use super::book::{Book, FinalRead, QueueNo, ValueNo};
use super::{Class, Plan, Report};
use crate::event::{Step, What};

pub(super) fn check(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    one_value_an_offset(book, report);
    for read in &book.final_reads {
        dense(book, read, report);
    }
    for node in nodes(book) {
        complete(book, node, report);
    }
    all_were_sent(book, report);
    same_ends(book, report);
    same_digests(book, report);
    same_logs(book, plan, report);
    nothing_skipped(book, report);
    all_replicas_were_read(book, plan, report);
}

fn nodes<'a>(book: &Book<'a>) -> Vec<&'a str> {
    let mut nodes: Vec<_> = book.final_reads.iter().map(|read| read.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    nodes
}

/// Values by place: a list for offsets as they are in a queue without gaps, a map for all others.
#[derive(Debug, Default)]
struct Places {
    dense: Vec<Vec<ValueNo>>,
    sparse: HashMap<(QueueNo, u64), ValueNo>,
}

impl Places {
    const DENSE_MAX: usize = 1 << 24;
    const FREE: ValueNo = ValueNo::MAX;

    fn new(queue_count: usize) -> Self {
        Self { dense: vec![Vec::new(); queue_count], sparse: HashMap::new() }
    }

    fn get(&self, queue: QueueNo, offset: u64) -> Option<ValueNo> {
        match usize::try_from(offset) {
            Ok(at) if at < Self::DENSE_MAX => {
                self.dense[queue].get(at).copied().filter(|value| *value != Self::FREE)
            }
            _ => self.sparse.get(&(queue, offset)).copied(),
        }
    }

    fn insert(&mut self, queue: QueueNo, offset: u64, value: ValueNo) {
        match usize::try_from(offset) {
            Ok(at) if at < Self::DENSE_MAX => {
                let values = &mut self.dense[queue];
                if values.len() <= at {
                    values.resize(at + 1, Self::FREE);
                }
                values[at] = value;
            }
            _ => {
                self.sparse.insert((queue, offset), value);
            }
        }
    }
}

/// Over acknowledgements, consumers and all replicas, at any time.
fn one_value_an_offset(book: &Book<'_>, report: &mut Report) {
    let mut known = Places::new(book.queues.len());
    let acknowledged = book.sends.iter().enumerate();
    let acknowledged =
        acknowledged.filter_map(|(value, send)| send.place.map(|place| (place.0, place.1, value)));
    let final_reads = book.final_reads.iter().flat_map(|read| {
        read.values.iter().map(move |&(offset, value)| (read.queue, offset, value))
    });
    for (queue, offset, value) in acknowledged.chain(book.read.iter().copied()).chain(final_reads) {
        let Some(first) = known.get(queue, offset) else {
            known.insert(queue, offset, value);
            continue;
        };
        if first != value {
            let (first, second) = (book.sends[first].value, book.sends[value].value);
            let text = format!("{offset} of {} is {first}, is {second}", book.queues[queue]);
            report.add(Class::InconsistentOffset, text);
        }
    }
}

fn dense(book: &Book<'_>, read: &FinalRead<'_>, report: &mut Report) {
    let offsets = read.values.iter().map(|(offset, _)| *offset);
    if let Some((expected, offset)) =
        (read.min..).zip(offsets).find(|(expected, offset)| expected != offset)
    {
        let (node, queue) = (read.node, book.queues[read.queue]);
        let text = format!("{node} has {offset} of {queue} where {expected} should be");
        report.add(Class::Gap, text);
    }
    if read.min > 0 {
        // Nothing is old or large enough to be forgotten in a test.
        let (node, queue, min) = (read.node, book.queues[read.queue], read.min);
        report.add(Class::Gap, format!("{node} begins {queue} at {min}"));
    }
}

/// One replica against what was acknowledged and read.
fn complete(book: &Book<'_>, node: &str, report: &mut Report) {
    let mut held = Places::new(book.queues.len());
    let mut places: Vec<u32> = vec![0; book.sends.len()];
    let mut queues_read = vec![false; book.queues.len()];
    for read in book.final_reads.iter().filter(|read| read.node == node) {
        queues_read[read.queue] = true;
        for &(offset, value) in &read.values {
            held.insert(read.queue, offset, value);
            places[value] += 1;
        }
    }
    let missing = |queue: QueueNo, offset: u64, value: ValueNo| {
        queues_read[queue] && held.get(queue, offset) != Some(value)
    };
    for (number, send) in book.sends.iter().enumerate() {
        if let Some((queue, offset)) = send.place
            && missing(queue, offset, number)
        {
            let (value, queue) = (send.value, book.queues[queue]);
            report.add(Class::Lost, format!("{value}, {offset} of {queue}, is not on {node}"));
        }
        if places[number] > 1 && send.outcome != Step::Info && !send.repeats {
            let (value, count) = (send.value, places[number]);
            report.add(Class::Duplicate, format!("{value} is on {node} {count} times"));
        }
    }
    for &(queue, offset, value) in &book.read {
        if missing(queue, offset, value) {
            let (value, queue) = (book.sends[value].value, book.queues[queue]);
            report.add(Class::Vanished, format!("{value}, {offset} of {queue}, left {node}"));
        }
    }
}

fn all_were_sent(book: &Book<'_>, report: &mut Report) {
    let mut there = vec![false; book.sends.len()];
    for &(_, _, value) in &book.read {
        there[value] = true;
    }
    for &(_, value) in book.final_reads.iter().flat_map(|read| &read.values) {
        there[value] = true;
    }
    for (send, _) in book.sends.iter().zip(there).filter(|(_, there)| *there) {
        let how = match (send.invoked, send.outcome) {
            (None, _) => "was never sent",
            (Some(_), Step::Fail) => "was refused",
            (Some(_), _) => continue,
        };
        report.add(Class::Phantom, format!("{} is there, and {how}", send.value));
    }
}

/// Values at common offsets are compared by [`one_value_an_offset`].
fn same_ends(book: &Book<'_>, report: &mut Report) {
    let mut ends: BTreeMap<QueueNo, BTreeMap<&str, usize>> = BTreeMap::new();
    for read in &book.final_reads {
        ends.entry(read.queue).or_default().insert(read.node, read.values.len());
    }
    for (queue, counts) in ends {
        let mut each = counts.values();
        let first = each.next();
        if each.any(|count| Some(count) != first) {
            let text = format!("records of {}: {counts:?}", book.queues[queue]);
            report.add(Class::Divergence, text);
        }
    }
}

fn same_digests(book: &Book<'_>, report: &mut Report) {
    let mut known: BTreeMap<(&str, u64), (&str, &str)> = BTreeMap::new();
    for event in book.events {
        let What::Digest { node, group, index, digest } = &event.what else { continue };
        let (first, theirs) = *known.entry((group, *index)).or_insert((node, digest));
        if theirs != digest {
            let text = format!("state of {group} at {index} differs: {first}, {node}");
            report.add(Class::Divergence, text);
        }
    }
}

/// Byte for byte what clients cannot see: terms, clocks, checksums, and the witness's headers.
fn same_logs(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    let mut compared: BTreeMap<&str, usize> = BTreeMap::new();
    for event in book.events {
        let What::Compared { group, one, other, entries, difference } = &event.what else {
            continue;
        };
        if let Some(difference) = difference {
            report.add(Class::Divergence, format!("logs of {one} and {other}: {difference}"));
        } else if *entries == 0 {
            report.doubts.push(format!("logs of {one} and {other} have nothing in common"));
        }
        *compared.entry(group).or_default() += 1;
    }
    for group in plan.replicas.keys().filter(|_| plan.logs_compared_min > 0) {
        let (pairs, wanted) = (compared.get(&**group).copied(), plan.logs_compared_min);
        if pairs.unwrap_or(0) < wanted {
            let pairs = pairs.unwrap_or(0);
            report.doubts.push(format!("{pairs} pairs of logs of {group} compared, not {wanted}"));
        }
    }
}

fn nothing_skipped(book: &Book<'_>, report: &mut Report) {
    for (line, event) in book.events.iter().enumerate() {
        if let What::Skipped { queue, expected, offset } = &event.what {
            let text = format!("line {line}: a reader of {queue} got {offset} after {expected}");
            report.add(Class::Skipped, text);
        }
    }
}

fn all_replicas_were_read(book: &Book<'_>, plan: &Plan, report: &mut Report) {
    for queue in &book.queues {
        let Some(nodes) = plan.replicas.get(&*queue.group) else {
            report.doubts.push(format!("{queue} is of a broker group that nobody planned"));
            continue;
        };
        for node in nodes {
            let read = |read: &FinalRead<'_>| {
                read.node == node && book.queues.get(read.queue) == Some(queue)
            };
            if !book.final_reads.iter().any(read) {
                report.doubts.push(format!("{queue} was not read from {node} in the end"));
            }
        }
    }
}
