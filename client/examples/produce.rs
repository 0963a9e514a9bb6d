//! Sends messages in the three ways: awaited, enqueued with the acknowledgement later, one-way.
//!
//! `cargo run -p drumlin-client --example produce [HOST:PORT]`

use std::time::Duration;

use drumlin_client::{Client, Message};

pub(crate) async fn run(endpoint: &str) -> anyhow::Result<()> {
    let client = Client::connect(endpoint).await?;
    let producer = client.producer().build().await?;

    // Awaiting a send means that it is stored.
    let order = Message::new("orders", "3 apples").key("order-1").tag("eu").property("paid", "yes");
    let receipt = producer.send(order).await?;
    println!("stored at offset {} of queue {}", receipt.offset, receipt.queue_id);

    // Enqueueing keeps the order and lets batches form; the acknowledgements come later.
    let mut acks = Vec::new();
    for step in ["ordered", "packed", "sent"] {
        let message = Message::new("orders", step).message_group("order-1");
        acks.push(producer.enqueue(message).await?);
    }
    for ack in acks {
        println!("step stored at offset {}", ack.await?.offset);
    }

    // One-way never waits, and fails when the producer's window is full.
    producer.send_oneway(Message::new("orders", "a hint"))?;

    // Nothing is lost at the end: this waits for what is still on its way.
    producer.shutdown(Duration::from_secs(10)).await?;
    client.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run(&std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8081".into())).await
}
