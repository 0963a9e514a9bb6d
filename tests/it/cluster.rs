//! Replicated groups of real processes under load and faults: nothing acknowledged is lost, nothing
//! forbidden is seen, and what is left goes on. Each test is a run with a verdict of its own.

use std::time::Duration;

mod deferred;
mod disks;
mod gate;
mod gone_back;
mod kills;
mod leading;
mod members;
mod operation;
mod partitions;
mod pauses;
mod power;

/// A group that lost one member acknowledges again within so long, on a busy machine and in a
/// build without optimisation.
const GOES_ON_WITHIN: Duration = Duration::from_secs(10);
/// Acknowledged sends that make a fault window worth something.
const IN_FAULT: usize = 20;
/// Of one test, where it repeats its fault `cycles` times.
fn limit(cycles: usize) -> Duration {
    Duration::from_secs(240) + Duration::from_secs(60) * u32::try_from(cycles).unwrap_or(1_000)
}
