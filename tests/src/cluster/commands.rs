//! The command line as an operator types it, against a cluster.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Cluster;
use crate::schema;

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Told {
    pub exit: i32,
    /// The document on stdout; null without one.
    pub data: Value,
    pub errors: String,
}

impl Told {
    /// Fails unless it succeeded.
    pub fn success(self) -> Result<Self> {
        ensure!(self.exit == 0, "exit {}: {}", self.exit, self.errors);
        Ok(self)
    }

    /// Fails unless it ended with this code and said this.
    pub fn refusal(self, exit: i32, text: &str) -> Result<Self> {
        let is_so = self.exit == exit && self.errors.contains(text);
        ensure!(
            is_so,
            "exit {}, not {exit} with {text:?}: {} {}",
            self.exit,
            self.errors,
            self.data
        );
        Ok(self)
    }
}

impl Cluster {
    /// Runs a command that asks all nodes, with JSON on stdout and without a terminal.
    pub async fn command(&self, arguments: &[&str]) -> Result<Told> {
        let names = self.nameservers().into_iter().chain(self.brokers());
        let addresses: Result<Vec<_>> = names.map(|name| self.client_address(&name)).collect();
        let mut command = self.plain_command(arguments);
        command.args(["--endpoint", &addresses?.join(","), "--timeout", "30s", "-o", "json"]);
        run(command).await
    }

    /// Runs `drumlin cluster ...` on a stopped node's own configuration.
    pub async fn command_of(&self, name: &str, arguments: &[&str]) -> Result<Told> {
        let mut command = self.plain_command(arguments);
        let settings = &self.node(name)?.settings;
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        command.args(["-o", "json"]);
        run(command).await
    }

    fn plain_command(&self, arguments: &[&str]) -> Command {
        let binary = self.nodes.values().next().map(|node| node.binary.clone());
        let mut command = Command::new(binary.unwrap_or_else(|| "drumlin".into()));
        command.args(arguments).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("DRUMLIN_") || name == "NAMESRV_ADDR" {
                command.env_remove(name.as_ref());
            }
        }
        command
    }
}

/// Links run on a thread of their own, but a test has few to spare.
async fn run(mut command: Command) -> Result<Told> {
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let data = match output.stdout.trim_ascii() {
        [] => Value::Null,
        // What was shown, or asked for, may be text.
        text => serde_json::from_slice(text)
            .unwrap_or_else(|_| String::from_utf8_lossy(text).into_owned().into()),
    };
    if let Some(name) = data["schema"].as_str().filter(|name| name.starts_with("drumlin/cluster."))
    {
        let faults = schema::faults(&schema::shipped(name)?, &data);
        ensure!(faults.is_empty(), "{name}: {} in {data}", faults.join(", "));
    }
    let exit = output.status.code().with_context(|| format!("{}: {errors}", output.status))?;
    Ok(Told { exit, data, errors })
}
