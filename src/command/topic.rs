//! `drumlin topic`: definitions of topics, and where their queues begin and end.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::{Args, Subcommand, ValueEnum};
use drumlin_client::admin::{NewTopic, QueueState, Topic as Definition, TopicType, TopicUpdate};
use drumlin_client::{Admin, At};
use serde_json::{Map, Value, json};

use super::access;
use crate::cli::{Global, NamesrvShort, Shape};
use crate::failure::{Failure, Kind};
use crate::moment::{Start, rfc3339};
use crate::output::{self, Column, Listing, column, wide};

#[derive(Debug, Args)]
pub(crate) struct Topic {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a topic
    Create(Create),
    /// Add queues or broker groups to a topic, or change what it asks for
    Update(Update),
    /// List all topics
    List,
    /// Show a topic and its queues
    Describe { name: String },
    /// Delete a topic and all that is in it
    Delete { name: String },
    /// Show the offset of a moment in every queue of a topic
    Offsets {
        name: String,
        /// earliest, latest, or a time
        #[arg(long, default_value = "latest", allow_hyphen_values = true)]
        at: Start,
    },
}

#[derive(Debug, Args)]
struct Create {
    name: String,
    /// On each broker group
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    queues: u32,
    /// What it accepts
    #[arg(long = "type", value_enum, default_value_t = Type::Normal)]
    kind: Type,
    /// Broker groups that get queues [default: all]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    groups: Vec<String>,
    /// Copies that an acknowledged message has; with 2, sends are refused while there is only one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=2))]
    min_copies: u32,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
struct Update {
    name: String,
    /// On each broker group; only more than now
    #[arg(long, group = "change", value_parser = clap::value_parser!(u32).range(1..=65_535))]
    queues: Option<u32>,
    /// All broker groups that shall have queues, those that have some already among them
    #[arg(long, group = "change", value_name = "A,B", value_delimiter = ',')]
    groups: Vec<String>,
    /// Copies that an acknowledged message has; with 2, sends are refused while there is only one
    #[arg(long, group = "change", value_parser = clap::value_parser!(u32).range(1..=2))]
    min_copies: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    Normal,
    Fifo,
    Mixed,
}

const TOPICS: &[Column] = &[
    column("NAME", "name"),
    column("TYPE", "type"),
    column("QUEUES/GROUP", "queues_per_group"),
    column("QUEUES", "queue_count"),
    column("BROKER-GROUPS", "broker_groups"),
    column("CREATED", "created"),
    wide("MIN-COPIES", "min_copies"),
    wide("ID", "topic_id"),
    wide("VERSION", "version"),
];

const QUEUES: &[Column] = &[
    column("BROKER", "broker_group"),
    column("QUEUE", "queue_id"),
    column("MIN", "min_offset"),
    column("MAX", "max_offset"),
    column("RECORDS", "record_count"),
    column("NEWEST", "newest"),
    wide("PLACE", "queue"),
];

const OFFSETS: &[Column] = &[
    column("BROKER", "broker_group"),
    column("QUEUE", "queue_id"),
    column("OFFSET", "offset"),
    wide("PLACE", "place"),
];

impl Topic {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let global = global.clone().with(self.short.short.as_ref());
        if let Action::Delete { name } = &self.action {
            confirm(&global, &format!("delete topic {name} and every message in it"))?;
        }
        super::runtime()?.block_on(async {
            let client = access::connect(&global).await?;
            let done = self.ask(&client.admin(), &global).await;
            access::close(&client).await;
            done
        })
    }

    async fn ask(&self, admin: &Admin, global: &Global) -> Result<(), Failure> {
        match &self.action {
            Action::Create(create) => create.ask(admin, global).await,
            Action::Update(update) => update.ask(admin, global).await,
            Action::List => list(admin, global).await,
            Action::Describe { name } => describe(admin, name, global).await,
            Action::Delete { name } => {
                access::topic_answer(global, admin, name, admin.delete_topic(name)).await?;
                done("drumlin/topic.delete/v1", json!({"name": name}), global, || {
                    format!("deleted {name}")
                })
            }
            Action::Offsets { name, at } => offsets(admin, name, *at, global).await,
        }
    }
}

impl Create {
    async fn ask(&self, admin: &Admin, global: &Global) -> Result<(), Failure> {
        let kind = match self.kind {
            Type::Normal => TopicType::Normal,
            Type::Fifo => TopicType::Fifo,
            Type::Mixed => TopicType::Mixed,
        };
        let topic = NewTopic::new(&self.name, self.queues)
            .kind(kind)
            .broker_groups(self.groups.iter().cloned())
            .min_copies(self.min_copies);
        let created = access::answer(global, admin.create_topic(topic)).await?;
        let row = topic_row(&created);
        let text = || {
            format!(
                "created {}: {} queues on {}",
                created.name,
                row["queue_count"],
                output::plain(&row["broker_groups"])
            )
        };
        done("drumlin/topic.create/v1", row.clone(), global, text)
    }
}

impl Update {
    async fn ask(&self, admin: &Admin, global: &Global) -> Result<(), Failure> {
        let mut update = TopicUpdate::new(&self.name).broker_groups(self.groups.iter().cloned());
        if let Some(queue_count) = self.queues {
            update = update.queue_count(queue_count);
        }
        if let Some(min_copies) = self.min_copies {
            update = update.min_copies(min_copies);
        }
        let updated = admin.update_topic(update);
        let updated = access::topic_answer(global, admin, &self.name, updated).await?;
        let row = topic_row(&updated);
        let text = || {
            format!(
                "updated {}: {} queues on {}, {} copies asked for",
                updated.name,
                row["queue_count"],
                output::plain(&row["broker_groups"]),
                row["min_copies"]
            )
        };
        done("drumlin/topic.update/v1", row.clone(), global, text)
    }
}

