//! The leader clock: the one source of time in the log. Pure: readings of the wall and the
//! monotonic clock come in as arguments.
//!
//! It never goes back, so no store time does. A wall clock that steps back an hour makes it run at
//! half speed until the wall has caught up, so leases still expire; one that jumps a year moves it
//! by `step_max` only, so nothing is trimmed early.

use std::time::Duration;

/// What the two clocks of the machine say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Ms since the epoch.
    pub wall_ms: u64,
    /// Since any fixed point of this process.
    pub monotonic: Duration,
}

/// Something an operator must hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockAlarm {
    /// The wall clock jumped ahead; the leader clock follows by `followed_ms` of it.
    SteppedForward { step_ms: u64, followed_ms: u64 },
    /// The wall clock went back; the leader clock runs at half speed until it is caught up with.
    SteppedBack { ahead_ms: u64 },
}

/// Drives entry clocks while a node leads.
#[derive(Clone, Debug)]
pub struct LeaderClock {
    /// µs since the epoch, so that half speed loses nothing between two readings.
    now_us: u64,
    read_at: Duration,
    /// How much of the wall clock's time is disbelieved.
    disbelieved_us: u64,
    step_max_us: u64,
    alarmed_back: bool,
}

impl LeaderClock {
    /// Starts at an election: not before `highest_ms`, the highest clock in the log.
    pub fn elected(highest_ms: u64, reading: Reading, step_max: Duration) -> Self {
        Self {
            now_us: highest_ms.max(reading.wall_ms).saturating_mul(1000),
            read_at: reading.monotonic,
            disbelieved_us: 0,
            step_max_us: u64::try_from(step_max.as_micros()).unwrap_or(u64::MAX),
            alarmed_back: false,
        }
    }

    /// The clock now, ms since the epoch: never less than before.
    pub fn read(&mut self, reading: Reading) -> (u64, Option<ClockAlarm>) {
        let elapsed = reading.monotonic.saturating_sub(self.read_at);
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        self.read_at = self.read_at.max(reading.monotonic);
        let wall_us = reading.wall_ms.saturating_mul(1000);
        let full_speed_us = self.now_us.saturating_add(elapsed_us);
        self.disbelieved_us = self.disbelieved_us.min(wall_us.saturating_sub(self.now_us));
        let believed_us = wall_us.saturating_sub(self.disbelieved_us);
        let alarm = if believed_us < full_speed_us {
            self.fall_back_to(believed_us, elapsed_us)
        } else {
            self.alarmed_back = false;
            self.follow(full_speed_us, believed_us)
        };
        (self.now_us / 1000, alarm)
    }

    /// The wall is behind: half speed, but not less than the wall itself asks for.
    fn fall_back_to(&mut self, believed_us: u64, elapsed_us: u64) -> Option<ClockAlarm> {
        self.now_us = believed_us.max(self.now_us.saturating_add(elapsed_us / 2));
        let ahead_us = self.now_us - believed_us;
        let stepped = ahead_us > self.step_max_us;
        let alarm = (stepped && !self.alarmed_back)
            .then_some(ClockAlarm::SteppedBack { ahead_ms: ahead_us / 1000 });
        self.alarmed_back = stepped;
        alarm
    }

