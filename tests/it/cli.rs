//! The binary as people and scripts use it: what it prints, and how it exits.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_tests::node::{Launch, Node, binary};
use serde_json::Value;

const READY_WITHIN: Duration = Duration::from_secs(20);

/// What a command left behind.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON: {self:?}"))
    }

    fn lines(&self) -> Vec<&str> {
        self.stdout.lines().collect()
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("DRUMLIN_")) {
            command.env_remove(name);
        }
    }
    command
}

fn run(arguments: &[&str]) -> Result<Ran> {
    Ok(command(arguments).output()?.into())
}

fn run_with_input(arguments: &[&str], input: &str) -> Result<Ran> {
    let mut child = command(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("stdin is piped")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?.into())
}

/// A dev node, and commands that talk to its broker.
struct Dev {
    node: Node,
    _dir: tempfile::TempDir,
}

impl Dev {
    fn start() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let launch = Launch {
            settings: vec!["log.segment_bytes=8MiB".into(), "log.prepared_bytes=4MiB".into()],
            ..Launch::default()
        };
        let node = Node::start(&dir.path().join("data"), &launch)?;
        node.wait_ready(READY_WITHIN)?;
        Ok(Self { node, _dir: dir })
    }

    fn run(&self, arguments: &[&str]) -> Result<Ran> {
        run(&[&["-e", &self.node.broker], arguments].concat())
    }

    fn ok(&self, arguments: &[&str]) -> Result<Ran> {
        let ran = self.run(arguments)?;
        ensure!(ran.code == Some(0), "{arguments:?}: {ran:?}");
        Ok(ran)
    }

    fn produce(&self, arguments: &[&str], input: &str) -> Result<Ran> {
        let endpoint = ["-e", &self.node.broker, "produce"];
        run_with_input(&[&endpoint, arguments].concat(), input)
    }
}

#[test]
fn lines_that_were_produced_are_consumed() -> Result<()> {
    let dev = Dev::start()?;

    let produced = dev.produce(&["greetings"], "one\ntwo\n\u{e9}\n")?;
    assert_eq!(produced.code, Some(0), "{produced:?}");
    assert_eq!((produced.stdout.as_str(), produced.stderr.as_str()), ("", "3 acknowledged\n"));

    let from_start = ["consume", "greetings", "--from", "earliest", "--exit-at-end"];
    let consumed = dev.ok(&from_start)?;
    let bodies: BTreeSet<_> = consumed.lines().into_iter().collect();
    assert_eq!(bodies, BTreeSet::from(["one", "two", "\u{e9}"]));

    let two = dev.ok(&["consume", "greetings", "--from", "earliest", "-n", "2"])?;
    assert_eq!(two.lines().len(), 2);
    let none = dev.ok(&["consume", "greetings", "--from", "latest", "--exit-at-end"])?;
    assert_eq!(none.stdout, "");
    Ok(())
}

#[test]
fn attributes_travel_with_a_message() -> Result<()> {
    let dev = Dev::start()?;
    let attributes = ["--body", "hello", "--key", "k1", "--tag", "eu", "--property", "a=b"];
    let message_group = ["--message-group", "order-7"];
    let produced =
        dev.ok(&[&["produce", "orders", "-o", "jsonl"][..], &attributes, &message_group].concat())?;
    let receipt = produced.json()?;
    assert_eq!(receipt["schema"], "drumlin/produce.receipt/v1");

    let consumed = dev.ok(&["consume", "orders", "--exit-at-end", "-J"])?;
    let message = consumed.json()?;
    assert_eq!(message["schema"], "drumlin/message/v1");
    assert_eq!(message["body"], "hello");
    assert_eq!(message["keys"][0], "k1");
    assert_eq!(message["tag"], "eu");
    assert_eq!(message["message_group"], "order-7");
    assert_eq!(message["properties"]["a"], "b");
    assert_eq!(message["message_id"], receipt["message_id"]);
    assert_eq!(message["offset"], receipt["offset"]);

    let format = "%t|%p|%o|%k|%g|%h|%S|%s\\n";
    let formatted = dev.ok(&["consume", "orders", "--exit-at-end", "--format", format])?;
    let queue_id = &receipt["queue_id"];
    assert_eq!(formatted.stdout, format!("orders|{queue_id}|0|k1|eu|a=b|5|hello\n"));
    let other = dev.ok(&["consume", "orders", "--exit-at-end", "--tag", "us||asia"])?;
    assert_eq!(other.stdout, "");
    let tagged = dev.ok(&["consume", "orders", "--exit-at-end", "--tag", "us||eu"])?;
    assert_eq!(tagged.stdout, "hello\n");
    Ok(())
}

