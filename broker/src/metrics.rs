//! The broker's metrics: one registry per broker, no globals.

use parking_lot::RwLock;
use prometheus_client::registry::Registry;

/// Every metric of one broker. Modules below `service` get the handles they feed, not this.
#[derive(Debug, Default)]
pub struct Metrics {
    pub registry: RwLock<Registry>,
}
