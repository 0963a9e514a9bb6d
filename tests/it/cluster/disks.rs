//! The leader's disk: full, failing, stalled.

use std::path::Path;

use anyhow::{Result, ensure};
use drumlin_proto::native::status::Code;
use drumlin_tests::cluster::{Layout, PATIENCE, wait_for};
use drumlin_tests::load::native::{self, Sender, Sent};
use drumlin_tests::loop_disk::LoopDisk;
use drumlin_tests::run::{Run, suite};

use super::power::skipped;
use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const DISK_MEBIBYTES: u64 = 400;
const GROUP: &str = "broker-a";
/// A topic of its own, for sends that are in no history.
const ASKED: &str = "asked";

fn layout() -> Layout {
    Layout::one_group().on_disks(DISK_MEBIBYTES)
}

fn fill(path: &Path) -> Result<()> {
    let mut filler = std::fs::File::create(path)?;
    let block = vec![0xA5; 1 << 20];
    while let Ok(()) = std::io::Write::write_all(&mut filler, &block) {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_of_the_leader_refuses_until_space_returns() -> Result<()> {
    if skipped("a_full_disk_of_the_leader_refuses_until_space_returns")? {
        return Ok(());
    }
    suite("disk full", &layout(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let channel = native::connect(&run.cluster.client_address(&leader)?).await?;
        native::create_topic(&channel, ASKED, 1, 1).await?;
        let filler = run.cluster.disk(&leader)?.path().join("filler");
        fill(&filler)?;
        let cause = refusal(run).await?;
        run.began("disk full", None, None);
        ensure!(cause.to_lowercase().contains("disk"), "no cause in {cause:?}");
        std::fs::remove_file(&filler)?;
        run.ended("disk full");
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        for name in run.cluster.names() {
            ensure!(!run.cluster.ended(&name)?, "{name} ended");
        }
        run.planned("disk full", 1);
        Ok(())
    })
    .await?;
    Ok(())
}

async fn refusal(run: &Run) -> Result<String> {
    let mut count = 0;
    wait_for("a full disk refuses nothing", PATIENCE, async || {
        let Some((leader, _)) = run.cluster.leader(GROUP).await else { return Ok(None) };
        let channel = native::connect(&run.cluster.client_address(&leader)?).await?;
        let mut sender = Sender::open(channel).await?;
        count += 1;
        match sender.send(ASKED, 0, &format!("asked-{count}"), 10).await {
            Sent::Refused { code: Code::Busy, message } => Ok(Some(message)),
            Sent::Stored { .. } | Sent::Refused { .. } | Sent::Unknown { .. } => Ok(None),
        }
    })
    .await
}

/// Another node leads, and the group goes on.
async fn gives_way(run: &mut Run, leader: &str, fault: &str) -> Result<()> {
    run.began(fault, Some(GROUP), Some(GOES_ON_WITHIN));
    run.cluster.wait_leader_but(GROUP, leader, PATIENCE).await?;
    run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
    run.ended(fault);
    run.planned(fault, 1);
    run.plan.leader_changes_min = 1;
    run.plan.sends_in_faults_min = IN_FAULT;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_sync_fails_gives_way() -> Result<()> {
    if skipped("a_leader_whose_sync_fails_gives_way")? {
        return Ok(());
    }
    suite("failing sync", &layout(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        // From now on every write and sync of it fails, and its process goes on.
        LoopDisk::cut_power(run.cluster.disk(&leader)?.path())?;
        gives_way(run, &leader, "failing sync").await?;
        run.cluster.kill(&leader)?;
        run.cluster.restore_power(&leader)?;
        run.recover().await
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_stalls_gives_way() -> Result<()> {
    if skipped("a_leader_whose_disk_stalls_gives_way")? {
        return Ok(());
    }
    suite("stalled disk", &layout(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let frozen = run.cluster.disk(&leader)?.freeze()?;
        gives_way(run, &leader, "stalled disk").await?;
        drop(frozen);
        run.recover().await
    })
    .await?;
    Ok(())
}

/// Nobody can take over: it refuses, and begins anew or ends, so that nothing old is left of its lead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long tier: see tests/long"]
async fn a_disk_that_stalls_under_the_only_copy_loses_nothing() -> Result<()> {
    if skipped("a_disk_that_stalls_under_the_only_copy_loses_nothing")? {
        return Ok(());
    }
    suite("stalled disk alone", &layout(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let follower = run.cluster.peer(&leader)?;
        run.cluster.kill(&follower)?;
        run.began("follower kill", Some(GROUP), Some(GOES_ON_WITHIN));
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        let frozen = run.cluster.disk(&leader)?.freeze()?;
        run.began("stalled disk", None, None);
        wait_for("it does not give its lead up", PATIENCE, async || {
            Ok(run.cluster.log_text(&leader)?.contains("the disk stalls").then_some(()))
        })
        .await?;
        // It refuses, stops in order as far as it can, and is silent in the end.
        wait_for("it still says that it leads", PATIENCE, async || {
            let leads = run.cluster.look(&leader).await.is_ok_and(|seen| seen.leads);
            Ok((!leads).then_some(()))
        })
        .await?;
        drop(frozen);
        run.ended("stalled disk");
        // A process whose disk did not answer in time ends; whoever started it starts it again.
        wait_for("it does not go on", PATIENCE, async || {
            if run.cluster.ended(&leader)? {
                run.cluster.start_node(&leader)?;
            }
            Ok(run.cluster.leader(GROUP).await.map(drop))
        })
        .await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("follower kill");
        run.recover().await?;
        run.planned("stalled disk", 1);
        run.planned("follower kill", 1);
        Ok(())
    })
    .await?;
    Ok(())
}
