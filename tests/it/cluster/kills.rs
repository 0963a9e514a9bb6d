//! SIGKILL: of any node, of leaders, of all.

use std::time::Duration;

use anyhow::Result;
use drumlin_tests::cluster::{Layout, PATIENCE};
use drumlin_tests::event::times_to_acknowledgement;
use drumlin_tests::run::{cycles, suite};

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

/// Sometimes two nodes of different groups at once, sometimes a nameserver with its witness.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_of_random_nodes_lose_nothing() -> Result<()> {
    let cycles = cycles(10);
    suite("kills", &Layout::two_groups(), limit(cycles), async |run| {
        for cycle in 0..cycles {
            let all = run.cluster.names();
            let mut victims = vec![run.pick(&all).clone()];
            if run.rng.u8(..4) == 0 {
                let group = run.cluster.node(&victims[0])?.group.clone();
                let mut others = run.cluster.brokers();
                // A witness must be there where a data node is not.
                others.retain(|name| {
                    let node = run.cluster.node(name);
                    !group.is_empty() && node.is_ok_and(|node| node.group != group)
                });
                if !others.is_empty() {
                    victims.push(run.pick(&others).clone());
                }
            }
            for victim in &victims {
                run.cluster.kill(victim)?;
                let group = run.cluster.node(victim)?.group.clone();
                let group = (!group.is_empty()).then_some(group);
                run.began("kill", group.as_deref(), Some(GOES_ON_WITHIN));
            }
            println!("kill {cycle}: {}", victims.join(", "));
            run.load.progress_everywhere(IN_FAULT, PATIENCE).await?;
            run.ended("kill");
            run.recover().await?;
        }
        run.planned("kill", cycles);
        run.plan.sends_in_faults_min = cycles * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// The survivor is elected each time while the group is paired, and in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_replaced_every_time() -> Result<()> {
    let cycles = cycles(5);
    suite("leader kills", &Layout::one_group(), limit(cycles), async |run| {
        let group = "broker-a";
        for cycle in 0..cycles {
            let leader = run.cluster.wait_leader(group, PATIENCE).await?;
            run.cluster.kill(&leader)?;
            let since = run.cluster.recorder.count();
            run.began("leader kill", Some(group), Some(GOES_ON_WITHIN));
            run.leader_noted(group, since).await?;
            run.load.progress(group, IN_FAULT, PATIENCE).await?;
            run.ended("leader kill");
            println!("leader kill {cycle}: {leader}");
            run.recover().await?;
        }
        print_distribution(&mut times_to_acknowledgement(
            &run.cluster.recorder.events(),
            "leader kill",
        ));
        run.planned("leader kill", cycles);
        run.plan.leader_changes_min = cycles;
        Ok(())
    })
    .await?;
    Ok(())
}

/// As docs/performance.md has it.
fn print_distribution(times: &mut [Duration]) {
    times.sort_unstable();
    let rank = |percent: usize| times.get((times.len() * percent).div_ceil(100).saturating_sub(1));
    println!(
        "fail-over: {} kills, ms from kill to first new acknowledgement: {:?}; p50 {:?}, p99 {:?}, max {:?}",
        times.len(),
        times.iter().map(Duration::as_millis).collect::<Vec<_>>(),
        rank(50),
        rank(99),
        times.last()
    );
}

/// Everything dies at once, and nothing is missing when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_died_whole_comes_back_whole() -> Result<()> {
    let cycles = cycles(1);
    die_whole("kills of all", &Layout::one_group(), cycles).await
}

/// What is written stays when processes die, synced or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_defers_syncs_and_died_whole_comes_back_whole() -> Result<()> {
    let cycles = cycles(1);
    die_whole("kills of all, syncs deferred", &Layout::one_group().set("log.flush=async"), cycles)
        .await
}

async fn die_whole(name: &str, layout: &Layout, cycles: usize) -> Result<()> {
    suite(name, layout, limit(cycles), async |run| {
        for _ in 0..cycles {
            for name in run.cluster.names() {
                run.cluster.kill(&name)?;
            }
            run.began("kill of all", None, None);
            run.ended("kill of all");
            run.recover().await?;
        }
        run.planned("kill of all", cycles);
        Ok(())
    })
    .await?;
    Ok(())
}
