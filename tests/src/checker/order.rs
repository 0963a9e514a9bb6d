//! The order of sends: of one process, and between processes where one send had ended before the
//! other began.

use std::collections::HashMap;

use super::book::{Book, QueueNo, ValueNo};
use super::{Class, Report};
use crate::event::{Process, Step, What};

pub(super) fn check(book: &Book<'_>, report: &mut Report) {
    let places = places(book);
    let mut by_value: HashMap<&str, ValueNo> = HashMap::with_capacity(book.sends.len());
    by_value.extend(book.sends.iter().enumerate().map(|(number, send)| (send.value, number)));
    // Per queue the highest offset whose send has ended well.
    let mut ended: Vec<Option<u64>> = vec![None; book.queues.len()];
    let mut last_of: HashMap<(Process, QueueNo), u64> = HashMap::new();
    for event in book.events {
        let What::Send { value, .. } = &event.what else { continue };
        let Some(&number) = by_value.get(value.as_str()) else { continue };
        let send = &book.sends[number];
        match event.step {
            Step::Invoke => {
                for &(queue, offset) in &places[number] {
                    let Some(before) = ended[queue].filter(|before| *before >= offset) else {
                        continue;
                    };
                    let queue = book.queues[queue];
                    let text = format!(
                        "{value} began when {before} of {queue} was acknowledged, and is {offset}"
                    );
                    report.add(Class::RealTime, text);
                }
            }
            Step::Ok => {
                let Some((queue, offset)) = send.place else { continue };
                ended[queue] = ended[queue].max(Some(offset));
                if let Some(before) = last_of.insert((send.process, queue), offset)
                    && before >= offset
                {
                    let (process, queue) = (send.process, book.queues[queue]);
                    let text = format!(
                        "process {process} got {before}, then {offset} of {queue}: {value}"
                    );
                    report.add(Class::Reorder, text);
                }
            }
            Step::Fail | Step::Info => {}
        }
    }
}

/// Where each value was acknowledged, read or left in the end.
fn places(book: &Book<'_>) -> Vec<Vec<(QueueNo, u64)>> {
    let mut places: Vec<Vec<_>> = vec![Vec::new(); book.sends.len()];
    for (number, send) in book.sends.iter().enumerate() {
        places[number].extend(send.place);
    }
    let unknown = |value: ValueNo| book.sends[value].outcome == Step::Info;
    for &(queue, offset, value) in book.read.iter().filter(|read| unknown(read.2)) {
        places[value].push((queue, offset));
    }
    for read in &book.final_reads {
        for &(offset, value) in read.values.iter().filter(|value| unknown(value.1)) {
            places[value].push((read.queue, offset));
        }
    }
    for places in &mut places {
        places.sort_unstable();
        places.dedup();
    }
    places
}