    /// The wall is ahead: by its usual drift, or by a step of which only a part is believed.
    fn follow(&mut self, full_speed_us: u64, believed_us: u64) -> Option<ClockAlarm> {
        let step_us = believed_us - full_speed_us;
        let followed_us = step_us.min(self.step_max_us);
        self.now_us = full_speed_us + followed_us;
        self.disbelieved_us = self.disbelieved_us.saturating_add(step_us - followed_us);
        (step_us > self.step_max_us).then_some(ClockAlarm::SteppedForward {
            step_ms: step_us / 1000,
            followed_ms: followed_us / 1000,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;
    const YEAR_MS: u64 = 365 * 24 * HOUR_MS;
    const START_MS: u64 = 1_800_000_000_000;

    fn at(wall_ms: u64, monotonic_ms: u64) -> Reading {
        Reading { wall_ms, monotonic: Duration::from_millis(monotonic_ms) }
    }

    fn started() -> LeaderClock {
        LeaderClock::elected(0, at(START_MS, 0), Duration::from_secs(10))
    }

    #[test]
    fn starts_at_the_larger_of_log_and_wall() {
        let mut behind = LeaderClock::elected(START_MS + 5, at(START_MS, 0), Duration::ZERO);
        assert_eq!(behind.read(at(START_MS, 0)).0, START_MS + 5);
        assert_eq!(started().read(at(START_MS, 0)), (START_MS, None));
    }

    #[test]
    fn keeps_with_a_wall_that_drifts() {
        let mut clock = started();
        assert_eq!(clock.read(at(START_MS + 1_003, 1_000)), (START_MS + 1_003, None));
        assert_eq!(clock.read(at(START_MS + 2_001, 2_000)), (START_MS + 2_001, None));
    }

    #[test]
    fn wall_an_hour_back_means_half_speed_until_caught_up() {
        let mut clock = started();
        let (now_ms, alarm) = clock.read(at(START_MS - HOUR_MS, 0));
        assert_eq!(now_ms, START_MS);
        assert_eq!(alarm, Some(ClockAlarm::SteppedBack { ahead_ms: HOUR_MS }));
        let (now_ms, alarm) = clock.read(at(START_MS - HOUR_MS + 60_000, 60_000));
        assert_eq!((now_ms, alarm), (START_MS + 30_000, None), "alarmed once");
        // After two hours of real time the wall is an hour ahead of the start, and so is the clock.
        let (now_ms, _) = clock.read(at(START_MS + HOUR_MS, 2 * HOUR_MS));
        assert_eq!(now_ms, START_MS + HOUR_MS);
        let (now_ms, _) = clock.read(at(START_MS + HOUR_MS + 1_000, 2 * HOUR_MS + 1_000));
        assert_eq!(now_ms, START_MS + HOUR_MS + 1_000);
    }

    #[test]
    fn wall_a_year_ahead_moves_it_by_the_largest_step_once() {
        let mut clock = started();
        let (now_ms, alarm) = clock.read(at(START_MS + YEAR_MS, 0));
        assert_eq!(now_ms, START_MS + 10_000);
        assert_eq!(
            alarm,
            Some(ClockAlarm::SteppedForward { step_ms: YEAR_MS, followed_ms: 10_000 })
        );
        let (now_ms, alarm) = clock.read(at(START_MS + YEAR_MS + 1_000, 1_000));
        assert_eq!((now_ms, alarm), (START_MS + 11_000, None));
    }

    #[test]
    fn wall_that_comes_back_from_a_year_ahead_is_believed_again() {
        let mut clock = started();
        clock.read(at(START_MS + YEAR_MS, 0));
        // Back to true time: ten seconds ahead of it, so half speed for twenty.
        assert_eq!(clock.read(at(START_MS + 1_000, 1_000)).0, START_MS + 10_500);
        assert_eq!(clock.read(at(START_MS + 20_000, 20_000)).0, START_MS + 20_000);
        assert_eq!(clock.read(at(START_MS + 21_000, 21_000)).0, START_MS + 21_000);
    }

    #[test]
    fn never_goes_back_whatever_the_wall_does() {
        let mut clock = started();
        let mut random = fastrand::Rng::with_seed(7);
        let mut last_ms = 0;
        for tick in 0..10_000 {
            let wall_ms = random.u64(0..2 * START_MS);
            let (now_ms, _) = clock.read(at(wall_ms, tick * 3));
            assert!(now_ms >= last_ms, "{last_ms} -> {now_ms} at {wall_ms}");
            last_ms = now_ms;
        }
    }
}
