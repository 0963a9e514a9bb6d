//! Receives messages as a member of a consumer group and acknowledges them one by one.
//!
//! `cargo run -p drumlin-client --example simple_consumer [HOST:PORT]`

use std::time::Duration;

use drumlin_client::{Client, Filter};

pub(crate) async fn run(endpoint: &str) -> anyhow::Result<usize> {
    let client = Client::connect(endpoint).await?;
    let consumer = client
        .simple_consumer("shipping")
        .subscribe("orders", Filter::All)
        .invisible_duration(Duration::from_secs(30))
        .build()
        .await?;

    let mut handled = 0;
    loop {
        let deliveries = consumer.receive(16, Duration::from_secs(2)).await?;
        if deliveries.is_empty() {
            break;
        }
        for delivery in deliveries {
            println!("attempt {}: {}", delivery.attempt, delivery.body_text());
            // Until this, the group has not consumed it: a crash here would bring it back.
            consumer.ack(&delivery).await?;
            handled += 1;
        }
    }

    consumer.shutdown(Duration::from_secs(5)).await;
    client.shutdown(Duration::from_secs(5)).await;
    Ok(handled)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let endpoint = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8081".into());
    println!("{} messages handled", run(&endpoint).await?);
    Ok(())
}