#[test]
fn a_group_gets_each_message_once() -> Result<()> {
    let dev = Dev::start()?;
    assert_eq!(dev.produce(&["jobs"], "a\nb\nc\nd\n")?.code, Some(0));

    let first = dev.ok(&["consume", "jobs", "--group", "workers", "-n", "3"])?;
    assert_eq!(first.lines().len(), 3);
    let rest = dev.ok(&["consume", "jobs", "--group", "workers", "--exit-at-end"])?;
    assert_eq!(rest.lines().len(), 1, "{rest:?}");
    let both: BTreeSet<_> = first.lines().into_iter().chain(rest.lines()).collect();
    assert_eq!(both, BTreeSet::from(["a", "b", "c", "d"]));
    let other = dev.ok(&["consume", "jobs", "--group", "auditors", "--exit-at-end"])?;
    assert_eq!(other.lines().len(), 4);
    Ok(())
}

#[test]
fn messages_are_found_by_place_and_by_time() -> Result<()> {
    let dev = Dev::start()?;
    dev.ok(&["topic", "create", "orders", "--queues", "1"])?;
    assert_eq!(dev.produce(&["orders"], "first\nsecond\n")?.code, Some(0));

    let found = dev.ok(&["msg", "get", "--offset", "orders/0:1", "--body", "raw"])?;
    assert_eq!(found.stdout, "second");
    let shown = dev.ok(&["msg", "get", "--offset", "orders/broker-a/0:0"])?;
    assert!(shown.stdout.starts_with("place:          orders/broker-a/0:0\n"), "{shown:?}");
    assert!(shown.stdout.ends_with("\nfirst\n"), "{shown:?}");
    let hex = dev.ok(&["msg", "get", "--time", "orders@-1h", "--body", "hex"])?;
    assert!(hex.stdout.ends_with("\n6669727374\n"), "{hex:?}");
    let json = dev.ok(&["msg", "get", "--time", "orders@@0", "-o", "json"])?.json()?;
    assert_eq!(json["body"], "first");

    for (arguments, code) in [
        (["msg", "get", "--offset", "orders/0:7"], "E0303"),
        (["msg", "get", "--offset", "orders/9:0"], "E0302"),
        (["msg", "get", "--offset", "nothing/0:0"], "E0301"),
        (["msg", "get", "--time", "orders@2999-01-01T00:00:00Z"], "E0303"),
    ] {
        let ran = dev.run(&arguments)?;
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stderr.starts_with(&format!("error[{code}]: ")), "{ran:?}");
    }
    Ok(())
}

#[test]
fn topics_are_listed_in_every_shape() -> Result<()> {
    let dev = Dev::start()?;
    let created =
        dev.ok(&["topic", "create", "orders", "--queues", "4", "--type", "fifo", "-o", "json"])?;
    assert_eq!(created.json()?["type"], "fifo");
    dev.ok(&["topic", "create", "logs", "--queues", "2"])?;

    let table = dev.ok(&["topic", "list"])?;
    assert!(table.lines()[0].starts_with("NAME"), "{table:?}");
    let cells: Vec<_> = table.lines()[1].split_whitespace().take(5).collect();
    assert_eq!(cells, ["logs", "normal", "2", "2", "broker-a"]);
    let bare = dev.ok(&["topic", "list", "--no-headers"])?;
    assert_eq!(bare.lines().len(), 2);
    assert!(dev.ok(&["topic", "list", "-o", "wide"])?.lines()[0].contains("VERSION"));
    assert_eq!(dev.ok(&["topic", "list", "-o", "name"])?.stdout, "logs\norders\n");
    let csv = dev.ok(&["topic", "list", "-o", "csv"])?;
    assert!(csv.lines()[2].starts_with("orders,fifo,4,4,broker-a,"), "{csv:?}");
    let json = dev.ok(&["topic", "list", "-o", "json"])?.json()?;
    assert_eq!(json["schema"], "drumlin/topic.list/v1");
    assert_eq!(json["topics"][1]["queues_by_group"]["broker-a"], 4);
    let lines = dev.ok(&["topic", "list", "-o", "jsonl"])?;
    for line in lines.lines() {
        let row: Value = serde_json::from_str(line)?;
        assert_eq!(row["schema"], "drumlin/topic.list/v1");
    }

    // A nameserver is an access point, too.
    let names = run(&["-n", &dev.node.nameserver, "topic", "list", "-o", "name"])?;
    assert_eq!((names.code, names.stdout.as_str()), (Some(0), "logs\norders\n"), "{names:?}");
    Ok(())
}

