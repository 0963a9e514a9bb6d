//! What the witness and the gate in front of it promise where it is hardest: power lost by the only
//! copy, leaders that come back, tails that were never committed, votes that must be remembered.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_tests::cluster::{Layout, PATIENCE, Purpose, wait_for, wait_while};
use drumlin_tests::event::{Queue, Step, What};
use drumlin_tests::link::Mode;
use drumlin_tests::load::native::{self, Fetcher};
use drumlin_tests::run::{Run, cycles, suite};

use super::power::skipped;
use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
const WITNESS: &str = "nameserver-0";
const DISK_MEBIBYTES: u64 = 512;
/// A node that shows nothing for so long has shown all.
const READ_SILENCE: Duration = Duration::from_millis(300);

async fn wait_alone(run: &Run, leader: &str) -> Result<()> {
    wait_for("the group is not alone", PATIENCE, async || {
        Ok((run.cluster.look(leader).await?.paired == Some(false)).then_some(()))
    })
    .await
}

/// The rest goes on without it. Who leads, and who is gone.
async fn lose_follower(run: &mut Run) -> Result<(String, String)> {
    let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
    let follower = run.cluster.peer(&leader)?;
    run.cluster.kill(&follower)?;
    run.began("follower kill", Some(GROUP), Some(GOES_ON_WITHIN));
    run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
    Ok((leader, follower))
}

