//! `drumlin dev --cluster`: six processes that are kept alive, and that end with their parent.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use drumlin_tests::node::binary;
use serde_json::Value;

const NODES: [&str; 6] =
    ["nameserver-0", "nameserver-1", "broker-a-0", "broker-a-1", "broker-b-0", "broker-b-1"];

/// The parent, and what it said of its children.
struct Cluster {
    parent: Child,
    root: PathBuf,
    nodes: Vec<Value>,
}

impl Cluster {
    fn start(root: &Path) -> Result<Self> {
        let mut command = Command::new(binary());
        command
            .args(["dev", "--cluster", "-o", "json", "--nameserver-port", "0"])
            .args(["--broker-port", "0", "--http-port", "0", "--peer-port", "0"])
            .args(["--set", "log.prepared_bytes=1MiB", "--data-dir"])
            .arg(root)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DRUMLIN_") {
                command.env_remove(name);
            }
        }
        let mut parent = command.spawn()?;
        let mut line = String::new();
        BufReader::new(parent.stdout.take().context("piped")?).read_line(&mut line)?;
        let told: Value = serde_json::from_str(&line).with_context(|| format!("{line:?}"))?;
        ensure!(told["schema"] == "drumlin/dev.cluster/v1", "{told}");
        let nodes = told["nodes"].as_array().context("a list")?.clone();
        Ok(Self { parent, root: root.to_owned(), nodes })
    }

    /// The child of this name that runs now.
    fn pid_of(&self, name: &str) -> Option<u32> {
        let config = self.root.join(format!("{name}.toml")).display().to_string();
        processes().into_iter().find(|(_, args)| args.contains(&config)).map(|(pid, _)| pid)
    }

    fn wait<T>(&self, what: &str, mut look: impl FnMut(&Self) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        bail!("{what}: not within 30 s")
    }

    fn none_left(&self) -> Option<()> {
        NODES.iter().all(|name| self.pid_of(name).is_none()).then_some(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.parent.kill().ok();
        self.parent.wait().ok();
    }
}

/// Ids and arguments of the processes that run, without those that are gone but not yet reaped.
fn processes() -> Vec<(u32, Vec<String>)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let process = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let args = line.split(|byte| *byte == 0);
        Some((pid, args.map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()))
    };
    entries.flatten().filter_map(process).collect()
}

fn signal(name: &str, pid: u32) -> Result<()> {
    ensure!(Command::new("kill").args([name, &pid.to_string()]).status()?.success(), "kill");
    Ok(())
}

#[test]
fn a_killed_child_is_started_again_and_all_stop_with_a_signal() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(&dir.path().join("data"))?;
    let names: Vec<_> = cluster.nodes.iter().filter_map(|node| node["node"].as_str()).collect();
    assert_eq!(names, NODES);
    for node in &cluster.nodes {
        let name = node["node"].as_str().context("a name")?;
        let pid = cluster.wait(name, |cluster| cluster.pid_of(name))?;
        assert_eq!(node["pid"], pid, "{name}");
    }

    let first = cluster.pid_of("broker-a-0").context("it runs")?;
    let killed = Instant::now();
    signal("-9", first)?;
    let second = cluster.wait("started again", |cluster| {
        cluster.pid_of("broker-a-0").filter(|pid| *pid != first)
    })?;
    let away = killed.elapsed();
    assert!(away >= Duration::from_secs(4), "{first} -> {second} within {away:?}");

    signal("-TERM", cluster.parent.id())?;
    let status = cluster.parent.wait()?;
    assert!(status.success(), "{status}");
    cluster.none_left().context("a child is left")
}

#[test]
fn children_end_with_a_parent_that_was_killed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut cluster = Cluster::start(&dir.path().join("data"))?;
    cluster.wait("children", |cluster| {
        NODES.iter().all(|n| cluster.pid_of(n).is_some()).then_some(())
    })?;
    cluster.parent.kill()?;
    cluster.parent.wait()?;
    cluster.wait("the children's end", Cluster::none_left)
}

#[test]
fn a_port_that_is_taken_is_told_before_anything_starts() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let output = Command::new(binary())
        .args(["dev", "--cluster", "--nameserver-port", &port, "--broker-port", "0"])
        .args(["--http-port", "0", "--peer-port", "0", "--data-dir"])
        .arg(dir.path().join("data"))
        .output()?;
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("nameserver-0") && stderr.contains(&port), "{stderr}");
    Ok(())
}