#[test]
fn a_topic_is_described_measured_and_deleted() -> Result<()> {
    let dev = Dev::start()?;
    dev.ok(&["topic", "create", "orders", "--queues", "2"])?;
    assert_eq!(dev.produce(&["orders"], "a\nb\nc\n")?.code, Some(0));

    let state = dev.ok(&["topic", "describe", "orders", "-o", "json"])?.json()?;
    assert_eq!(state["schema"], "drumlin/topic.describe/v1");
    let queues = state["queues"].as_array().context("queues is a list")?;
    assert_eq!(queues.len(), 2);
    let records: u64 = queues.iter().filter_map(|queue| queue["record_count"].as_u64()).sum();
    assert_eq!(records, 3);

    let offsets = |at: &str| -> Result<u64> {
        let json = dev.ok(&["topic", "offsets", "orders", "--at", at, "-o", "json"])?.json()?;
        let rows = json["offsets"].as_array().context("offsets is a list")?;
        Ok(rows.iter().filter_map(|row| row["offset"].as_u64()).sum())
    };
    assert_eq!((offsets("earliest")?, offsets("latest")?, offsets("-1h")?), (0, 3, 0));

    let unconfirmed = dev.run(&["topic", "delete", "orders"])?;
    assert_eq!(unconfirmed.code, Some(6), "{unconfirmed:?}");
    let again = dev.run(&["topic", "create", "orders"])?;
    assert_eq!(again.code, Some(6), "{again:?}");
    dev.ok(&["topic", "delete", "orders", "--yes"])?;
    let gone = dev.run(&["topic", "describe", "orders"])?;
    assert_eq!(gone.code, Some(3), "{gone:?}");
    Ok(())
}

#[test]
fn a_name_that_is_nearly_right_is_suggested() -> Result<()> {
    let dev = Dev::start()?;
    dev.ok(&["topic", "create", "orders"])?;

    let ran = dev.run(&["topic", "describe", "ordres", "--color", "never"])?;

    assert_eq!(ran.code, Some(3));
    let expected = "error[E0301]: topic \"ordres\" does not exist\n  did you mean \"orders\"?\n  \
                    hint: drumlin topic create ordres --queues 8\n";
    assert_eq!(ran.stderr, expected);
    Ok(())
}

