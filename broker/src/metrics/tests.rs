use super::labels::OTHER;
use super::reading::{GroupReading, MemberReading, SeedReading};
use super::*;

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).expect("a valid name")
}

fn group(name: &str) -> GroupName {
    GroupName::parse(name).expect("a valid name")
}

fn scraped(metrics: &Metrics) -> String {
    metrics.scrape(&Reading::default()).expect("text can be written")
}

#[test]
fn stored_messages_are_counted_by_topic_type_and_bytes() {
    let metrics = Metrics::default();
    metrics.messages_in(&topic("orders"), RecordKind::Fifo, [10, 5000]);

    let text = scraped(&metrics);

    let series = r#"topic="orders",message_type="fifo",is_system="false"} "#;
    assert!(text.lines().any(|line| {
        line.starts_with("rocketmq_messages_in_total{") && line.contains(&format!("{series}2"))
    }));
    assert!(text.lines().any(|line| {
        line.starts_with("rocketmq_throughput_in_total{") && line.contains(&format!("{series}5010"))
    }));
}

#[test]
fn topics_beyond_the_cap_share_one_series() {
    let identity = Identity { cluster: "c".into(), broker_group: "a".into(), node: "a-0".into() };
    let metrics = Metrics::new(&identity, 2);
    for name in ["one", "two", "three", "four"] {
        metrics.messages_in(&topic(name), RecordKind::Normal, [1]);
    }
    metrics.messages_in(&topic("one"), RecordKind::Normal, [1]);

    let text = scraped(&metrics);

    let counts: Vec<(&str, &str)> = text
        .lines()
        .filter(|line| line.starts_with("rocketmq_messages_in_total{"))
        .filter_map(|line| {
            let name = line.split("topic=\"").nth(1)?.split('"').next()?;
            Some((name, line.rsplit(' ').next()?))
        })
        .collect();
    assert_eq!(counts.len(), 3, "{counts:?}");
    assert!(counts.contains(&("one", "2")));
    assert!(counts.contains(&("two", "1")));
    assert!(counts.contains(&(OTHER, "2")));
}

#[test]
fn a_connection_counts_until_it_is_dropped() {
    let metrics = Metrics::default();
    let count = |metrics: &Metrics| {
        let text = scraped(metrics);
        let line = text.lines().find(|l| l.starts_with("rocketmq_producer_connections{"));
        line.and_then(|l| l.rsplit(' ').next().map(str::to_owned))
    };
    let first = metrics.producer_connected("PYTHON", "5.1.2");
    let second = metrics.producer_connected("PYTHON", "5.1.2");
    assert_eq!(count(&metrics).as_deref(), Some("2"));
    drop(first);
    assert_eq!(count(&metrics).as_deref(), Some("1"));
    drop(second);
    assert_eq!(count(&metrics).as_deref(), Some("0"));
}

