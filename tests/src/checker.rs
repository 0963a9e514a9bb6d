//! Judges a history: pure, no matter where its lines come from.
//!
//! A run is *valid* only if nothing forbidden is in it and it could have found something: every
//! planned fault was seen, sends went on meanwhile, leaders changed, all replicas were read.

use std::collections::BTreeMap;
use std::fmt;

use crate::event::Event;

mod book;
mod content;
mod faults;
mod offsets;
mod order;
#[cfg(test)]
mod tests;

use book::Book;

/// What must never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The lines contradict themselves: an error of the harness.
    Malformed,
    /// Acknowledged, and not there in the end.
    Lost,
    /// Never sent, or refused, and there.
    Phantom,
    /// Not the bytes that were sent.
    Corrupt,
    /// One offset, two values.
    InconsistentOffset,
    /// One value at two offsets, although its send was told its outcome.
    Duplicate,
    /// Offsets of a queue are not dense.
    Gap,
    /// Sends of one process, one after the other, in another order.
    Reorder,
    /// A send that had ended before another began lies behind it.
    RealTime,
    /// The end of a queue went back, or excludes what was acknowledged before.
    MaxOffset,
    /// A consumer had it, and it is gone.
    Vanished,
    /// A reader was not given a record that lies between two others.
    Skipped,
    /// A committed offset went back, or beyond all that was committed.
    Committed,
    /// Replicas differ.
    Divergence,
    /// Two leaders in one term.
    TwoLeaders,
    /// Sends did not succeed in time.
    Liveness,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub class: Class,
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.class, self.text)
    }
}

/// What makes a run worth something.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Faults by name, and how often each must have been seen.
    pub faults: BTreeMap<String, usize>,
    /// Acknowledged sends while a fault was there.
    pub sends_in_faults_min: usize,
    /// Over all groups.
    pub leader_changes_min: usize,
    /// Data replicas of each broker group: every queue is read from each of them.
    pub replicas: BTreeMap<String, Vec<String>>,
    /// Pairs of members of each broker group whose logs were compared in the end.
    pub logs_compared_min: usize,
}

impl Plan {
    pub fn fault(mut self, name: &str, times: usize) -> Self {
        *self.faults.entry(name.to_owned()).or_default() += times;
        self
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Valid,
    Invalid,
    /// Nothing forbidden was seen, and too little was seen at all.
    Unknown,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub acknowledged: usize,
    pub degraded: usize,
    pub refused: usize,
    pub unknown: usize,
    pub read: usize,
    pub in_faults: usize,
    pub leader_changes: usize,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub violations: Vec<Violation>,
    /// Why the run proves too little.
    pub doubts: Vec<String>,
    pub counts: Counts,
}

impl Report {
    pub fn verdict(&self) -> Verdict {
        match (self.violations.is_empty(), self.doubts.is_empty()) {
            (false, _) => Verdict::Invalid,
            (true, false) => Verdict::Unknown,
            (true, true) => Verdict::Valid,
        }
    }

    pub fn has(&self, class: Class) -> bool {
        self.violations.iter().any(|violation| violation.class == class)
    }

    fn add(&mut self, class: Class, text: String) {
        self.violations.push(Violation { class, text });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}: {:?}", self.verdict(), self.counts)?;
        let mut of_class: BTreeMap<Class, Vec<&Violation>> = BTreeMap::new();
        for violation in &self.violations {
            of_class.entry(violation.class).or_default().push(violation);
        }
        for (class, violations) in of_class {
            writeln!(f, "{class:?}, {} times:", violations.len())?;
            for violation in violations.iter().take(5) {
                writeln!(f, "  {}", violation.text)?;
            }
        }
        for doubt in &self.doubts {
            writeln!(f, "proves too little: {doubt}")?;
        }
        Ok(())
    }
}

pub fn check(events: &[Event], plan: &Plan) -> Report {
    let mut report =
        Report { violations: Vec::new(), doubts: Vec::new(), counts: Counts::default() };
    let book = Book::read(events, &mut report);
    content::check(&book, plan, &mut report);
    order::check(&book, &mut report);
    offsets::check(&book, &mut report);
    faults::check(&book, plan, &mut report);
    report
}
