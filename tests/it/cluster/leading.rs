//! Where leadership is: sent away by an operator, back at the preferred node, gone before a stop;
//! and given by hand, once the one that knew all is gone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_tests::cluster::{CLIENTS, Layout, PATIENCE, Purpose, Told, wait_for, wait_while};
use drumlin_tests::load::native::{self, Sender, Sent};
use drumlin_tests::run::{Run, suite};

use super::members::{operator, rejoin};
use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
/// Preferred: the first by name.
const FIRST: &str = "broker-a-0";
const SECOND: &str = "broker-a-1";
const WITNESS: &str = "nameserver-0";
/// Longer than a preferred node must be in step before it leads again.
const STAYS: Duration = Duration::from_secs(4);
/// A topic of its own, for sends that are in no history.
const GIVEN_UP: &str = "given-up";
/// It comes behind that of the load.
const GIVEN_UP_ID: u32 = 2;
const GIVEN_UP_COUNT: u64 = 3;

async fn leads(run: &Run, name: &str) -> Result<()> {
    let what = format!("{name} does not lead");
    wait_for(&what, PATIENCE, async || {
        let leader = run.cluster.leader(GROUP).await;
        Ok(leader.filter(|(leader, _)| leader == name).map(drop))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_sent_and_comes_back_after_a_restart() -> Result<()> {
    suite("leadership", &Layout::one_group(), limit(2), async |run| {
        leads(run, FIRST).await?;
        operator(&run.cluster, &["transfer", GROUP, "--to", WITNESS])
            .await?
            .refusal(6, "no data node")?;
        operator(&run.cluster, &["transfer", GROUP, "--to", FIRST]).await?.success()?;
        run.began("transfer", Some(GROUP), Some(GOES_ON_WITHIN));
        let told = operator(&run.cluster, &["transfer", GROUP]).await?.success()?;
        ensure!(told.data["done"] == "broker-a-1 leads now", "{}", told.data);
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        // The figures of a node are up to a second old.
        leads(run, SECOND).await?;
        // Although the first is preferred: an operator has sent it away.
        wait_while("leadership went back", STAYS, async || {
            Ok(run.cluster.leader(GROUP).await.is_none_or(|(leader, _)| leader == SECOND))
        })
        .await?;
        operator(&run.cluster, &["transfer", GROUP, "--to", SECOND]).await?.success()?;
        run.ended("transfer");
        operator(&run.cluster, &["upgrade"]).await?.success()?;
        operator(&run.cluster, &["upgrade", GROUP, "--level", "999"]).await?.refusal(6, "999")?;

        // Restarted, it is as any other that is preferred.
        run.cluster.stop(FIRST, PATIENCE).await?;
        run.cluster.start_node(FIRST)?;
        leads(run, FIRST).await?;
        run.recover().await?;

        run.began("stop", Some(GROUP), Some(GOES_ON_WITHIN));
        run.cluster.stop(FIRST, PATIENCE).await?;
        leads(run, SECOND).await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("stop");
        let log = run.cluster.log_text(FIRST)?;
        ensure!(log.contains("leadership has moved before the stop"), "it stopped as leader");
        run.recover().await?;
        run.planned("transfer", 1);
        run.planned("stop", 1);
        run.plan.leader_changes_min = 3;
        run.plan.sends_in_faults_min = 2 * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Clients of the history reach nobody while the leader is alone: all that they were promised is on
/// both, and what is given up are sends of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unsafe_election_gives_up_what_it_says_and_nothing_else() -> Result<()> {
    suite("unsafe election", &Layout::one_group(), limit(3), async |run| {
        let old = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let elected = run.cluster.peer(&old)?;
        let channel = native::connect(&run.cluster.node(&old)?.ports.client).await?;
        native::create_topic(&channel, GIVEN_UP, 1, 1).await?;
        for name in [&old, &elected] {
            run.cluster.link_between(CLIENTS, name, Purpose::Client)?.cut();
        }
        run.cluster.kill(&elected)?;
        run.began("election by hand", None, None);
        let mut sender = Sender::open(channel).await?;
        for number in 0..GIVEN_UP_COUNT {
            let sent = sender.send(GIVEN_UP, 0, &format!("given-up-{number}"), 10).await;
            ensure!(matches!(sent, Sent::Stored { degraded: true, .. }), "{sent:?}");
        }
        let running = elect(run, &old, &["--unsafe", "--yes"]).await?;
        running.refusal(1, "in use by process")?;
        let reached = elect(run, &elected, &["--unsafe", "--yes"]).await?;
        reached.refusal(6, "has a leader")?;
        // Between the two only: the leader and its witness go on.
        run.cluster.link_between(&elected, &old, Purpose::Peer)?.cut();
        let heard = elect(run, &elected, &["--unsafe", "--yes"]).await?;
        heard.refusal(6, "nameserver-0 hears a leader")?;
        run.cluster.kill(&old)?;

        elect(run, &elected, &["--yes"]).await?.refusal(2, "--unsafe")?;
        elect(run, &elected, &["--unsafe", "--yes", "--check-config"]).await?.success()?;
        elect(run, &elected, &["--unsafe"]).await?.refusal(6, "GIVEN UP: ")?;
        let told = elect(run, &elected, &["--unsafe", "--yes"]).await?.success()?;
        let lacking = told.data["lacking_entries"].as_u64().context("who knows it")?;
        // The sends, and the entry that says that the leader went on alone.
        ensure!(lacking > GIVEN_UP_COUNT, "{}", told.data);
        let own_end = told.data["first_index_of_its_own"].as_u64().context("an end")?;
        elect(run, &elected, &["--unsafe", "--yes"]).await?.refusal(6, "only voter")?;
        run.cluster.start_node(&elected)?;
        run.cluster.open_links();
        leads(run, &elected).await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("election by hand");

        rejected(run, &old, own_end).await?;
        run.cluster.take_disk(&old)?;
        run.cluster.start_node(&old)?;
        rejoin(&run.cluster, &old).await?;
        run.recover().await?;
        run.planned("election by hand", 1);
        // The new witness's log goes by the new UUID, those of the data nodes by their first.
        run.plan.logs_compared_min = 1;
        run.plan.leader_changes_min = 1;
        Ok(())
    })
    .await?;
    Ok(())
}

async fn elect(run: &Run, name: &str, arguments: &[&str]) -> Result<Told> {
    run.cluster.command_of(name, &[&["cluster", "elect"], arguments].concat()).await
}

/// The former leader leads nobody, not with the witness either, and its log shows what it had.
async fn rejected(run: &mut Run, old: &str, own_end: u64) -> Result<()> {
    wait_for("its witness is still there", PATIENCE, async || {
        Ok(run.cluster.log_text(WITNESS)?.contains("is taken out of use").then_some(()))
    })
    .await?;
    run.cluster.start_node(old)?;
    wait_for("no nameserver turns it away", PATIENCE, async || {
        let log = run.cluster.log_text(old)?;
        Ok(log.contains("the nameserver does not take this broker").then_some(()))
    })
    .await?;
    wait_while("the former leader leads", STAYS, async || {
        Ok(run.cluster.look(old).await.is_ok_and(|seen| !seen.leads))
    })
    .await?;
    let (status, _) = run.cluster.readiness(old).await?;
    ensure!(status == 503, "it says that it is ready");
    run.cluster.stop(old, PATIENCE).await?;
    let data_dir = run.cluster.node(old)?.data_dir.display().to_string();
    let from = own_end.to_string();
    let orphans = ["log", "orphans", &data_dir, "--from-index", &from];
    let orphans = run.cluster.command(&orphans).await?.success()?;
    let rows = orphans.data["orphans"].as_array().context("no orphans")?;
    let given_up = rows.iter().filter(|row| row["topics"] == serde_json::json!([GIVEN_UP_ID]));
    let records: u64 = given_up.filter_map(|row| row["record_count"].as_u64()).sum();
    ensure!(records == GIVEN_UP_COUNT, "{}", orphans.data);
    Ok(())
}