#[test]
fn a_version_from_a_client_cannot_break_the_text() {
    let metrics = Metrics::default();
    let _connected = metrics.producer_connected("GO", "5\"}\n1.0\u{2028}x");
    assert!(scraped(&metrics).contains(r#"version="51.0x""#));
}

#[test]
fn groups_that_are_gone_leave_no_lag_behind() {
    let metrics = Metrics::default();
    let reading = Reading {
        groups: vec![GroupReading {
            topic: topic("orders"),
            group: group("billing"),
            ready: 3,
            in_flight: 2,
            in_retry: 1,
            lag_ms: 40,
            queueing_ms: 30,
        }],
        ..Reading::default()
    };
    let with = metrics.scrape(&reading).expect("text can be written");
    assert!(with.lines().any(|line| {
        line.starts_with("rocketmq_consumer_lag_messages{") && line.ends_with(" 6")
    }));
    assert!(!scraped(&metrics).contains("billing"));
}

/// Names of observability.md that are built. Those of later features are not among them.
const NAMES: &[&str] = &[
    "rocketmq_messages_in_total",
    "rocketmq_messages_out_total",
    "rocketmq_throughput_in_total",
    "rocketmq_throughput_out_total",
    "rocketmq_message_size_bucket",
    "rocketmq_rpc_latency_bucket",
    "rocketmq_consumer_lag_messages",
    "rocketmq_consumer_ready_messages",
    "rocketmq_consumer_inflight_messages",
    "rocketmq_consumer_lag_latency",
    "rocketmq_consumer_lag_latency_milliseconds",
    "rocketmq_consumer_queueing_latency",
    "rocketmq_consumer_queueing_latency_milliseconds",
    "rocketmq_producer_connections",
    "rocketmq_consumer_connections",
    "rocketmq_processor_watermark",
    "rocketmq_broker_permission",
    "rocketmq_topic_number",
    "rocketmq_consumer_group_number",
    "rocketmq_topic_create_execution_time_bucket",
    "rocketmq_consumer_group_create_execution_time_bucket",
    "rocketmq_storage_size",
    "rocketmq_storage_flush_behind_bytes",
    "rocketmq_storage_dispatch_behind_bytes",
    "rocketmq_storage_message_reserve_time",
    "drumlin_commitlog_index",
    "drumlin_raft_term",
    "drumlin_raft_leader",
    "drumlin_raft_elections_total",
    "drumlin_replica_paired",
    "drumlin_replica_fenced",
    "drumlin_replica_up",
    "drumlin_replica_lag_entries",
    "drumlin_replica_lag_bytes",
    "drumlin_replica_lag_seconds",
    "drumlin_replica_disk_ratio",
    "drumlin_seed_done_bytes",
    "drumlin_seed_all_bytes",
    "drumlin_witness_up",
    "drumlin_witness_lost",
    "drumlin_gate_openings_total",
    "drumlin_state_digest_mismatch_total",
    "drumlin_request_duration_seconds_bucket",
    "drumlin_disk_total_bytes",
    "drumlin_disk_free_bytes",
    "drumlin_disk_state",
    "drumlin_append_duration_seconds_bucket",
    "drumlin_fsync_duration_seconds_bucket",
    "drumlin_commit_duration_seconds_bucket",
    "drumlin_fsync_bytes_bucket",
    "drumlin_group_commit_waiters_bucket",
    "drumlin_log_tail_bytes",
    "drumlin_refused_total",
    "drumlin_quarantined_entries_total",
    "drumlin_build_info",
    "process_start_time_seconds",
];

#[test]
fn every_built_name_is_in_a_scrape_with_the_common_labels() {
    let metrics = Metrics::default();
    metrics.register_log(&crate::log::LogMetrics::default());
    metrics.register_replication(Counter::default(), Counter::default());
    metrics.messages_in(&topic("orders"), RecordKind::Normal, [1]);
    metrics.messages_out(&topic("orders"), Some(&group("billing")), false, 1, 1);
    metrics.rpc("SendMessage", "OK", false, Duration::from_millis(2));
    metrics.refused(Reason::DiskFull);
    metrics.topic_created(true, Duration::from_millis(2));
    metrics.group_created(true, Duration::from_millis(2));
    let _producer = metrics.producer_connected("JAVA", "5.2.0");
    let _consumer = metrics.consumer_connected("JAVA", "5.2.0", &group("billing"), "push");
    let _call = metrics.in_progress(Processor::Send);
    let group = GroupReading {
        topic: topic("orders"),
        group: group("billing"),
        ready: 1,
        in_flight: 0,
        in_retry: 0,
        lag_ms: 1,
        queueing_ms: 1,
    };

    let peer = MemberReading {
        node: "broker-a-1".into(),
        is_reachable: true,
        lag_entries: Some(1),
        lag_bytes: Some(80),
        lag_ms: Some(5),
        disk_percent: Some(50),
        ..MemberReading::default()
    };
    let witness = MemberReading { is_witness: true, ..MemberReading::default() };
    let reading = Reading {
        groups: vec![group],
        paired: Some(true),
        members: vec![peer, witness],
        seeds: vec![SeedReading { node: "broker-a-1".into(), done_bytes: 3, all_bytes: 9 }],
        ..Reading::default()
    };
    let text = metrics.scrape(&reading).expect("text can be written");

    let common = r#"cluster="drumlin",node_type="broker",node_id="broker-a",replica="broker-a-0""#;
    for name in NAMES {
        let begin = format!("{name}{{");
        let line = text.lines().find(|line| line.starts_with(&begin));
        let line = line.unwrap_or_else(|| panic!("{name} is not in the scrape"));
        assert!(line.contains(common), "{line}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert!(!scraped(&metrics).contains("drumlin_seed_all_bytes{"), "it is over");
}
