//! One line of a history: what a client asked and was told, what a replica held in the end, which
//! fault was there. A single recorder orders all lines and stamps them with its monotonic clock.
//!
//! As JSON, one object a line, fields that do not apply left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use serde_json::{Map, Value as Json, json};

/// A client of the history; after a call of unknown outcome its next calls come from a new one.
pub type Process = u32;

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Invoke,
    Ok,
    /// Definitely without effect.
    Fail,
    /// With or without effect, now or later.
    Info,
}

/// A queue of a topic in a broker group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Queue {
    pub topic: Arc<str>,
    pub group: Arc<str>,
    pub id: u32,
}

/// A message as a reader got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub offset: u64,
    /// What its body begins with.
    pub value: String,
    /// Its body is what the sender made of the value.
    pub intact: bool,
}

/// What was asked, and in the closing line of a call what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A value is sent once in a history; `repeats`: by a client that may send it again itself.
    Send {
        value: String,
        queue: Option<Queue>,
        offset: Option<u64>,
        degraded: bool,
        repeats: bool,
    },
    /// A consumer got these.
    Read {
        queue: Queue,
        seen: Vec<Seen>,
    },
    /// A reader that goes from record to record found another offset than the next one.
    Skipped {
        queue: Queue,
        expected: u64,
        offset: u64,
    },
    /// Behind the newest readable record, asked with a read barrier.
    MaxOffset {
        queue: Queue,
        offset: Option<u64>,
    },
    Commit {
        consumers: String,
        queue: Queue,
        offset: u64,
    },
    /// The committed offset, asked with a read barrier.
    Committed {
        consumers: String,
        queue: Queue,
        offset: Option<u64>,
    },
    /// All of a queue as one data replica has it, when nothing is sent any more.
    FinalRead {
        node: String,
        queue: Queue,
        min: u64,
        seen: Vec<Seen>,
    },
    /// What two members of a broker group have on their disks, when no process runs any more.
    Compared {
        group: String,
        one: String,
        other: String,
        /// In common.
        entries: u64,
        /// The first.
        difference: Option<String>,
    },
    /// Of the logical state right behind an index of a broker group's log.
    Digest {
        node: String,
        group: String,
        index: u64,
        digest: String,
    },
    /// Somebody said that it leads.
    Leader {
        group: String,
        node: String,
        term: u64,
    },
    /// A fault begins: `Ok` once it was seen to be there. `ok_within_ms`: by then sends to the
    /// group must succeed again although it lasts.
    Fault {
        name: String,
        group: Option<String>,
        ok_within_ms: Option<u64>,
    },
    /// The fault of this name is over.
    FaultEnds {
        name: String,
    },
    /// No fault is left; by then every client must succeed again.
    Healed {
        ok_within_ms: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub t_ns: u64,
    pub process: Process,
    pub step: Step,
    pub what: What,
}

/// Orders the lines of all clients.
#[derive(Clone, Debug)]
pub struct Recorder {
    began: Instant,
    state: Arc<Mutex<Recorded>>,
}

#[derive(Debug, Default)]
struct Recorded {
    events: Vec<Event>,
    processes: Process,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { began: Instant::now(), state: Arc::default() }
    }
}

impl Recorder {
    /// A client that never was before. The controller is 0.
    pub fn new_process(&self) -> Process {
        let mut state = self.state.lock();
        state.processes += 1;
        state.processes
    }

    pub fn record(&self, process: Process, step: Step, what: What) {
        let mut state = self.state.lock();
        let t_ns = u64::try_from(self.began.elapsed().as_nanos()).expect("a run ends in 500 years");
        state.events.push(Event { t_ns, process, step, what });
    }

    /// A line of the controller.
    pub fn note(&self, what: What) {
        self.record(0, Step::Ok, what);
    }

    pub fn count(&self) -> usize {
        self.state.lock().events.len()
    }

    /// How many lines match, from the `from`th on.
    pub fn count_from(&self, from: usize, matches: impl Fn(&Event) -> bool) -> usize {
        let state = self.state.lock();
        state.events[from.min(state.events.len())..].iter().filter(|event| matches(event)).count()
    }

    /// Everything so far.
    pub fn events(&self) -> Vec<Event> {
        self.state.lock().events.clone()
    }

    /// Of each queue where the next record behind all acknowledged ones is.
    pub fn acknowledged_ends(&self) -> BTreeMap<Queue, u64> {
        let mut ends = BTreeMap::new();
        for event in &self.state.lock().events {
            if let What::Send { queue: Some(queue), offset: Some(offset), .. } = &event.what
                && event.step == Step::Ok
            {
                let end = ends.entry(queue.clone()).or_default();
                *end = offset.saturating_add(1).max(*end);
            }
        }
        ends
    }
}

