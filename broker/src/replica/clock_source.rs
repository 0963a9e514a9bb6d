//! The clocks of this machine, read for the leader clock. The one place below the edges that asks
//! what time it is.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::clock::{ClockAlarm, LeaderClock, Reading};

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

    #[allow(clippy::disallowed_methods, reason = "the edge where the wall clock comes in")]
    fn reading(&self) -> Reading {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Reading {
            wall_ms: u64::try_from(wall.as_millis()).unwrap_or(u64::MAX),
            monotonic: self.started.elapsed(),
        }
    }

    /// Starts the clock at an election; says how far behind it the log's highest clock lies, in ms.
    pub(crate) fn elect(&self, highest_ms: u64) -> u64 {
        let reading = self.reading();
        let mut clock = LeaderClock::elected(highest_ms, reading, self.step_max);
        let (now_ms, _) = clock.read(reading);
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
