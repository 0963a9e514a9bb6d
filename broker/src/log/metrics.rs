//! What the log measures. Registered by whoever has the registry.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

/// Handles that the log feeds; clones share their values.
#[derive(Clone, Debug)]
pub struct LogMetrics {
    /// From `append` to its callback.
    pub append_seconds: Histogram,
    pub fsync_seconds: Histogram,
    /// Bytes that one sync covered.
    pub fsync_bytes: Histogram,
    /// Appends that one sync completed.
    pub group_commit_waiters: Histogram,
    /// Frames that the disk does not hold yet.
    pub tail_bytes: Gauge,
    pub quarantined_entries: Counter,
}

impl Default for LogMetrics {
    fn default() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.000_05, 2.0, 18));
        Self {
            append_seconds: seconds(),
            fsync_seconds: seconds(),
            fsync_bytes: Histogram::new(exponential_buckets(256.0, 4.0, 10)),
            group_commit_waiters: Histogram::new(exponential_buckets(1.0, 2.0, 12)),
            tail_bytes: Gauge::default(),
            quarantined_entries: Counter::default(),
        }
    }
}
