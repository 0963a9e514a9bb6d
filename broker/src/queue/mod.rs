//! Queues as projections of the log: derived, always rebuildable.

pub mod blocks;
mod directory;
pub mod index;
mod page;
pub mod rebuild;
