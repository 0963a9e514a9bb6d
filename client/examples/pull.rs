//! Reads a topic from its oldest record to the end that it has now, outside of any group.
//!
//! `cargo run -p drumlin-client --example pull [HOST:PORT]`

use std::time::Duration;

use drumlin_client::{At, Client, Queues};

pub(crate) async fn run(endpoint: &str) -> anyhow::Result<usize> {
    let client = Client::connect(endpoint).await?;
    let mut records = client
        .pull_consumer()
        .assign("orders", Queues::All)
        .seek(At::Earliest)
        .stop_at_end()
        .into_stream();

    let mut count = 0;
    while let Some(record) = records.next().await {
        let record = record?;
        println!("{}@{}: {}", record.queue_id, record.offset, record.body_text());
        count += 1;
    }

    client.shutdown(Duration::from_secs(5)).await;
    Ok(count)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let endpoint = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8081".into());
    println!("{} records read", run(&endpoint).await?);
    Ok(())
}
