//! Acknowledged sends of SDK producers.

use std::time::{Duration, Instant};

use clap::Args;
use drumlin_client::admin::NewTopic;
use drumlin_client::{Client, Code, Error, Message, Receipt};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde_json::{Map, json};
use tokio::task::JoinSet;

use super::{Latencies, duration, mb_rate, rate};
use crate::cli::{Global, Shape};
use crate::command::access;
use crate::config::parse_size;
use crate::failure::{Failure, Kind};
use crate::output::{self, Column, Listing, column};

#[derive(Clone, Debug, Args)]
pub(crate) struct Produce {
    #[arg(long, default_value = "bench")]
    topic: String,
    /// Queues of the topic, if it has to be created
    #[arg(long, default_value_t = 8)]
    queues: u32,
    /// Of each body
    #[arg(long, default_value = "1024", value_parser = parse_size)]
    size: u64,
    #[arg(long, default_value = "10s", value_parser = duration, conflicts_with = "count")]
    duration: Duration,
    /// Messages in all, instead of a duration
    #[arg(long)]
    count: Option<u64>,
    /// Unacknowledged messages of each producer
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    in_flight: u32,
    /// Each with a connection of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    producers: u32,
}

const COLUMNS: &[Column] = &[
    column("MSGS/S", "msgs_per_s"),
    column("MB/S", "mb_per_s"),
    column("P50-US", "p50_us"),
    column("P99-US", "p99_us"),
    column("ACKED", "acknowledged"),
    column("FAILED", "failed"),
    column("SECONDS", "seconds"),
];

/// What one producer has seen.
struct Seen {
    latencies: Latencies,
    acknowledged: u64,
    failed: u64,
    first_failure: Option<Error>,
}

impl Seen {
    fn new() -> Self {
        Self { latencies: Latencies::new(), acknowledged: 0, failed: 0, first_failure: None }
    }

    fn settle(&mut self, result: Result<Receipt, Error>, took: Duration) {
        match result {
            Ok(_) => {
                self.acknowledged += 1;
                self.latencies.record(took);
            }
            Err(error) => {
                self.failed += 1;
                self.first_failure.get_or_insert(error);
            }
        }
    }

    fn add(&mut self, other: Self) {
        self.latencies.add(&other.latencies);
        self.acknowledged += other.acknowledged;
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
    }
}

impl Produce {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        crate::command::runtime()?.block_on(self.measure(global))
    }

    async fn measure(&self, global: &Global) -> Result<(), Failure> {
        let mut clients = Vec::new();
        for _ in 0..self.producers {
            clients.push(access::connect(global).await?);
        }
        if let Some(client) = clients.first() {
            self.prepare(client, global).await?;
        }
        let begun = Instant::now();
        let mut tasks = JoinSet::new();
        for (nth, client) in clients.iter().enumerate() {
            let share = self.share(nth);
            tasks.spawn(self.clone().send(client.clone(), share, begun));
        }
        let mut seen = Seen::new();
        while let Some(ended) = tasks.join_next().await {
            let ended = ended.map_err(|error| Failure::new(Kind::Failed, error.to_string()))?;
            seen.add(ended.map_err(|error| access::failure(&error))?);
        }
        let took = begun.elapsed();
        for client in &clients {
            access::close(client).await;
        }
        self.print(&seen, took, global)?;
        match seen.first_failure {
            None => Ok(()),
            Some(error) => Err(Failure::new(
                Kind::Partly,
                format!("{} sends failed, first: {error}", seen.failed),
            )),
        }
    }

    /// Creates the topic, and sends one message so that routes and connections are there.
    async fn prepare(&self, client: &Client, global: &Global) -> Result<(), Failure> {
        let created = client.admin().create_topic(NewTopic::new(&self.topic, self.queues)).await;
        match created {
            Ok(_) => {}
            Err(error) if error.code() == Code::AlreadyExists => {}
            Err(error) => return Err(access::failure(&error)),
        }
        let producer = client.producer().build().await.map_err(|e| access::failure(&e))?;
        access::answer(global, producer.send(self.message(&self.body()?))).await?;
        Ok(())
    }

    /// Messages of the producer with this number; `None` if the time decides.
    fn share(&self, nth: usize) -> Option<u64> {
        let producers = u64::from(self.producers);
        let extra = |count: u64| u64::from((nth as u64) < count % producers);
        self.count.map(|count| count / producers + extra(count))
    }

    fn body(&self) -> Result<bytes::Bytes, Failure> {
        let size = usize::try_from(self.size).ok().filter(|size| *size <= 4 << 20);
        let size = size.ok_or_else(|| Failure::new(Kind::Usage, "--size is at most 4MiB"))?;
        // Not all the same, should anything on the way compress.
        let byte = |nth: usize| u8::try_from(nth * 31 % 251).unwrap_or(0);
        Ok((0..size).map(byte).collect::<Vec<_>>().into())
    }

    fn message(&self, body: &bytes::Bytes) -> Message {
        Message::new(&self.topic, body.clone())
    }

    async fn send(self, client: Client, share: Option<u64>, begun: Instant) -> Result<Seen, Error> {
        let in_flight = usize::try_from(self.in_flight).unwrap_or(usize::MAX);
        let producer = client.producer().max_in_flight_messages(in_flight).build().await?;
        let body = self
            .body()
            .map_err(|failure| Error::Configuration { faults: vec![failure.message] })?;
        let (mut seen, mut sent) = (Seen::new(), 0_u64);
        let mut unacknowledged = FuturesUnordered::new();
        let more = |sent: u64| match share {
            Some(share) => sent < share,
            None => begun.elapsed() < self.duration,
        };
        while more(sent) {
            if unacknowledged.len() >= in_flight
                && let Some((result, took)) = unacknowledged.next().await
            {
                seen.settle(result, took);
                continue;
            }
            let accepted_at = Instant::now();
            let ack = producer.enqueue(self.message(&body)).await?;
            unacknowledged.push(async move { (ack.await, accepted_at.elapsed()) });
            sent += 1;
        }
        while let Some((result, took)) = unacknowledged.next().await {
            seen.settle(result, took);
        }
        Ok(seen)
    }

    fn print(&self, seen: &Seen, took: Duration, global: &Global) -> std::io::Result<()> {
        let row = json!({
            "msgs_per_s": rate(seen.acknowledged, took),
            "mb_per_s": mb_rate(seen.acknowledged * self.size, took),
            "latency_us": seen.latencies.json(),
            "p50_us": seen.latencies.p50(),
            "p99_us": seen.latencies.p99(),
            "acknowledged": seen.acknowledged,
            "failed": seen.failed,
            "seconds": (took.as_secs_f64() * 1000.0).round() / 1000.0,
            "size_bytes": self.size,
            "producers": self.producers,
            "in_flight": self.in_flight,
            "topic": self.topic,
            "version": env!("CARGO_PKG_VERSION"),
            "debug_build": cfg!(debug_assertions),
        });
        if matches!(global.output, Shape::Json | Shape::Jsonl) {
            return output::print_document("drumlin/bench.produce/v1", row);
        }
        let listing = Listing {
            schema: "drumlin/bench.produce/v1",
            rows_field: "results",
            rows: vec![row],
            fields: Map::new(),
            columns: COLUMNS,
            name_field: "msgs_per_s",
        };
        listing.print(global)
    }
}
