//! The processes of `drumlin dev --cluster`: started, started again when they end, stopped in order.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use super::plan::{Kin, Node};
use crate::cli::{Global, Shape};
use crate::command::{health, server};
use crate::failure::{Failure, Kind};
use crate::logging;
use crate::output;

/// A process that ended by itself stays away for so long.
const RESTART_DELAY: Duration = Duration::from_secs(5);
/// What a stopping process may take before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(40);
const READY_POLL: Duration = Duration::from_millis(200);
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// How every child is run.
struct Launcher {
    program: PathBuf,
    root: PathBuf,
    /// Flags of this command that the children get too.
    flags: Vec<String>,
}

/// Runs until a signal. Brokers are stopped first, so that they can tell the nameservers; a second
/// signal kills what is left.
///
/// The children are started by the calling thread and end when it does, so this must be the main one.
pub(super) async fn run(root: &Path, nodes: Vec<Node>, global: &Global) -> Result<(), Failure> {
    let program = std::env::current_exe()?;
    let launcher = Launcher { program, root: root.to_owned(), flags: logging_flags(global) };
    let (stop_brokers, stop_nameservers) = (CancellationToken::new(), CancellationToken::new());
    let kill = CancellationToken::new();
    let mut children = Vec::new();
    for node in nodes {
        let child = launcher.start(&node).map_err(|error| {
            Failure::new(Kind::Failed, format!("{} cannot be started: {error}", node.name))
        })?;
        children.push((node, child));
    }
    announce(&children, root, global)?;
    let nodes: Vec<Node> = children.iter().map(|(node, _)| node.clone()).collect();
    let (nameservers, brokers): (Vec<_>, Vec<_>) =
        children.into_iter().partition(|(node, _)| node.is_nameserver());
    let keep = |children: Vec<(Node, Child)>, stop: &CancellationToken| {
        let (launcher, kill, stop) = (&launcher, &kill, stop.clone());
        join_all(
            children
                .into_iter()
                .map(move |(node, child)| launcher.keep(node, child, stop.clone(), kill.clone())),
        )
    };
    let nameservers = keep(nameservers, &stop_nameservers);
    let brokers = async {
        keep(brokers, &stop_brokers).await;
        stop_nameservers.cancel();
    };
    let ready = async {
        until_ready(&nodes).await;
        tell_ready(&nodes, global)
    };
    let signals = async {
        let signal = server::stop_signal().await?;
        tracing::info!(signal, "stopping");
        stop_brokers.cancel();
        server::stop_signal().await?;
        tracing::warn!("killing what is left");
        kill.cancel();
        std::future::pending::<io::Result<()>>().await
    };
    let watched = async { tokio::try_join!(ready, signals).map(drop) };
    // Dropping the children kills them.
    tokio::select! {
        _ = async { tokio::join!(nameservers, brokers) } => {}
        ended = watched => ended?,
    }
    tracing::info!("stopped");
    Ok(())
}

fn logging_flags(global: &Global) -> Vec<String> {
    // A file is for people, unless told otherwise.
    let shape = match global.log_format {
        logging::Shape::Json => "json",
        logging::Shape::Text | logging::Shape::Auto => "text",
    };
    let mut flags = vec!["--log-format".to_owned(), shape.to_owned()];
    if let Some(level) = &global.log_level {
        flags.extend(["--log-level".to_owned(), level.clone()]);
    }
    flags
}

impl Launcher {
    fn start(&self, node: &Node) -> io::Result<Child> {
        let log = self.log_file(node)?;
        let mut command = Command::new(&self.program);
        command
            .arg(node.command())
            .arg("-c")
            .arg(node.config_path(&self.root))
            .args(["--parent", &std::process::id().to_string()])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Away from the terminal's Ctrl-C: the order of stopping is ours.
            .process_group(0)
            .kill_on_drop(true);
        // Their file has it all; a key of the other kind of node would be refused.
        for (name, _) in server::environment() {
            if name.starts_with("DRUMLIN_") && name != "DRUMLIN_FAULT" {
                command.env_remove(name);
            }
        }
        command.spawn()
    }

    fn log_file(&self, node: &Node) -> io::Result<File> {
        OpenOptions::new().create(true).append(true).open(node.log_path(&self.root))
    }

    /// Starts the node again whenever it has ended, until `stop`.
    async fn keep(
        &self,
        node: Node,
        mut child: Child,
        stop: CancellationToken,
        kill: CancellationToken,
    ) {
        loop {
            tokio::select! {
                ended = child.wait() => self.report(&node, ended),
                () = stop.cancelled() => return end(&node, child, &kill).await,
            }
            child = loop {
                tokio::select! {
                    () = tokio::time::sleep(RESTART_DELAY) => {}
                    () = stop.cancelled() => return,
                }
                match self.start(&node) {
                    Ok(child) => break child,
                    Err(error) => tracing::error!(child = node.name, %error, "cannot be started"),
                }
            };
            tracing::info!(child = node.name, pid = child.id(), "started again");
        }
    }

