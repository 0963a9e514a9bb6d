//! Gauges: what the broker looks like at the moment of a scrape.

use std::sync::atomic::AtomicU64;

use drumlin_proto::ids::{GroupName, TopicName};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::approximate;
use super::labels::{GroupLabel, TopicLabel, TopicOut};
use crate::retention::DiskLevel;

/// One consumer group in one topic.
#[derive(Clone, Debug)]
pub struct GroupReading {
    pub topic: TopicName,
    pub group: GroupName,
    /// Never delivered, or due again.
    pub ready: u64,
    /// Leased.
    pub in_flight: u64,
    /// Waiting for their next delivery.
    pub in_retry: u64,
    /// Age of the oldest that is not acknowledged; 0 without one.
    pub lag_ms: u64,
    /// Age of the oldest that was never delivered; 0 without one.
    pub queueing_ms: u64,
}

/// Another member, as this node sees it.
#[derive(Clone, Debug, Default)]
pub struct MemberReading {
    pub node: String,
    pub is_witness: bool,
    pub is_reachable: bool,
    /// A witness that lost entries which it had answered.
    pub is_lost: bool,
    /// Behind the leader; `None` if this node does not lead.
    pub lag_entries: Option<u64>,
    pub lag_bytes: Option<u64>,
    pub lag_ms: Option<u64>,
    pub disk_percent: Option<u64>,
}

/// A member that copies another node's files.
#[derive(Clone, Debug, Default)]
pub struct SeedReading {
    pub node: String,
    pub done_bytes: u64,
    pub all_bytes: u64,
}

/// Everything that gauges show, read at one moment.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    pub topic_count: u64,
    pub group_count: u64,
    pub groups: Vec<GroupReading>,
    /// 4 read, 2 write, 6 both, as RocketMQ has them.
    pub permission: u64,
    pub appended_index: u64,
    pub durable_index: u64,
    pub committed_index: u64,
    pub applied_index: u64,
    pub trimmed_index: u64,
    pub term: u64,
    pub leads: bool,
    /// Of a group of two data nodes: both have what is acknowledged.
    pub paired: Option<bool>,
    /// This node may lack entries that it had answered.
    pub fenced: bool,
    pub members: Vec<MemberReading>,
    /// This node among them.
    pub seeds: Vec<SeedReading>,
    /// Bytes of the log that are kept.
    pub storage_bytes: u64,
    pub flush_behind_bytes: u64,
    pub dispatch_behind_bytes: u64,
    /// Age of the oldest retained message.
    pub reserve_time_ms: u64,
    pub disk_total_bytes: u64,
    pub disk_free_bytes: u64,
    pub disk_level: DiskLevel,
    /// Messages are refused, whatever the reason.
    pub refusing_writes: bool,
    pub started_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Storage {
    storage_type: &'static str,
    storage_medium: &'static str,
}

const LOCAL_DISK: Storage = Storage { storage_type: "local", storage_medium: "disk" };

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Member {
    member: String,
}

type Number = Gauge<u64, AtomicU64>;
/// No labels, in a family: so that there may be no series.
type Plain = [(String, String); 0];
type Numbers<L> = Family<L, Number>;

#[derive(Debug, Default)]
pub(super) struct Gauges {
    lag: Numbers<TopicOut>,
    ready: Numbers<TopicOut>,
    in_flight: Numbers<TopicOut>,
    lag_ms: Numbers<TopicOut>,
    queueing_ms: Numbers<TopicOut>,
    permission: Number,
    topics: Number,
    groups: Number,
    storage_bytes: Numbers<Storage>,
    flush_behind: Numbers<Storage>,
    dispatch_behind: Numbers<Storage>,
    reserve_time: Numbers<Storage>,
    index: Numbers<Kind>,
    term: Number,
    leader: Number,
    paired: Numbers<Plain>,
    fenced: Number,
    member_up: Numbers<Member>,
    witness_up: Numbers<Member>,
    witness_lost: Numbers<Member>,
    lag_entries: Numbers<Member>,
    lag_bytes: Numbers<Member>,
    lag_seconds: Family<Member, Gauge<f64, AtomicU64>>,
    member_disk: Family<Member, Gauge<f64, AtomicU64>>,
    seed_done: Numbers<Member>,
    seed_all: Numbers<Member>,
    disk_total: Number,
    disk_free: Number,
    disk_state: Number,
    build: Numbers<Build>,
    started: Number,
}

