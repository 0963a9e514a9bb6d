//! What a network can do between the members of a group, one after the other in one cluster.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use drumlin_tests::cluster::{CLIENTS, Layout, PATIENCE, Purpose, wait_for};
use drumlin_tests::link::{Link, Mode};
use drumlin_tests::load::native;
use drumlin_tests::load::native::{Fetcher, Sender, Sent};
use drumlin_tests::run::{Run, suite};

use super::{GOES_ON_WITHIN, IN_FAULT, limit};

const GROUP: &str = "broker-a";
const WITNESS: &str = "nameserver-0";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The leader from everybody but clients.
    LeaderFromRest,
    /// Nothing of the leader reaches the follower.
    LeaderToFollower,
    FollowerToLeader,
    LeaderFromWitness,
    FollowerFromWitness,
    /// Both still see the witness.
    Replicas,
    Nameserver,
    Clients,
    /// 200 ms and up to 100 ms more between all.
    Delay,
    /// 10 Mbit/s to the follower.
    SlowFollower,
    /// Cut and open every 500 ms.
    Flapping,
    /// Connections between the replicas are forgotten by one side.
    HalfOpen,
    /// Connections between all members break again and again, each in its own time.
    Loss,
    /// Links between all members stop one by one, and go on one by one in another order.
    Swizzle,
}

/// The short tier's, then the rest of the matrix.
const KINDS: &[Kind] = &[
    Kind::LeaderFromRest,
    Kind::Replicas,
    Kind::LeaderToFollower,
    Kind::FollowerToLeader,
    Kind::LeaderFromWitness,
    Kind::Flapping,
    Kind::FollowerFromWitness,
    Kind::Nameserver,
    Kind::Clients,
    Kind::Delay,
    Kind::SlowFollower,
    Kind::HalfOpen,
    Kind::Loss,
    Kind::Swizzle,
];
const SHORT_COUNT: usize = 6;

fn long() -> bool {
    std::env::var_os("DRUMLIN_LONG").is_some()
}

