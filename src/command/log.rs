//! `drumlin log`: reads the log of a stopped or running node; takes no lock, changes nothing.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use drumlin_broker::entry::EntryKind;
use drumlin_broker::item::{self, ItemView};
use drumlin_broker::log::OpenError;
use drumlin_broker::log::inspect::{Frame, LogFiles, Place, SegmentFacts, Verdict, Verified};
use drumlin_broker::position::EntryIndex;
use drumlin_proto::record::Run;
use serde_json::{Map, Value, json};

use self::replicas::Diff;
use crate::cli::{Global, Shape};
use crate::failure::{Failure, Kind, chain};
use crate::moment::rfc3339;
use crate::output::{self, Column, Listing, column, wide};

mod replicas;

/// Where `drumlin dev` keeps its broker, below its root.
const DEV_BROKER: &str = "broker";

#[derive(Debug, Args)]
pub(crate) struct Log {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print entries
    Dump(Dump),
    /// Check every entry: 0 clean or torn tail only, 8 corrupt
    Verify {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
        /// Look into every item and record too
        #[arg(long)]
        deep: bool,
    },
    /// Show the segments
    Stat {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
    },
    /// Compare two replicas: 0 identical where they overlap, 8 they differ
    Diff(Diff),
    /// List what the log cut off and keeps in quarantine
    Orphans {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
        /// Also what the log itself has from here on: of a node whose group another one has
        /// succeeded by `cluster elect --unsafe`, which says the number
        #[arg(long, value_name = "N")]
        from_index: Option<u64>,
    },
}

#[derive(Debug, Args)]
struct Dump {
    /// A log's folder, a node's data directory, or the root of `dev`'s
    dir: PathBuf,
    #[arg(long, value_name = "N", default_value_t = 0)]
    from_index: u64,
    /// Inclusive
    #[arg(long, value_name = "N")]
    to_index: Option<u64>,
    /// Entries at most
    #[arg(long, default_value_t = 100)]
    max: u64,
}

impl Log {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        match &self.action {
            Action::Dump(dump) => dump.run(global),
            Action::Verify { dir, deep } => verify(dir, *deep, global),
            Action::Stat { dir } => stat(dir, global),
            Action::Diff(diff) => diff.run(global),
            Action::Orphans { dir, from_index } => {
                replicas::orphans(dir, from_index.map(EntryIndex::new), global)
            }
        }
    }
}

/// The log in a folder, in a data directory around it, or in the root of `dev`'s.
fn open(dir: &Path) -> Result<LogFiles, Failure> {
    let below = dir.join(DEV_BROKER);
    let dir = if below.is_dir() { &below } else { dir };
    LogFiles::open(dir).map_err(|error| open_failure(dir, &error))
}

fn open_failure(dir: &Path, error: &OpenError) -> Failure {
    let kind = match error {
        OpenError::Io(_) => Kind::Failed,
        OpenError::Missing { .. } if !holds_segments(dir) => Kind::Failed,
        OpenError::Missing { .. }
        | OpenError::Corrupt { .. }
        | OpenError::Segment { .. }
        | OpenError::OtherGroup { .. }
        | OpenError::State { .. } => Kind::Corrupt,
    };
    Failure::new(kind, format!("{}: {}", dir.display(), chain(error)))
}

