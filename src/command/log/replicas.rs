//! `drumlin log orphans` and `drumlin log diff`: what a log dropped, and where two replicas differ.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use drumlin_broker::entry::{Entry, EntryKind};
use drumlin_broker::item::{self, ItemView};
use drumlin_broker::log::inspect::{CutFile, Frame, LogFiles, Verdict};
use drumlin_broker::position::{EntryId, EntryIndex};
use serde_json::{Map, Value, json};

use super::{kind_name, open, open_failure, time};
use crate::cli::{Global, Shape};
use crate::failure::{Failure, Kind};
use crate::output::{self, Column, Listing, column, wide};

const ORPHANS: &[Column] = &[
    column("INDEX", "index"),
    column("TERM", "term"),
    column("KIND", "kind"),
    column("TIME", "time"),
    column("TOPICS", "topics"),
    column("RECORDS", "record_count"),
    column("BYTES", "bytes"),
    column("WHY", "why"),
    wide("INCARNATION", "incarnation"),
    wide("CRC", "payload_crc"),
    wide("FILE", "file"),
];

/// Lists what lies in quarantine, and what the log has from `given_up` on.
pub(super) fn orphans(
    dir: &Path,
    given_up: Option<EntryIndex>,
    global: &Global,
) -> Result<(), Failure> {
    let files = open(dir)?;
    let cuts = files.cut_files().map_err(|error| open_failure(dir, &error.into()))?;
    let first = cuts.iter().flat_map(|cut| &cut.entries).map(|(_, entry)| entry.id.index).min();
    // What the log has now where the entries were.
    let held: BTreeMap<EntryIndex, EntryId> = first.map_or_else(BTreeMap::new, |first| {
        let frames = files.frames(first).map_while(Result::ok);
        frames.map(|frame| (frame.entry.id.index, frame.entry.id)).collect()
    });
    let oldest = files.segments().first().map(|segment| segment.header.base);
    let mut rows: Vec<Value> = cuts.iter().flat_map(|cut| rows_of(cut, &held, oldest)).collect();
    if let Some(from) = given_up {
        let mut frames = files.frames(from);
        while let Some(frame) = next(dir, &files, frames.next())? {
            let Frame { header, entry, .. } = &frame;
            let (bytes, incarnation) = (header.frame_bytes(), header.incarnation);
            rows.push(row(entry, bytes, incarnation, "the group went on without it", None));
        }
    }
    let listing = Listing {
        schema: "drumlin/log.orphans/v1",
        rows_field: "orphans",
        rows,
        fields: Map::from_iter([(
            "directory".to_owned(),
            files.path().display().to_string().into(),
        )]),
        columns: ORPHANS,
        name_field: "index",
    };
    Ok(listing.print(global)?)
}

fn rows_of(
    cut: &CutFile,
    held: &BTreeMap<EntryIndex, EntryId>,
    oldest: Option<EntryIndex>,
) -> Vec<Value> {
    let mut rows: Vec<Value> = cut
        .entries
        .iter()
        .map(|(header, entry)| {
            let why = match held.get(&entry.id.index) {
                Some(id) if *id == entry.id => "it is in the log again".to_owned(),
                Some(id) => format!("an entry of term {} is in its place", id.term),
                None if oldest.is_some_and(|oldest| entry.id.index < oldest) => {
                    "the log begins behind it".to_owned()
                }
                None => "the log ends before it".to_owned(),
            };
            let (bytes, incarnation) = (header.frame_bytes(), header.incarnation);
            row(entry, bytes, incarnation, &why, Some(&cut.name))
        })
        .collect();
    if cut.unreadable_bytes > 0 {
        let last = cut.entries.last().map(|(_, entry)| entry.id.index.next());
        rows.push(json!({
            "index": last.unwrap_or(cut.first).get(),
            "term": null,
            "kind": null,
            "time": null,
            "time_ms": null,
            "topics": [],
            "record_count": null,
            "bytes": cut.unreadable_bytes,
            "payload_crc": null,
            "why": "no whole entry: it was never synced, or is damaged",
            "incarnation": cut.incarnation,
            "file": cut.name,
        }));
    }
    rows
}

/// `file`: of the quarantine; none for what lies in the log.
fn row(entry: &Entry, bytes: u64, incarnation: u64, why: &str, file: Option<&str>) -> Value {
    let (topics, record_count) = held_runs(entry);
    json!({
        "index": entry.id.index.get(),
        "term": entry.id.term.get(),
        "kind": kind_name(entry.kind),
        "time": (entry.clock_ms > 0).then(|| time(entry.clock_ms)).flatten(),
        "time_ms": (entry.clock_ms > 0).then_some(entry.clock_ms),
        "topics": topics,
        "record_count": record_count,
        "bytes": bytes,
        "payload_crc": format!("{:08x}", entry.payload_crc),
        "why": why,
        "incarnation": incarnation,
        "file": file,
    })
}

