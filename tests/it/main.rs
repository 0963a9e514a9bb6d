//! Real processes, one module per behaviour.

mod abuse;
mod clock;
mod disk_full;
mod durability;