#[test]
fn a_closed_pipe_is_no_error() -> Result<()> {
    let dev = Dev::start()?;
    let input: String = (0..20_000).map(|n| format!("line {n} of a long output\n")).collect();
    assert_eq!(dev.produce(&["long"], &input)?.code, Some(0));

    let mut child = command(&["-e", &dev.node.broker, "consume", "long", "--exit-at-end"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let ran = Ran::from(child.wait_with_output()?);

    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    Ok(())
}

#[test]
fn health_and_metrics_answer() -> Result<()> {
    let dev = Dev::start()?;
    assert_eq!(dev.produce(&["orders"], "a\n")?.code, Some(0));
    dev.ok(&["consume", "orders", "--group", "billing", "-n", "1"])?;

    for arguments in [&["health"][..], &["health", "--ready"]] {
        let ran = run(&[arguments, &["--http", &dev.node.http]].concat())?;
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "ok\n"), "{ran:?}");
    }
    let (status, text) = dev.node.http_get("/metrics")?;
    assert_eq!(status, 200);
    for name in [
        "rocketmq_messages_in_total",
        "rocketmq_throughput_in_total",
        "rocketmq_messages_out_total",
        "rocketmq_message_size_bucket",
        "rocketmq_rpc_latency_bucket",
        "rocketmq_processor_watermark",
        "rocketmq_consumer_connections",
        "rocketmq_consumer_lag_messages",
        "rocketmq_consumer_inflight_messages",
        "rocketmq_topic_number",
        "rocketmq_consumer_group_number",
        "rocketmq_storage_size",
        "drumlin_commitlog_index",
        "drumlin_raft_term",
        "drumlin_raft_elections_total",
        "drumlin_request_duration_seconds_bucket",
        "drumlin_disk_free_bytes",
        "drumlin_append_duration_seconds_bucket",
        "drumlin_fsync_duration_seconds_bucket",
        "drumlin_commit_duration_seconds_bucket",
        "drumlin_build_info",
        "process_start_time_seconds",
    ] {
        assert!(text.lines().any(|line| line.starts_with(&format!("{name}{{"))), "no {name}");
    }
    let nobody = run(&["health", "--http", "127.0.0.1:1"])?;
    assert_eq!(nobody.code, Some(4), "{nobody:?}");
    Ok(())
}

#[test]
fn nobody_there_is_told_with_a_hint() -> Result<()> {
    let ran = run(&["-e", "127.0.0.1:1", "--timeout", "5s", "topic", "list"])?;
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(4), ""), "{ran:?}");
    assert!(ran.stderr.contains("error[E0401]"), "{ran:?}");
    assert!(ran.stderr.contains("hint: drumlin dev starts a node"), "{ran:?}");
    Ok(())
}

#[test]
fn wrong_usage_exits_with_2() -> Result<()> {
    for arguments in [
        &["topic", "create"][..],
        &["consume", "t", "--from", "someday"],
        &["msg", "get"],
        &["frobnicate"],
        &["-e", "no port", "topic", "list"],
    ] {
        let ran = run(arguments)?;
        assert_eq!(ran.code, Some(2), "{arguments:?}: {ran:?}");
        assert_eq!(ran.stdout, "", "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_faulty_configuration_is_told_in_full() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("broker.toml");
    std::fs::write(&path, "[log]\nsegmentbytes = 1\n\n[disk]\nwarn_percent = 120\n")?;
    let file = path.to_str().context("a path of text")?;

    let ran = Ran::from(
        command(&["broker", "-c", file, "--check-config"])
            .env("DRUMLIN_HTTP_BIND", "0.0.0.0:8082")
            .output()?,
    );
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
    for part in [
        "error[E0202]: the configuration has 3 faults".to_owned(),
        format!("{file}:2: log.segmentbytes is no key; did you mean log.segment_bytes?"),
        format!("{file}:5: disk.warn_percent is 120"),
        "environment DRUMLIN_HTTP_BIND: http.bind is 0.0.0.0:8082, not a loopback".to_owned(),
    ] {
        assert!(ran.stderr.contains(&part), "no {part:?} in {}", ran.stderr);
    }

    std::fs::write(&path, "[log]\nsegment_bytes = \"2GiB\"\n")?;
    assert_eq!(run(&["broker", "-c", file, "--check-config"])?.code, Some(0));
    let printed = run(&["broker", "-c", file, "--print-config"])?;
    let line = printed.lines().into_iter().find(|line| line.starts_with("segment_bytes"));
    let line = line.context("segment_bytes is printed")?;
    assert!(line.starts_with("segment_bytes = \"2GiB\"") && line.ends_with(&format!("{file}:2")));
    let json = run(&["nameserver", "--print-config", "-o", "json"])?.json()?;
    assert_eq!(json["schema"], "drumlin/config/v1");
    Ok(())
}

/// A dev directory with a few entries, stopped.
fn stopped(dir: &Path, gracefully: bool) -> Result<()> {
    let node = Node::start(dir, &Launch::default())?;
    node.wait_ready(READY_WITHIN)?;
    let produced = run_with_input(&["-e", &node.broker, "produce", "orders"], "a\nb\nc\n")?;
    ensure!(produced.code == Some(0), "{produced:?}");
    match gracefully {
        true => node.stop(Duration::from_secs(20)),
        false => node.kill(),
    }
}

fn segment(dir: &Path) -> Result<std::path::PathBuf> {
    let mut segments = Vec::new();
    for file in std::fs::read_dir(dir.join("broker").join("log"))? {
        let path = file?.path();
        if path.extension().is_some_and(|end| end == "log") {
            segments.push(path);
        }
    }
    segments.sort();
    segments.pop().context("there is a segment")
}

/// Where the entry lies in its segment's file, and how long its payload is.
fn entry_at(dir: &str, index: usize) -> Result<(usize, usize)> {
    let dump = run(&["log", "dump", dir, "-o", "json"])?.json()?;
    let field = |name: &str| {
        let number = dump["entries"][index][name].as_u64();
        number.and_then(|number| usize::try_from(number).ok()).context("a number")
    };
    Ok((field("at")?, field("payload_bytes")?))
}

#[test]
fn log_tools_read_a_stopped_node() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    stopped(&data, true)?;
    let root = data.to_str().context("a path of text")?;
    let log = data.join("broker").join("log");
    let log = log.to_str().context("a path of text")?;

    for folder in [root, log] {
        let verified = run(&["log", "verify", folder, "--deep", "-o", "json"])?;
        assert_eq!(verified.code, Some(0), "{verified:?}");
        assert_eq!(verified.json()?["verdict"], "clean");
    }
    let stat = run(&["log", "stat", root, "-o", "json"])?.json()?;
    assert_eq!(stat["closed_cleanly"], true);
    assert_eq!(stat["segments"][0]["records"], 3);
    let dump = run(&["log", "dump", root, "-o", "json"])?.json()?;
    let entries = dump["entries"].as_array().context("entries is a list")?;
    let records: u64 = entries.iter().filter_map(|entry| entry["record_count"].as_u64()).sum();
    assert_eq!(records, 3);
    let some = run(&["log", "dump", root, "--from-index", "1", "--max", "2", "-o", "name"])?;
    assert_eq!(some.stdout, "1\n2\n");

    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty)?;
    let nothing = run(&["log", "verify", empty.to_str().context("text")?])?;
    assert_eq!(nothing.code, Some(1), "{nothing:?}");
    Ok(())
}

