//! What was acknowledged survives SIGKILL and a loss of power, under load.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use drumlin_tests::history::{History, Violation};
use drumlin_tests::loop_disk::LoopDisk;
use drumlin_tests::node::{Launch, Node};
use drumlin_tests::skip::skipped;
use drumlin_tests::traffic;
use tokio::task::JoinSet;

const PRODUCERS: usize = 4;
const READY: Duration = Duration::from_secs(30);

/// Restarts per test: 5, or what `DRUMLIN_CYCLES` says.
fn cycles() -> usize {
    std::env::var("DRUMLIN_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

/// Sends until about `sends` are acknowledged, calls `fail` while more are under way, and returns
/// what the producers were told.
async fn load_until_failure(
    node: Node,
    cycle: usize,
    sends: usize,
    committed: BTreeMap<u32, u64>,
    fail: impl FnOnce(Node) -> Result<()> + Send + 'static,
) -> Result<History> {
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let (reached, enough) = tokio::sync::oneshot::channel();
    let mut reached = Some(reached);
    let mut producers = JoinSet::new();
    for producer in 0..PRODUCERS {
        let channel = traffic::connect(&node.broker).await?;
        let acknowledged = Arc::clone(&acknowledged);
        let mut reached = if producer == 0 { reached.take() } else { None };
        let name = format!("c{cycle}p{producer}");
        let body_bytes = 200 * (producer + 1);
        let mut known = 0;
        producers.spawn(traffic::produce(channel, name, body_bytes, move |history| {
            let new = history.acknowledged_count() - known;
            known += new;
            let total = acknowledged.fetch_add(new, Ordering::Relaxed) + new;
            if total >= sends
                && let Some(reached) = reached.take()
            {
                reached.send(()).ok();
            }
            false // only the failure ends a producer: sends are always in flight when it comes
        }));
    }
    let committer = tokio::spawn(commit_while_running(node.broker.clone(), committed));
    tokio::select! {
        _ = enough => {}
        history = producers.join_next() => anyhow::bail!("ended before the failure: {history:?}"),
    }
    let failed = tokio::task::spawn_blocking(move || fail(node));
    let mut history = committer.await??;
    failed.await??;
    while let Some(told) = producers.join_next().await {
        let violations = history.merge(told??);
        ensure!(violations.is_empty(), "{violations:#?}");
    }
    Ok(history)
}

/// Commits one record more of each queue again and again, until the node is gone.
async fn commit_while_running(broker: String, mut ends: BTreeMap<u32, u64>) -> Result<History> {
    let mut history = History::default();
    let channel = traffic::connect(&broker).await?;
    loop {
        for queue in 0..traffic::QUEUE_COUNT {
            let end: &mut u64 = ends.entry(queue).or_default();
            match traffic::commit_offset(&channel, queue, *end + 1).await {
                Ok(()) => *end += 1,
                Err(error) if error.is::<tonic::Status>() => return Ok(history),
                Err(_beyond_end) => continue,
            }
            history.committed(queue, *end);
        }
    }
}

async fn check(node: &Node, history: &mut History) -> Result<()> {
    let channel = traffic::connect(&node.broker).await?;
    let mut violations = history.check_read(&traffic::read_all(&channel).await?);
    let stored = traffic::committed_offsets(&channel).await?;
    violations.extend(history.check_committed(&stored));
    violations.truncate(10);
    ensure!(violations.is_empty(), "{:#?}", violations as Vec<Violation>);
    Ok(())
}

fn start(data_dir: &Path, log: &Path) -> Result<Node> {
    let launch = Launch { log: Some(log.to_owned()), ..Launch::default() };
    let node = Node::start(data_dir, &launch)?;
    node.wait_ready(READY)?;
    Ok(node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_by_sigkill() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (data_dir, log) = (folder.path().join("data"), folder.path().join("log"));
    let mut history = History::default();
    let mut node = start(&data_dir, &log)?;
    traffic::create_topic(&traffic::connect(&node.broker).await?).await?;
    for cycle in 0..cycles() {
        let sends = 200 + fastrand::usize(..800);
        let told =
            load_until_failure(node, cycle, sends, history.committed_offsets(), Node::kill).await?;
        let violations = history.merge(told);
        ensure!(violations.is_empty(), "{violations:#?}");
        node = start(&data_dir, &log)?;
        check(&node, &mut history).await?;
        println!("cycle {cycle}: {} acknowledged so far, none lost", history.acknowledged_count());
    }
    node.stop(READY)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_by_power_loss() -> Result<()> {
    let folder = tempfile::tempdir()?;
    if let Some(reason) = LoopDisk::unavailable(folder.path()) {
        let reason = format!("no loop device: {reason}");
        skipped("nothing_acknowledged_is_lost_by_power_loss", &reason)?;
        return Ok(());
    }
    let mut disk = LoopDisk::create(folder.path(), 1024)?;
    let (data_dir, log) = (disk.path().join("data"), folder.path().join("log"));
    let mut history = History::default();
    let mut node = start(&data_dir, &log)?;
    traffic::create_topic(&traffic::connect(&node.broker).await?).await?;
    for cycle in 0..cycles() {
        let sends = 200 + fastrand::usize(..800);
        // The disk goes first, while the node still writes: nothing is flushed on its way down.
        let mount_point = disk.path().to_owned();
        let committed = history.committed_offsets();
        let told = load_until_failure(node, cycle, sends, committed, move |node| {
            LoopDisk::cut_power(&mount_point)?;
            node.kill()
        })
        .await?;
        disk.remount()?;
        let violations = history.merge(told);
        ensure!(violations.is_empty(), "{violations:#?}");
        node = start(&data_dir, &log)?;
        check(&node, &mut history).await?;
        println!("cycle {cycle}: {} acknowledged so far, none lost", history.acknowledged_count());
    }
    node.stop(READY)
}
