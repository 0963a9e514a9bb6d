//! A full disk is a clear error to producers, and nothing to consumers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use drumlin_proto::native::status::Code;
use drumlin_tests::history::History;
use drumlin_tests::loop_disk::LoopDisk;
use drumlin_tests::node::{Launch, Node};
use drumlin_tests::skip::skipped;
use drumlin_tests::traffic::{self, Sent};

const DISK_MEBIBYTES: u64 = 400;
const PATIENCE: Duration = Duration::from_secs(30);

fn fill(path: &Path) -> Result<()> {
    let mut filler = std::fs::File::create(path)?;
    let block = vec![0xA5; 1 << 20];
    while let Ok(()) = std::io::Write::write_all(&mut filler, &block) {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_writes_until_space_returns() -> Result<()> {
    let folder = tempfile::tempdir()?;
    if let Some(reason) = LoopDisk::unavailable(folder.path()) {
        skipped("a_full_disk_refuses_writes_until_space_returns", &reason)?;
        return Ok(());
    }
    let disk = LoopDisk::create(folder.path(), DISK_MEBIBYTES)?;
    let settings = ["log.segment_bytes=16MiB", "log.prepared_bytes=8MiB"];
    let launch = Launch {
        settings: settings.map(str::to_owned).to_vec(),
        log: Some(folder.path().join("log")),
        ..Launch::default()
    };
    let mut node = Node::start(&disk.path().join("data"), &launch)?;
    node.wait_ready(PATIENCE)?;
    let channel = traffic::connect(&node.broker).await?;
    traffic::create_topic(&channel).await?;
    let mut history = History::default();
    let first = traffic::send_one(&channel, "before", 1000).await?;
    first.record(&mut history, "before")?;

    let filler = disk.path().join("filler");
    fill(&filler)?;
    let refusal = refused_in_time(&channel, &mut history).await?;
    ensure!(refusal.to_lowercase().contains("disk"), "no cause in {refusal:?}");
    let reads = traffic::read_all(&channel).await?;
    let violations = history.check_read(&reads);
    ensure!(violations.is_empty(), "consumers do not go on: {violations:#?}");
    ensure!(node.http_get("/livez")?.0 == 200, "not alive");

    std::fs::remove_file(&filler)?;
    let deadline = Instant::now() + PATIENCE;
    for attempt in 0.. {
        let value = format!("after-{attempt}");
        let sent = traffic::send_one(&channel, &value, 1000).await?;
        sent.record(&mut history, &value)?;
        if matches!(sent, Sent::Acknowledged { .. }) {
            break;
        }
        ensure!(Instant::now() < deadline, "writes do not resume: {sent:?}");
    }
    ensure!(!node.ended()?, "the node ended");
    let violations = history.check_read(&traffic::read_all(&channel).await?);
    ensure!(violations.is_empty(), "{violations:#?}");
    node.stop(PATIENCE)
}

/// Sends until a send is refused for good reason, which must come before long.
async fn refused_in_time(
    channel: &tonic::transport::Channel,
    history: &mut History,
) -> Result<String> {
    let deadline = Instant::now() + PATIENCE;
    for attempt in 0.. {
        let value = format!("full-{attempt}");
        let sent = traffic::send_one(channel, &value, 100_000).await?;
        sent.record(history, &value)?;
        if let Sent::Refused { code: Code::Busy, message } = sent {
            return Ok(message);
        }
        ensure!(Instant::now() < deadline, "never refused: {sent:?}");
    }
    unreachable!("the loop has no end of its own")
}
