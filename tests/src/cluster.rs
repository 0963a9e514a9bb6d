//! A cluster of real processes on loopback: nameservers, brokers in groups of two, and a link of
//! its own for each direction between any two that talk to each other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::event::Recorder;
use crate::link::{Link, Network};
use crate::loop_disk::LoopDisk;

use self::process::Machine;

mod commands;
pub mod logs;
mod observe;
mod process;

pub use commands::Told;
pub use observe::{Seen, look};
pub use process::Process;

/// How long anything that has no limit of its own may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(25);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Layout {
    /// `a`, `b`, ...: a broker group of two data nodes each.
    pub groups: Vec<&'static str>,
    pub nameservers: usize,
    /// `section.key=value` for brokers.
    pub settings: Vec<String>,
    /// Data of brokers on disks of their own, of so many MiB.
    pub disk_mebibytes: Option<u64>,
    /// The binary, and what it finds in its environment.
    pub binary: PathBuf,
    pub environment: Vec<(String, String)>,
}

impl Layout {
    /// One group and one nameserver.
    pub fn one_group() -> Self {
        let small = ["log.segment_bytes=8MiB", "log.prepared_bytes=4MiB"];
        // A fault to inject is for the nodes; everything else of that name is the harness's own.
        let fault = std::env::var("DRUMLIN_FAULT").ok();
        Self {
            groups: vec!["a"],
            nameservers: 1,
            settings: small.map(str::to_owned).to_vec(),
            disk_mebibytes: None,
            binary: crate::node::binary().to_owned(),
            environment: fault
                .map(|fault| ("DRUMLIN_FAULT".to_owned(), fault))
                .into_iter()
                .collect(),
        }
    }

    /// Two groups and two nameservers: the deployment that is asked for.
    pub fn two_groups() -> Self {
        Self { groups: vec!["a", "b"], nameservers: 2, ..Self::one_group() }
    }

    pub fn set(mut self, setting: &str) -> Self {
        self.settings.push(setting.to_owned());
        self
    }

    pub fn on_disks(mut self, mebibytes: u64) -> Self {
        self.disk_mebibytes = Some(mebibytes);
        self
    }
}

/// What goes over a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Raft, between members of a group.
    Peer,
    /// From brokers to nameservers.
    Registry,
    /// From clients to brokers.
    Client,
}

/// Who dials whom.
type LinkKey = (String, String, Purpose);

/// The name that clients have as ends of links.
pub const CLIENTS: &str = "clients";

#[derive(Debug)]
pub struct Cluster {
    pub recorder: Recorder,
    nodes: BTreeMap<String, Process>,
    disks: BTreeMap<String, LoopDisk>,
    links: BTreeMap<LinkKey, Link>,
    _network: Network,
    folder: Folder,
}

/// Logs stay if the run does not end well; data never stays.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    forget: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        let gone = if self.forget { self.path.clone() } else { self.path.join("data") };
        if let Err(error) = std::fs::remove_dir_all(&gone) {
            eprintln!("{} stays: {error}", gone.display());
        }
        if !self.forget {
            println!("logs and history: {}", self.path.display());
        }
    }
}

impl Cluster {
    /// Prepares everything; no process runs yet.
    pub fn new(layout: &Layout) -> Result<Self> {
        let path = tempfile::Builder::new().prefix("drumlin-cluster-").tempdir()?.keep();
        std::fs::create_dir_all(path.join("data"))?;
        let mut cluster = Self {
            recorder: Recorder::default(),
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            links: BTreeMap::new(),
            _network: Network::new()?,
            folder: Folder { path, forget: false },
        };
        for number in 0..layout.nameservers {
            cluster.add_nameserver(number, layout)?;
        }
        for (number, group) in layout.groups.iter().enumerate() {
            cluster.add_group(group, number % layout.nameservers, layout)?;
        }
        cluster.give_machines()?;
        Ok(cluster)
    }

    /// Starts all processes and waits until each group has a leader and both copies.
    pub async fn start(layout: &Layout) -> Result<Self> {
        let mut cluster = Self::new(layout)?;
        for name in cluster.names() {
            cluster.start_node(&name)?;
        }
        cluster.wait_healthy(PATIENCE).await?;
        Ok(cluster)
    }