impl Gauges {
    pub(super) fn register(&self, r: &mut Registry) {
        let lag_ms = "Age of the oldest message not acknowledged, ms";
        let queueing_ms = "Age of the oldest message never delivered, ms";
        r.register("rocketmq_consumer_lag_messages", "Not acknowledged", self.lag.clone());
        r.register("rocketmq_consumer_ready_messages", "Not yet delivered", self.ready.clone());
        r.register("rocketmq_consumer_inflight_messages", "Leased", self.in_flight.clone());
        r.register("rocketmq_consumer_lag_latency", lag_ms, self.lag_ms.clone());
        r.register("rocketmq_consumer_lag_latency_milliseconds", lag_ms, self.lag_ms.clone());
        r.register("rocketmq_consumer_queueing_latency", queueing_ms, self.queueing_ms.clone());
        r.register(
            "rocketmq_consumer_queueing_latency_milliseconds",
            queueing_ms,
            self.queueing_ms.clone(),
        );
        r.register(
            "rocketmq_broker_permission",
            "4 read, 2 write, 6 both",
            self.permission.clone(),
        );
        r.register("rocketmq_topic_number", "Topics", self.topics.clone());
        r.register("rocketmq_consumer_group_number", "Consumer groups", self.groups.clone());
        r.register("rocketmq_storage_size", "Log bytes kept", self.storage_bytes.clone());
        r.register(
            "rocketmq_storage_flush_behind_bytes",
            "Appended and not durable",
            self.flush_behind.clone(),
        );
        r.register(
            "rocketmq_storage_dispatch_behind_bytes",
            "Durable and not applied",
            self.dispatch_behind.clone(),
        );
        r.register(
            "rocketmq_storage_message_reserve_time",
            "Age of the oldest message kept, ms",
            self.reserve_time.clone(),
        );
        self.register_ours(r);
    }

    fn register_ours(&self, r: &mut Registry) {
        r.register("drumlin_commitlog_index", "Raft indexes of the log", self.index.clone());
        r.register("drumlin_raft_term", "Raft term", self.term.clone());
        r.register("drumlin_raft_leader", "1 where this node leads", self.leader.clone());
        r.register(
            "drumlin_replica_paired",
            "1 paired, 0 alone: acknowledged messages have one copy",
            self.paired.clone(),
        );
        r.register(
            "drumlin_replica_fenced",
            "1 while this node may lack what it had answered: it neither votes nor leads",
            self.fenced.clone(),
        );
        r.register("drumlin_replica_up", "1 if it answers this node", self.member_up.clone());
        r.register("drumlin_witness_up", "1 if it answers this node", self.witness_up.clone());
        r.register(
            "drumlin_witness_lost",
            "1 once it lacks what it had answered: it is to be replaced",
            self.witness_lost.clone(),
        );
        let behind = "Behind the leader, of this leader's members";
        r.register("drumlin_replica_lag_entries", behind, self.lag_entries.clone());
        r.register("drumlin_replica_lag_bytes", behind, self.lag_bytes.clone());
        r.register("drumlin_replica_lag_seconds", behind, self.lag_seconds.clone());
        r.register("drumlin_replica_disk_ratio", "Fill of its disk", self.member_disk.clone());
        let copied = "Of the files that it copies of another node, while it does";
        r.register("drumlin_seed_done_bytes", copied, self.seed_done.clone());
        r.register("drumlin_seed_all_bytes", copied, self.seed_all.clone());
        r.register("drumlin_disk_total_bytes", "Of the data disk", self.disk_total.clone());
        r.register("drumlin_disk_free_bytes", "Of the data disk", self.disk_free.clone());
        r.register(
            "drumlin_disk_state",
            "0 ok, 1 warn, 2 refusing writes",
            self.disk_state.clone(),
        );
        r.register("drumlin_build_info", "Always 1", self.build.clone());
        r.register("process_start_time_seconds", "Since the epoch", self.started.clone());
    }

