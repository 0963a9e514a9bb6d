//! Both data nodes of a group that defers its syncs lose their power: something acknowledged may be
//! gone, which nobody hides. Nobody leads until an operator has decided who shall go on.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drumlin_tests::cluster::{Cluster, Layout, PATIENCE, wait_for, wait_while};
use drumlin_tests::load::native::{self, Sender, Sent};
use drumlin_tests::loop_disk::LoopDisk;
use drumlin_tests::run::within;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::limit;
use super::members::rejoin;
use super::power::{DISK_MEBIBYTES, FENCED, skipped};

const GROUP: &str = "broker-a";
const TOPIC: &str = "deferred";
/// Sends before the power goes.
const STEADY: usize = 100;
/// Clusters that are tried until one has lost something.
const TRIES: usize = 3;
/// Whoever may stand has stood by then.
const SEVERAL_ELECTIONS: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_on_both_loses_what_was_not_synced_and_waits_for_an_operator() -> Result<()> {
    if skipped("power_lost_on_both_loses_what_was_not_synced_and_waits_for_an_operator")? {
        return Ok(());
    }
    within(limit(2 * TRIES), async {
        for _ in 0..TRIES {
            let lost = lose_both().await?;
            println!("{lost} acknowledged messages are gone");
            if lost > 0 {
                return Ok(());
            }
        }
        bail!("nothing is ever lost: syncs are not deferred, or the power was not cut")
    })
    .await
}

/// How many acknowledged messages are gone.
async fn lose_both() -> Result<usize> {
    let layout = Layout::one_group().on_disks(DISK_MEBIBYTES).set("log.flush=async");
    let mut cluster = Cluster::start(&layout).await?;
    let acknowledged = send_until_the_power_goes(&mut cluster).await?;
    // One that starts still holds the disk of the other for a moment.
    for name in cluster.members(GROUP) {
        cluster.restore_power(&name)?;
    }
    for name in cluster.members(GROUP) {
        cluster.start_node(&name)?;
    }
    for name in cluster.members(GROUP) {
        let what = format!("{name} does not say that it may have lost something");
        wait_for(&what, PATIENCE, async || {
            Ok(cluster.log_text(&name)?.contains(FENCED).then_some(()))
        })
        .await?;
    }
    wait_while("a node leads that may lack entries", SEVERAL_ELECTIONS, async || {
        Ok(cluster.leader(GROUP).await.is_none())
    })
    .await?;

    let chosen = longest(&cluster).await?;
    let other = cluster.peer(&chosen)?;
    cluster.stop(&chosen, PATIENCE).await?;
    let elect = ["cluster", "elect", "--unsafe", "--yes"];
    cluster.command_of(&chosen, &elect).await?.success()?;
    cluster.start_node(&chosen)?;
    wait_for(&format!("{chosen} does not lead"), PATIENCE, async || {
        Ok(cluster.look(&chosen).await.is_ok_and(|seen| seen.leads).then_some(()))
    })
    .await?;
    let lost = count_lost(&cluster, &chosen, &acknowledged).await?;
    cluster.stop(&other, PATIENCE).await?;
    cluster.take_disk(&other)?;
    cluster.start_node(&other)?;
    rejoin(&cluster, &other).await?;
    cluster.wait_converged(GROUP, PATIENCE).await?;
    ensure!(count_lost(&cluster, &chosen, &acknowledged).await? == lost, "more is gone by now");
    for name in cluster.names() {
        cluster.stop(&name, PATIENCE).await?;
    }
    cluster.forget();
    Ok(lost)
}

/// Values that were acknowledged, in their order in one queue.
async fn send_until_the_power_goes(cluster: &mut Cluster) -> Result<Vec<String>> {
    let leader = cluster.wait_leader(GROUP, PATIENCE).await?;
    let channel = native::connect(&cluster.client_address(&leader)?).await?;
    native::create_topic(&channel, TOPIC, 1, 1).await?;
    let (counting, mut count) = watch::channel(0);
    let mut sender = Sender::open(channel).await?;
    let sending: JoinHandle<Vec<String>> = tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        loop {
            let value = format!("v{}", acknowledged.len());
            let Sent::Stored { .. } = sender.send(TOPIC, 0, &value, 300).await else {
                return acknowledged;
            };
            acknowledged.push(value);
            counting.send_replace(acknowledged.len());
        }
    });
    tokio::time::timeout(PATIENCE, count.wait_for(|count| *count >= STEADY)).await??;
    let members = cluster.members(GROUP);
    let disks = members.iter().map(|name| cluster.disk(name)).collect::<Result<Vec<_>>>()?;
    let paths: Vec<_> = disks.iter().map(|disk| disk.path()).collect();
    LoopDisk::cut_power_of_all(&paths)?;
    for name in &members {
        cluster.kill(name)?;
    }
    Ok(tokio::time::timeout(PATIENCE, sending).await??)
}

/// The data node that has kept most.
async fn longest(cluster: &Cluster) -> Result<String> {
    let mut longest = None;
    for name in cluster.members(GROUP) {
        let appended = wait_for(&format!("{name} is silent"), PATIENCE, async || {
            Ok(cluster.look(&name).await.ok().map(|seen| seen.appended))
        })
        .await?;
        longest = longest.max(Some((appended, name)));
    }
    Ok(longest.context("the group has no nodes")?.1)
}

/// What is there must be the first of what was sent, in order.
async fn count_lost(cluster: &Cluster, node: &str, acknowledged: &[String]) -> Result<usize> {
    let channel = native::connect(&cluster.client_address(node)?).await?;
    let (min, seen) = native::read_queue(&channel, TOPIC, 0).await?;
    ensure!(min == 0, "the queue begins at {min}");
    for (number, seen) in seen.iter().enumerate() {
        let fits = seen.value == format!("v{number}") && seen.intact;
        ensure!(fits, "{seen:?} is at offset {number}");
    }
    Ok(acknowledged.len().saturating_sub(seen.len()))
}
