//! Queues as projections of the log: derived, always rebuildable.

pub mod index;