/// Sends that were acknowledged by a broker group.
pub fn acknowledged_by(group: &str) -> impl Fn(&Event) -> bool + '_ {
    move |event| match &event.what {
        What::Send { queue: Some(queue), .. } => {
            event.step == Step::Ok && (group.is_empty() || &*queue.group == group)
        }
        _ => false,
    }
}

/// From each fault of this name to the end of the first acknowledged send that began after it.
pub fn times_to_acknowledgement(events: &[Event], fault: &str) -> Vec<Duration> {
    let is_fault =
        |event: &&Event| matches!(&event.what, What::Fault { name, .. } if name == fault);
    let faults = (0..).zip(events).filter(|(_, event)| is_fault(event));
    let time = |(at, begun): (usize, &Event)| {
        let mut invoked = BTreeSet::new();
        let acknowledged = events[at..].iter().find(|event| match (&event.what, event.step) {
            (What::Send { .. }, Step::Invoke) => {
                invoked.insert(event.process);
                false
            }
            (What::Send { .. }, Step::Ok) => invoked.contains(&event.process),
            _ => false,
        });
        acknowledged.map(|event| Duration::from_nanos(event.t_ns - begun.t_ns))
    };
    faults.filter_map(time).collect()
}

impl Queue {
    pub fn new(topic: &str, group: &str, id: u32) -> Self {
        Self { topic: topic.into(), group: group.into(), id }
    }

    fn parse(text: &str) -> Result<Self> {
        let mut parts = text.split('/');
        let (topic, group, id) = (parts.next(), parts.next(), parts.next());
        let id = id.with_context(|| format!("{text:?} is no queue"))?.parse()?;
        Ok(Self::new(topic.unwrap_or_default(), group.unwrap_or_default(), id))
    }
}

impl std::fmt::Display for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.group, self.id)
    }
}

/// As text, a line each.
pub fn to_lines(events: &[Event]) -> String {
    let mut text = String::new();
    for event in events {
        writeln!(text, "{}", event.to_json()).expect("writing to a string cannot fail");
    }
    text
}

pub fn from_lines(text: &str) -> Result<Vec<Event>> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            let json: Json = serde_json::from_str(line)?;
            Event::from_json(&json).with_context(|| format!("in {line}"))
        })
        .collect()
}

impl Event {
    pub fn to_json(&self) -> Json {
        let step = match self.step {
            Step::Invoke => "invoke",
            Step::Ok => "ok",
            Step::Fail => "fail",
            Step::Info => "info",
        };
        let (f, mut fields) = self.what.to_json();
        fields.insert("t".into(), self.t_ns.into());
        fields.insert("proc".into(), self.process.into());
        fields.insert("type".into(), step.into());
        fields.insert("f".into(), f.into());
        fields.retain(|_, value| !value.is_null());
        Json::Object(fields)
    }

    pub fn from_json(json: &Json) -> Result<Self> {
        let step = match json["type"].as_str() {
            Some("invoke") => Step::Invoke,
            Some("ok") => Step::Ok,
            Some("fail") => Step::Fail,
            Some("info") => Step::Info,
            other => bail!("{other:?} is no type"),
        };
        let process = Process::try_from(number(json, "proc")?)?;
        Ok(Self { t_ns: number(json, "t")?, process, step, what: What::from_json(json)? })
    }
}