    fn report(&self, node: &Node, ended: io::Result<std::process::ExitStatus>) {
        let status = match ended {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            child = node.name,
            status,
            log = %node.log_path(&self.root).display(),
            restart_s = RESTART_DELAY.as_secs(),
            "ended by itself"
        );
    }
}

/// Asks a child to stop, and kills it if it does not.
async fn end(node: &Node, mut child: Child, kill: &CancellationToken) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = kill_process(pid, Signal::TERM)
    {
        tracing::warn!(child = node.name, %error, "cannot be told to stop");
    }
    tokio::select! {
        ended = child.wait() => match ended {
            Ok(status) if status.success() => return,
            Ok(status) => {
                tracing::warn!(child = node.name, %status, "stopped badly");
                return;
            }
            Err(error) => tracing::warn!(child = node.name, %error, "cannot be waited for"),
        },
        () = tokio::time::sleep(STOP_PATIENCE) => {
            tracing::warn!(child = node.name, "does not stop and is killed");
        }
        () = kill.cancelled() => {}
    }
    if let Err(error) = child.kill().await {
        tracing::warn!(child = node.name, %error, "cannot be killed");
    }
}

/// Returns once every node has said that it is ready.
async fn until_ready(nodes: &[Node]) {
    for node in nodes {
        let address = format!("127.0.0.1:{}", node.http_port);
        loop {
            let answer = tokio::time::timeout(READY_PATIENCE, health::get(&address, "/readyz"));
            if let Ok(Ok(health::Answer { status: 200, .. })) = answer.await {
                break;
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }
}

fn row(node: &Node, pid: Option<u32>, root: &Path) -> Value {
    let (group, peer) = match &node.kin {
        Kin::Nameserver => (None, None),
        Kin::Broker { group, peer_port } => (Some(group), Some(format!("127.0.0.1:{peer_port}"))),
    };
    json!({
        "node": node.name,
        "role": node.command(),
        "broker_group": group,
        "endpoint": format!("127.0.0.1:{}", node.port),
        "http": format!("127.0.0.1:{}", node.http_port),
        "peer": peer,
        "pid": pid,
        "log": node.log_path(root).display().to_string(),
    })
}

/// Who was started, before anyone is ready.
fn announce(children: &[(Node, Child)], root: &Path, global: &Global) -> io::Result<()> {
    let rows = children.iter().map(|(node, child)| row(node, child.id(), root)).collect::<Vec<_>>();
    match global.output {
        Shape::Json | Shape::Jsonl => output::print_document(
            "drumlin/dev.cluster/v1",
            json!({
                "nodes": rows,
                "data_dir": root.display().to_string(),
                "pid": std::process::id(),
                "version": env!("CARGO_PKG_VERSION"),
            }),
        ),
        Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
            let mut text = format!(
                "Drumlin {} starts two nameservers and two broker groups; data in {}\n\n\
                 \x20 {:<14}{:<17}{:<17}PID\n",
                env!("CARGO_PKG_VERSION"),
                root.display(),
                "NODE",
                "CLIENTS",
                "HTTP",
            );
            for (node, child) in children {
                let clients = format!("localhost:{}", node.port);
                let http = format!("localhost:{}", node.http_port);
                let pid = child.id().map_or_else(|| "-".to_owned(), |pid| pid.to_string());
                text += &format!("  {:<14}{clients:<17}{http:<17}{pid}\n", node.name);
            }
            print(&text)
        }
    }
}

/// Everyone is ready: what to paste next.
fn tell_ready(nodes: &[Node], global: &Global) -> io::Result<()> {
    let of = |nameserver: bool| -> Vec<String> {
        let nodes = nodes.iter().filter(|node| node.is_nameserver() == nameserver);
        nodes.map(|node| format!("localhost:{}", node.port)).collect()
    };
    let (nameservers, brokers) = (of(true), of(false));
    match global.output {
        Shape::Json | Shape::Jsonl => output::print_document(
            "drumlin/dev.cluster.ready/v1",
            json!({"nameservers": nameservers, "brokers": brokers}),
        ),
        Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
            // Where the CLI looks by itself.
            let endpoint = match nameservers.iter().any(|a| a == "localhost:9876") {
                true => String::new(),
                false => format!(" -e {}", nameservers.join(",")),
            };
            print(&format!(
                "\nAll are ready. Topics are created on first use. Try, in another terminal:\n\n\
                 \x20 echo hello | drumlin{endpoint} produce greetings\n\
                 \x20 drumlin{endpoint} cluster health\n\
                 \x20 pkill -9 -f broker-a-0\n\
                 \x20 drumlin{endpoint} consume greetings --from earliest --exit-at-end\n\n\
                 A process that ends is started again after {} s. Ctrl-C stops all.\n",
                RESTART_DELAY.as_secs()
            ))
        }
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
