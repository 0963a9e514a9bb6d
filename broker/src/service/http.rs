//! The HTTP port: is it alive, is it ready, how is it doing. Changes nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
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
/// Entries that a follower in step may be behind: those in flight.
const IN_FLIGHT_ENTRIES: u64 = 64;

/// The port, from before there is anything to show; clones share it.
#[derive(Clone, Debug)]
pub struct HttpPort {
    stage: Arc<OnceLock<Http>>,
    /// For whom the start waits; empty: for nobody.
    waiting: watch::Receiver<String>,
}

/// What the port of a broker that runs shows; clones share it.
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
    /// Whether all that was committed has been applied here, once since the start.
    caught_up: AtomicBool,
}

impl Shared {
    /// How the broker group stands, as this node sees it.
    fn group(&self) -> GroupStanding {
        let facts = standing::facts(&self.replica, self.disk_warn_percent);
        standing::judge(&facts, Instant::now())
    }

    fn facts(&self) -> Facts {
        let group = standing::facts(&self.replica, self.disk_warn_percent);
        let to_apply = standing::entries_to_apply(&group);
        if to_apply.is_some_and(|count| count <= IN_FLIGHT_ENTRIES) {
            self.caught_up.store(true, Ordering::Relaxed);
        }
        let (done, all) = (group.own.seed_done_bytes, group.own.seed_all_bytes);
        let standing = standing::judge(&group, Instant::now());
        let lost_witness = standing.members.iter().find(|member| member.is_lost_witness());
        Facts {
            status: *self.replica.raft_status().borrow(),
            registered: *self.registered.borrow(),
            stopping: self.stopping.is_cancelled(),
            runs_refused: self.replica.runs_refused(),
            alone: standing.copies == Copies::Alone,
            fenced: group.own.fenced,
            lost_witness: lost_witness.map(|member| member.node.name.clone()),
            caught_up: self.caught_up.load(Ordering::Relaxed),
            to_apply,
            seeding: (all > 0).then_some((done, all)),
        }
    }
}

impl HttpPort {
    /// `waiting`: for whom the start waits, as [`crate::broker::Broker::start`] tells it.
    pub fn new(waiting: watch::Receiver<String>) -> Self {
        Self { stage: Arc::default(), waiting }
    }

    /// Shows this from now on; the first call counts.
    pub fn show(&self, http: Http) {
        // A port is of one run of a broker.
        self.stage.set(http).ok();
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

    /// What there is to say before the broker runs.
    fn starting(&self) -> String {
        match self.waiting.borrow().as_str() {
            "" => "not ready: starting\n".to_owned(),
            awaited => format!("not ready: waiting for {awaited}\n"),
        }
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
                caught_up: AtomicBool::new(false),
            }),
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
    /// This node may lack entries that it had answered.
    fenced: bool,
    /// Where the witness is that lost entries which it had answered.
    lost_witness: Option<String>,
    /// Once since the start.
    caught_up: bool,
    /// Entries that the leader has committed and this node has not applied; `None`: not known.
    to_apply: Option<u64>,
    /// Bytes of how many that were copied of another node.
    seeding: Option<(u64, u64)>,
}

/// Ready or not, and a line for each reason or restriction.
fn readiness(facts: &Facts) -> (bool, Vec<String>) {
    let mut reasons = Vec::new();
    if facts.stopping {
        reasons.push("not ready: stopping".to_owned());
    }
    let behind = behind(facts);
    if facts.status.leader.is_none() {
        reasons.push("not ready: the broker group has no leader".to_owned());
    } else if let (Some(behind), false) = (&behind, facts.caught_up) {
        reasons.push(format!("not ready: {behind}"));
    }
    if !facts.registered {
        reasons.push("not ready: not registered with any nameserver since the start".to_owned());
    }
    let ready = reasons.is_empty();
    if ready {
        reasons.push("ok".to_owned());
    }
    if ready && let Some(behind) = behind {
        reasons.push(behind);
    }
    if facts.alone {
        reasons.push("alone: acknowledged messages have one copy".to_owned());
    }
    if facts.fenced {
        reasons.push(
            "fenced: acknowledged entries may be missing here; neither votes nor leads until a \
             leader has given them"
                .to_owned(),
        );
    }
    if let Some(name) = &facts.lost_witness {
        reasons.push(format!(
            "the witness at {name} lost entries and counts no more: replace it, `drumlin cluster \
             replace-witness`"
        ));
    }
    if let Some(reason) = &facts.runs_refused {
        reasons.push(format!("refusing writes: {reason}"));
    }
    (ready, reasons)
}

