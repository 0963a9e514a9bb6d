//! Real processes, one module per behaviour.

mod abuse;
mod disk_full;
mod durability;
