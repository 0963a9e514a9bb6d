//! The order of items that must not overtake each other, kept over failures.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use crate::position::Term;

/// Items of which none is proposed once an earlier one was not stored, or may not be: keeps the
/// order of a queue over retries. Whoever goes on after a failure takes a new chain.
#[derive(Clone, Debug)]
pub struct Chain {
    links: Arc<AtomicU64>,
    broken: Arc<Broken>,
}

/// What ends a chain.
#[derive(Debug)]
struct Broken {
    /// Number of the first link that was not stored.
    at: AtomicU64,
    /// The term all its items are proposed in; 0 before the first. What becomes of the last ones of
    /// a term may be known only after the next term has begun.
    term: AtomicU64,
}

impl Default for Chain {
    fn default() -> Self {
        let broken = Broken { at: AtomicU64::new(u64::MAX), term: AtomicU64::new(0) };
        Self { links: Arc::default(), broken: Arc::new(broken) }
    }
}

impl Chain {
    pub(super) fn next_link(&self) -> Link {
        Link { number: self.links.fetch_add(1, Relaxed), broken: Arc::clone(&self.broken) }
    }

    /// Breaks it for whatever is proposed from now on.
    pub fn break_here(&self) {
        self.next_link().break_chain();
    }

    /// Whether it is unbroken and none of its links waits: a new one would do as well.
    pub fn is_idle(&mut self) -> bool {
        Arc::get_mut(&mut self.broken).is_some_and(|broken| *broken.at.get_mut() == u64::MAX)
    }
}

/// One item's place in its chain.
#[derive(Debug)]
pub(super) struct Link {
    number: u64,
    broken: Arc<Broken>,
}

impl Link {
    pub(super) fn break_chain(&self) {
        self.broken.at.fetch_min(self.number, Relaxed);
    }

    pub(super) fn follows_a_break(&self) -> bool {
        self.broken.at.load(Relaxed) < self.number
    }

    /// Whether it may be proposed in a term.
    pub(super) fn holds_in(&self, term: Term) -> bool {
        let begun = self.broken.term.compare_exchange(0, term.get(), Relaxed, Relaxed);
        begun.is_ok() || begun == Err(term.get())
    }
}
