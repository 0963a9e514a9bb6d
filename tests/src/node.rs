//! `drumlin dev` as a child process.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The binary under test: `DRUMLIN_BINARY`, or this build's, made once where it is not there yet.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(told) = std::env::var_os("DRUMLIN_BINARY") {
            return told.into();
        }
        let test = std::env::current_exe().expect("a test has an executable");
        let profile = test.ancestors().nth(2).expect("target/<profile>/deps/<test>");
        let binary = profile.join("drumlin");
        if !binary.is_file() {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--package", "drumlin", "--bin", "drumlin"]);
            if profile.ends_with("release") {
                build.arg("--release");
            }
            assert!(build.status().expect("cargo runs").success(), "drumlin does not build");
        }
        binary
    })
}

/// How a node is started.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// `section.key=value`, as `--set` takes them.
    pub settings: Vec<String>,
    /// A program and arguments put in front, such as `faketime`.
    pub wrapper: Vec<String>,
    pub environment: Vec<(String, String)>,
    /// Where stderr goes; beside the data directory unless told otherwise.
    pub log: Option<PathBuf>,
}

impl Launch {
    fn log_path(&self, data_dir: &Path) -> PathBuf {
        self.log.clone().unwrap_or_else(|| data_dir.with_extension("stderr"))
    }
}

/// One running `drumlin dev`; killed when dropped.
#[derive(Debug)]
pub struct Node {
    child: Child,
    log_path: PathBuf,
    /// `host:port` of each port.
    pub nameserver: String,
    pub broker: String,
    pub http: String,
}

impl Node {
    /// Starts on ephemeral ports and returns when the ports are bound.
    pub fn start(data_dir: &Path, launch: &Launch) -> Result<Self> {
        let log_path = launch.log_path(data_dir);
        let mut command = match launch.wrapper.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(binary());
                command
            }
            None => Command::new(binary()),
        };
        command
            .args(["dev", "-o", "json", "--log-format", "text"])
            .args(["--nameserver-port", "0", "--broker-port", "0", "--http-port", "0"])
            .arg("--data-dir")
            .arg(data_dir)
            .args(launch.settings.iter().flat_map(|setting| ["--set", setting]))
            .envs(launch.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file(&log_path)?);
        // Whatever else begins so is the harness's own, and would be refused as an unknown key.
        for (name, _) in std::env::vars_os() {
            let given =
                launch.environment.iter().any(|(given, _)| *given == name.to_string_lossy());
            if name.to_string_lossy().starts_with("DRUMLIN_") && !given {
                command.env_remove(name);
            }
        }
        let mut child = command.spawn().context("drumlin does not start")?;
        let stdout = child.stdout.take().expect("stdout is piped");
        match read_addresses(stdout) {
            Ok((nameserver, broker, http)) => {
                Ok(Self { child, log_path, nameserver, broker, http })
            }
            Err(error) => {
                child.kill().ok();
                let status = child.wait()?;
                Err(error.context(format!("drumlin dev ended with {status}: {}", tail(&log_path))))
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM; fails unless it ends by itself, with success, within `limit`.
    pub fn stop(mut self, limit: Duration) -> Result<()> {
        let pid = self.child.id().to_string();
        ensure!(Command::new("kill").arg(&pid).status()?.success(), "kill {pid} failed");
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "ended with {status}");
                return Ok(());
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
        bail!("still there {limit:?} after SIGTERM")
    }

    /// Whether it has ended by itself.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// All that it wrote to stderr so far.
    pub fn log_text(&self) -> Result<String> {
        Ok(std::fs::read_to_string(&self.log_path)?)
    }

    /// Body of an HTTP GET, with its status code.
    pub fn http_get(&self, path: &str) -> Result<(u16, String)> {
        http_get(&self.http, path)
    }

    /// Waits for `/readyz`.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.http_get("/readyz");
            match &answer {
                Ok((200, _)) => return Ok(()),
                _ if Instant::now() < deadline => {
                    std::thread::park_timeout(Duration::from_millis(10));
                }
                _ => bail!("not ready within {limit:?}: {answer:?}"),
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Status code and body of one HTTP/1.1 GET.
pub fn http_get(address: &str, path: &str) -> Result<(u16, String)> {
    use std::io::Write;
    let mut socket = std::net::TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).context("no status line")?.parse()?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}

fn log_file(path: &Path) -> Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("{} cannot be written", path.display()))
}

/// The last lines of a node's log.
fn tail(log_path: &Path) -> String {
    let text = std::fs::read_to_string(log_path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn read_addresses(stdout: impl Read) -> Result<(String, String, String)> {
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    let banner: Value = serde_json::from_str(&line).with_context(|| format!("banner {line:?}"))?;
    let address = |name: &str| {
        banner[name].as_str().map(str::to_owned).with_context(|| format!("no {name} in {line}"))
    };
    Ok((address("nameserver")?, address("broker")?, address("http")?))
}