    fn add_nameserver(&mut self, number: usize, layout: &Layout) -> Result<()> {
        let name = format!("nameserver-{number}");
        let ports = process::Ports::choose()?;
        let data_dir = self.folder.path.join("data").join(&name);
        let settings = vec![
            format!("node.name={name}"),
            format!("node.data_dir={}", data_dir.display()),
            format!("listeners.external.bind={}", ports.client),
            format!("http.bind={}", ports.http),
        ];
        self.add(name, "", "nameserver", settings, ports, data_dir, layout);
        Ok(())
    }

    fn add_group(&mut self, letter: &str, witness: usize, layout: &Layout) -> Result<()> {
        let group = format!("broker-{letter}");
        let names = [format!("{group}-0"), format!("{group}-1")];
        let ports = [process::Ports::choose()?, process::Ports::choose()?];
        let witness = format!("nameserver-{witness}");
        for (at, name) in names.iter().enumerate() {
            let (own, other) = (&ports[at], &ports[1 - at]);
            let to_peer = self.link(name, &names[1 - at], Purpose::Peer, &other.peers)?;
            let witness_port = self.node(&witness)?.ports.client.clone();
            let to_witness = self.link(name, &witness, Purpose::Peer, &witness_port)?;
            let to_self = self.link(CLIENTS, name, Purpose::Client, &own.client)?;
            let mut nodes = [(name, own.peers.clone()), (&names[1 - at], to_peer)];
            nodes.sort();
            let nodes = nodes.map(|(name, address)| format!("{name}@{address}"));
            let mut registries = Vec::new();
            for number in 0..layout.nameservers {
                let nameserver = format!("nameserver-{number}");
                let port = self.node(&nameserver)?.ports.client.clone();
                registries.push(self.link(name, &nameserver, Purpose::Registry, &port)?);
            }
            let data_dir = self.data_dir(name, layout)?;
            let catalog = layout.groups.first().context("no group")?;
            let mut settings = vec![
                format!("node.name={name}"),
                format!("node.broker_group={group}"),
                format!("node.data_dir={}", data_dir.display()),
                format!("cluster.catalog_group=broker-{catalog}"),
                format!("listeners.external.bind={}", own.client),
                format!("listeners.external.advertised={to_self}"),
                format!("listeners.peers.bind={}", own.peers),
                format!("http.bind={}", own.http),
                format!("replicas.nodes={}", nodes.join(",")),
                format!("replicas.witness={witness}@{to_witness}"),
                format!("nameservers.addresses={}", registries.join(",")),
            ];
            settings.extend(layout.settings.iter().cloned());
            self.add(name.clone(), &group, "broker", settings, own.clone(), data_dir, layout);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn add(
        &mut self,
        name: String,
        group: &str,
        role: &'static str,
        settings: Vec<String>,
        ports: process::Ports,
        data_dir: PathBuf,
        layout: &Layout,
    ) {
        let log_path = self.folder.path.join(format!("{name}.log"));
        let process = Process {
            name: name.clone(),
            group: group.to_owned(),
            role,
            settings,
            ports,
            data_dir,
            log_path,
            binary: layout.binary.clone(),
            environment: layout.environment.clone(),
            machine: None,
            child: None,
            paused: false,
        };
        self.nodes.insert(name, process);
    }

    /// A node that can lose its power knows when it has.
    fn give_machines(&mut self) -> Result<()> {
        for name in self.disks.keys() {
            let mut machine = Machine::new(self.folder.path.join("data").join(name).join("boot"))?;
            let others = self.disks.iter().filter(|(other, _)| *other != name);
            machine.foreign = others.map(|(_, disk)| disk.path().to_owned()).collect();
            let node = self.nodes.get_mut(name).context("a disk without a node")?;
            node.machine = Some(machine);
        }
        Ok(())
    }

    fn link(&mut self, from: &str, to: &str, purpose: Purpose, target: &str) -> Result<String> {
        let link = self._network.link(target)?;
        let address = link.address().to_owned();
        self.links.insert((from.to_owned(), to.to_owned(), purpose), link);
        Ok(address)
    }

    fn data_dir(&mut self, name: &str, layout: &Layout) -> Result<PathBuf> {
        let place = self.folder.path.join("data").join(name);
        let Some(mebibytes) = layout.disk_mebibytes else { return Ok(place) };
        let disk = LoopDisk::create(&place, mebibytes)?;
        let data_dir = disk.path().join("data");
        self.disks.insert(name.to_owned(), disk);
        Ok(data_dir)
    }

    pub fn names(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Names of all data nodes.
    pub fn brokers(&self) -> Vec<String> {
        self.of_role("broker")
    }

    pub fn nameservers(&self) -> Vec<String> {
        self.of_role("nameserver")
    }

    fn of_role(&self, role: &str) -> Vec<String> {
        let nodes = self.nodes.values().filter(|node| node.role == role);
        nodes.map(|node| node.name.clone()).collect()
    }

    pub fn groups(&self) -> Vec<String> {
        let mut groups: Vec<_> = self.nodes.values().map(|node| node.group.clone()).collect();
        groups.retain(|group| !group.is_empty());
        groups.dedup();
        groups
    }

    pub fn members(&self, group: &str) -> Vec<String> {
        let nodes = self.nodes.values().filter(|node| node.group == group);
        nodes.map(|node| node.name.clone()).collect()
    }

    /// The other data node of its group.
    pub fn peer(&self, name: &str) -> Result<String> {
        let others = self.members(&self.node(name)?.group);
        others.into_iter().find(|other| other != name).with_context(|| format!("{name} is alone"))
    }

    pub fn node(&self, name: &str) -> Result<&Process> {
        self.nodes.get(name).with_context(|| format!("there is no {name}"))
    }

    fn node_mut(&mut self, name: &str) -> Result<&mut Process> {
        self.nodes.get_mut(name).with_context(|| format!("there is no {name}"))
    }

    /// Where clients dial a broker.
    pub fn client_address(&self, name: &str) -> Result<String> {
        let key = (CLIENTS.to_owned(), name.to_owned(), Purpose::Client);
        match self.links.get(&key) {
            Some(link) => Ok(link.address().to_owned()),
            None => Ok(self.node(name)?.ports.client.clone()),
        }
    }

    /// The folder of logs, for whatever else a failed run should leave behind.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    pub fn log_text(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(&self.node(name)?.log_path)?)
    }

    pub fn start_node(&mut self, name: &str) -> Result<()> {
        self.node_mut(name)?.start()
    }

    /// SIGKILL; returns when it is gone.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.node_mut(name)?.kill()
    }

    /// SIGTERM; fails unless it ends by itself, with success, within `limit`.
    pub async fn stop(&mut self, name: &str, limit: Duration) -> Result<()> {
        self.node_mut(name)?.terminate()?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.node_mut(name)?.ended()? {
                ensure!(status.success(), "{name} ended with {status}");
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} is still there {limit:?} after SIGTERM");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// SIGSTOP; returns when the kernel shows it as stopped.
    pub fn pause(&mut self, name: &str) -> Result<()> {
        self.node_mut(name)?.pause()
    }

    pub fn resume(&mut self, name: &str) -> Result<()> {
        self.node_mut(name)?.resume()
    }

    /// Takes all that a dead node had: it finds an empty disk. Returns where its data lies now.
    pub fn take_disk(&mut self, name: &str) -> Result<PathBuf> {
        let node = self.node_mut(name)?;
        ensure!(node.child.is_none() || node.ended()?.is_some(), "{name} is running");
        let taken = node.data_dir.with_extension(format!("taken-{}", fastrand::u32(..)));
        std::fs::rename(&node.data_dir, &taken)?;
        Ok(taken)
    }

    /// Status and body of `/readyz`.
    pub async fn readiness(&self, name: &str) -> Result<(u16, String)> {
        observe::get(&self.node(name)?.ports.http, "/readyz").await
    }

    /// Whether its process ended by itself.
    pub fn ended(&mut self, name: &str) -> Result<bool> {
        Ok(self.node_mut(name)?.ended()?.is_some())
    }

    pub fn disk(&self, name: &str) -> Result<&LoopDisk> {
        self.disks.get(name).with_context(|| format!("{name} has no disk of its own"))
    }

    /// What was not synced is lost, then its process is killed.
    pub fn cut_power(&mut self, name: &str) -> Result<()> {
        LoopDisk::cut_power(self.disk(name)?.path())?;
        self.kill(name)
    }

    /// Mounts what the disk still has; its process will see that the machine was started anew.
    pub fn restore_power(&mut self, name: &str) -> Result<()> {
        let disk = self.disks.get_mut(name).with_context(|| format!("{name} has no disk"))?;
        disk.remount()?;
        self.node(name)?.machine.as_ref().map_or(Ok(()), Machine::boot)
    }

    /// Who dials whom for what.
    pub fn link_between(&self, from: &str, to: &str, purpose: Purpose) -> Result<&Link> {
        let key = (from.to_owned(), to.to_owned(), purpose);
        self.links.get(&key).with_context(|| format!("no {purpose:?} link {from} -> {to}"))
    }

    /// Links of one node with another, by who dials: `(dialled by one, dialled by other)`.
    pub fn links_of_pair(&self, one: &str, other: &str) -> (Vec<&Link>, Vec<&Link>) {
        let dialled = |from: &str, to: &str| -> Vec<&Link> {
            let links = self.links.iter();
            links.filter(|(key, _)| key.0 == from && key.1 == to).map(|(_, link)| link).collect()
        };
        (dialled(one, other), dialled(other, one))
    }

    /// All links that end at a node.
    pub fn links_of(&self, name: &str) -> Vec<&Link> {
        let links = self.links.iter();
        links.filter(|(key, _)| key.0 == name || key.1 == name).map(|(_, link)| link).collect()
    }

    pub fn open_links(&self) {
        self.links.values().for_each(Link::open);
    }

    /// Undoes what can be undone: links, pauses, dead processes.
    pub fn heal(&mut self) -> Result<()> {
        self.open_links();
        for name in self.names() {
            let node = self.node_mut(&name)?;
            if node.paused {
                node.resume()?;
            }
            if node.child.is_none() || node.ended()?.is_some() {
                node.start()?;
            }
        }
        Ok(())
    }

    /// The run ended well: nothing is kept.
    pub fn forget(&mut self) {
        self.folder.forget = true;
    }

    /// What a node says of itself.
    pub async fn look(&self, name: &str) -> Result<Seen> {
        observe::look(&self.node(name)?.ports.http).await
    }

    /// What every node of a group says; those that say nothing are left out.
    pub async fn look_at_group(&self, group: &str) -> BTreeMap<String, Seen> {
        let mut seen = BTreeMap::new();
        for name in self.members(group) {
            if let Ok(of_node) = self.look(&name).await {
                seen.insert(name, of_node);
            }
        }
        seen
    }

    /// The leader of the highest term, if any says that it leads.
    pub async fn leader(&self, group: &str) -> Option<(String, Seen)> {
        let seen = self.look_at_group(group).await.into_iter();
        seen.filter(|(_, seen)| seen.leads).max_by_key(|(_, seen)| seen.term)
    }

    pub async fn wait_leader(&self, group: &str, limit: Duration) -> Result<String> {
        let what = format!("{group} has no leader");
        let leader = wait_for(&what, limit, async || Ok(self.leader(group).await)).await?;
        Ok(leader.0)
    }

    /// Waits until another node leads.
    pub async fn wait_leader_but(&self, group: &str, old: &str, limit: Duration) -> Result<String> {
        let what = format!("{group} has no leader but {old}");
        wait_for(&what, limit, async || {
            let leader = self.leader(group).await;
            Ok(leader.map(|(name, _)| name).filter(|name| name != old))
        })
        .await
    }

    /// Both copies and a leader in every group, and nothing left to replicate or apply.
    pub async fn wait_healthy(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for group in self.groups() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait_paired(&group, left).await?;
        }
        Ok(())
    }

    pub async fn wait_paired(&self, group: &str, limit: Duration) -> Result<()> {
        let what = format!("{group} is not paired");
        wait_for(&what, limit, async || {
            let leader = self.leader(group).await;
            let paired = leader.as_ref().is_some_and(|(_, seen)| seen.paired == Some(true));
            let all = self.look_at_group(group).await.len() == self.members(group).len();
            Ok((paired && all).then_some(()))
        })
        .await
    }

    /// Until all data nodes of a group have applied the same entries.
    pub async fn wait_converged(&self, group: &str, limit: Duration) -> Result<()> {
        let what = format!("{group} does not converge");
        wait_for(&what, limit, async || {
            let seen = self.look_at_group(group).await;
            let mut applied = seen.values().map(|seen| (seen.applied, seen.appended));
            let first = applied.next();
            let same = first.is_some_and(|(applied, appended)| applied == appended)
                && applied.all(|other| Some(other) == first);
            Ok((same && seen.len() == self.members(group).len()).then_some(()))
        })
        .await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            if let Err(error) = node.kill_if_alive() {
                eprintln!("{} may be left: {error:#}", node.name);
            }
        }
        // File systems before the folder that they are in.
        self.disks.clear();
    }
}

/// Looks as long as it is to be so, and fails as soon as it is not.
pub async fn wait_while(
    what: &str,
    time: Duration,
    mut look: impl AsyncFnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        ensure!(look().await?, "{what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(())
}

/// Looks until there is something.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what} within {limit:?}");
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}
