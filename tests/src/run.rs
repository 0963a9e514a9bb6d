//! One run: a cluster under load, faults, and the verdict in the end.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::checker::{Plan, Report, Verdict, check};
use crate::cluster::{Cluster, Layout, PATIENCE, logs, wait_for};
use crate::event::{Event, What, to_lines};
use crate::link::{Counts, Link};
use crate::load::{self, Load, Mix, native};
use crate::watch::Watch;

/// After the last fault everything works again within so long.
pub const HEALED_WITHIN: Duration = Duration::from_secs(15);
/// Acknowledged sends per group before a fault, in it, and after it.
pub const STEADY: usize = 50;

#[derive(Debug)]
pub struct Run {
    pub cluster: Cluster,
    pub load: Load,
    pub rng: fastrand::Rng,
    pub plan: Plan,
    mix: Mix,
    watch: Watch,
    name: String,
}

/// Of a run: `DRUMLIN_SEED`, or another each time. Times stay the machine's.
pub fn seed() -> u64 {
    let told = std::env::var("DRUMLIN_SEED").ok().and_then(|text| text.parse().ok());
    told.unwrap_or_else(|| fastrand::u64(..))
}

/// How often a suite repeats its fault: `DRUMLIN_CYCLES`, or what the short tier takes.
pub fn cycles(short: usize) -> usize {
    std::env::var("DRUMLIN_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(short)
}

impl Run {
    async fn start(name: &str, layout: &Layout) -> Result<Self> {
        let seed = seed();
        println!("{name}: DRUMLIN_SEED={seed}");
        let cluster = Cluster::start(layout).await.context("the cluster does not start")?;
        let watch = Watch::start(&cluster)?;
        let mix = Mix::default();
        let load = Load::start(&cluster, mix.clone()).await?;
        load.progress_everywhere(STEADY, PATIENCE).await?;
        let groups = cluster.groups().into_iter();
        let replicas = groups.map(|group| (group.clone(), cluster.members(&group)));
        let plan = Plan {
            replicas: replicas.collect(),
            // Data node with data node and with the witness.
            logs_compared_min: 2,
            ..Plan::default()
        };
        let rng = fastrand::Rng::with_seed(seed);
        Ok(Self { cluster, load, rng, plan, mix, watch, name: name.to_owned() })
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.rng.usize(..items.len())]
    }

    /// A fault of this name must have been there so many times.
    pub fn planned(&mut self, fault: &str, times: usize) {
        *self.plan.faults.entry(fault.to_owned()).or_default() += times;
    }

    /// A fault that was seen to be there: it counts for the plan, and sends in it are counted.
    pub fn began(&self, name: &str, group: Option<&str>, ok_within: Option<Duration>) {
        let ok_within_ms =
            ok_within.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        let (name, group) = (name.to_owned(), group.map(str::to_owned));
        self.cluster.recorder.note(What::Fault { name, group, ok_within_ms });
    }

    pub fn ended(&self, name: &str) {
        self.cluster.recorder.note(What::FaultEnds { name: name.to_owned() });
    }

    /// Waits until the history has a leader behind its first `since` lines: one that is killed
    /// sooner than anybody looked would be missing in it.
    pub async fn leader_noted(&self, group: &str, since: usize) -> Result<()> {
        let leads =
            |event: &Event| matches!(&event.what, What::Leader { group: of, .. } if of == group);
        let what = format!("no leader of {group} is noted");
        wait_for(&what, PATIENCE, async || {
            Ok((self.cluster.recorder.count_from(since, leads) > 0).then_some(()))
        })
        .await
    }

    /// Waits until what passes over links shows that something was done to them.
    pub async fn wait_links(&self, one: &str, other: &str, before: Counts) -> Result<()> {
        let what = format!("links between {one} and {other} show no fault");
        wait_for(&what, PATIENCE, async || {
            Ok((self.link_counts(one, other).felt() > before.felt()).then_some(()))
        })
        .await
    }

    /// Sums over all links between two nodes.
    pub fn link_counts(&self, one: &str, other: &str) -> Counts {
        let (there, back) = self.cluster.links_of_pair(one, other);
        there.into_iter().chain(back).map(Link::counts).sum()
    }

    /// Everything works again: both copies everywhere, and clients go on.
    pub async fn recover(&mut self) -> Result<()> {
        self.cluster.heal()?;
        self.cluster.wait_healthy(PATIENCE).await?;
        self.load.progress_everywhere(STEADY, PATIENCE).await
    }

    /// Heals, reads everything from every replica, and judges, also where the suite ended early.
    /// Fails unless that went well and the run is valid; `DRUMLIN_KEEP` keeps logs and history of a
    /// valid one too.
    async fn finish(mut self, done: Result<()>) -> Result<Report> {
        let name = self.name.clone();
        if let Err(error) = &done {
            println!("{name} ends early: {error:#}");
        }
        let limit = Duration::from_secs(300);
        let wound_up = match tokio::time::timeout(limit, self.wind_up()).await {
            Ok(wound_up) => wound_up,
            Err(_) => Err(anyhow!("does not end within {limit:?}")),
        };
        let events = self.cluster.recorder.events();
        std::fs::write(self.cluster.folder().join("history.jsonl"), to_lines(&events))?;
        let report = check(&events, &self.plan);
        println!("{name}: {report}");
        let count = report.violations.len();
        done.with_context(|| format!("{name}, {count} violations"))?;
        wound_up.with_context(|| format!("{name} in the end, {count} violations"))?;
        ensure!(report.verdict() == Verdict::Valid, "{name}: {report}");
        if std::env::var_os("DRUMLIN_KEEP").is_none() {
            self.cluster.forget();
        }
        Ok(report)
    }

    async fn wind_up(&mut self) -> Result<()> {
        self.cluster.heal()?;
        let ok_within_ms = u64::try_from(HEALED_WITHIN.as_millis())?;
        self.cluster.recorder.note(What::Healed { ok_within_ms });
        self.cluster.wait_healthy(PATIENCE).await?;
        self.load.progress_everywhere(STEADY, PATIENCE).await?;
        self.load.drain(PATIENCE).await?;
        self.load.stop().await?;
        let mut committed = BTreeMap::new();
        for group in self.cluster.groups() {
            self.cluster.wait_converged(&group, PATIENCE).await?;
            let index = self.digests(&group).await?;
            committed.insert(group, index);
        }
        for group in committed.keys() {
            self.read_each_replica(group).await?;
        }
        self.watch.stop().await?;
        for name in self.cluster.names() {
            self.cluster.stop(&name, PATIENCE).await?;
        }
        for (group, index) in committed {
            let compared = logs::compare(&self.cluster, &group, index)?;
            compared.into_iter().for_each(|what| self.cluster.recorder.note(what));
        }
        Ok(())
    }

    /// At an index where both are; as nothing is sent any more they meet at one soon. Tells which.
    async fn digests(&self, group: &str) -> Result<u64> {
        let mut channels = Vec::new();
        for name in self.cluster.members(group) {
            let channel = native::connect(&self.cluster.client_address(&name)?).await?;
            channels.push((name, channel));
        }
        let what = format!("replicas of {group} do not meet at one index");
        let described = wait_for(&what, PATIENCE, async || {
            let mut described = Vec::new();
            for (name, channel) in &channels {
                described.push((name.clone(), native::describe(channel).await?));
            }
            let mut indexes = described.iter().map(|(_, of_node)| of_node.applied_index);
            let first = indexes.next();
            Ok(indexes.all(|index| Some(index) == first).then_some(described))
        })
        .await?;
        let index = described.first().map_or(0, |(_, of_node)| of_node.applied_index);
        for (node, of_node) in described {
            self.cluster.recorder.note(What::Digest {
                node,
                group: group.to_owned(),
                index: of_node.applied_index,
                digest: of_node.state_digest,
            });
        }
        Ok(index)
    }

    /// A replica shows what it has when it leads: the leader stops, and the other takes over.
    async fn read_each_replica(&mut self, group: &str) -> Result<()> {
        let first = self.cluster.wait_leader(group, PATIENCE).await?;
        self.final_read(&first).await?;
        let other = self.cluster.peer(&first)?;
        self.cluster.stop(&first, PATIENCE).await?;
        let leader = self.cluster.wait_leader_but(group, &first, PATIENCE).await?;
        ensure!(leader == other, "{leader} leads {group}");
        self.final_read(&other).await?;
        self.cluster.start_node(&first)?;
        self.cluster.wait_paired(group, PATIENCE).await
    }

    async fn final_read(&self, node: &str) -> Result<()> {
        let mut last = None;
        let what = format!("{node} does not let itself be read");
        let read = wait_for(&what, PATIENCE, async || {
            let read = load::final_read(&self.cluster, node, &self.mix.topic, self.mix.queue_count);
            match read.await {
                Ok(()) => Ok(Some(())),
                Err(error) => {
                    last = Some(error);
                    Ok(None)
                }
            }
        });
        read.await.with_context(|| format!("{last:?}"))
    }
}

/// One cluster at a time: two would take each other's processor and be late.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Runs the body of a test that is no suite when it is its turn, with a limit, so that what hangs
/// fails and cleans up.
pub async fn within<T>(limit: Duration, body: impl Future<Output = Result<T>>) -> Result<T> {
    let _turn = TURN.lock().await;
    tokio::time::timeout(limit, body).await.with_context(|| format!("not done within {limit:?}"))?
}

/// One suite, when it is its turn: a cluster under load, its faults in `body`, and the verdict,
/// whatever became of the body. What hangs beyond `limit` fails, is judged, and is cleaned up.
pub async fn suite(
    name: &str,
    layout: &Layout,
    limit: Duration,
    body: impl AsyncFnOnce(&mut Run) -> Result<()>,
) -> Result<Report> {
    let _turn = TURN.lock().await;
    let late = || format!("not done within {limit:?}");
    let started = tokio::time::timeout(limit, Run::start(name, layout)).await;
    let mut run = started.with_context(late)??;
    let done = tokio::time::timeout(limit, body(&mut run)).await;
    run.finish(done.unwrap_or_else(|_| Err(anyhow!(late())))).await
}
