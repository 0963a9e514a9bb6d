//! The broker's metrics: one registry per broker, no globals.
//!
//! Modules feed counters and histograms through the methods of [`Metrics`]; gauges are set from a
//! [`Reading`] when somebody scrapes, so no copy of the state is kept current for them. Knows
//! neither HTTP nor the replica.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::record::RecordKind;
use parking_lot::RwLock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::command::Refusal;
use crate::log::LogMetrics;
use crate::replica::ProposeError;

pub mod labels;
pub mod reading;

use labels::{
    ClientVersion, Connected, ConsumerClient, Created, GroupLabel, MessageType, Processing,
    Processor, ProducerClient, Reason, Refused, Request, Rpc, TopicIn, TopicLabel, TopicOut,
};
use reading::{Gauges, Reading};

/// Distinct label sets that one metric with topic or group labels may have by default.
pub const SERIES_MAX: usize = 10_000;
/// Distinct (language, version) pairs and the like: clients choose them.
const CLIENT_SERIES_MAX: usize = 256;

const SIZE_BUCKETS: [f64; 6] = [1024.0, 4096.0, 524_288.0, 1_048_576.0, 2_097_152.0, 4_194_304.0];
const RPC_BUCKETS_MS: [f64; 9] = [1.0, 3.0, 5.0, 7.0, 10.0, 100.0, 1e3, 2e3, 3e3];
const CREATE_BUCKETS_MS: [f64; 5] = [10.0, 100.0, 1e3, 3e3, 5e3];
/// From 50 us, where a fast disk syncs, to the seconds of a stalled one.
pub const SECONDS_BUCKETS: [f64; 15] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 5.0,
];

/// Histograms of a family all have these buckets.
#[derive(Clone, Copy, Debug)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Histograms<L> = Family<L, Histogram, Buckets>;

/// Label sets that a family may still take.
#[derive(Debug)]
struct Room(AtomicUsize);

impl Room {
    /// `labels` if the family has them or there is room for them, else `overflow`.
    fn fit<L, M, C>(&self, family: &Family<L, M, C>, labels: L, overflow: impl FnOnce() -> L) -> L
    where
        L: Clone + std::hash::Hash + Eq,
        C: MetricConstructor<M>,
    {
        let known = family.get(&labels).is_some();
        let take = |left: usize| left.checked_sub(1);
        match known || self.0.fetch_update(Relaxed, Relaxed, take).is_ok() {
            true => labels,
            false => overflow(),
        }
    }
}

#[derive(Debug)]
struct Rooms {
    messages_in: Room,
    messages_out: Room,
    producers: Room,
    consumers: Room,
}

impl Rooms {
    fn new(series_max: usize) -> Self {
        Self {
            messages_in: Room(AtomicUsize::new(series_max)),
            messages_out: Room(AtomicUsize::new(series_max)),
            producers: Room(AtomicUsize::new(CLIENT_SERIES_MAX)),
            consumers: Room(AtomicUsize::new(series_max)),
        }
    }
}

/// Who reports: labels of every series.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cluster: String,
    /// RocketMQ's `node_id`: the broker group.
    pub broker_group: String,
    /// This node within its broker group.
    pub node: String,
}

/// Every metric of one broker.
#[derive(Debug)]
pub struct Metrics {
    /// For modules that keep metrics of their own and register them once at start.
    pub registry: RwLock<Registry>,
    series_max: usize,
    rooms: Rooms,
    messages_in: Family<TopicIn, Counter>,
    throughput_in: Family<TopicIn, Counter>,
    message_size: Histograms<TopicIn>,
    messages_out: Family<TopicOut, Counter>,
    throughput_out: Family<TopicOut, Counter>,
    rpc_latency: Histograms<Rpc>,
    request_seconds: Histograms<Request>,
    topic_create: Histograms<Created>,
    group_create: Histograms<Created>,
    refused: Family<Refused, Counter>,
    producers: Family<ProducerClient, Gauge>,
    consumers: Family<ConsumerClient, Gauge>,
    watermark: Family<Processing, Gauge>,
    commit_seconds: Histogram,
    elections: Counter,
    gauges: Gauges,
}

impl Default for Metrics {
    fn default() -> Self {
        let identity = Identity {
            cluster: "drumlin".into(),
            broker_group: "broker-a".into(),
            node: "broker-a-0".into(),
        };
        Self::new(&identity, SERIES_MAX)
    }
}

