//! The HTTP port: is it alive, is it ready, how is it doing. Changes nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::metrics::reading::Reading;
use crate::replica::{RaftStatus, Replica};
use crate::retention::{DiskThresholds, DiskWatch};
use crate::standing::{self, Copies, GroupStanding};

mod gauges;
mod listener;

use listener::Bounded;

/// OpenMetrics, as the encoder writes it.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Scrapes within it show the same gauges.
const READING_AGE_MAX: Duration = Duration::from_secs(1);

/// What the port shows; clones share it.
#[derive(Clone, Debug)]
pub struct Http {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    replica: Replica,
    metrics: Arc<Metrics>,
    registered: watch::Receiver<bool>,
    stopping: CancellationToken,
    disk: parking_lot::Mutex<DiskWatch>,
    started_s: u64,
    disk_warn_percent: u8,
    reading: Mutex<Option<(Instant, Arc<Reading>)>>,
}

impl Shared {
    /// How the broker group stands, as this node sees it.
    fn group(&self) -> GroupStanding {
        let facts = standing::facts(&self.replica, self.disk_warn_percent);
        standing::judge(&facts, Instant::now())
    }
}

impl Http {
    /// `registered` as [`crate::registration::Registration::registered`] tells it. Once `stopping`
    /// is cancelled, the broker is not ready any more.
    pub fn new(
        config: &Config,
        replica: Replica,
        metrics: Arc<Metrics>,
        registered: watch::Receiver<bool>,
        stopping: CancellationToken,
    ) -> Self {
        let thresholds = DiskThresholds {
            warn_percent: config.disk_warn_percent,
            refuse_percent: config.disk_refuse_percent,
        };
        let disk = parking_lot::Mutex::new(DiskWatch::new(config.data_dir.clone(), thresholds));
        #[allow(clippy::disallowed_methods, reason = "when the process was started, for people")]
        let now = SystemTime::now();
        let started_s = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let reading = Mutex::new(None);
        Self {
            shared: Arc::new(Shared {
                replica,
                metrics,
                registered,
                stopping,
                disk,
                started_s,
                disk_warn_percent: config.disk_warn_percent,
                reading,
            }),
        }
    }

    /// Serves until `end`, which should come after everything else has stopped.
    pub async fn serve(self, listener: TcpListener, end: CancellationToken) {
        let router = Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self);
        let listener = Bounded::new(listener);
        let serving = axum::serve(listener, router).with_graceful_shutdown(end.cancelled_owned());
        if let Err(error) = serving.await {
            tracing::error!(%error, "the HTTP listener failed");
        }
    }

    /// The state now, or a moment ago.
    async fn reading(&self) -> Result<Arc<Reading>, tokio::task::JoinError> {
        let mut cached = self.shared.reading.lock().await;
        if let Some((at, reading)) = cached.as_ref()
            && at.elapsed() < READING_AGE_MAX
        {
            return Ok(Arc::clone(reading));
        }
        let shared = Arc::clone(&self.shared);
        // Looks at the disk and into the index.
        let reading = tokio::task::spawn_blocking(move || {
            let group = shared.group();
            gauges::read(&shared.replica, &shared.disk, &group, shared.started_s)
        });
        let reading = Arc::new(reading.await?);
        *cached = Some((Instant::now(), Arc::clone(&reading)));
        Ok(reading)
    }
}

/// What [`readiness`] is judged by.
#[derive(Clone, Debug, Default)]
struct Facts {
    status: RaftStatus,
    registered: bool,
    stopping: bool,
    runs_refused: Option<String>,
    /// What is acknowledged has one copy instead of two.
    alone: bool,
}

/// Ready or not, and a line for each reason or restriction.
fn readiness(facts: &Facts) -> (bool, Vec<String>) {
    let mut reasons = Vec::new();
    if facts.stopping {
        reasons.push("not ready: stopping".to_owned());
    }
    if facts.status.leader.is_none() {
        reasons.push("not ready: the broker group has no leader".to_owned());
    }
    if !facts.registered {
        reasons.push("not ready: not registered with any nameserver since the start".to_owned());
    }
    let ready = reasons.is_empty();
    if ready {
        reasons.push("ok".to_owned());
    }
    if facts.alone {
        reasons.push("alone: acknowledged messages have one copy".to_owned());
    }
    if let Some(reason) = &facts.runs_refused {
        reasons.push(format!("refusing writes: {reason}"));
    }
    (ready, reasons)
}

async fn readyz(State(http): State<Http>) -> (StatusCode, String) {
    let shared = &http.shared;
    let facts = Facts {
        status: *shared.replica.raft_status().borrow(),
        registered: *shared.registered.borrow(),
        stopping: shared.stopping.is_cancelled(),
        runs_refused: shared.replica.runs_refused(),
        alone: shared.group().copies == Copies::Alone,
    };
    let (ready, lines) = readiness(&facts);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, lines.join("\n") + "\n")
}

async fn metrics(State(http): State<Http>) -> Response {
    let failed = |error: &dyn std::fmt::Display| {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
    };
    let reading = match http.reading().await {
        Ok(reading) => reading,
        Err(error) => return failed(&error),
    };
    match http.shared.metrics.scrape(&reading) {
        Ok(text) => ([(CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => failed(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Term;

    fn serving() -> Facts {
        let status = RaftStatus { term: Term::new(1), leader: Some(1), serving: true };
        Facts { status, registered: true, ..Facts::default() }
    }

    #[test]
    fn a_serving_and_registered_broker_is_ready() {
        assert_eq!(readiness(&serving()), (true, vec!["ok".to_owned()]));
    }

    #[test]
    fn every_reason_against_is_named() {
        let facts = Facts { stopping: true, ..Facts::default() };
        let (ready, reasons) = readiness(&facts);
        assert!(!ready);
        assert_eq!(reasons.len(), 3, "{reasons:?}");
        assert!(reasons[0].contains("stopping"));
        assert!(reasons[1].contains("no leader"));
        assert!(reasons[2].contains("not registered"));
    }

    #[test]
    fn alone_is_said_but_stays_ready() {
        let (ready, lines) = readiness(&Facts { alone: true, ..serving() });
        assert!(ready);
        assert_eq!(lines[1], "alone: acknowledged messages have one copy");
    }

    #[test]
    fn refusing_writes_is_said_but_stays_ready() {
        let facts = Facts { runs_refused: Some("the disk is full".into()), ..serving() };
        let (ready, lines) = readiness(&facts);
        assert!(ready);
        assert_eq!(lines[1], "refusing writes: the disk is full");
    }
}
