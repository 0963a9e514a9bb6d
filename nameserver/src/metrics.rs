//! The nameserver's metrics: one registry per nameserver, no globals.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct QueryLabels {
    /// found | not_found | unavailable | refused
    pub(crate) answer: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RpcLabels {
    pub(crate) rpc: &'static str,
}

#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) route_queries: Family<QueryLabels, Counter>,
    pub(crate) forwarded: Family<RpcLabels, Counter>,
    brokers: Gauge,
    topics: Gauge,
}

impl Metrics {
    pub(crate) fn new(cluster: &str, node: &str) -> Self {
        let label = |name: &'static str, value: &str| (name.into(), value.to_owned().into());
        let labels =
            [label("cluster", cluster), label("node_type", "nameserver"), label("node_id", node)];
        let mut registry = Registry::with_labels(labels.into_iter());
        let route_queries = Family::<QueryLabels, Counter>::default();
        let forwarded = Family::<RpcLabels, Counter>::default();
        let (brokers, topics) = (Gauge::default(), Gauge::default());
        let help = "Route queries by what was answered";
        registry.register("drumlin_route_queries", help, route_queries.clone());
        let help = "Client calls sent on to a broker";
        registry.register("drumlin_forwarded_calls", help, forwarded.clone());
        registry.register("drumlin_registered_brokers", "Live registrations", brokers.clone());
        registry.register("rocketmq_topic_number", "Topics that are known", topics.clone());
        let started = Gauge::<i64>::default();
        started.set(epoch_seconds());
        let help = "When the process began";
        registry.register_with_unit("process_start_time", help, Unit::Seconds, started);
        Self { registry, route_queries, forwarded, brokers, topics }
    }

    pub(crate) fn queried(&self, answer: &'static str) {
        self.route_queries.get_or_create(&QueryLabels { answer }).inc();
    }

    pub(crate) fn forwards(&self, rpc: &'static str) {
        self.forwarded.get_or_create(&RpcLabels { rpc }).inc();
    }

    /// The metrics as OpenMetrics text.
    pub(crate) fn render(
        &self,
        (brokers, topics): (usize, usize),
    ) -> Result<String, std::fmt::Error> {
        self.brokers.set(i64::try_from(brokers).unwrap_or(i64::MAX));
        self.topics.set(i64::try_from(topics).unwrap_or(i64::MAX));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[allow(clippy::disallowed_methods, reason = "the start time is told, nothing is decided by it")]
fn epoch_seconds() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
