//! `drumlin bench`: measures, and says in which units.

use std::time::Duration;

use clap::{Args, Subcommand};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::cli::{Global, NamesrvShort};
use crate::config::parse_duration;
use crate::failure::Failure;

mod limits;
mod produce;

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Acknowledged sends of SDK producers
    Produce(produce::Produce),
    /// What the disk gives: overwrites with fdatasync
    Limits(limits::Limits),
}

impl Bench {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let global = global.clone().with(self.short.short.as_ref());
        match &self.action {
            Action::Produce(produce) => produce.run(&global),
            Action::Limits(limits) => limits.run(&global),
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text, "s")
}

/// Times of single operations, in microseconds.
#[derive(Clone, Debug)]
struct Latencies(Histogram<u64>);

impl Latencies {
    /// Three digits from 1 us to ten minutes.
    fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, 600_000_000, 3);
        Self(histogram.expect("1 is below 600,000,000 and three digits are allowed"))
    }

    fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    fn add(&mut self, other: &Self) {
        // Both have the same bounds, so nothing can be out of range.
        if let Err(error) = self.0.add(&other.0) {
            tracing::error!(%error, "latencies cannot be added");
        }
    }

    fn json(&self) -> Value {
        json!({
            "min": self.0.min(),
            "mean": rounded(self.0.mean()),
            "p50": self.0.value_at_quantile(0.5),
            "p90": self.0.value_at_quantile(0.9),
            "p99": self.0.value_at_quantile(0.99),
            "p999": self.0.value_at_quantile(0.999),
            "max": self.0.max(),
        })
    }

    fn p50(&self) -> u64 {
        self.0.value_at_quantile(0.5)
    }

    fn p99(&self) -> u64 {
        self.0.value_at_quantile(0.99)
    }
}

/// For people: one digit behind the point.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Per second.
fn rate(count: u64, took: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact above 2^53")]
    let count = count as f64;
    rounded(count / took.as_secs_f64().max(1e-9))
}

/// Of 1,000,000 bytes, per second.
fn mb_rate(bytes: u64, took: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact above 2^53")]
    let mb = bytes as f64 / 1e6;
    (mb / took.as_secs_f64().max(1e-9) * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second() {
        assert_eq!(rate(500, Duration::from_millis(250)).to_string(), "2000");
        assert_eq!(mb_rate(1_024_000, Duration::from_secs(2)).to_string(), "0.512");
    }

    #[test]
    fn latencies_are_microseconds() {
        let mut latencies = Latencies::new();
        (1..=100).for_each(|ms| latencies.record(Duration::from_millis(ms)));
        let p50 = latencies.p50();
        assert!((50_000..51_000).contains(&p50), "{p50}");
    }
}
