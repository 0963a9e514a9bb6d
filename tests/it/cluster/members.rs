//! Members come, go and are replaced by an operator's commands, under load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_tests::cluster::{Cluster, Layout, PATIENCE, Told, wait_for};
use drumlin_tests::load::{Load, Mix};
use drumlin_tests::run::{Run, suite, within};

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
const WITNESS: &str = "nameserver-0";

/// `NODE@HOST:PORT` of the peer port.
fn place(cluster: &Cluster, name: &str) -> Result<String> {
    Ok(format!("{name}@{}", cluster.node(name)?.ports.peers))
}

pub(super) async fn operator(cluster: &Cluster, arguments: &[&str]) -> Result<Told> {
    cluster.command(&[&["cluster"], arguments].concat()).await
}

/// Until the learner of that name has caught up and votes.
async fn promote(cluster: &Cluster, name: &str) -> Result<Told> {
    wait_for("it does not become a voter", PATIENCE, async || {
        let told = operator(cluster, &["promote", GROUP, name]).await?;
        // Only being behind is worth another try.
        ensure!(told.exit == 0 || told.errors.contains("behind"), "{told:?}");
        Ok((told.exit == 0).then_some(told))
    })
    .await
}

/// One whose group went on without it, started with an empty disk: under a new id, and with a new
/// witness.
pub(super) async fn rejoin(cluster: &Cluster, name: &str) -> Result<()> {
    let place = place(cluster, name)?;
    wait_for("its port does not answer", PATIENCE, async || {
        let told = operator(cluster, &["add", GROUP, &place]).await?;
        ensure!(told.exit == 0 || told.errors.contains("does not answer"), "{told:?}");
        Ok((told.exit == 0).then_some(()))
    })
    .await?;
    let replaced = ["replace-witness", GROUP, "--on", WITNESS, "--yes"];
    operator(cluster, &replaced).await?.success()?;
    promote(cluster, name).await?;
    healthy(cluster).await.map(drop)
}

