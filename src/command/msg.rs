//! `drumlin msg`: one message, by its place or its time.

use std::io::{self, Write};

use clap::{Args, Subcommand, ValueEnum};
use drumlin_client::admin::TopicState;
use drumlin_client::{At, Client, Delivery, QueueOffset, Queues};

use super::{access, consume};
use crate::cli::{Global, NamesrvShort, Shape};
use crate::failure::{Failure, Kind};
use crate::format::{Printed, base64};
use crate::moment::{Place, QueueName, TopicMoment, rfc3339};
use crate::output;

#[derive(Debug, Args)]
pub(crate) struct Msg {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print one message: headers, then the body
    Get(Get),
}

#[derive(Debug, Args)]
struct Get {
    #[command(flatten)]
    which: Which,
    #[arg(long, value_enum, default_value_t = Body::Text)]
    body: Body,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The message at a place
    #[arg(long, value_name = "TOPIC/BROKERGROUP/ID:OFFSET")]
    offset: Option<Place>,
    /// The first message stored at or after a time
    #[arg(long, value_name = "TOPIC@TIME")]
    time: Option<TopicMoment>,
}

/// How a body is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Body {
    Text,
    Hex,
    Base64,
    /// The bytes as they are, without headers
    Raw,
    None,
}

impl Msg {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let global = global.clone().with(self.short.short.as_ref());
        let Action::Get(get) = &self.action;
        super::runtime()?.block_on(async {
            let client = access::connect(&global).await?;
            let found = match (&get.which.offset, &get.which.time) {
                (Some(place), _) => at_place(&client, place, &global).await,
                (None, Some(asked)) => at_time(&client, asked, &global).await,
                (None, None) => Err(Failure::new(Kind::Usage, "give --offset or --time")),
            };
            access::close(&client).await;
            let message = consume::printed(&found?, false);
            Ok(print(&message, get.body, &global)?)
        })
    }
}

async fn at_place(client: &Client, place: &Place, global: &Global) -> Result<Delivery, Failure> {
    let topic = &place.queue.topic;
    let state = describe(client, topic, global).await?;
    let broker_group = broker_group(&state, &place.queue)?;
    let offset = QueueOffset::new(place.offset);
    let found = first_from(client, topic, (&broker_group, place.queue.queue_id), offset, global);
    match found.await? {
        Some(delivery) if delivery.offset == offset => Ok(delivery),
        Some(_) | None => {
            let queue = state.queues.iter().find(|queue| {
                queue.broker_group == broker_group && queue.queue_id == place.queue.queue_id
            });
            let range = queue.map(|queue| {
                format!("the queue has {} up to {} (exclusive)", queue.min_offset, queue.max_offset)
            });
            let message = format!("there is no message at offset {}", place.offset);
            Err(Failure::new(Kind::MessageNotFound, message).details(range))
        }
    }
}

async fn at_time(
    client: &Client,
    asked: &TopicMoment,
    global: &Global,
) -> Result<Delivery, Failure> {
    let (topic, admin) = (&asked.topic, client.admin());
    let time_ms = asked.moment.ms(jiff::Timestamp::now());
    let query = admin.query_offsets(topic, At::TimeMs(time_ms));
    let queues = access::topic_answer(global, &admin, topic, query).await?;
    let mut first: Option<Delivery> = None;
    for queue in &queues {
        let (group, offset) = (queue.broker_group.as_str(), QueueOffset::new(queue.offset));
        let found = first_from(client, topic, (group, queue.queue_id), offset, global).await?;
        let Some(found) = found.filter(|delivery| delivery.store_time_ms >= time_ms) else {
            continue;
        };
        if first.as_ref().is_none_or(|first| found.store_time_ms < first.store_time_ms) {
            first = Some(found);
        }
    }
    first.ok_or_else(|| {
        let since = rfc3339(time_ms).unwrap_or_else(|| format!("@{time_ms}"));
        Failure::new(Kind::MessageNotFound, format!("no message was stored since {since}"))
    })
}

async fn describe(client: &Client, topic: &str, global: &Global) -> Result<TopicState, Failure> {
    let admin = client.admin();
    access::topic_answer(global, &admin, topic, admin.describe_topic(topic)).await
}

/// The broker group that has the queue; it may be left out where the topic lies on one.
fn broker_group(state: &TopicState, queue: &QueueName) -> Result<String, Failure> {
    let shares = state.topic.as_ref().map(|topic| topic.shares.as_slice()).unwrap_or_default();
    let share = match (&queue.broker_group, shares) {
        (Some(name), shares) => shares.iter().find(|share| share.broker_group == *name),
        (None, [only]) => Some(only),
        (None, shares) => {
            let names: Vec<_> = shares.iter().map(|share| share.broker_group.as_str()).collect();
            let message = format!("the topic lies on several broker groups: {}", names.join(", "));
            return Err(Failure::new(Kind::Usage, message).hint("write TOPIC/BROKERGROUP/ID"));
        }
    };
    match share.filter(|share| queue.queue_id < share.queue_count) {
        Some(share) => Ok(share.broker_group.clone()),
        None => Err(Failure::new(Kind::QueueNotFound, "the topic has no such queue")
            .hint(format!("drumlin topic describe {}", queue.topic))),
    }
}

/// The first message of a queue at or behind an offset, if there is one now.
async fn first_from(
    client: &Client,
    topic: &str,
    queue: (&str, u32),
    offset: QueueOffset,
    global: &Global,
) -> Result<Option<Delivery>, Failure> {
    let mut stream = client
        .pull_consumer()
        .assign(topic, Queues::some([queue]))
        .seek(At::Offset(offset))
        .stop_at_end()
        .max_buffered_bytes(64 << 10)
        .into_stream();
    match tokio::time::timeout(global.timeout, stream.next()).await {
        Ok(Some(Ok(delivery))) => Ok(Some(delivery)),
        Ok(None) => Ok(None),
        Ok(Some(Err(error))) => Err(access::failure(&error)),
        Err(_) => Err(access::timeout(global)),
    }
}

fn print(message: &Printed, body: Body, global: &Global) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if body == Body::Raw {
        out.write_all(&message.body)?;
        return out.flush();
    }
    match global.output {
        Shape::Json | Shape::Jsonl => writeln!(out, "{}", message.json())?,
        Shape::Name => writeln!(out, "{}", message.message_id)?,
        Shape::Table | Shape::Wide | Shape::Csv => {
            print_headers(message, &mut out)?;
            match body {
                Body::Text => writeln!(out, "\n{}", String::from_utf8_lossy(&message.body))?,
                Body::Hex => writeln!(out, "\n{}", hex(&message.body))?,
                Body::Base64 => writeln!(out, "\n{}", base64(&message.body))?,
                Body::Raw | Body::None => {}
            }
        }
    }
    out.flush()
}

fn print_headers(message: &Printed, out: &mut impl Write) -> io::Result<()> {
    let json = message.json();
    writeln!(out, "place:          {}:{}", message.queue(), message.offset)?;
    for (name, field) in [
        ("message id", "message_id"),
        ("keys", "keys"),
        ("tag", "tag"),
        ("message group", "message_group"),
        ("born", "born"),
        ("stored", "store_time"),
        ("body bytes", "body_bytes"),
    ] {
        let value = output::plain(&json[field]);
        if !value.is_empty() {
            writeln!(out, "{:<15} {value}", format!("{name}:"))?;
        }
    }
    for (key, value) in &message.properties {
        writeln!(out, "property:       {key}={value}")?;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
