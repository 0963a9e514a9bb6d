//! Since when the group has been paired or alone, as this node has seen it.

use std::mem::discriminant;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::replica::gate::{GateView, Mode};

/// The time of the last change; clones share it.
#[derive(Clone, Debug)]
pub struct CopiesSince {
    ms: Arc<AtomicU64>,
}

#[allow(clippy::disallowed_methods, reason = "a time for people, that nothing is decided by")]
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl CopiesSince {
    /// Follows the gate until `stop`, tells the log of its changes and counts its openings.
    pub fn follow(
        mut gate: watch::Receiver<GateView>,
        openings: Counter,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let ms = Arc::new(AtomicU64::new(now_ms()));
        let told = Self { ms: Arc::clone(&ms) };
        let following = async move {
            let mut mode = gate.borrow_and_update().mode;
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = gate.changed() => if changed.is_err() { return },
                }
                let view = gate.borrow_and_update().clone();
                if discriminant(&view.mode) == discriminant(&mode) {
                    continue;
                }
                mode = view.mode;
                ms.store(now_ms(), Ordering::Relaxed);
                match (mode, view.term) {
                    (Mode::Alone { at }, Some(term)) => {
                        openings.inc();
                        tracing::warn!(
                            %at, %term, gone = ?view.gone,
                            "DEGRADED: this node goes on alone, acknowledged messages have one copy"
                        );
                    }
                    (Mode::Paired, Some(term)) => {
                        tracing::info!(%term, "paired: acknowledged messages have two copies");
                    }
                    // A follower learns it from the log.
                    (Mode::Alone { .. } | Mode::Paired, None) => {}
                }
            }
        };
        (told, following)
    }

    /// Since the epoch.
    pub fn ms(&self) -> i64 {
        i64::try_from(self.ms.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
    }
}
