//! `drumlin produce`: lines of stdin, or one body, as messages.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use drumlin_client::{Client, Code, Error, Message, Producer, Receipt, SendAck};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::mpsc;

use super::access;
use crate::cli::{Global, NamesrvShort, Shape};
use crate::failure::{Failure, Kind};
use crate::moment::rfc3339;
use crate::output;

/// Messages whose acknowledgement is awaited; beyond them stdin is not read.
const AWAITED_MAX: usize = 16_384;
/// Longest line, as long as a body may be.
const LINE_BYTES_MAX: usize = 4 << 20;
/// Failures that are told one by one.
const TOLD_MAX: usize = 5;

#[derive(Debug, Args)]
pub(crate) struct Produce {
    topic: String,
    #[command(flatten)]
    short: NamesrvShort,
    /// One message with this body, instead of a message per line of stdin
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
    /// For look-up; never routes
    #[arg(long, value_name = "KEY")]
    key: Vec<String>,
    #[arg(long)]
    tag: Option<String>,
    #[arg(long, value_name = "KEY=VALUE", value_parser = property)]
    property: Vec<(String, String)>,
    /// Messages of one group stay in order
    #[arg(long, value_name = "GROUP")]
    message_group: Option<String>,
}

fn property(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        Some(_) | None => Err("write KEY=VALUE".into()),
    }
}

/// What became of the messages so far.
#[derive(Default)]
struct Tally {
    acknowledged: u64,
    failed: u64,
    first_failure: Option<Error>,
    told: VecDeque<String>,
}

impl Tally {
    fn fail(&mut self, error: Error) {
        self.failed += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push_back(format!("message {}: {error}", self.acknowledged + self.failed));
        }
        self.first_failure.get_or_insert(error);
    }
}

impl Produce {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let global = global.clone().with(self.short.short.as_ref());
        super::runtime()?.block_on(async {
            let client = access::connect(&global).await?;
            let done = self.send_all(&client, &global).await;
            access::close(&client).await;
            done
        })
    }

    async fn send_all(&self, client: &Client, global: &Global) -> Result<(), Failure> {
        let producer = client
            .producer()
            .send_timeout(global.timeout.max(Duration::from_millis(1)))
            .build()
            .await
            .map_err(|error| access::failure(&error))?;
        let (acks, awaited) = mpsc::channel(AWAITED_MAX);
        let settle = settle(awaited, global.output);
        let (read, tally) = tokio::join!(self.read_all(&producer, acks), settle);
        // Everything is settled, so nothing can be left.
        if let Err(unsent) = producer.shutdown(global.timeout).await {
            tracing::warn!(%unsent, "the producer did not end cleanly");
        }
        let tally = tally?;
        if let Err(error) = read {
            let before = format!("{} messages before it are acknowledged", tally.acknowledged);
            return Err(Failure::from(error).details([before]));
        }
        self.conclude(client, tally, global).await
    }

    /// Reads until the end of stdin; ends early, with a fault, where stdin cannot be read.
    async fn read_all(
        &self,
        producer: &Producer,
        acks: mpsc::Sender<Result<SendAck, Error>>,
    ) -> io::Result<()> {
        if let Some(body) = &self.body {
            let accepted = producer.enqueue(self.message(body.clone().into_bytes())).await;
            acks.send(accepted).await.ok();
            return Ok(());
        }
        let mut lines = BufReader::new(tokio::io::stdin());
        while let Some(line) = next_line(&mut lines).await? {
            let accepted = producer.enqueue(self.message(line)).await;
            let lost = accepted.as_ref().is_err_and(|error| error.code() == Code::TopicNotFound);
            // Whoever settles has gone because its output was closed.
            if acks.send(accepted).await.is_err() || lost {
                break;
            }
        }
        Ok(())
    }

    fn message(&self, body: Vec<u8>) -> Message {
        let mut message = Message::new(&self.topic, body);
        for key in &self.key {
            message = message.key(key);
        }
        for (key, value) in &self.property {
            message = message.property(key, value);
        }
        if let Some(tag) = &self.tag {
            message = message.tag(tag);
        }
        match &self.message_group {
            Some(group) => message.message_group(group),
            None => message,
        }
    }

    async fn conclude(
        &self,
        client: &Client,
        tally: Tally,
        global: &Global,
    ) -> Result<(), Failure> {
        let Tally { acknowledged, failed, first_failure, told } = tally;
        if global.output == Shape::Json {
            let summary =
                json!({"topic": self.topic, "acknowledged": acknowledged, "failed": failed});
            output::print_document("drumlin/produce/v1", summary)?;
        } else if !global.quiet {
            anstream::eprintln!("{acknowledged} acknowledged");
        }
        match first_failure {
            None => Ok(()),
            Some(error) if error.code() == Code::TopicNotFound => {
                Err(access::topic_not_found(&client.admin(), &self.topic).await)
            }
            Some(error) if acknowledged == 0 && failed == 1 => Err(access::failure(&error)),
            Some(error) => {
                let kind = match acknowledged {
                    0 => access::failure(&error).kind,
                    1.. => Kind::Partly,
                };
                let message = format!("{failed} messages are not acknowledged");
                Err(Failure::new(kind, message).details(told))
            }
        }
    }
}

/// A line without its end; `None` at the end of the input.
async fn next_line(lines: &mut BufReader<tokio::io::Stdin>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let buffered = lines.fill_buf().await?;
        if buffered.is_empty() {
            return Ok((!line.is_empty()).then_some(line));
        }
        let end = buffered.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(buffered.len());
        line.extend_from_slice(&buffered[..taken]);
        lines.consume(taken + usize::from(end.is_some()));
        if line.len() > LINE_BYTES_MAX {
            let reason = format!("a line has more than the {LINE_BYTES_MAX} bytes of a message");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

/// Awaits the acknowledgements in order, and prints receipts where they were asked for.
async fn settle(
    mut awaited: mpsc::Receiver<Result<SendAck, Error>>,
    shape: Shape,
) -> io::Result<Tally> {
    let mut tally = Tally::default();
    while let Some(accepted) = awaited.recv().await {
        let settled = match accepted {
            Ok(ack) => ack.await,
            Err(error) => Err(error),
        };
        match settled {
            Ok(receipt) => {
                tally.acknowledged += 1;
                print_receipt(&receipt, shape)?;
            }
            Err(error) => tally.fail(error),
        }
    }
    Ok(tally)
}

fn print_receipt(receipt: &Receipt, shape: Shape) -> io::Result<()> {
    match shape {
        Shape::Jsonl => output::print_document(
            "drumlin/produce.receipt/v1",
            json!({
                "message_id": receipt.message_id,
                "topic": &*receipt.topic,
                "broker_group": &*receipt.broker_group,
                "queue_id": receipt.queue_id,
                "offset": receipt.offset.get(),
                "store_time": rfc3339(receipt.store_time_ms),
                "store_time_ms": receipt.store_time_ms,
                "degraded": receipt.degraded,
            }),
        ),
        Shape::Name => writeln!(io::stdout().lock(), "{}", receipt.message_id),
        Shape::Wide => writeln!(
            io::stdout().lock(),
            "{}/{}/{}:{} {}",
            receipt.topic,
            receipt.broker_group,
            receipt.queue_id,
            receipt.offset,
            receipt.message_id
        ),
        Shape::Table | Shape::Json | Shape::Csv => Ok(()),
    }
}
