//! Registers that only rise, asked with a read barrier: ends of queues, committed offsets.

use std::collections::BTreeMap;

use super::book::{Book, Call, QueueNo};
use super::{Class, Report};
use crate::event::What;

/// Lower bounds of a register over time: at each place in the history what it must have reached.
#[derive(Debug, Default)]
struct Floor {
    /// Places and floors, both rising.
    steps: Vec<(usize, u64)>,
}

impl Floor {
    fn raise(&mut self, at: usize, floor: u64) {
        if self.steps.last().is_none_or(|(_, last)| *last < floor) {
            self.steps.push((at, floor));
        }
    }

    /// The floor when something began at `at`.
    fn before(&self, at: usize) -> Option<u64> {
        let below = self.steps.partition_point(|(step, _)| *step < at);
        below.checked_sub(1).map(|last| self.steps[last].1)
    }
}

pub(super) fn check(book: &Book<'_>, report: &mut Report) {
    queue_ends(book, report);
    committed(book, report);
}

fn queue_ends(book: &Book<'_>, report: &mut Report) {
    let mut acknowledged: Vec<_> = book
        .sends
        .iter()
        .filter(|send| send.acknowledged())
        .filter_map(|send| Some((send.ended?, send.place?)))
        .collect();
    acknowledged.sort_unstable();
    let mut acknowledged = acknowledged.into_iter().peekable();
    let mut floors: BTreeMap<QueueNo, Floor> = BTreeMap::new();
    for Call { invoked, ended, what } in &book.calls {
        while let Some((at, (queue, offset))) = acknowledged.next_if(|(at, _)| at < ended) {
            floors.entry(queue).or_default().raise(at, offset + 1);
        }
        let What::MaxOffset { queue, offset } = what else { continue };
        let Some(number) = book.find_queue(queue) else { continue };
        let floor = floors.entry(number).or_default();
        if *offset < floor.before(*invoked) {
            let before = floor.before(*invoked);
            report.add(
                Class::MaxOffset,
                format!("line {ended}: {queue} ends at {offset:?}, ended at {before:?} before"),
            );
        }
        if let Some(offset) = offset {
            floor.raise(*ended, *offset);
        }
    }
}

fn committed(book: &Book<'_>, report: &mut Report) {
    let mut highest: BTreeMap<(&str, String), u64> = BTreeMap::new();
    for what in &book.commits {
        let What::Commit { consumers, queue, offset } = what else { continue };
        let tried = highest.entry((consumers, queue.to_string())).or_default();
        *tried = (*tried).max(*offset);
    }
    let mut floors: BTreeMap<(&str, String), Floor> = BTreeMap::new();
    for Call { invoked, ended, what } in &book.calls {
        match what {
            What::Commit { consumers, queue, offset } => {
                let register = (consumers.as_str(), queue.to_string());
                floors.entry(register).or_default().raise(*ended, *offset);
            }
            What::Committed { consumers, queue, offset } => {
                let register = (consumers.as_str(), queue.to_string());
                let tried = highest.get(&register).copied();
                let floor = floors.entry(register).or_default();
                let before = floor.before(*invoked);
                if *offset < before || *offset > tried {
                    let text = format!(
                        "line {ended}: {consumers} is at {offset:?} of {queue}, was at {before:?}, \
                         {tried:?} is the highest ever committed"
                    );
                    report.add(Class::Committed, text);
                }
                if let Some(offset) = offset {
                    floor.raise(*ended, *offset);
                }
            }
            _ => {}
        }
    }
}
