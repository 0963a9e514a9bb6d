//! SIGSTOP: a leader that is silent, and wakes up believing that it leads.

use std::time::Duration;

use anyhow::Result;
use drumlin_tests::cluster::{Layout, PATIENCE, wait_for};
use drumlin_tests::run::{cycles, suite};

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

/// Also how long a pause lasts at least.
const PAUSE: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_leader_is_replaced_and_shows_nothing_new() -> Result<()> {
    let cycles = cycles(2);
    suite("pauses", &Layout::one_group(), limit(cycles), async |run| {
        let group = "broker-a";
        for cycle in 0..cycles {
            let leader = run.cluster.wait_leader(group, PATIENCE).await?;
            run.cluster.pause(&leader)?;
            let began = std::time::Instant::now();
            run.began("pause", Some(group), Some(GOES_ON_WITHIN));
            let next = run.cluster.wait_leader_but(group, &leader, PATIENCE).await?;
            run.load.progress(group, IN_FAULT, PATIENCE).await?;
            let passed = began.elapsed();
            tokio::time::sleep(PAUSE.saturating_sub(passed)).await;
            let term = run.cluster.look(&next).await?.term;
            run.cluster.resume(&leader)?;
            run.ended("pause");
            println!("pause {cycle}: {leader}, then {next} led");
            run.recover().await?;
            // Its figures may be from the moment when it woke.
            let what = format!("{leader} goes on in a term before {term}");
            wait_for(&what, PATIENCE, async || {
                Ok((run.cluster.look(&leader).await?.term >= term).then_some(()))
            })
            .await?;
        }
        run.planned("pause", cycles);
        run.plan.leader_changes_min = cycles;
        run.plan.sends_in_faults_min = cycles * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}
