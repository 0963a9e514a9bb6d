//! Real processes, one module per behaviour.

mod durability;