/// What was done: data where data was asked for, else a word on stderr.
pub(super) fn done(
    schema: &str,
    data: Value,
    global: &Global,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    match global.output {
        Shape::Json | Shape::Jsonl => output::print_document(schema, data)?,
        Shape::Name => output::print_line(&output::plain(&data["name"]))?,
        Shape::Table | Shape::Wide | Shape::Csv if global.quiet => {}
        Shape::Table | Shape::Wide | Shape::Csv => anstream::eprintln!("{}", text()),
    }
    Ok(())
}

/// Asks on a terminal; without one, only `--yes` will do.
pub(super) fn confirm(global: &Global, what: &str) -> Result<(), Failure> {
    if global.yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::new(Kind::NotConfirmed, format!("this would {what}"))
            .hint("--yes does it without asking"));
    }
    anstream::eprint!("This will {what}. Continue? [y/N] ");
    io::stderr().flush()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    match line.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::new(Kind::NotConfirmed, "nothing was changed")),
    }
}

async fn list(admin: &Admin, global: &Global) -> Result<(), Failure> {
    let mut topics = access::answer(global, admin.list_topics()).await?;
    topics.sort_by(|a, b| a.name.cmp(&b.name));
    let listing = Listing {
        schema: "drumlin/topic.list/v1",
        rows_field: "topics",
        rows: topics.iter().map(topic_row).collect(),
        fields: Map::new(),
        columns: TOPICS,
        name_field: "name",
    };
    Ok(listing.print(global)?)
}

fn topic_row(topic: &Definition) -> Value {
    let kind = match topic.r#type() {
        TopicType::Normal => Some("normal"),
        TopicType::Fifo => Some("fifo"),
        TopicType::Mixed => Some("mixed"),
        TopicType::Unspecified => None,
    };
    let groups: Vec<_> = topic.shares.iter().map(|share| &share.broker_group).collect();
    let counts: Vec<_> = topic.shares.iter().map(|share| share.queue_count).collect();
    let same = counts.windows(2).all(|pair| pair[0] == pair[1]);
    json!({
        "name": topic.name,
        "type": kind,
        "queues_per_group": counts.first().filter(|_| same),
        "queue_count": counts.iter().sum::<u32>(),
        "broker_groups": groups,
        "queues_by_group": topic.shares.iter()
            .map(|share| (share.broker_group.clone(), share.queue_count.into()))
            .collect::<Map<String, Value>>(),
        "min_copies": topic.min_copies.max(1),
        "topic_id": topic.topic_id,
        "version": topic.version,
        "created": rfc3339(topic.created_ms),
        "created_ms": topic.created_ms,
    })
}

async fn describe(admin: &Admin, name: &str, global: &Global) -> Result<(), Failure> {
    let state = access::topic_answer(global, admin, name, admin.describe_topic(name)).await?;
    let topic = state.topic.clone().unwrap_or_default();
    let row = topic_row(&topic);
    if matches!(global.output, Shape::Table | Shape::Wide) && !global.no_headers {
        output::print_line(&format!(
            "{}: {}, {} queues on {}, {} copies asked for, created {}\n",
            topic.name,
            output::plain(&row["type"]),
            row["queue_count"],
            output::plain(&row["broker_groups"]),
            row["min_copies"],
            output::plain(&row["created"]),
        ))?;
    }
    let listing = Listing {
        schema: "drumlin/topic.describe/v1",
        rows_field: "queues",
        rows: state.queues.iter().map(|queue| queue_row(name, queue)).collect(),
        fields: row.as_object().cloned().unwrap_or_default(),
        columns: QUEUES,
        name_field: "queue",
    };
    Ok(listing.print(global)?)
}

fn queue_row(topic: &str, queue: &QueueState) -> Value {
    let newest_ms = (queue.newest_ms > 0).then_some(queue.newest_ms);
    json!({
        "queue": format!("{topic}/{}/{}", queue.broker_group, queue.queue_id),
        "broker_group": queue.broker_group,
        "queue_id": queue.queue_id,
        "min_offset": queue.min_offset,
        "max_offset": queue.max_offset,
        "record_count": queue.max_offset.saturating_sub(queue.min_offset),
        "newest": newest_ms.and_then(rfc3339),
        "newest_ms": newest_ms,
    })
}

async fn offsets(admin: &Admin, name: &str, start: Start, global: &Global) -> Result<(), Failure> {
    let at = at(start);
    let asked = admin.query_offsets(name, at);
    let offsets = access::topic_answer(global, admin, name, asked).await?;
    let rows = offsets.iter().map(|queue| {
        json!({
            "place": format!("{name}/{}/{}:{}", queue.broker_group, queue.queue_id, queue.offset),
            "broker_group": queue.broker_group,
            "queue_id": queue.queue_id,
            "offset": queue.offset,
        })
    });
    let listing = Listing {
        schema: "drumlin/topic.offsets/v1",
        rows_field: "offsets",
        rows: rows.collect(),
        fields: Map::from_iter([("topic".to_owned(), name.into())]),
        columns: OFFSETS,
        name_field: "place",
    };
    Ok(listing.print(global)?)
}

/// As the SDK says it.
pub(super) fn at(start: Start) -> At {
    match start {
        Start::Earliest => At::Earliest,
        Start::Latest => At::Latest,
        Start::Offset(offset) => At::Offset(drumlin_client::QueueOffset::new(offset)),
        Start::At(moment) => At::TimeMs(moment.ms(jiff::Timestamp::now())),
    }
}