/// Members as `cluster health` has them: name, role, id.
fn members(health: &Told) -> Result<Vec<(String, String, u64)>> {
    let rows = health.data["replicas"].as_array().context("no replicas")?;
    let text = |row: &serde_json::Value, field: &str| {
        row[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in {row}"))
    };
    rows.iter()
        .map(|row| {
            let id = row["node_id"].as_u64().with_context(|| format!("no id in {row}"))?;
            Ok((text(row, "node")?, text(row, "role")?, id))
        })
        .collect()
}

async fn healthy(cluster: &Cluster) -> Result<Vec<(String, String, u64)>> {
    let health = operator(cluster, &["health", "--wait"]).await?.success()?;
    ensure!(health.data["groups"][0]["copies"] == "paired", "{}", health.data);
    members(&health)
}

fn id_of(members: &[(String, String, u64)], name: &str) -> Result<u64> {
    let found = members.iter().find(|(node, _, _)| node == name);
    found.map(|(_, _, id)| *id).with_context(|| format!("no {name} in {members:?}"))
}

/// The follower leads with the witness's vote, and the group is whole again in the end.
async fn lose_leader(run: &mut Run, leader: &str) -> Result<()> {
    run.cluster.kill(leader)?;
    run.began("leader kill", Some(GROUP), Some(GOES_ON_WITHIN));
    run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
    run.ended("leader kill");
    run.planned("leader kill", 1);
    run.recover().await
}

/// Its old id would stand for votes and entries that the new disk does not have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_disk_comes_back_as_a_new_member() -> Result<()> {
    suite("lost disk", &Layout::one_group(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let lost = run.cluster.peer(&leader)?;
        let old_id = id_of(&healthy(&run.cluster).await?, &lost)?;
        run.cluster.kill(&lost)?;
        run.cluster.take_disk(&lost)?;
        run.began("lost disk", Some(GROUP), Some(GOES_ON_WITHIN));
        run.cluster.start_node(&lost)?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        let hint = format!("drumlin cluster add {GROUP} {lost}@");
        wait_for("it does not say what to do", PATIENCE, async || {
            let (status, body) = run.cluster.readiness(&lost).await?;
            Ok((status == 503 && body.contains(&hint)).then_some(()))
        })
        .await?;
        let health = operator(&run.cluster, &["health"]).await?.refusal(1, "does not answer")?;
        ensure!(health.data["groups"][0]["degraded"] == true, "{}", health.data);

        let place = place(&run.cluster, &lost)?;
        let (_, address) = place.split_once('@').context("an address")?;
        let renamed = format!("broker-a-7@{address}");
        operator(&run.cluster, &["add", GROUP, &renamed])
            .await?
            .refusal(6, "expected \"broker-a-7\"")?;
        operator(&run.cluster, &["add", "broker-z", &place]).await?.refusal(3, "broker-z")?;
        operator(&run.cluster, &["promote", GROUP, "nobody"]).await?.refusal(2, "no member")?;
        operator(&run.cluster, &["remove", GROUP, "nobody", "--yes"])
            .await?
            .refusal(3, "no member")?;
        let added = operator(&run.cluster, &["add", GROUP, &place]).await?.success()?;
        // As where the answer to the first never arrived.
        let again = operator(&run.cluster, &["add", GROUP, &place]).await?.success()?;
        ensure!(added.data == again.data, "{} and {}", added.data, again.data);
        promote(&run.cluster, &lost).await?;
        promote(&run.cluster, &lost).await?;
        let now = healthy(&run.cluster).await?;
        ensure!(id_of(&now, &lost)? > old_id && now.len() == 3, "{now:?}");
        run.ended("lost disk");

        // It counts as the one before did.
        lose_leader(run, &leader).await?;
        run.planned("lost disk", 1);
        run.plan.sends_in_faults_min = 2 * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// A wiped witness has forgotten its votes: a new one takes its place, here or elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_witness_is_replaced_where_it_was_and_elsewhere() -> Result<()> {
    let layout = Layout { nameservers: 2, ..Layout::one_group() };
    suite("witness", &layout, limit(1), async |run| {
        let old_id = id_of(&healthy(&run.cluster).await?, WITNESS)?;
        run.cluster.kill(WITNESS)?;
        run.cluster.take_disk(WITNESS)?;
        run.cluster.start_node(WITNESS)?;
        run.began("lost witness", Some(GROUP), Some(GOES_ON_WITHIN));
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        wait_for("the loss does not show", PATIENCE, async || {
            let health = operator(&run.cluster, &["health"]).await?;
            Ok(health.errors.contains("the witness at nameserver-0 does not answer").then_some(()))
        })
        .await?;

        let replace = ["replace-witness", GROUP, "--on"];
        let on = async |place: &str| {
            operator(&run.cluster, &[&replace[..], &[place, "--yes"]].concat()).await
        };
        operator(&run.cluster, &[&replace[..], &[WITNESS]].concat()).await?.refusal(6, "--yes")?;
        on("nameserver-7").await?.refusal(2, "nameserver-7@HOST:PORT")?;
        // The configuration of the brokers has its address.
        on(WITNESS).await?.success()?;
        let now = healthy(&run.cluster).await?;
        ensure!(id_of(&now, WITNESS)? > old_id && now.len() == 3, "{now:?}");
        run.ended("lost witness");

        // With its vote the follower takes over.
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        lose_leader(run, &leader).await?;

        let other = format!("nameserver-1@{}", run.cluster.node("nameserver-1")?.ports.client);
        let on = async |place: &str| {
            operator(&run.cluster, &[&replace[..], &[place, "--yes"]].concat()).await
        };
        on(&other).await?.success()?;
        let now = healthy(&run.cluster).await?;
        ensure!(id_of(&now, "nameserver-1").is_ok() && now.len() == 3, "{now:?}");
        // Again, as where the answer did not arrive.
        on(&other).await?.success()?;
        // The one that was left there counts no more, whether or not it has heard of it.
        on(WITNESS).await?.success()?;
        let now = healthy(&run.cluster).await?;
        ensure!(id_of(&now, WITNESS).is_ok() && now.len() == 3, "{now:?}");
        run.recover().await?;
        run.planned("lost witness", 1);
        run.plan.sends_in_faults_min = 2 * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Down to one node, which goes on by itself, and up to two and a witness again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long tier: see tests/long"]
async fn a_group_shrinks_to_one_node_and_grows_again() -> Result<()> {
    suite("shrink", &Layout::one_group(), limit(1), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        // The leader itself: it hands over first.
        operator(&run.cluster, &["remove", GROUP, &leader])
            .await?
            .refusal(6, "without a second copy")?;
        operator(&run.cluster, &["remove", GROUP, &leader, "--yes"]).await?.success()?;
        run.began("removal", Some(GROUP), Some(GOES_ON_WITHIN));
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        let health = operator(&run.cluster, &["health", "--wait"]).await?.success()?;
        ensure!(health.data["groups"][0]["copies"] == "single", "{}", health.data);
        ensure!(members(&health)?.len() == 1, "{}", health.data);
        operator(&run.cluster, &["remove", GROUP, &leader, "--yes"])
            .await?
            .refusal(3, "no member")?;
        operator(&run.cluster, &["transfer", GROUP]).await?.refusal(6, "in step")?;

        run.cluster.stop(&leader, PATIENCE).await?;
        run.cluster.take_disk(&leader)?;
        run.cluster.start_node(&leader)?;
        let place = place(&run.cluster, &leader)?;
        operator(&run.cluster, &["add", GROUP, &place]).await?.success()?;
        operator(&run.cluster, &["promote", GROUP, &leader]).await?.refusal(6, "need a witness")?;
        let replaced = ["replace-witness", GROUP, "--on", WITNESS, "--yes"];
        operator(&run.cluster, &replaced).await?.success()?;
        promote(&run.cluster, &leader).await?;
        let now = healthy(&run.cluster).await?;
        ensure!(now.len() == 3, "{now:?}");
        run.ended("removal");
        run.recover().await?;
        run.planned("removal", 1);
        run.plan.sends_in_faults_min = IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// A node that was away for longer than the log goes back: how far it is with its copy is seen
/// everywhere, and it is not ready before. No suite: the checker would miss what retention trims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "long tier: see tests/long"]
async fn how_far_a_seed_has_come_is_told_by_both_nodes() -> Result<()> {
    within(limit(2), async {
        let layout = Layout::one_group()
            .set("log.segment_bytes=4MiB")
            .set("retention.retention_bytes_max=16MiB")
            .set("raft.seed_bytes_per_second_max=1MiB");
        let pause = Duration::from_millis(20);
        let mix = Mix { body_bytes: 20_000, pause, ..Mix::default() };
        let mut cluster = Cluster::start(&layout).await?;
        let mut load = Load::start(&cluster, mix).await?;
        let leader = cluster.wait_leader(GROUP, PATIENCE).await?;
        let follower = cluster.peer(&leader)?;
        let had = cluster.look(&follower).await?.appended;
        cluster.kill(&follower)?;
        wait_for("nothing is trimmed", 3 * PATIENCE, async || {
            let seen = cluster.look(&leader).await?;
            let trimmed = seen.metric("drumlin_commitlog_index{kind=\"trimmed\"}");
            // Indexes of a test are exact in a float.
            #[allow(clippy::cast_precision_loss)]
            let had = had as f64;
            Ok((trimmed.context("no trimmed index")? > had + 1.0).then_some(()))
        })
        .await?;
        cluster.start_node(&follower)?;
        wait_for("the copy does not show", PATIENCE, async || {
            let health = operator(&cluster, &["health"]).await?;
            let rows = health.data["replicas"].as_array().context("no replicas")?;
            let row = rows.iter().find(|row| row["node"] == follower.as_str());
            let row = row.context("it is no member")?;
            let (done, all) = (row["seed_done_bytes"].as_u64(), row["seed_all_bytes"].as_u64());
            let (status, body) = cluster.readiness(&follower).await?;
            let seen = cluster.look(&leader).await?;
            let series = format!("drumlin_seed_all_bytes{{member=\"{follower}\"}}");
            let is_seen = row["state"] == "seeding"
                && done.zip(all).is_some_and(|(done, all)| 0 < done && done < all)
                && health.errors.contains("is being seeded anew")
                && status == 503
                && body.contains("being seeded from another node")
                && seen.metric(&series).is_some_and(|bytes| bytes > 0.0);
            Ok(is_seen.then_some(()))
        })
        .await?;
        healthy(&cluster).await?;
        let (status, body) = cluster.readiness(&follower).await?;
        ensure!(status == 200, "{body}");
        load.stop().await?;
        cluster.wait_converged(GROUP, PATIENCE).await?;
        wait_for("the copies are not equal", PATIENCE, async || {
            let health = operator(&cluster, &["health"]).await?.success()?;
            let rows = health.data["replicas"].as_array().context("no replicas")?;
            Ok(rows.iter().any(|row| row["digest"] == "equal").then_some(()))
        })
        .await?;
        cluster.forget();
        Ok(())
    })
    .await
}
