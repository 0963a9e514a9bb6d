//! Log lines on stderr: one per event, for people or for machines.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::cli::{Color, Global};
use crate::failure::{Failure, Kind};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// For people
    Text,
    /// One JSON object per line
    Json,
    /// Text on a terminal, else JSON
    Auto,
}

/// RFC 3339 in UTC with microseconds.
struct Utc;

impl FormatTime for Utc {
    fn format_time(&self, w: &mut Writer<'_>) -> std::fmt::Result {
        write!(w, "{:.6}", jiff::Timestamp::now())
    }
}

/// Starts logging for the whole process. `default_level` holds where neither `--log-level` nor
/// `RUST_LOG` say anything.
pub(crate) fn start(global: &Global, default_level: &str) -> Result<(), Failure> {
    let level = match (&global.log_level, std::env::var("RUST_LOG"), global.verbose) {
        (Some(level), _, _) => level.clone(),
        (None, _, 1) => "debug".into(),
        (None, _, 2..) => "trace".into(),
        (None, Ok(level), 0) if !level.is_empty() => level,
        (None, _, 0) => default_level.into(),
    };
    let filter = EnvFilter::try_new(&level).map_err(|error| {
        Failure::new(Kind::Usage, format!("log level {level:?} is invalid: {error}"))
    })?;
    let terminal = std::io::stderr().is_terminal();
    let json = match global.log_format {
        Shape::Text => false,
        Shape::Json => true,
        Shape::Auto => !terminal,
    };
    let color = match global.color {
        Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        Color::Always => true,
        Color::Never => false,
    };
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // systemd's journal has its own times.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let started = match (json, journal) {
        (true, _) => lines.with_timer(Utc).json().flatten_event(true).try_init(),
        (false, false) => lines.with_timer(Utc).with_ansi(color).try_init(),
        (false, true) => lines.without_time().with_ansi(false).try_init(),
    };
    started.map_err(|error| Failure::new(Kind::Failed, format!("logging cannot start: {error}")))
}