impl What {
    fn to_json(&self) -> (&'static str, Map<String, Json>) {
        let (f, json) = match self {
            Self::Send { value, queue, offset, degraded, repeats } => {
                let queue = queue.as_ref().map(Queue::to_string);
                let json = json!({"v": value, "q": queue, "off": offset, "degraded": degraded,
                    "repeats": repeats});
                ("send", json)
            }
            Self::Read { queue, seen } => {
                ("read", json!({"q": queue.to_string(), "seen": seen_to_json(seen)}))
            }
            Self::Skipped { queue, expected, offset } => {
                ("skipped", json!({"q": queue.to_string(), "expected": expected, "off": offset}))
            }
            Self::MaxOffset { queue, offset } => {
                ("max_off", json!({"q": queue.to_string(), "off": offset}))
            }
            Self::Commit { consumers, queue, offset } => {
                ("commit_off", json!({"group": consumers, "q": queue.to_string(), "off": offset}))
            }
            Self::Committed { consumers, queue, offset } => {
                ("get_off", json!({"group": consumers, "q": queue.to_string(), "off": offset}))
            }
            Self::FinalRead { node, queue, min, seen } => {
                let json = json!({"node": node, "q": queue.to_string(), "min": min,
                    "seen": seen_to_json(seen)});
                ("final_read", json)
            }
            Self::Compared { group, one, other, entries, difference } => {
                let json = json!({"group": group, "one": one, "other": other, "entries": entries,
                    "difference": difference});
                ("compared", json)
            }
            Self::Digest { node, group, index, digest } => {
                let json = json!({"node": node, "group": group, "index": index, "digest": digest});
                ("digest", json)
            }
            Self::Leader { group, node, term } => {
                ("leader", json!({"group": group, "node": node, "term": term}))
            }
            Self::Fault { name, group, ok_within_ms } => {
                ("fault", json!({"name": name, "group": group, "ok_within_ms": ok_within_ms}))
            }
            Self::FaultEnds { name } => ("fault_ends", json!({"name": name})),
            Self::Healed { ok_within_ms } => ("healed", json!({"ok_within_ms": ok_within_ms})),
        };
        match json {
            Json::Object(fields) => (f, fields),
            _ => unreachable!("every arm makes an object"),
        }
    }

    fn from_json(json: &Json) -> Result<Self> {
        let queue = || Queue::parse(&text(json, "q")?);
        let offset = || json["off"].as_u64();
        let group = || json["group"].as_str().map(str::to_owned);
        Ok(match json["f"].as_str() {
            Some("send") => Self::Send {
                value: text(json, "v")?,
                queue: json["q"].as_str().map(Queue::parse).transpose()?,
                offset: offset(),
                degraded: json["degraded"] == true,
                repeats: json["repeats"] == true,
            },
            Some("read") => Self::Read { queue: queue()?, seen: seen_from_json(json)? },
            Some("skipped") => Self::Skipped {
                queue: queue()?,
                expected: number(json, "expected")?,
                offset: number(json, "off")?,
            },
            Some("max_off") => Self::MaxOffset { queue: queue()?, offset: offset() },
            Some("commit_off") => Self::Commit {
                consumers: text(json, "group")?,
                queue: queue()?,
                offset: number(json, "off")?,
            },
            Some("get_off") => Self::Committed {
                consumers: text(json, "group")?,
                queue: queue()?,
                offset: offset(),
            },
            Some("final_read") => Self::FinalRead {
                node: text(json, "node")?,
                queue: queue()?,
                min: number(json, "min")?,
                seen: seen_from_json(json)?,
            },
            Some("compared") => Self::Compared {
                group: text(json, "group")?,
                one: text(json, "one")?,
                other: text(json, "other")?,
                entries: number(json, "entries")?,
                difference: json["difference"].as_str().map(str::to_owned),
            },
            Some("digest") => Self::Digest {
                node: text(json, "node")?,
                group: text(json, "group")?,
                index: number(json, "index")?,
                digest: text(json, "digest")?,
            },
            Some("leader") => Self::Leader {
                group: text(json, "group")?,
                node: text(json, "node")?,
                term: number(json, "term")?,
            },
            Some("fault") => Self::Fault {
                name: text(json, "name")?,
                group: group(),
                ok_within_ms: json["ok_within_ms"].as_u64(),
            },
            Some("fault_ends") => Self::FaultEnds { name: text(json, "name")? },
            Some("healed") => Self::Healed { ok_within_ms: number(json, "ok_within_ms")? },
            other => bail!("{other:?} is nothing that happens"),
        })
    }
}

fn text(json: &Json, name: &str) -> Result<String> {
    json[name].as_str().map(str::to_owned).with_context(|| format!("no text {name:?}"))
}

fn number(json: &Json, name: &str) -> Result<u64> {
    json[name].as_u64().with_context(|| format!("no number {name:?}"))
}

fn seen_to_json(seen: &[Seen]) -> Json {
    seen.iter().map(|seen| json!([seen.offset, seen.value, seen.intact])).collect()
}

fn seen_from_json(json: &Json) -> Result<Vec<Seen>> {
    let items = json["seen"].as_array().context("no list \"seen\"")?;
    let parse = |item: &Json| {
        let (offset, value) = (item[0].as_u64()?, item[1].as_str()?.to_owned());
        Some(Seen { offset, value, intact: item[2].as_bool()? })
    };
    items.iter().map(|item| parse(item).with_context(|| format!("{item} was not seen"))).collect()
}