/// Ids of the topics and the number of records in an entry.
fn held_runs(entry: &Entry) -> (Vec<u32>, u64) {
    if entry.kind != EntryKind::Batch {
        return (Vec::new(), 0);
    }
    let mut topics = Vec::new();
    let mut record_count = 0;
    for placed in item::items(&entry.payload).map_while(Result::ok) {
        if let ItemView::Run(run) = placed.item {
            topics.push(run.topic.get());
            record_count += u64::from(run.record_count);
        }
    }
    topics.sort_unstable();
    topics.dedup();
    (topics, record_count)
}

#[derive(Debug, Args)]
pub(super) struct Diff {
    /// A log's folder, a node's data directory, or the root of `dev`'s
    dir_a: PathBuf,
    /// The same of another replica of the broker group
    dir_b: PathBuf,
}

/// What two replicas have in common.
struct Compared {
    from: EntryIndex,
    /// Exclusive; of what was found equal.
    end: EntryIndex,
    differ: Option<(Frame, Frame)>,
}

impl Diff {
    pub(super) fn run(&self, global: &Global) -> Result<(), Failure> {
        let (a, b) = (open(&self.dir_a)?, open(&self.dir_b)?);
        if a.group_uuid() != b.group_uuid() {
            let (a, b) = (a.group_uuid(), b.group_uuid());
            let reason = format!("these are no replicas of one group: {a} and {b}");
            return Err(Failure::new(Kind::Precondition, reason));
        }
        let compared = self.compare(&a, &b)?;
        let (from, end) = (compared.from, compared.end);
        let count = end.get().saturating_sub(from.get());
        let found = compared.differ.as_ref().map(|(of_a, of_b)| differences(of_a, of_b));
        match global.output {
            Shape::Json | Shape::Jsonl => output::print_document(
                "drumlin/log.diff/v1",
                json!({
                    "a": a.path().display().to_string(),
                    "b": b.path().display().to_string(),
                    "from_index": from.get(),
                    "end_index": end.get(),
                    "identical_entries": count,
                    "identical": found.is_none(),
                    "index": found.is_some().then_some(end.get()),
                    "differences": found.clone().unwrap_or_default(),
                }),
            )?,
            Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
                let line = match count {
                    0 if found.is_none() => "they have no entry in common".to_owned(),
                    0 => format!("the first common entry is {from}"),
                    _ => format!(
                        "identical from entry {from} up to {}: {count} entries",
                        end.get() - 1
                    ),
                };
                output::print_line(&line)?;
            }
        }
        match found {
            None => Ok(()),
            Some(found) => {
                let reason = format!("the replicas differ at entry {end}: {}", found.join(", "));
                Err(Failure::new(Kind::Corrupt, reason))
            }
        }
    }

    fn compare(&self, a: &LogFiles, b: &LogFiles) -> Result<Compared, Failure> {
        let first = |files: &LogFiles| files.segments().first().map(|first| first.header.base);
        let from = first(a).max(first(b)).unwrap_or(EntryIndex::ZERO);
        let mut compared = Compared { from, end: from, differ: None };
        let (mut of_a, mut of_b) = (a.frames(from), b.frames(from));
        loop {
            let next_a = next(&self.dir_a, a, of_a.next())?;
            let next_b = next(&self.dir_b, b, of_b.next())?;
            let (Some(frame_a), Some(frame_b)) = (next_a, next_b) else { return Ok(compared) };
            if frame_a.entry != frame_b.entry {
                compared.differ = Some((frame_a, frame_b));
                return Ok(compared);
            }
            compared.end = frame_a.entry.id.index.next();
        }
    }
}

type NextFrame = Option<Result<Frame, drumlin_broker::log::OpenError>>;

/// The next entry. What is being written, and a torn tail, are the end of a log.
fn next(dir: &Path, files: &LogFiles, frame: NextFrame) -> Result<Option<Frame>, Failure> {
    match frame.transpose() {
        Ok(frame) => Ok(frame),
        Err(error) => match files.verify().map(|verified| verified.verdict) {
            Ok(Verdict::Clean | Verdict::TornTail { .. }) => Ok(None),
            Ok(Verdict::Corrupt(_)) | Err(_) => Err(open_failure(dir, &error)),
        },
    }
}

/// What of an entry is not the same on both.
fn differences(a: &Frame, b: &Frame) -> Vec<String> {
    let (a, b) = (&a.entry, &b.entry);
    let mut found = Vec::new();
    let mut compare = |what: &str, a: String, b: String| {
        if a != b {
            found.push(format!("{what} {a} and {b}"));
        }
    };
    compare("term", a.id.term.to_string(), b.id.term.to_string());
    compare("kind", kind_name(a.kind).to_owned(), kind_name(b.kind).to_owned());
    compare("clock", a.clock_ms.to_string(), b.clock_ms.to_string());
    compare("item count", a.item_count.to_string(), b.item_count.to_string());
    compare("payload bytes", a.payload.len().to_string(), b.payload.len().to_string());
    compare("payload CRC", format!("{:08x}", a.payload_crc), format!("{:08x}", b.payload_crc));
    if found.is_empty() {
        found.push("payloads with the same checksum".to_owned());
    }
    found
}
