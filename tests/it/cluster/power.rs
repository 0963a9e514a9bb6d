//! Loss of power: what was not synced is gone, on one data node or on both at once.

use anyhow::{Result, ensure};
use drumlin_tests::cluster::{Layout, PATIENCE};
use drumlin_tests::loop_disk::LoopDisk;
use drumlin_tests::run::{cycles, suite};
use drumlin_tests::skip;

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

pub(super) const DISK_MEBIBYTES: u64 = 512;
/// What a node says that may have lost something it had answered.
pub(super) const FENCED: &str = "neither votes nor leads";
const GROUP: &str = "broker-a";

/// Says so where there are no loop devices.
pub(super) fn skipped(test: &str) -> Result<bool> {
    let folder = tempfile::tempdir()?;
    let reason = LoopDisk::unavailable(folder.path());
    if let Some(reason) = &reason {
        skip::skipped(test, &format!("no loop device: {reason}"))?;
    }
    Ok(reason.is_some())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_on_one_data_node_loses_nothing() -> Result<()> {
    if skipped("power_lost_on_one_data_node_loses_nothing")? {
        return Ok(());
    }
    let layout = Layout::one_group().on_disks(DISK_MEBIBYTES);
    lose_power_by_turns("power loss", &layout, cycles(8), false).await
}

/// The other node has it, and keeps the one that may lack it from voting until it has it too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_on_one_data_node_loses_nothing_where_syncs_are_deferred() -> Result<()> {
    if skipped("power_lost_on_one_data_node_loses_nothing_where_syncs_are_deferred")? {
        return Ok(());
    }
    let layout = Layout::one_group().on_disks(DISK_MEBIBYTES).set("log.flush=async");
    lose_power_by_turns("power loss, syncs deferred", &layout, cycles(4), true).await
}

/// `fences`: whoever comes back is to know that it may lack something.
async fn lose_power_by_turns(
    name: &str,
    layout: &Layout,
    cycles: usize,
    fences: bool,
) -> Result<()> {
    suite(name, layout, limit(cycles), async |run| {
        for cycle in 0..cycles {
            let victim = run.pick(&run.cluster.members(GROUP)).clone();
            let before = run.cluster.log_text(&victim)?.matches(FENCED).count();
            run.cluster.cut_power(&victim)?;
            run.began("power loss", Some(GROUP), Some(GOES_ON_WITHIN));
            println!("power loss {cycle}: {victim}");
            run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
            run.ended("power loss");
            run.cluster.restore_power(&victim)?;
            run.recover().await?;
            let fenced = run.cluster.log_text(&victim)?.matches(FENCED).count() > before;
            ensure!(fenced == fences, "{victim} says {FENCED:?}: {fenced}");
        }
        run.planned("power loss", cycles);
        run.plan.sends_in_faults_min = cycles * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_on_both_data_nodes_loses_nothing() -> Result<()> {
    if skipped("power_lost_on_both_data_nodes_loses_nothing")? {
        return Ok(());
    }
    // The long tier cuts both a quarter as often as one.
    let cycles = cycles(8).div_ceil(4);
    let layout = Layout::one_group().on_disks(DISK_MEBIBYTES);
    suite("power loss of both", &layout, limit(cycles), async |run| {
        for cycle in 0..cycles {
            let mut victims = run.cluster.members(GROUP);
            run.rng.shuffle(&mut victims);
            // Both disks at once and before either process: nothing is flushed on its way down.
            let disks: Vec<_> =
                victims.iter().map(|name| run.cluster.disk(name)).collect::<Result<_>>()?;
            let paths: Vec<_> = disks.iter().map(|disk| disk.path()).collect();
            LoopDisk::cut_power_of_all(&paths)?;
            for victim in &victims {
                run.cluster.kill(victim)?;
            }
            run.began("power loss of both", None, None);
            println!("power loss of both {cycle}");
            run.ended("power loss of both");
            for victim in &victims {
                run.cluster.restore_power(victim)?;
            }
            run.recover().await?;
        }
        run.planned("power loss of both", cycles);
        Ok(())
    })
    .await?;
    Ok(())
}
