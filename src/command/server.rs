//! What the servers share: their configuration flags, the wait for a signal.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Global, Shape};
use crate::config::{self, Flag, Given, Keys, Loaded};
use crate::failure::{Failure, Kind};
use crate::output;

/// Where a server's configuration comes from.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConfigArgs {
    /// Configuration file; of several the later wins
    #[arg(short, long = "config", value_name = "FILE")]
    pub(crate) config: Vec<PathBuf>,
    /// One key, over files and environment
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    pub(crate) set: Vec<(String, String)>,
    /// Instead of `node.data_dir`
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Look at the configuration only: 0 if it is sound, 2 if not
    #[arg(long, conflicts_with = "print_config")]
    pub(crate) check_config: bool,
    /// Print the values in force with their origins
    #[arg(long)]
    pub(crate) print_config: bool,
    /// Print a commented file with every key and its default
    #[arg(long, conflicts_with_all = ["check_config", "print_config"])]
    pub(crate) example_config: bool,
    /// Dies with the process of this id, which started it
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) parent: Option<u32>,
}

pub(crate) fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((path, value)) if path.contains('.') => Ok((path.trim().into(), value.into())),
        Some(_) | None => Err("write SECTION.KEY=VALUE".into()),
    }
}

impl ConfigArgs {
    pub(crate) fn load<K: Keys>(&self) -> Result<Loaded<K>, Failure> {
        let mut flags = flags(&self.set);
        flags.extend(self.data_dir.as_ref().map(|dir| Flag {
            flag: "--data-dir",
            path: "node.data_dir".into(),
            value: dir.display().to_string(),
        }));
        let given =
            Given { preset: None, files: self.config.clone(), environment: environment(), flags };
        Ok(config::load(&given, &[])?)
    }

    /// With `--parent`: has the kernel end this process once its parent is gone, however it went.
    /// Where the kernel cannot, this does nothing.
    pub(crate) fn tie_to_parent(&self) -> Result<(), Failure> {
        let Some(parent) = self.parent else { return Ok(()) };
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(io::Error::from)?;
        let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
        match now.and_then(|pid| u32::try_from(pid).ok()) == Some(parent) {
            true => Ok(()),
            false => Err(Failure::new(Kind::Failed, format!("process {parent} is gone already"))),
        }
    }

    /// Answers `--example-config`; true if nothing is left to do.
    pub(crate) fn answer_example<K: Keys>(&self, role: &str) -> io::Result<bool> {
        if self.example_config {
            let mut out = io::stdout().lock();
            out.write_all(config::document::<K>(role).as_bytes())?;
            out.flush()?;
        }
        Ok(self.example_config)
    }

    /// Answers `--check-config` and `--print-config`; true if nothing is left to do.
    pub(crate) fn answer<K>(&self, loaded: &Loaded<K>, global: &Global) -> io::Result<bool> {
        if self.check_config {
            for warning in &loaded.warnings {
                anstream::eprintln!("warning: {warning}");
            }
            if !global.quiet {
                anstream::eprintln!("the configuration is sound");
            }
        } else if self.print_config {
            print_config(loaded, global)?;
        }
        Ok(self.check_config || self.print_config)
    }
}

pub(crate) fn flags(set: &[(String, String)]) -> Vec<Flag> {
    let flag = |(path, value): &(String, String)| Flag {
        flag: "--set",
        path: path.clone(),
        value: value.clone(),
    };
    set.iter().map(flag).collect()
}

/// Variables that are text; others cannot name a key.
pub(crate) fn environment() -> Vec<(String, String)> {
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).collect()
}

fn print_config<K>(loaded: &Loaded<K>, global: &Global) -> io::Result<()> {
    match global.output {
        Shape::Json | Shape::Jsonl => {
            let keys: Vec<_> = loaded
                .effective
                .iter()
                .map(|value| {
                    json!({
                        "key": format!("{}.{}", value.section, value.name),
                        "value": value.shown,
                        "origin": value.origin.to_string(),
                    })
                })
                .collect();
            output::print_document("drumlin/config/v1", json!({"keys": keys}))
        }
        Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
            let mut out = io::stdout().lock();
            out.write_all(config::effective(loaded).as_bytes())?;
            out.flush()
        }
    }
}

/// Writes what the configuration was made of to the log.
pub(crate) fn log_start<K>(role: &str, loaded: &Loaded<K>) {
    let files: Vec<_> = loaded.files.iter().map(|file| file.display().to_string()).collect();
    tracing::info!(role, version = env!("CARGO_PKG_VERSION"), files = files.join(", "), "starting");
    for value in loaded.effective.iter().filter(|v| v.is_given()) {
        tracing::info!(
            key = format!("{}.{}", value.section, value.name),
            value = value.shown,
            origin = %value.origin,
            "configured"
        );
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
}

/// Resolves at the first SIGTERM or SIGINT.
pub(crate) async fn stop_signal() -> io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Both are safe to cancel: a signal that is not received stays for the next listener.
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    }
}

/// Cancelled by the first SIGTERM or SIGINT, for commands that look at it now and then.
pub(crate) fn stop_token() -> tokio_util::sync::CancellationToken {
    let token = tokio_util::sync::CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        if let Err(error) = stop_signal().await {
            tracing::warn!(%error, "signals cannot be waited for");
        }
        stop.cancel();
    });
    token
}