/// The witness holds nothing that the only copy may lose: the two of them go on after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_lost_by_the_only_copy_stops_nobody_for_long() -> Result<()> {
    if skipped("power_lost_by_the_only_copy_stops_nobody_for_long")? {
        return Ok(());
    }
    let cycles = cycles(3);
    let layout = Layout::one_group().on_disks(DISK_MEBIBYTES);
    suite("power loss alone", &layout, limit(cycles), async |run| {
        let (leader, _follower) = lose_follower(run).await?;
        wait_alone(run, &leader).await?;
        for cycle in 0..cycles {
            run.cluster.cut_power(&leader)?;
            let since = run.cluster.recorder.count();
            run.cluster.restore_power(&leader)?;
            run.cluster.start_node(&leader)?;
            run.began("power loss alone", Some(GROUP), Some(2 * GOES_ON_WITHIN));
            println!("power loss alone {cycle}");
            run.leader_noted(GROUP, since).await?;
            run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
            run.ended("power loss alone");
        }
        run.ended("follower kill");
        run.recover().await?;
        run.planned("power loss alone", cycles);
        run.plan.leader_changes_min = cycles;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Only the witness is there to elect it, so nobody else could have raised the term.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_restarts_leads_in_a_new_term() -> Result<()> {
    suite("restarted leader", &Layout::one_group(), limit(1), async |run| {
        let (leader, _follower) = lose_follower(run).await?;
        wait_alone(run, &leader).await?;
        for _ in 0..2 {
            let term = run.cluster.look(&leader).await?.term;
            run.cluster.kill(&leader)?;
            let since = run.cluster.recorder.count();
            run.cluster.start_node(&leader)?;
            run.began("leader kill", Some(GROUP), Some(2 * GOES_ON_WITHIN));
            // What was on its way back to a client at the kill counts as progress, too.
            run.leader_noted(GROUP, since).await?;
            run.load.progress(GROUP, 1, PATIENCE).await?;
            let again = run.cluster.look(&leader).await?.term;
            ensure!(again > term, "it led in term {term}, and leads in {again}");
            run.ended("leader kill");
        }
        run.ended("follower kill");
        run.recover().await?;
        run.planned("leader kill", 2);
        run.plan.leader_changes_min = 2;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Whoever still asks a leader that was cut off may see what it shows, which must be there in the end,
/// at the same offsets.
async fn read_at(run: &Run, node: &str) -> Result<usize> {
    let channel = native::connect(&run.cluster.client_address(node)?).await?;
    let from: Vec<_> = (0..run.load.queue_count()).map(|id| (id, 0)).collect();
    let mut fetcher = Fetcher::open(channel, "durable", &from).await?;
    let process = run.cluster.recorder.new_process();
    let mut count = 0;
    while let Ok(Some(fetched)) = fetcher.next(READ_SILENCE).await {
        let queue = Queue::new("durable", GROUP, fetched.queue);
        let asked = What::Read { queue: queue.clone(), seen: Vec::new() };
        run.cluster.recorder.record(process, Step::Invoke, asked);
        count += fetched.seen.len();
        let seen = What::Read { queue, seen: fetched.seen };
        run.cluster.recorder.record(process, Step::Ok, seen);
    }
    Ok(count)
}

/// A leader that is cut off goes on taking sends that can never be committed. Nobody may see them,
/// and once it has been told so they must not come back, whatever becomes of its process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_deposed_leader_had_alone_is_never_seen() -> Result<()> {
    let cycles = cycles(2);
    // Long enough to ask it before it counts as leader no more.
    let slow = ["raft.election_timeout_min=1200ms", "raft.election_timeout_max=1800ms"];
    let layout = slow.iter().fold(Layout::one_group(), |layout, slow| layout.set(slow));
    suite("deposed leader", &layout, limit(cycles), async |run| {
        let mut shown = 0;
        for cycle in 0..cycles {
            let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
            let follower = run.cluster.peer(&leader)?;
            let before = run.link_counts(&leader, &follower);
            for other in [follower.as_str(), WITNESS] {
                let (there, back) = run.cluster.links_of_pair(&leader, other);
                there.into_iter().chain(back).for_each(|link| link.set(Mode::Blackhole));
            }
            run.wait_links(&leader, &follower, before).await?;
            run.began("isolation", Some(GROUP), Some(GOES_ON_WITHIN));
            let left = wait_for("nothing is left uncommitted", PATIENCE, async || {
                let seen = run.cluster.look(&leader).await?;
                Ok((seen.appended > seen.applied).then_some(seen))
            })
            .await?;
            let now = read_at(run, &leader).await?;
            shown += now;
            run.cluster.wait_leader_but(GROUP, &leader, PATIENCE).await?;
            run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
            println!(
                "deposed {cycle}: {leader} had {} entries, {} committed, showed {now} messages",
                left.appended, left.applied
            );
            run.cluster.open_links();
            run.ended("isolation");
            run.cluster.wait_healthy(PATIENCE).await?;
            // What it cut must be cut on its disk too.
            run.cluster.kill(&leader)?;
            run.began("kill of the deposed", Some(GROUP), Some(GOES_ON_WITHIN));
            run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
            run.ended("kill of the deposed");
            run.recover().await?;
        }
        ensure!(shown > 0, "no deposed leader showed anything: nothing was checked");
        run.planned("isolation", cycles);
        run.planned("kill of the deposed", cycles);
        run.plan.leader_changes_min = cycles;
        run.plan.sends_in_faults_min = cycles * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// A witness that comes back knows the term of its last vote before anybody has told it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_that_restarts_remembers_its_vote() -> Result<()> {
    suite("witness vote", &Layout::one_group(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        // Another election, so that the vote is not the very first.
        run.cluster.kill(&leader)?;
        run.began("leader kill", Some(GROUP), Some(GOES_ON_WITHIN));
        let leader = run.cluster.wait_leader_but(GROUP, &leader, PATIENCE).await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("leader kill");
        run.recover().await?;
        let channel = native::connect(&run.cluster.client_address(&leader)?).await?;
        let described = native::describe(&channel).await?;
        let term = run.cluster.look(&leader).await?.term;

        for broker in run.cluster.members(GROUP) {
            run.cluster.link_between(&broker, WITNESS, Purpose::Peer)?.cut();
        }
        run.cluster.kill(WITNESS)?;
        run.began("witness kill", Some(GROUP), Some(GOES_ON_WITHIN));
        run.cluster.start_node(WITNESS)?;
        let address = run.cluster.node(WITNESS)?.ports.client.clone();
        let remembered = wait_for("the witness does not answer", PATIENCE, async || {
            let Ok(channel) = native::connect(&address).await else { return Ok(None) };
            let asked = native::member_term(&channel, &described);
            Ok(asked.await.map_err(|error| eprintln!("{error:#}")).ok())
        })
        .await
        .context("its term")?;
        ensure!(remembered >= term, "it voted in term {term}, and remembers {remembered}");
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("witness kill");
        run.recover().await?;
        run.planned("leader kill", 1);
        run.planned("witness kill", 1);
        Ok(())
    })
    .await?;
    Ok(())
}

/// How long entries are kept from the follower: far less than it may be silent here, and enough for
/// a witness that nobody holds back to get them. Where all is well nothing comes of it.
const HELD_UP: Duration = Duration::from_secs(2);

/// While the follower is slow to hear, the witness must not have what it has not: either of the two
/// may be all that is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_held_up_can_lead() -> Result<()> {
    let cycles = cycles(1);
    let layout = Layout::one_group().set("raft.peer_silence_max=60s");
    suite("held up", &layout, limit(cycles), async |run| {
        for _ in 0..cycles {
            let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
            let follower = run.cluster.peer(&leader)?;
            let before = run.link_counts(&leader, &follower);
            let appended = run.cluster.look(&leader).await?.appended;
            let link = run.cluster.link_between(&leader, &follower, Purpose::Peer)?;
            link.set_forward(Mode::Blackhole);
            run.began("held up", None, None);
            run.wait_links(&leader, &follower, before).await?;
            wait_for("the leader takes nothing more", PATIENCE, async || {
                Ok((run.cluster.look(&leader).await?.appended > appended).then_some(()))
            })
            .await?;
            wait_while("the follower is given up", HELD_UP, async || {
                let seen = run.cluster.look(&leader).await?;
                Ok(seen.leads && seen.paired == Some(true))
            })
            .await?;
            // What was held up must not arrive when it is of no use any more.
            run.cluster.link_between(&leader, &follower, Purpose::Peer)?.cut();
            run.cluster.kill(&leader)?;
            run.cluster.open_links();
            run.ended("held up");
            run.began("leader kill", Some(GROUP), Some(GOES_ON_WITHIN));
            run.load.progress(GROUP, IN_FAULT, 2 * GOES_ON_WITHIN).await?;
            run.ended("leader kill");
            run.recover().await?;
        }
        run.planned("held up", cycles);
        run.planned("leader kill", cycles);
        run.plan.leader_changes_min = cycles;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Whoever says that two copies are kept can lose either: also right after the second one is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_says_it_is_paired_outlives_its_leader() -> Result<()> {
    suite("said to be paired", &Layout::one_group(), limit(1), async |run| {
        let (leader, follower) = lose_follower(run).await?;
        let link = run.cluster.link_between(&leader, &follower, Purpose::Peer)?;
        link.set_forward(Mode::Blackhole);
        run.cluster.start_node(&follower)?;
        wait_for("the follower is not back", PATIENCE, async || {
            Ok(run.cluster.look(&follower).await.is_ok().then_some(()))
        })
        .await?;
        // Whatever it says is to be true: who says nothing of one copy must be able to lose it.
        if run.cluster.look(&leader).await?.paired == Some(false) {
            run.cluster.open_links();
            run.cluster.wait_paired(GROUP, PATIENCE).await?;
        }
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let follower = run.cluster.peer(&leader)?;
        run.cluster.link_between(&leader, &follower, Purpose::Peer)?.cut();
        run.cluster.kill(&leader)?;
        run.cluster.open_links();
        run.ended("follower kill");
        run.began("leader kill", Some(GROUP), Some(GOES_ON_WITHIN));
        run.load.progress(GROUP, IN_FAULT, 2 * GOES_ON_WITHIN).await?;
        run.ended("leader kill");
        run.recover().await?;
        run.planned("follower kill", 1);
        run.planned("leader kill", 1);
        run.plan.leader_changes_min = 1;
        Ok(())
    })
    .await?;
    Ok(())
}