/// Whether there is anything that could be damaged: files that are named as segments are.
fn holds_segments(dir: &Path) -> bool {
    let is_segment = |name: &str| {
        let parts = name.strip_suffix(".log").and_then(|stem| stem.split_once('-'));
        parts.is_some_and(|(incarnation, base)| {
            incarnation.len() == 10 && base.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    [dir.to_owned(), dir.join("log")].iter().any(|dir| {
        std::fs::read_dir(dir).is_ok_and(|mut files| {
            files.any(|file| {
                file.is_ok_and(|file| file.file_name().to_str().is_some_and(is_segment))
            })
        })
    })
}

const STAT: &[Column] = &[
    column("SEGMENT", "segment"),
    column("BASE", "base_index"),
    column("END", "end_index"),
    column("STATE", "state"),
    column("FILE-BYTES", "file_bytes"),
    column("ENTRIES", "entries"),
    column("RECORDS", "records"),
    column("LOG-BYTES", "log_bytes"),
    column("FIRST", "first"),
    column("LAST", "last"),
    wide("INCARNATION", "incarnation"),
    wide("BASE-TERM", "base_term"),
    wide("BASE-POSITION", "base_position"),
];

/// What one segment holds.
#[derive(Default)]
struct Held {
    entries: u64,
    records: u64,
    bytes: u64,
    first_ms: Option<u64>,
    last_ms: Option<u64>,
}

impl Held {
    fn count(&mut self, frame: &Frame) {
        self.entries += 1;
        self.bytes += frame.header.frame_bytes();
        self.records += item::items(&frame.entry.payload)
            .map_while(Result::ok)
            .map(|placed| match placed.item {
                ItemView::Run(run) => u64::from(run.record_count),
                ItemView::Command(_) => 0,
            })
            .sum::<u64>();
        let clock_ms = frame.entry.clock_ms;
        if clock_ms > 0 {
            self.first_ms.get_or_insert(clock_ms);
            self.last_ms = Some(clock_ms);
        }
    }
}

fn stat(dir: &Path, global: &Global) -> Result<(), Failure> {
    let files = open(dir)?;
    let segments = files.segments();
    let mut held: Vec<Held> = segments.iter().map(|_| Held::default()).collect();
    let mut fault = None;
    for frame in files.frames(EntryIndex::ZERO) {
        match frame {
            Ok(frame) => {
                let nth = segments.iter().position(|segment| segment.name == frame.segment);
                if let Some(held) = nth.and_then(|nth| held.get_mut(nth)) {
                    held.count(&frame);
                }
            }
            Err(error) => fault = Some(error),
        }
    }
    let rows = segments.iter().zip(&held).map(|(segment, held)| segment_row(segment, held));
    let fields = Map::from_iter([
        ("directory".to_owned(), files.path().display().to_string().into()),
        ("group_uuid".to_owned(), files.group_uuid().to_string().into()),
        ("closed_cleanly".to_owned(), files.closed_cleanly().into()),
        ("durable_mark".to_owned(), files.durable_mark().map(EntryIndex::get).into()),
    ]);
    let listing = Listing {
        schema: "drumlin/log.stat/v1",
        rows_field: "segments",
        rows: rows.collect(),
        fields,
        columns: STAT,
        name_field: "segment",
    };
    listing.print(global)?;
    if let Some(error) = fault
        && !global.quiet
    {
        anstream::eprintln!("behind the last entry shown: {}; see `log verify`", chain(&error));
    }
    Ok(())
}

fn segment_row(segment: &SegmentFacts, held: &Held) -> Value {
    let header = &segment.header;
    let end = segment.end.map_or(header.base.get() + held.entries, EntryIndex::get);
    json!({
        "segment": segment.name,
        "base_index": header.base.get(),
        "end_index": end,
        "state": if segment.sealed { "sealed" } else { "active" },
        "file_bytes": segment.file_bytes,
        "entries": held.entries,
        "records": held.records,
        "log_bytes": held.bytes,
        "first": held.first_ms.and_then(time),
        "first_ms": held.first_ms,
        "last": held.last_ms.and_then(time),
        "last_ms": held.last_ms,
        "incarnation": header.incarnation,
        "base_term": header.base_term.get(),
        "base_position": header.base_position.get(),
        "recycled": header.recycled,
    })
}

fn time(ms: u64) -> Option<String> {
    rfc3339(i64::try_from(ms).ok()?)
}

fn verify(dir: &Path, deep: bool, global: &Global) -> Result<(), Failure> {
    let files = open(dir)?;
    let Verified { mut verdict, entries, bytes } =
        files.verify().map_err(|error| open_failure(dir, &error))?;
    if deep && !matches!(verdict, Verdict::Corrupt(_)) {
        match check_items(&files, entries) {
            Ok(None) => {}
            Ok(Some(place)) => verdict = Verdict::Corrupt(place),
            Err(error) => return Err(open_failure(dir, &error)),
        }
    }
    let (name, place, torn_bytes) = match &verdict {
        Verdict::Clean => ("clean", None, None),
        Verdict::TornTail { place, bytes } => ("torn tail", Some(place), Some(*bytes)),
        Verdict::Corrupt(place) => ("corrupt", Some(place), None),
    };
    match global.output {
        Shape::Json | Shape::Jsonl => output::print_document(
            "drumlin/log.verify/v1",
            json!({
                "directory": files.path().display().to_string(),
                "verdict": name,
                "entries": entries,
                "bytes": bytes,
                "torn_bytes": torn_bytes,
                "index": place.map(|place| place.index.get()),
                "segment": place.map(|place| &place.segment),
                "at": place.map(|place| place.at),
                "reason": place.map(|place| &place.reason),
            }),
        )?,
        Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
            let mut line = format!("{name}: {entries} entries, {bytes} bytes");
            if let (Verdict::TornTail { .. }, Some(place)) = (&verdict, place) {
                line += &format!(
                    "; {} bytes behind them never were durable ({}); a start cuts them off",
                    torn_bytes.unwrap_or_default(),
                    shown(place)
                );
            }
            output::print_line(&line)?;
        }
    }
    match verdict {
        Verdict::Clean | Verdict::TornTail { .. } => Ok(()),
        Verdict::Corrupt(place) => Err(Failure::new(
            Kind::Corrupt,
            format!("{} is corrupt: {}", files.path().display(), shown(&place)),
        )),
    }
}

fn shown(place: &Place) -> String {
    let Place { index, segment, at, reason } = place;
    format!("entry {index} in {segment} at byte {at}: {reason}")
}

/// The first entry whose items or records make no sense although its checksums hold.
fn check_items(files: &LogFiles, entries: u64) -> Result<Option<Place>, OpenError> {
    let entries = usize::try_from(entries).unwrap_or(usize::MAX);
    for frame in files.frames(EntryIndex::ZERO).take(entries) {
        let frame = frame?;
        if let Err(reason) = check_frame(&frame) {
            let (index, segment, at) = (frame.entry.id.index, frame.segment, frame.at);
            return Ok(Some(Place { index, segment, at, reason }));
        }
    }
    Ok(None)
}

fn check_frame(frame: &Frame) -> Result<(), String> {
    if frame.entry.kind != EntryKind::Batch {
        return Ok(());
    }
    let mut count = 0;
    for placed in item::items(&frame.entry.payload) {
        let placed = placed.map_err(|error| chain(&error))?;
        count += 1;
        match placed.item {
            ItemView::Run(_) => {
                let at = usize::try_from(placed.at_bytes).map_err(|error| error.to_string())?;
                let run = Run::from_log(frame.entry.payload.slice(at..));
                run.and_then(|run| run.verify()).map_err(|error| chain(&error))?;
            }
            ItemView::Command(command) => {
                command.decode().map_err(|error| chain(&error))?;
            }
        }
    }
    match count == frame.entry.item_count {
        true => Ok(()),
        false => Err(format!("{count} items instead of {}", frame.entry.item_count)),
    }
}

const DUMP: &[Column] = &[
    column("INDEX", "index"),
    column("TERM", "term"),
    column("KIND", "kind"),
    column("TIME", "time"),
    column("ITEMS", "item_count"),
    column("RECORDS", "record_count"),
    column("BYTES", "payload_bytes"),
    wide("SEGMENT", "segment"),
    wide("AT", "at"),
    wide("POSITION", "position"),
    wide("CRC", "payload_crc"),
    wide("DURABLE", "durable_end"),
];

impl Dump {
    fn run(&self, global: &Global) -> Result<(), Failure> {
        let files = open(&self.dir)?;
        let mut rows = Vec::new();
        let mut fault = None;
        let max = usize::try_from(self.max).unwrap_or(usize::MAX);
        for frame in files.frames(EntryIndex::new(self.from_index)) {
            match frame {
                Ok(frame) => {
                    let behind = self.to_index.is_some_and(|to| frame.entry.id.index.get() > to);
                    if behind || rows.len() >= max {
                        break;
                    }
                    rows.push(entry_row(&frame));
                }
                Err(error) => fault = Some(error),
            }
        }
        let listing = Listing {
            schema: "drumlin/log.dump/v1",
            rows_field: "entries",
            rows,
            fields: Map::new(),
            columns: DUMP,
            name_field: "index",
        };
        listing.print(global)?;
        match fault {
            None => Ok(()),
            // A torn tail is no fault, so `verify` has to judge what this is.
            Some(error) => match files.verify().map(|verified| verified.verdict) {
                Ok(Verdict::Clean | Verdict::TornTail { .. }) => Ok(()),
                Ok(Verdict::Corrupt(_)) | Err(_) => Err(open_failure(&self.dir, &error)),
            },
        }
    }
}

fn entry_row(frame: &Frame) -> Value {
    let entry = &frame.entry;
    let kind = kind_name(entry.kind);
    let items: Vec<Value> = match entry.kind {
        EntryKind::Batch => item::items(&entry.payload).map(item_json).collect(),
        EntryKind::Blank | EntryKind::Membership | EntryKind::Paired | EntryKind::Alone => {
            Vec::new()
        }
    };
    let record_count: u64 = items.iter().filter_map(|item| item["record_count"].as_u64()).sum();
    json!({
        "index": entry.id.index.get(),
        "term": entry.id.term.get(),
        "kind": kind,
        "time": (entry.clock_ms > 0).then(|| time(entry.clock_ms)).flatten(),
        "time_ms": (entry.clock_ms > 0).then_some(entry.clock_ms),
        "item_count": entry.item_count,
        "record_count": record_count,
        "payload_bytes": entry.payload.len(),
        "payload_crc": format!("{:08x}", entry.payload_crc),
        "segment": frame.segment,
        "at": frame.at,
        "position": frame.header.position.get(),
        "durable_end": frame.header.durable_end.get(),
        "incarnation": frame.header.incarnation,
        "items": items,
    })
}

fn kind_name(kind: EntryKind) -> &'static str {
    match kind {
        EntryKind::Blank => "blank",
        EntryKind::Membership => "membership",
        EntryKind::Batch => "batch",
        EntryKind::Paired => "paired",
        EntryKind::Alone => "alone",
    }
}

fn item_json(placed: Result<item::PlacedItem<'_>, item::ItemError>) -> Value {
    let item = match placed {
        Ok(placed) => placed.item,
        Err(error) => return json!({"error": chain(&error)}),
    };
    match item {
        ItemView::Run(run) => json!({
            "run": true,
            "topic_id": run.topic.get(),
            "queue_id": run.queue.get(),
            "record_count": run.record_count,
            "records_bytes": run.records_bytes,
            "first_born_ms": run.first_born_ms,
            "last_born_ms": run.last_born_ms,
            "guard": run.guard,
        }),
        ItemView::Command(command) => {
            let decoded = command.decode();
            json!({
                "command_kind": command.kind,
                "version": command.version,
                "command": decoded.as_ref().ok().map(|command| format!("{command:?}")),
                "error": decoded.as_ref().err().map(|error| chain(error)),
            })
        }
    }
}