impl Metrics {
    pub fn new(identity: &Identity, series_max: usize) -> Self {
        let common = [
            ("cluster", identity.cluster.clone()),
            ("node_type", "broker".to_owned()),
            ("node_id", identity.broker_group.clone()),
            ("replica", identity.node.clone()),
        ];
        let registry = Registry::with_labels(common.into_iter().map(|(k, v)| (k.into(), v.into())));
        let metrics = Self {
            registry: RwLock::new(registry),
            series_max,
            rooms: Rooms::new(series_max),
            messages_in: Family::default(),
            throughput_in: Family::default(),
            message_size: Family::new_with_constructor(Buckets(&SIZE_BUCKETS)),
            messages_out: Family::default(),
            throughput_out: Family::default(),
            rpc_latency: Family::new_with_constructor(Buckets(&RPC_BUCKETS_MS)),
            request_seconds: Family::new_with_constructor(Buckets(&SECONDS_BUCKETS)),
            topic_create: Family::new_with_constructor(Buckets(&CREATE_BUCKETS_MS)),
            group_create: Family::new_with_constructor(Buckets(&CREATE_BUCKETS_MS)),
            refused: Family::default(),
            producers: Family::default(),
            consumers: Family::default(),
            watermark: Family::default(),
            commit_seconds: Histogram::new(SECONDS_BUCKETS),
            elections: Counter::default(),
            gauges: Gauges::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let r = &mut *self.registry.write();
        // The encoder adds `_total` to the names of counters.
        r.register("rocketmq_messages_in", "Messages stored", self.messages_in.clone());
        r.register("rocketmq_throughput_in", "Bytes stored", self.throughput_in.clone());
        r.register("rocketmq_message_size", "Body bytes by message", self.message_size.clone());
        r.register("rocketmq_messages_out", "Messages delivered", self.messages_out.clone());
        r.register("rocketmq_throughput_out", "Bytes delivered", self.throughput_out.clone());
        r.register("rocketmq_rpc_latency", "Time of calls, ms", self.rpc_latency.clone());
        r.register(
            "rocketmq_topic_create_execution_time",
            "Time of topic creations, ms",
            self.topic_create.clone(),
        );
        r.register(
            "rocketmq_consumer_group_create_execution_time",
            "Time of consumer group creations, ms",
            self.group_create.clone(),
        );
        r.register("rocketmq_producer_connections", "Connected producers", self.producers.clone());
        r.register("rocketmq_consumer_connections", "Connected consumers", self.consumers.clone());
        r.register("rocketmq_processor_watermark", "Calls in progress", self.watermark.clone());
        r.register(
            "drumlin_request_duration_seconds",
            "Time of calls",
            self.request_seconds.clone(),
        );
        r.register("drumlin_refused", "Calls refused", self.refused.clone());
        r.register(
            "drumlin_commit_duration_seconds",
            "From proposed to committed and durable",
            self.commit_seconds.clone(),
        );
        r.register("drumlin_raft_elections", "Leaders seen", self.elections.clone());
        self.gauges.register(r);
    }

    /// Shows what is counted of replication, too; once, at start.
    pub fn register_replication(&self, gate_openings: Counter, state_mismatches: Counter) {
        let r = &mut *self.registry.write();
        r.register(
            "drumlin_gate_openings",
            "This node went on alone: acknowledged messages have one copy",
            gate_openings,
        );
        r.register(
            "drumlin_state_digest_mismatch",
            "States of other members that differ",
            state_mismatches,
        );
    }

    /// Shows what the log measures, too; once, at start.
    pub fn register_log(&self, log: &LogMetrics) {
        let r = &mut *self.registry.write();
        r.register(
            "drumlin_append_duration_seconds",
            "From append to durable",
            log.append_seconds.clone(),
        );
        r.register("drumlin_fsync_duration_seconds", "Of one sync", log.fsync_seconds.clone());
        r.register("drumlin_fsync_bytes", "Covered by one sync", log.fsync_bytes.clone());
        r.register(
            "drumlin_group_commit_waiters",
            "Appends completed by one sync",
            log.group_commit_waiters.clone(),
        );
        r.register("drumlin_log_tail_bytes", "Not on disk yet", log.tail_bytes.clone());
        r.register(
            "drumlin_quarantined_entries",
            "Entries that were cut off",
            log.quarantined_entries.clone(),
        );
    }

    /// Messages of one topic were stored: body bytes of each.
    pub fn messages_in(
        &self,
        topic: &TopicName,
        kind: RecordKind,
        sizes: impl IntoIterator<Item = u64>,
    ) {
        let message_type = MessageType(kind);
        let labels = TopicIn::new(TopicLabel::Named(topic.clone()), message_type);
        let labels = self
            .rooms
            .messages_in
            .fit(&self.messages_in, labels, || TopicIn::new(TopicLabel::Other, message_type));
        let histogram = self.message_size.get_or_create(&labels);
        let (mut count, mut bytes) = (0, 0);
        for size in sizes {
            count += 1;
            bytes += size;
            histogram.observe(approximate(size));
        }
        self.messages_in.get_or_create(&labels).inc_by(count);
        self.throughput_in.get_or_create(&labels).inc_by(bytes);
    }

    /// Messages were delivered; `retry`: not for the first time.
    pub fn messages_out(
        &self,
        topic: &TopicName,
        group: Option<&GroupName>,
        retry: bool,
        count: u64,
        bytes: u64,
    ) {
        let group = group.cloned().map_or(GroupLabel::None, GroupLabel::Named);
        let labels = TopicOut::new(TopicLabel::Named(topic.clone()), group, retry);
        let labels = self.rooms.messages_out.fit(&self.messages_out, labels, || {
            TopicOut::new(TopicLabel::Other, GroupLabel::Other, retry)
        });
        self.messages_out.get_or_create(&labels).inc_by(count);
        self.throughput_out.get_or_create(&labels).inc_by(bytes);
    }

    /// A call of `apache.rocketmq.v2` or `drumlin.v1` ended. Names come from the contract, never
    /// from a peer: `rpc("SendMessage", "OK", false, took)`.
    pub fn rpc(
        &self,
        request_code: &'static str,
        response_code: &'static str,
        long_polling: bool,
        took: Duration,
    ) {
        let labels = Rpc::new(request_code, response_code, long_polling);
        self.rpc_latency.get_or_create(&labels).observe(took.as_secs_f64() * 1e3);
        self.request_seconds
            .get_or_create(&Request { api: request_code })
            .observe(took.as_secs_f64());
    }

    /// A call was turned down for want of something that the broker should have.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&Refused { reason }).inc();
    }

