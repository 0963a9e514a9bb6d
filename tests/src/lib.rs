//! The harness: real processes on loopback, disks that lose power, and a checker of what they said.

pub mod checker;
pub mod cluster;
pub mod event;
pub mod history;
pub mod link;
pub mod load;
pub mod loop_disk;
pub mod node;
pub mod run;
pub mod schema;
pub mod skip;
pub mod traffic;
pub mod watch;
