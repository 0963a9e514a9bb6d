//! Members whose disks went back behind what they had answered as synced: they are named, nothing
//! that was acknowledged is lost by them, and the group ends in line again.

use std::path::Path;

use anyhow::{Result, ensure};
use drumlin_tests::cluster::{Layout, PATIENCE, wait_for};
use drumlin_tests::load::native;
use drumlin_tests::run::{Run, suite};

use super::members::operator;
use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
const WITNESS: &str = "nameserver-0";
/// What is cut off a log's end: more than the last group of writes.
const CUT_BYTES: usize = 256 << 10;

/// The preferred node leads, so that it goes on leading, and the other one follows.
async fn roles(run: &Run) -> Result<(String, String)> {
    let first = run.cluster.members(GROUP).swap_remove(0);
    wait_for("the preferred node does not lead", PATIENCE, async || {
        let leads = run.cluster.leader(GROUP).await.is_some_and(|(name, _)| name == first);
        Ok(leads.then_some(()))
    })
    .await?;
    let follower = run.cluster.peer(&first)?;
    Ok((first, follower))
}

async fn wait_said(run: &Run, node: &str, text: &str) -> Result<()> {
    wait_for(&format!("{node} does not say {text:?}"), PATIENCE, async || {
        Ok(run.cluster.log_text(node)?.contains(text).then_some(()))
    })
    .await
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_dir(&entry.path(), &target)?,
            false => drop(std::fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

fn put_back(old: &Path, home: &Path) -> Result<()> {
    std::fs::remove_dir_all(home)?;
    copy_dir(old, home)
}

/// Waits until a node has answered its leader that it has more than the entry of that index.
async fn wait_answered(run: &Run, leader: &str, node: &str, index: u64) -> Result<()> {
    let lag = format!("drumlin_replica_lag_entries{{member=\"{node}\"}}");
    wait_for(&format!("{node} does not answer for entry {index}"), PATIENCE, async || {
        let seen = run.cluster.look(leader).await?;
        #[allow(clippy::cast_precision_loss, reason = "indexes of a test are far below 2^53")]
        let more = seen.appended.saturating_sub(index) as f64;
        Ok(seen.metric(&lag).filter(|lag| *lag < more).map(drop))
    })
    .await
}

/// Kills a node that has answered more since, and gives it the files that it had before.
async fn go_back(run: &mut Run, leader: &str, node: &str, group: Option<&str>) -> Result<()> {
    let home = run.cluster.node(node)?.data_dir.clone();
    let old = run.cluster.folder().join("data").join("older");
    run.cluster.stop(node, PATIENCE).await?;
    copy_dir(&home, &old)?;
    run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
    let channel = native::connect(&run.cluster.node(leader)?.ports.client).await?;
    let behind_old = native::describe(&channel).await?.applied_index;
    run.cluster.start_node(node)?;
    run.recover().await?;
    wait_answered(run, leader, node, behind_old).await?;
    run.cluster.kill(node)?;
    put_back(&old, &home)?;
    run.began("older files", group, Some(GOES_ON_WITHIN));
    run.cluster.start_node(node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_with_older_files_is_named_and_brought_in_line() -> Result<()> {
    suite("older follower", &Layout::one_group(), limit(2), async |run| {
        let (leader, follower) = roles(run).await?;
        go_back(run, &leader, &follower, Some(GROUP)).await?;
        wait_said(run, &leader, "a member lost entries it had answered as synced").await?;
        wait_said(run, &follower, "this node lost entries that it had answered").await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        wait_said(run, &leader, "a member that had lost entries has them again").await?;
        run.ended("older files");
        run.recover().await?;
        run.planned("older files", 1);
        Ok(())
    })
    .await?;
    Ok(())
}

/// Zeroes what was written last: as a disk that lied about its syncs, or a torn copy.
fn cut_tail(log_dir: &Path) -> Result<()> {
    let mut segments: Vec<_> = std::fs::read_dir(log_dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    segments.sort();
    // Of those that are prepared ahead nothing is written yet.
    for path in segments.iter().rev() {
        let mut bytes = std::fs::read(path)?;
        let Some(last) = bytes.iter().rposition(|byte| *byte != 0) else { continue };
        let first_frame = 4096;
        if last <= first_frame + CUT_BYTES {
            continue;
        }
        bytes[last - CUT_BYTES..=last].fill(0);
        std::fs::write(path, bytes)?;
        return Ok(());
    }
    anyhow::bail!("nothing to cut in {}", log_dir.display())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_lost_its_tail_is_mended_or_brought_in_line() -> Result<()> {
    suite("cut follower", &Layout::one_group(), limit(2), async |run| {
        let (leader, follower) = roles(run).await?;
        let log_dir = run.cluster.node(&follower)?.data_dir.join("log");
        // Enough of a log to cut.
        run.load.progress(GROUP, 2_000, PATIENCE).await?;
        run.cluster.wait_paired(GROUP, PATIENCE).await?;
        run.cluster.kill(&follower)?;
        cut_tail(&log_dir)?;
        run.began("cut tail", Some(GROUP), Some(GOES_ON_WITHIN));
        run.cluster.start_node(&follower)?;
        // Where its own marks prove the loss it is mended before it takes part.
        let lost = "a member lost entries it had answered as synced";
        wait_for("nobody names the loss", PATIENCE, async || {
            let named = run.cluster.log_text(&leader)?.contains(lost);
            let mended = run.cluster.log_text(&follower)?.contains("the log is mended");
            Ok((named || mended).then_some(()))
        })
        .await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("cut tail");
        run.recover().await?;
        run.planned("cut tail", 1);
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_with_older_files_counts_no_more_until_it_is_replaced() -> Result<()> {
    suite("older witness", &Layout::one_group(), limit(2), async |run| {
        let (leader, _) = roles(run).await?;
        go_back(run, &leader, WITNESS, None).await?;
        wait_said(run, &leader, "drumlin cluster replace-witness").await?;
        wait_said(run, WITNESS, "drumlin cluster replace-witness").await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        // Nor does it come back by a restart.
        run.cluster.kill(WITNESS)?;
        run.cluster.start_node(WITNESS)?;
        wait_said(run, WITNESS, "a witness cannot be opened and stays out").await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;

        let replaced = ["replace-witness", GROUP, "--on", WITNESS, "--yes"];
        operator(&run.cluster, &replaced).await?.success()?;
        run.ended("older files");
        run.recover().await?;
        let seen = run.cluster.look(&leader).await?;
        ensure!(seen.paired == Some(true), "it is not paired");
        run.planned("older files", 1);
        // A final read lets each of the two lead: only the new witness can elect the second one.
        Ok(())
    })
    .await?;
    Ok(())
}
