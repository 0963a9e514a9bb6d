//! The history by subject: calls paired with their outcomes, names as small numbers.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::{Class, Report};
use crate::event::{Event, Process, Queue, Seen, Step, What};

/// Index into the history.
pub(super) type At = usize;
/// Index into [`Book::queues`].
pub(super) type QueueNo = usize;
/// Index into [`Book::sends`]; values that nobody sent have one too.
pub(super) type ValueNo = usize;

/// One value and its only send.
#[derive(Debug)]
pub(super) struct Send<'a> {
    pub(super) value: &'a str,
    pub(super) process: Process,
    /// Unset: nobody sent it.
    pub(super) invoked: Option<At>,
    /// Unset: it never ended.
    pub(super) ended: Option<At>,
    pub(super) outcome: Step,
    pub(super) place: Option<(QueueNo, u64)>,
    pub(super) repeats: bool,
}

impl Send<'_> {
    pub(super) fn acknowledged(&self) -> bool {
        self.outcome == Step::Ok
    }
}

/// A call other than a send, that ended well.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) invoked: At,
    pub(super) ended: At,
    pub(super) what: &'a What,
}

#[derive(Debug)]
pub(super) struct FinalRead<'a> {
    pub(super) node: &'a str,
    pub(super) queue: QueueNo,
    pub(super) min: u64,
    /// Offsets and values, as read.
    pub(super) values: Vec<(u64, ValueNo)>,
}

#[derive(Debug)]
pub(super) struct Book<'a> {
    pub(super) events: &'a [Event],
    pub(super) queues: Vec<&'a Queue>,
    pub(super) sends: Vec<Send<'a>>,
    /// Reads by consumers: queue, offset, value.
    pub(super) read: Vec<(QueueNo, u64, ValueNo)>,
    pub(super) final_reads: Vec<FinalRead<'a>>,
    /// Offset queries and commits in the order of their ends.
    pub(super) calls: Vec<Call<'a>>,
    /// Commits, however they ended: the invoking line of each.
    pub(super) commits: Vec<&'a What>,
    queue_numbers: HashMap<&'a Queue, QueueNo>,
    values: HashMap<&'a str, ValueNo>,
}

impl<'a> Book<'a> {
    pub(super) fn read(events: &'a [Event], report: &mut Report) -> Self {
        let mut book = Self {
            events,
            queues: Vec::new(),
            sends: Vec::new(),
            read: Vec::new(),
            final_reads: Vec::new(),
            calls: Vec::new(),
            commits: Vec::new(),
            queue_numbers: HashMap::new(),
            values: HashMap::new(),
        };
        let mut open: HashMap<Process, At> = HashMap::new();
        for (at, event) in events.iter().enumerate() {
            if at > 0 && events[at - 1].t_ns > event.t_ns {
                report.add(Class::Malformed, format!("line {at} is from before the one above it"));
            }
            match &event.what {
                What::FinalRead { node, queue, min, seen } => {
                    let queue = book.queue_no(queue);
                    let values = book.seen(queue, seen, node, report);
                    book.final_reads.push(FinalRead { node, queue, min: *min, values });
                }
                What::Send { .. }
                | What::Read { .. }
                | What::MaxOffset { .. }
                | What::Commit { .. }
                | What::Committed { .. } => book.call(at, event, &mut open, report),
                What::Skipped { .. }
                | What::Compared { .. }
                | What::Digest { .. }
                | What::Leader { .. }
                | What::Fault { .. }
                | What::FaultEnds { .. }
                | What::Healed { .. } => {}
            }
        }
        book.count(report);
        book
    }