#[test]
fn a_torn_tail_is_reported_and_no_fault() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    stopped(&data, false)?;
    let root = data.to_str().context("a path of text")?;
    let clean = run(&["log", "verify", root, "-o", "json"])?.json()?;
    let entries = usize::try_from(clean["entries"].as_u64().context("a number")?)?;
    let (at, payload_bytes) = entry_at(root, entries - 1)?;
    let behind = (at + 80 + payload_bytes).next_multiple_of(8);

    // The beginning of a frame whose rest never reached the disk.
    let segment = segment(&data)?;
    let mut bytes = std::fs::read(&segment)?;
    let frame = bytes[at..at + 40].to_vec();
    bytes.resize(bytes.len().max(behind + 40), 0);
    bytes[behind..behind + 40].copy_from_slice(&frame);
    std::fs::write(&segment, bytes)?;

    let verified = run(&["log", "verify", root])?;
    assert_eq!(verified.code, Some(0), "{verified:?}");
    assert!(verified.stdout.starts_with("torn tail: "), "{verified:?}");
    Ok(())
}

#[test]
fn a_flipped_bit_below_the_durable_end_is_corruption() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    stopped(&data, true)?;
    let root = data.to_str().context("a path of text")?;
    let (at, payload_bytes) = entry_at(root, 2)?;
    assert!(payload_bytes > 0);

    let segment = segment(&data)?;
    let mut bytes = std::fs::read(&segment)?;
    bytes[at + 80] ^= 1;
    std::fs::write(&segment, bytes)?;

    let verified = run(&["log", "verify", root])?;
    assert_eq!(verified.code, Some(8), "{verified:?}");
    assert!(verified.stderr.starts_with("error[E0801]: "), "{verified:?}");
    let name = segment.file_name().and_then(|name| name.to_str()).context("text")?;
    assert!(verified.stderr.contains(name), "{verified:?}");
    Ok(())
}