    pub(super) fn set(&self, reading: &Reading, series_max: usize) {
        self.set_groups(&reading.groups, series_max);
        self.set_members(reading);
        self.permission.set(reading.permission);
        self.topics.set(reading.topic_count);
        self.groups.set(reading.group_count);
        for (family, value) in [
            (&self.storage_bytes, reading.storage_bytes),
            (&self.flush_behind, reading.flush_behind_bytes),
            (&self.dispatch_behind, reading.dispatch_behind_bytes),
            (&self.reserve_time, reading.reserve_time_ms),
        ] {
            family.get_or_create(&LOCAL_DISK).set(value);
        }
        for (kind, index) in [
            ("appended", reading.appended_index),
            ("durable", reading.durable_index),
            ("committed", reading.committed_index),
            ("applied", reading.applied_index),
            ("trimmed", reading.trimmed_index),
        ] {
            self.index.get_or_create(&Kind { kind }).set(index);
        }
        self.term.set(reading.term);
        self.leader.set(u64::from(reading.leads));
        self.fenced.set(u64::from(reading.fenced));
        self.disk_total.set(reading.disk_total_bytes);
        self.disk_free.set(reading.disk_free_bytes);
        self.disk_state.set(match reading.disk_level {
            _ if reading.refusing_writes => 2,
            DiskLevel::Fine => 0,
            DiskLevel::Warn => 1,
            DiskLevel::Refuse => 2,
        });
        self.build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION") }).set(1);
        self.started.set(reading.started_s);
    }

    fn set_members(&self, reading: &Reading) {
        self.paired.clear();
        self.witness_up.clear();
        self.witness_lost.clear();
        for family in
            [&self.member_up, &self.lag_entries, &self.lag_bytes, &self.seed_done, &self.seed_all]
        {
            family.clear();
        }
        for seed in &reading.seeds {
            let label = Member { member: seed.node.clone() };
            self.seed_done.get_or_create(&label).set(seed.done_bytes);
            self.seed_all.get_or_create(&label).set(seed.all_bytes);
        }
        self.lag_seconds.clear();
        self.member_disk.clear();
        if let Some(paired) = reading.paired {
            self.paired.get_or_create(&[]).set(u64::from(paired));
        }
        for member in &reading.members {
            let label = Member { member: member.node.clone() };
            let up = u64::from(member.is_reachable);
            if member.is_witness {
                self.witness_up.get_or_create(&label).set(up);
                self.witness_lost.get_or_create(&label).set(u64::from(member.is_lost));
            } else {
                self.member_up.get_or_create(&label).set(up);
            }
            for (family, lag) in
                [(&self.lag_entries, member.lag_entries), (&self.lag_bytes, member.lag_bytes)]
            {
                if let Some(lag) = lag {
                    family.get_or_create(&label).set(lag);
                }
            }
            if let Some(ms) = member.lag_ms {
                self.lag_seconds.get_or_create(&label).set(approximate(ms) / 1e3);
            }
            if let Some(percent) = member.disk_percent {
                self.member_disk.get_or_create(&label).set(approximate(percent) / 100.0);
            }
        }
    }

    /// Sums and maxima of what finds no room go to one series.
    fn set_groups(&self, groups: &[GroupReading], series_max: usize) {
        for family in [&self.lag, &self.ready, &self.in_flight, &self.lag_ms, &self.queueing_ms] {
            family.clear();
        }
        for (nth, group) in groups.iter().enumerate() {
            let labels = match nth < series_max {
                true => TopicOut::new(
                    TopicLabel::Named(group.topic.clone()),
                    GroupLabel::Named(group.group.clone()),
                    false,
                ),
                false => TopicOut::new(TopicLabel::Other, GroupLabel::Other, false),
            };
            let lag = group.ready + group.in_flight + group.in_retry;
            self.lag.get_or_create(&labels).inc_by(lag);
            self.ready.get_or_create(&labels).inc_by(group.ready);
            self.in_flight.get_or_create(&labels).inc_by(group.in_flight);
            raise(&self.lag_ms, &labels, group.lag_ms);
            raise(&self.queueing_ms, &labels, group.queueing_ms);
        }
    }
}

fn raise(family: &Numbers<TopicOut>, labels: &TopicOut, value: u64) {
    let gauge = family.get_or_create(labels);
    gauge.set(gauge.get().max(value));
}