/// How long each lasts.
fn window() -> Duration {
    Duration::from_secs(if long() { 15 } else { 5 })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_lose_nothing_and_stop_nobody() -> Result<()> {
    let kinds = if long() { KINDS } else { &KINDS[..SHORT_COUNT] };
    suite("partitions", &Layout::one_group(), limit(kinds.len()), async |run| {
        for &kind in kinds {
            partition(run, kind).await.with_context(|| format!("{kind:?}"))?;
            run.planned(&format!("{kind:?}"), 1);
            run.recover().await.with_context(|| format!("after {kind:?}"))?;
        }
        run.plan.leader_changes_min = 1;
        run.plan.sends_in_faults_min = kinds.len() * IN_FAULT;
        Ok(())
    })
    .await?;
    Ok(())
}

/// The three names that matter, as they are when a partition begins.
struct Roles {
    leader: String,
    follower: String,
}

async fn partition(run: &mut Run, kind: Kind) -> Result<()> {
    // Leadership goes back to the preferred node, the first, and must not do so in the middle.
    let leader = run.cluster.members(GROUP).swap_remove(0);
    wait_for("the preferred node does not lead", PATIENCE, async || {
        let leads = run.cluster.leader(GROUP).await.is_some_and(|(name, _)| name == leader);
        Ok(leads.then_some(()))
    })
    .await?;
    let roles = Roles { follower: run.cluster.peer(&leader)?, leader };
    let before = felt(run, kind, &roles);
    let term_before = run.cluster.look(&roles.leader).await?.term;
    begin(run, kind, &roles)?;
    wait_for("no link shows the fault", PATIENCE, async || {
        Ok((felt(run, kind, &roles) > before).then_some(()))
    })
    .await?;
    println!("partition {kind:?}: {} led", roles.leader);
    // Without clients nothing can be acknowledged, and with all links stopped nothing need be.
    let goes_on = !matches!(kind, Kind::Clients | Kind::Swizzle);
    run.began(&format!("{kind:?}"), Some(GROUP), goes_on.then_some(GOES_ON_WITHIN));
    match kind {
        Kind::Swizzle => swizzle(run, &roles).await?,
        // It is how long this lasts that decides who gives up whom.
        _ => tokio::time::sleep(window()).await,
    }
    match kind {
        Kind::LeaderFromRest => isolated_leader(run, &roles).await?,
        Kind::Replicas
        | Kind::LeaderToFollower
        | Kind::FollowerToLeader
        | Kind::LeaderFromWitness
        | Kind::FollowerFromWitness
        | Kind::Nameserver
        | Kind::Clients
        | Kind::SlowFollower
        | Kind::HalfOpen => {
            // Who is led refuses to elect another, and who cannot win does not disturb.
            let now = run.cluster.wait_leader(GROUP, PATIENCE).await?;
            let term = run.cluster.look(&now).await?.term;
            ensure!(
                (&now, term) == (&roles.leader, term_before),
                "{now} leads in term {term}, {} led in {term_before}",
                roles.leader
            );
        }
        _ => {}
    }
    if kind != Kind::Clients {
        run.load.progress(GROUP, IN_FAULT, PATIENCE).await?;
    }
    run.ended(&format!("{kind:?}"));
    Ok(())
}

/// It counts as leader no more, in a term that stays as it was: it says so, shows nothing, and what
/// it is sent it refuses as not stored.
async fn isolated_leader(run: &Run, roles: &Roles) -> Result<()> {
    let new = run.cluster.wait_leader_but(GROUP, &roles.leader, PATIENCE).await?;
    let old = run.cluster.look(&roles.leader).await?;
    let new = run.cluster.look(&new).await?;
    ensure!(old.term < new.term, "{} is in term {}", roles.leader, old.term);
    ensure!(!old.leads, "{} says that it leads", roles.leader);
    let channel = native::connect(&run.cluster.client_address(&roles.leader)?).await?;
    let sent = Sender::open(channel.clone()).await?.send("durable", 0, "isolated", 10).await;
    ensure!(matches!(sent, Sent::Refused { .. }), "{sent:?}");
    let shown = match Fetcher::open(channel, "durable", &[(0, 0)]).await {
        Ok(mut fetcher) => fetcher.next(Duration::from_secs(1)).await,
        Err(error) => Err(error),
    };
    ensure!(!matches!(shown, Ok(Some(_))), "it shows {shown:?}");
    Ok(())
}

/// Times that something was done to what wanted to pass over the links in question.
fn felt(run: &Run, kind: Kind, Roles { leader, follower }: &Roles) -> u64 {
    let replicas = (leader.as_str(), follower.as_str());
    let (of_leader, of_follower) = ((leader.as_str(), WITNESS), (follower.as_str(), WITNESS));
    let pairs = match kind {
        Kind::LeaderFromRest => vec![replicas, of_leader],
        Kind::LeaderToFollower
        | Kind::FollowerToLeader
        | Kind::Replicas
        | Kind::SlowFollower
        | Kind::Flapping
        | Kind::HalfOpen => vec![replicas],
        Kind::LeaderFromWitness => vec![of_leader],
        Kind::FollowerFromWitness => vec![of_follower],
        Kind::Nameserver => vec![of_leader, of_follower],
        Kind::Clients => vec![(CLIENTS, leader.as_str()), (CLIENTS, follower.as_str())],
        Kind::Delay | Kind::Loss | Kind::Swizzle => vec![replicas, of_leader, of_follower],
    };
    pairs.into_iter().map(|(one, other)| run.link_counts(one, other).felt()).sum()
}

/// Who dials whom between the members of the group.
fn member_links(Roles { leader, follower }: &Roles) -> [(&str, &str); 4] {
    [(leader, follower), (follower, leader), (leader, WITNESS), (follower, WITNESS)]
}

/// The first is held already. The pauses spread it over the window: members are to act in between.
async fn swizzle(run: &mut Run, roles: &Roles) -> Result<()> {
    let mut links = member_links(roles);
    let pause = window() / u32::try_from(2 * links.len())?;
    tokio::time::sleep(pause).await;
    for (from, to) in links.into_iter().skip(1) {
        let link = run.cluster.link_between(from, to, Purpose::Peer)?;
        let before = link.counts().felt();
        link.set(Mode::Blackhole);
        tokio::time::sleep(pause).await;
        wait_for(&format!("{from} has nothing to say to {to}"), PATIENCE, async || {
            Ok((link.counts().felt() > before).then_some(()))
        })
        .await?;
    }
    run.rng.shuffle(&mut links);
    for (from, to) in links {
        run.cluster.link_between(from, to, Purpose::Peer)?.open();
        tokio::time::sleep(pause).await;
    }
    Ok(())
}

/// Nothing from `from` reaches `to`, whoever dialled.
fn one_way(run: &Run, from: &str, to: &str) {
    let (dialled, answered) = run.cluster.links_of_pair(from, to);
    dialled.into_iter().for_each(|link| link.set_forward(Mode::Blackhole));
    answered.into_iter().for_each(|link| link.set_backward(Mode::Blackhole));
}

fn both_ways(run: &Run, one: &str, other: &str, change: impl Fn(&Link)) {
    let (there, back) = run.cluster.links_of_pair(one, other);
    there.into_iter().chain(back).for_each(change);
}

fn begin(run: &Run, kind: Kind, roles: &Roles) -> Result<()> {
    let Roles { leader, follower } = roles;
    let hold = |link: &Link| link.set(Mode::Blackhole);
    match kind {
        Kind::LeaderFromRest => {
            both_ways(run, leader, follower, hold);
            both_ways(run, leader, WITNESS, hold);
        }
        Kind::LeaderToFollower => one_way(run, leader, follower),
        Kind::FollowerToLeader => one_way(run, follower, leader),
        Kind::LeaderFromWitness => {
            run.cluster.link_between(leader, WITNESS, Purpose::Peer)?.set(Mode::Blackhole);
        }
        Kind::FollowerFromWitness => {
            run.cluster.link_between(follower, WITNESS, Purpose::Peer)?.cut();
        }
        Kind::Replicas => both_ways(run, leader, follower, Link::cut),
        Kind::Nameserver => {
            for node in [leader, follower] {
                run.cluster.link_between(node, WITNESS, Purpose::Registry)?.cut();
            }
        }
        Kind::Clients => {
            for node in [leader, follower] {
                run.cluster.link_between(CLIENTS, node, Purpose::Client)?.set(Mode::Blackhole);
            }
        }
        Kind::Delay => {
            let (base, jitter) = (Duration::from_millis(100), Duration::from_millis(50));
            let delay = |link: &Link| link.set(Mode::Delay { base, jitter });
            both_ways(run, leader, follower, delay);
            both_ways(run, leader, WITNESS, delay);
            both_ways(run, follower, WITNESS, delay);
        }
        Kind::SlowFollower => {
            let bytes_per_second = 10_000_000 / 8;
            let (dialled, _) = run.cluster.links_of_pair(leader, follower);
            dialled.into_iter().for_each(|link| link.set_forward(Mode::Slow { bytes_per_second }));
        }
        Kind::Flapping => {
            both_ways(run, leader, follower, |link| link.flap(Duration::from_millis(500)));
        }
        Kind::HalfOpen => both_ways(run, leader, follower, Link::half_open),
        Kind::Loss => {
            for (from, to) in member_links(roles) {
                let link = run.cluster.link_between(from, to, Purpose::Peer)?;
                link.lose(Duration::from_millis(100), 10);
            }
        }
        Kind::Swizzle => {
            run.cluster.link_between(leader, follower, Purpose::Peer)?.set(Mode::Blackhole);
        }
    }
    Ok(())
}
