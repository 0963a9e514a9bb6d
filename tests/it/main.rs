//! Real processes, one module per behaviour.

mod abuse;
mod cli;
mod clock;
mod disk_full;
mod durability;