/// Why this node has not all that is committed; `None`: it has.
fn behind(facts: &Facts) -> Option<String> {
    match (facts.seeding, facts.to_apply) {
        (Some((done, all)), _) => {
            Some(format!("being seeded from another node, {done} of {all} bytes"))
        }
        (None, Some(count)) if count <= IN_FLIGHT_ENTRIES => None,
        (None, Some(count)) => Some(format!("catching up, {count} entries behind the leader")),
        (None, None) => Some("has not heard from the leader".to_owned()),
    }
}

async fn readyz(State(port): State<HttpPort>) -> (StatusCode, String) {
    let Some(http) = port.stage.get() else {
        return (StatusCode::SERVICE_UNAVAILABLE, port.starting());
    };
    let (ready, lines) = readiness(&http.shared.facts());
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, lines.join("\n") + "\n")
}

async fn metrics(State(port): State<HttpPort>) -> Response {
    let Some(http) = port.stage.get() else {
        return (StatusCode::SERVICE_UNAVAILABLE, port.starting()).into_response();
    };
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
        let to_apply = Some(0);
        Facts { status, registered: true, caught_up: true, to_apply, ..Facts::default() }
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
    fn a_follower_is_ready_once_it_has_caught_up_and_stays_so() {
        let told = |facts: Facts| readiness(&facts).1.join(", ");
        let starting = Facts { caught_up: false, ..serving() };
        let behind = Some(IN_FLIGHT_ENTRIES + 1);
        assert_eq!(told(starting.clone()), "ok");
        let catching_up = Facts { to_apply: behind, ..starting.clone() };
        assert_eq!(told(catching_up), "not ready: catching up, 65 entries behind the leader");
        let seeded = Facts { seeding: Some((5, 9)), ..starting.clone() };
        assert_eq!(told(seeded), "not ready: being seeded from another node, 5 of 9 bytes");
        let unheard = Facts { to_apply: None, ..starting };
        assert_eq!(told(unheard), "not ready: has not heard from the leader");
        let (ready, lines) = readiness(&Facts { to_apply: behind, ..serving() });
        assert!(ready, "a restart would not help");
        assert_eq!(lines[1], "catching up, 65 entries behind the leader");
    }

    #[tokio::test]
    async fn before_it_runs_the_port_says_for_whom_the_broker_waits() {
        let waiting = watch::Sender::default();
        let port = HttpPort::new(waiting.subscribe());
        let told = readyz(State(port.clone())).await;
        assert_eq!(told, (StatusCode::SERVICE_UNAVAILABLE, "not ready: starting\n".to_owned()));
        waiting.send_replace("a-0, which makes the group".to_owned());
        let told = readyz(State(port.clone())).await.1;
        assert_eq!(told, "not ready: waiting for a-0, which makes the group\n");
        assert_eq!(metrics(State(port)).await.status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn alone_is_said_but_stays_ready() {
        let (ready, lines) = readiness(&Facts { alone: true, ..serving() });
        assert!(ready);
        assert_eq!(lines[1], "alone: acknowledged messages have one copy");
    }

    #[test]
    fn what_went_back_is_said_but_stays_ready() {
        let lost_witness = Some("ns-0".to_owned());
        let (ready, lines) = readiness(&Facts { fenced: true, lost_witness, ..serving() });
        assert!(ready, "a restart would not help");
        assert!(lines[1].starts_with("fenced: acknowledged entries may be missing"), "{lines:?}");
        assert!(lines[2].starts_with("the witness at ns-0 lost entries"), "{lines:?}");
    }

    #[test]
    fn refusing_writes_is_said_but_stays_ready() {
        let facts = Facts { runs_refused: Some("the disk is full".into()), ..serving() };
        let (ready, lines) = readiness(&facts);
        assert!(ready);
        assert_eq!(lines[1], "refusing writes: the disk is full");
    }
}