    /// [`Metrics::refused`] for what the replica said; nothing where the fault is the
    /// caller's.
    pub fn propose_refused(&self, error: &ProposeError) {
        match error {
            ProposeError::Refused(
                Refusal::TooManyTopics { .. } | Refusal::TooManyGroups { .. },
            ) => self.refused(Reason::Limit),
            ProposeError::Refused(_)
            | ProposeError::OutOfOrder
            | ProposeError::FeatureLevel { .. } => {}
            ProposeError::Busy { .. } => self.refused(Reason::InFlightBytes),
            ProposeError::DiskFull(_) => self.refused(Reason::DiskFull),
            ProposeError::NotLeader { .. } => self.refused(Reason::NotLeader),
            ProposeError::Expired => self.refused(Reason::Expired),
            ProposeError::UnknownOutcome => self.refused(Reason::UnknownOutcome),
            ProposeError::TooFewCopies => self.refused(Reason::TooFewCopies),
            ProposeError::Stopped(_) => self.refused(Reason::Stopping),
        }
    }

    /// What the replica feeds: seconds from the proposal of an entry to its commit and local sync,
    /// and the leaders seen.
    pub fn of_replica(&self) -> (Histogram, Counter) {
        (self.commit_seconds.clone(), self.elections.clone())
    }

    pub fn topic_created(&self, succeeded: bool, took: Duration) {
        let labels = Created::new(succeeded);
        self.topic_create.get_or_create(&labels).observe(took.as_secs_f64() * 1e3);
    }

    pub fn group_created(&self, succeeded: bool, took: Duration) {
        let labels = Created::new(succeeded);
        self.group_create.get_or_create(&labels).observe(took.as_secs_f64() * 1e3);
    }

    /// Counts a producer until the guard is dropped.
    pub fn producer_connected(&self, language: &'static str, version: &str) -> Connected {
        let labels = ProducerClient::new(language, ClientVersion::named(version));
        let labels = self
            .rooms
            .producers
            .fit(&self.producers, labels, || ProducerClient::new(language, ClientVersion::other()));
        Connected::count(self.producers.get_or_create_owned(&labels))
    }

    /// Counts a consumer until the guard is dropped. `mode`: `push`, `simple` or `pull`.
    pub fn consumer_connected(
        &self,
        language: &'static str,
        version: &str,
        group: &GroupName,
        mode: &'static str,
    ) -> Connected {
        let named = GroupLabel::Named(group.clone());
        let labels = ConsumerClient::new(language, ClientVersion::named(version), named, mode);
        let labels = self.rooms.consumers.fit(&self.consumers, labels, || {
            ConsumerClient::new(language, ClientVersion::other(), GroupLabel::Other, mode)
        });
        Connected::count(self.consumers.get_or_create_owned(&labels))
    }

    /// Counts a call as in progress until the guard is dropped.
    pub fn in_progress(&self, processor: Processor) -> Connected {
        Connected::count(self.watermark.get_or_create_owned(&Processing { processor }))
    }

    /// The text of a scrape, with the gauges of `reading`.
    pub fn scrape(&self, reading: &Reading) -> Result<String, std::fmt::Error> {
        // The write guard keeps two scrapes from mixing their gauges.
        let registry = self.registry.write();
        self.gauges.set(reading, self.series_max);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// For the sum of a histogram, which is a float.
fn approximate(value: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a metric need not be exact above 2^53")]
    let value = value as f64;
    value
}

#[cfg(test)]
mod tests;
