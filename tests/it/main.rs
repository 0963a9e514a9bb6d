//! Real processes, one module per behaviour.

mod abuse;
mod cli;
mod clock;
mod cluster;
mod compose;
mod dev_cluster;
mod disk_full;
mod durability;
