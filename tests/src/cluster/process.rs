//! One process of a cluster: how it is started, stopped, paused and killed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;

/// Addresses that a process binds, the same at each start.
#[derive(Clone, Debug)]
pub struct Ports {
    pub client: String,
    pub http: String,
    pub peers: String,
}

/// Below what the kernel gives to outgoing connections, so that nobody takes a port while its
/// process is dead.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

impl Ports {
    pub(super) fn choose() -> Result<Self> {
        Ok(Self { client: free_port()?, http: free_port()?, peers: free_port()? })
    }
}

fn free_port() -> Result<String> {
    static TAKEN: OnceLock<Mutex<BTreeSet<u16>>> = OnceLock::new();
    let mut taken = TAKEN.get_or_init(Mutex::default).lock();
    for _ in 0..1_000 {
        let port = fastrand::u16(PORTS);
        let address = format!("127.0.0.1:{port}");
        if !taken.contains(&port) && std::net::TcpListener::bind(&address).is_ok() {
            taken.insert(port);
            return Ok(address);
        }
    }
    bail!("no port is free")
}

/// What tells a process on which boot of the machine it runs, so that a loss of power can be one for
/// it: a boot id of its own, in a mount namespace of its own.
#[derive(Debug)]
pub(super) struct Machine {
    boot_id: PathBuf,
    /// Disks of others, which would stay mounted for as long as it runs.
    pub(super) foreign: Vec<PathBuf>,
}

/// Binds its own name over the kernel's file, lets go of the mounts in `$1`, and becomes the rest.
const ON_ITS_MACHINE: &str = "set -e
mount --bind \"$0\" /proc/sys/kernel/random/boot_id
for foreign in $1; do umount \"$foreign\"; done
shift
exec \"$@\"";

impl Machine {
    pub(super) fn new(boot_id: PathBuf) -> Result<Self> {
        let machine = Self { boot_id, foreign: Vec::new() };
        machine.boot()?;
        Ok(machine)
    }

    /// From its next start on the process is on another boot.
    pub(super) fn boot(&self) -> Result<()> {
        let (high, low) = (fastrand::u64(..), fastrand::u64(..));
        let hex = format!("{high:016x}{low:016x}");
        let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
        Ok(std::fs::write(&self.boot_id, parts.join("-"))?)
    }

    fn command(&self, binary: &Path) -> Command {
        let foreign: Vec<_> = self.foreign.iter().map(|path| path.to_string_lossy()).collect();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", ON_ITS_MACHINE]);
        command.arg(&self.boot_id).arg(foreign.join(" ")).arg(binary);
        command
    }
}

#[derive(Debug)]
pub struct Process {
    pub name: String,
    /// Empty for a nameserver.
    pub group: String,
    pub role: &'static str,
    pub settings: Vec<String>,
    pub ports: Ports,
    pub data_dir: PathBuf,
    pub log_path: PathBuf,
    pub(super) binary: PathBuf,
    pub(super) environment: Vec<(String, String)>,
    pub(super) machine: Option<Machine>,
    pub(super) child: Option<Child>,
    pub(super) paused: bool,
}

impl Process {
    pub(super) fn start(&mut self) -> Result<()> {
        self.kill_if_alive()?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log_path)?;
        let mut command = match &self.machine {
            Some(machine) => machine.command(&self.binary),
            None => Command::new(&self.binary),
        };
        command
            .arg(self.role)
            .args(["--log-format", "text"])
            .args(self.settings.iter().flat_map(|setting| ["--set", setting]))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DRUMLIN_") {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().cloned());
        self.child = Some(command.spawn().with_context(|| format!("{command:?}"))?);
        self.paused = false;
        Ok(())
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub(super) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        match &mut self.child {
            Some(child) => Ok(child.try_wait()?),
            None => Ok(None),
        }
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        let mut child = self.child.take().with_context(|| format!("{} is not there", self.name))?;
        child.kill()?;
        child.wait()?;
        self.paused = false;
        Ok(())
    }

    pub(super) fn kill_if_alive(&mut self) -> Result<()> {
        if self.child.is_some() { self.kill() } else { Ok(()) }
    }

    pub(super) fn terminate(&self) -> Result<()> {
        self.signal("-TERM")
    }

    pub(super) fn pause(&mut self) -> Result<()> {
        self.signal("-STOP")?;
        let pid = self.pid().context("it was signalled")?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while state_of(pid)? != 'T' {
            ensure!(Instant::now() < deadline, "{} does not stop", self.name);
            std::thread::yield_now();
        }
        self.paused = true;
        Ok(())
    }

    pub(super) fn resume(&mut self) -> Result<()> {
        self.paused = false;
        self.signal("-CONT")
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} is not there", self.name))?.to_string();
        let status = Command::new("kill").args([signal, &pid]).status()?;
        ensure!(status.success(), "kill {signal} {pid} failed");
        Ok(())
    }
}

/// As in `/proc/PID/stat`: T is stopped.
fn state_of(pid: u32) -> Result<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.with_context(|| format!("{stat:?} has no state"))
}