    fn call(
        &mut self,
        at: At,
        event: &'a Event,
        open: &mut HashMap<Process, At>,
        report: &mut Report,
    ) {
        if event.step == Step::Invoke {
            match open.entry(event.process) {
                Entry::Occupied(_) => {
                    let text = format!("line {at}: process {} is not done", event.process);
                    report.add(Class::Malformed, text);
                }
                Entry::Vacant(free) => {
                    free.insert(at);
                }
            }
            self.invoke(at, event, report);
            return;
        }
        let Some(invoked) = open.remove(&event.process) else {
            report.add(Class::Malformed, format!("line {at} ends what never began"));
            return;
        };
        if let What::Send { .. } = event.what {
            self.end_send(at, event, report);
        } else if event.step == Step::Ok {
            if let What::Read { queue, seen } = &event.what {
                let queue = self.queue_no(queue);
                let values = self.seen(queue, seen, "a consumer", report);
                let read = values.into_iter().map(|(offset, value)| (queue, offset, value));
                self.read.extend(read);
            }
            self.calls.push(Call { invoked, ended: at, what: &event.what });
        }
    }

    fn invoke(&mut self, at: At, event: &'a Event, report: &mut Report) {
        match &event.what {
            What::Send { value, repeats, .. } => {
                let number = self.value_no(value);
                let send = &mut self.sends[number];
                if send.invoked.is_some() {
                    report.add(Class::Malformed, format!("line {at}: {value} was sent before"));
                }
                send.process = event.process;
                send.invoked = Some(at);
                send.repeats = *repeats;
            }
            What::Commit { .. } => self.commits.push(&event.what),
            _ => {}
        }
    }

    fn end_send(&mut self, at: At, event: &'a Event, report: &mut Report) {
        let What::Send { value, queue, offset, degraded, .. } = &event.what else { return };
        let place = match (queue, offset) {
            (Some(queue), Some(offset)) => Some((self.queue_no(queue), *offset)),
            _ => None,
        };
        let number = self.value_no(value);
        let send = &mut self.sends[number];
        if send.process != event.process || send.invoked.is_none() || send.ended.is_some() {
            report.add(Class::Malformed, format!("line {at} ends another send than began"));
            return;
        }
        if event.step == Step::Ok && place.is_none() {
            report.add(Class::Malformed, format!("line {at}: {value} was stored nowhere"));
        }
        send.ended = Some(at);
        send.outcome = event.step;
        send.place = if event.step == Step::Ok { place } else { None };
        report.counts.degraded += usize::from(event.step == Step::Ok && *degraded);
    }

    fn seen(
        &mut self,
        queue: QueueNo,
        seen: &'a [Seen],
        by: &str,
        report: &mut Report,
    ) -> Vec<(u64, ValueNo)> {
        for bad in seen.iter().filter(|seen| !seen.intact) {
            let (queue, offset) = (self.queues[queue], bad.offset);
            let text = format!("{by} read other bytes at {offset} of {queue}: {}", bad.value);
            report.add(Class::Corrupt, text);
        }
        seen.iter().map(|seen| (seen.offset, self.value_no(&seen.value))).collect()
    }

    pub(super) fn queue_no(&mut self, queue: &'a Queue) -> QueueNo {
        *self.queue_numbers.entry(queue).or_insert_with(|| {
            self.queues.push(queue);
            self.queues.len() - 1
        })
    }

    pub(super) fn find_queue(&self, queue: &Queue) -> Option<QueueNo> {
        self.queue_numbers.get(queue).copied()
    }

    fn value_no(&mut self, value: &'a str) -> ValueNo {
        *self.values.entry(value).or_insert_with(|| {
            self.sends.push(Send {
                value,
                process: 0,
                invoked: None,
                ended: None,
                outcome: Step::Info,
                place: None,
                repeats: false,
            });
            self.sends.len() - 1
        })
    }

    fn count(&self, report: &mut Report) {
        for send in self.sends.iter().filter(|send| send.invoked.is_some()) {
            match send.outcome {
                Step::Ok => report.counts.acknowledged += 1,
                Step::Fail => report.counts.refused += 1,
                Step::Info | Step::Invoke => report.counts.unknown += 1,
            }
        }
        report.counts.read = self.read.len();
    }
}
