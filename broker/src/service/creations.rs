//! How fast clients may make topics and groups come into being, over all edges.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Creations of one kind on first use within a second.
pub(crate) const PER_SECOND_MAX: u32 = 50;

/// What clients created by naming it.
#[derive(Debug, Default)]
pub struct Creations {
    pub(crate) topics: Mutex<CreationRate>,
    pub(crate) groups: Mutex<CreationRate>,
}

/// Counts creations: each costs memory for as long as what was created exists.
#[derive(Debug, Default)]
pub(crate) struct CreationRate {
    /// When the current second began, and how many it had.
    second: Option<(Instant, u32)>,
}

impl CreationRate {
    /// Whether one more may be created now; counts it.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let (began, count) = match self.second {
            Some((began, count)) if now < began + Duration::from_secs(1) => (began, count),
            Some(_) | None => (now, 0),
        };
        let allowed = count < PER_SECOND_MAX;
        self.second = Some((began, count + u32::from(allowed)));
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creations_are_bounded_per_second() {
        let mut rate = CreationRate::default();
        let start = Instant::now();
        let allowed = (0..80).filter(|_| rate.take(start)).count();
        assert_eq!(allowed, 50);
        assert!(!rate.take(start + Duration::from_millis(999)));
        assert!(rate.take(start + Duration::from_secs(1)));
    }
}
