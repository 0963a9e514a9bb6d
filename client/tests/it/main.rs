//! The SDK against a real broker in this process.

use std::time::Duration;

use drumlin_broker::broker::Broker;
use drumlin_broker::config::Config;
use drumlin_client::{At, Client, Delivery, Queues};
use tempfile::TempDir;

mod consume;
mod examples;
mod fail_over;
mod group;
mod nameserver;
mod produce;

/// A broker on loopback with its own data directory, which can be restarted in place.
struct Node {
    broker: Option<Broker>,
    config: Config,
    _dir: TempDir,
}

impl Node {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = Config::embedded(dir.path().to_owned());
        config.http = None;
        change(&mut config);
        let broker = Broker::start(config.clone()).await.expect("the broker starts");
        // The same port after a restart.
        config.listeners[0].bind = broker.addresses()[0];
        Self { broker: Some(broker), config, _dir: dir }
    }

    fn address(&self) -> String {
        self.config.listeners[0].bind.to_string()
    }

    async fn stop(&mut self) {
        if let Some(broker) = self.broker.take() {
            broker.shutdown().await;
        }
    }

    async fn restart(&mut self) {
        self.stop().await;
        let broker = Broker::start(self.config.clone()).await.expect("the broker starts again");
        self.broker = Some(broker);
    }

    async fn client(&self) -> Client {
        Client::connect(&self.address()).await.expect("the broker answers")
    }
}

/// All that a topic holds now, each queue in order.
async fn read_all(client: &Client, topic: &str) -> Vec<Delivery> {
    let builder = client.pull_consumer().assign(topic, Queues::All).seek(At::Earliest);
    let mut stream = builder.stop_at_end().into_stream();
    let mut read = Vec::new();
    while let Some(record) = within(stream.next()).await {
        read.push(record.expect("a record"));
    }
    read
}

/// Fails the test instead of letting it hang.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("done within 30 s")
}
