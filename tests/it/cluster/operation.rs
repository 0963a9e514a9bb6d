//! What operators and clients rely on: restarts one by one, nameservers that are gone, the promise
//! of two copies, and a degraded state that shows.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_proto::native::status::Code;
use drumlin_tests::cluster::{Layout, PATIENCE, wait_for, wait_while};
use drumlin_tests::link::Mode;
use drumlin_tests::load::native::{self, Sender, Sent};
use drumlin_tests::run::suite;

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
/// A topic of its own, for sends that are in no history.
const ASKED: &str = "asked";
/// Far more than an election timeout: who hears nobody for so long would have stood several times.
const SEVERAL_ELECTIONS: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_restart_one_by_one_under_load() -> Result<()> {
    suite("rolling restart", &Layout::two_groups(), limit(6), async |run| {
        let names = run.cluster.names();
        for name in &names {
            let group = run.cluster.node(name)?.group.clone();
            let group = (!group.is_empty()).then_some(group);
            run.cluster.stop(name, PATIENCE).await?;
            run.began("restart", group.as_deref(), Some(GOES_ON_WITHIN));
            run.load.progress_everywhere(IN_FAULT, PATIENCE).await?;
            run.ended("restart");
            println!("restart of {name}");
            run.recover().await?;
        }
        run.planned("restart", names.len());
        run.plan.sends_in_faults_min = names.len() * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// Running clients and brokers go on with what they know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_needs_nameservers_to_go_on() -> Result<()> {
    suite("nameservers", &Layout::two_groups(), limit(2), async |run| {
        let nameservers = run.cluster.nameservers();
        for name in &nameservers {
            run.cluster.kill(name)?;
            run.began("nameserver kill", None, None);
        }
        for group in run.cluster.groups() {
            run.began("no nameserver", Some(&group), Some(GOES_ON_WITHIN));
            run.load.progress(&group, 5 * IN_FAULT, PATIENCE).await?;
        }
        run.ended("nameserver kill");
        run.ended("no nameserver");
        run.recover().await?;
        run.planned("nameserver kill", nameservers.len());
        run.planned("no nameserver", 2);
        run.plan.sends_in_faults_min = 5 * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// A topic that promises two copies refuses while there is one; others go on and say so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_copy_is_said_and_two_are_kept_where_promised() -> Result<()> {
    let report = suite("one copy", &Layout::one_group(), limit(2), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let follower = run.cluster.peer(&leader)?;
        let channel = native::connect(&run.cluster.client_address(&leader)?).await?;
        native::create_topic(&channel, ASKED, 1, 2).await?;
        let mut sender = Sender::open(channel).await?;
        let paired = sender.send(ASKED, 0, "both", 10).await;
        ensure!(matches!(paired, Sent::Stored { degraded: false, .. }), "{paired:?}");

        run.cluster.kill(&follower)?;
        run.began("follower kill", Some(GROUP), Some(GOES_ON_WITHIN));
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        wait_for("drumlin_replica_paired does not become 0", PATIENCE, async || {
            Ok((run.cluster.look(&leader).await?.paired == Some(false)).then_some(()))
        })
        .await?;
        let alone = sender.send(ASKED, 0, "one", 10).await;
        let refused =
            matches!(&alone, Sent::Refused { code, .. } if *code != Code::InvalidArgument);
        ensure!(refused, "two copies were promised: {alone:?}");
        run.ended("follower kill");

        run.recover().await?;
        wait_for("two copies are not kept again", PATIENCE, async || {
            let sent = sender.send(ASKED, 0, "again", 10).await;
            Ok(matches!(sent, Sent::Stored { degraded: false, .. }).then_some(()))
        })
        .await?;
        run.planned("follower kill", 1);
        Ok(())
    })
    .await?;
    ensure!(report.counts.degraded >= IN_FAULT, "{:?}", report.counts);
    Ok(())
}

/// Its term stays as it was, and the leader stays when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_follower_disturbs_nobody() -> Result<()> {
    suite("isolation", &Layout::one_group(), limit(2), async |run| {
        let leader = run.cluster.wait_leader(GROUP, PATIENCE).await?;
        let follower = run.cluster.peer(&leader)?;
        let term = run.cluster.look(&leader).await?.term;
        for other in [leader.as_str(), "nameserver-0"] {
            let before = run.link_counts(&follower, other);
            let (there, back) = run.cluster.links_of_pair(&follower, other);
            there.into_iter().chain(back).for_each(|link| link.set(Mode::Blackhole));
            run.wait_links(&follower, other, before).await?;
        }
        run.began("isolation", Some(GROUP), Some(GOES_ON_WITHIN));
        wait_while("the follower's term does not stay", SEVERAL_ELECTIONS, async || {
            let seen = run.cluster.look(&follower).await.context("the follower is silent")?;
            Ok(seen.term == term)
        })
        .await?;
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
        run.ended("isolation");
        run.recover().await?;
        let (now, seen) = run.cluster.leader(GROUP).await.context("no leader")?;
        ensure!((&now, seen.term) == (&leader, term), "{now} leads in term {}", seen.term);
        run.planned("isolation", 1);
        run.plan.sends_in_faults_min = IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}
