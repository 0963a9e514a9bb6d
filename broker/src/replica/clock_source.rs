//! The clocks of this machine, read for the leader clock. The one place below the edges that asks
//! what time it is.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::clock::{ClockAlarm, LeaderClock, Reading};

/// What the wall clock of this machine says, ms since the epoch.
#[allow(clippy::disallowed_methods, reason = "the edge where the wall clock comes in")]
pub(crate) fn wall_ms() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)
}

/// Of an even number the earlier one of the two in the middle.
fn median_ms(own_ms: u64, mut others_ms: Vec<u64>) -> u64 {
    others_ms.push(own_ms);
    others_ms.sort_unstable();
    others_ms.get((others_ms.len() - 1) / 2).copied().unwrap_or(own_ms)
}

/// The leader clock of this node, running while it leads.
#[derive(Debug)]
pub(crate) struct ClockSource {
    started: Instant,
    step_max: Duration,
    leader: Mutex<Option<LeaderClock>>,
}

impl ClockSource {
    pub(crate) fn new(step_max: Duration) -> Self {
        Self { started: Instant::now(), step_max, leader: Mutex::new(None) }
    }

    fn reading(&self) -> Reading {
        Reading { wall_ms: wall_ms(), monotonic: self.started.elapsed() }
    }

    /// Starts the clock at an election, at the log's highest or the median of all walls, whichever
    /// is later; says how far behind it the log's highest clock lies, in ms. `others_ms` is what
    /// the walls of other members say.
    pub(crate) fn elect(&self, highest_ms: u64, others_ms: Vec<u64>) -> u64 {
        let reading = self.reading();
        let median = Reading { wall_ms: median_ms(reading.wall_ms, others_ms), ..reading };
        let mut clock = LeaderClock::elected(highest_ms, median, self.step_max);
        let (now_ms, _) = clock.read(median);
        *self.leader.lock() = Some(clock);
        if highest_ms == 0 { 0 } else { now_ms.saturating_sub(highest_ms) }
    }

    /// This node no longer leads.
    pub(crate) fn resign(&self) {
        *self.leader.lock() = None;
    }

    /// The clock for the next entry; the wall's where this node does not lead.
    pub(crate) fn entry_ms(&self) -> u64 {
        let reading = self.reading();
        let mut leader = self.leader.lock();
        let Some(clock) = leader.as_mut() else { return reading.wall_ms };
        let (now_ms, alarm) = clock.read(reading);
        drop(leader);
        match alarm {
            Some(ClockAlarm::SteppedForward { step_ms, followed_ms }) => tracing::warn!(
                step_ms,
                followed_ms,
                "the wall clock stepped forward; entry times follow by a part of it only"
            ),
            Some(ClockAlarm::SteppedBack { ahead_ms }) => tracing::warn!(
                ahead_ms,
                "the wall clock stepped back; entry times run at half speed until it caught up"
            ),
            None => {}
        }
        now_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wall_that_is_years_off_does_not_set_the_clock_of_three() {
        const YEAR_MS: u64 = 365 * 24 * 3_600_000;
        let now_ms = 1_800_000_000_000;
        assert_eq!(median_ms(now_ms + YEAR_MS, vec![now_ms, now_ms + 3]), now_ms + 3);
        assert_eq!(median_ms(now_ms - YEAR_MS, vec![now_ms, now_ms + 3]), now_ms);
        assert_eq!(median_ms(now_ms + YEAR_MS, vec![now_ms]), now_ms);
        assert_eq!(median_ms(now_ms, Vec::new()), now_ms);
    }
}
