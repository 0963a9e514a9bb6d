//! Log lines on stderr: one per event, for people or for machines.

use std::fmt::{self, Debug};
use std::io::IsTerminal;

use clap::ValueEnum;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

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
    fn format_time(&self, w: &mut Writer<'_>) -> fmt::Result {
        write!(w, "{:.6}", jiff::Timestamp::now())
    }
}

/// Keys that mean the same in every line.
const RESERVED: [&str; 5] = ["ts", "level", "target", "msg", "node"];

/// One object per line: `ts`, `level`, `target`, `msg`, `node`, then the fields of the event.
struct JsonLines {
    node: String,
    times: bool,
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        writer.write_char('{')?;
        if self.times {
            write!(writer, "\"ts\":\"{:.6}\",", jiff::Timestamp::now())?;
        }
        let (level, target) = (event.metadata().level(), event.metadata().target());
        write!(writer, "\"level\":\"{level}\",\"target\":{}", Value::from(target))?;
        write!(writer, ",\"msg\":{}", Value::from(fields.message))?;
        write!(writer, ",\"node\":{}", Value::from(self.node.as_str()))?;
        for (name, value) in fields.others {
            // No key twice in one object.
            let suffix = if RESERVED.contains(&name) { "_" } else { "" };
            write!(writer, ",\"{name}{suffix}\":{value}")?;
        }
        writeln!(writer, "}}")
    }
}

/// The fields of an event, as JSON.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.others.push((field.name(), value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.others.push((field.name(), value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.others.push((field.name(), value.into()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.others.push((field.name(), value.into()));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            name => self.others.push((name, value.into())),
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// Starts logging for the whole process, which calls itself `node`. `default_level` holds where neither `--log-level` nor
/// `RUST_LOG` say anything.
pub(crate) fn start(global: &Global, node: &str, default_level: &str) -> Result<(), Failure> {
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
        (true, journal) => {
            lines.event_format(JsonLines { node: node.to_owned(), times: !journal }).try_init()
        }
        (false, false) => lines.with_timer(Utc).with_ansi(color).try_init(),
        (false, true) => lines.without_time().with_ansi(false).try_init(),
    };
    started.map_err(|error| Failure::new(Kind::Failed, format!("logging cannot start: {error}")))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_lines_have_the_promised_keys_and_flat_fields() {
        let lines = Lines::default();
        let out = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || out.clone())
            .event_format(JsonLines { node: "broker-a-0".into(), times: true })
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(took_ms = 12_u64, path = %"a\"b", ok = false, node = "b", "said {}", "so");
        });

        let text = String::from_utf8(lines.0.lock().expect("done").clone()).expect("text");
        let line: Value = serde_json::from_str(&text).expect("one JSON object");
        assert!(text.starts_with("{\"ts\":\"2") && text.ends_with("}\n"), "{text}");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["msg"], "said so");
        assert_eq!(line["node"], "broker-a-0");
        assert_eq!(line["took_ms"], 12);
        assert_eq!(line["path"], "a\"b");
        assert_eq!(line["ok"], false);
        assert_eq!(line["node_"], "b");
        assert!(line["ts"].as_str().is_some_and(|ts| ts.len() == 27 && ts.ends_with('Z')));
    }
}
