//! The Drumlin SDK: producers, consumers and administration.
//!
//! ```
//! # async fn example() -> anyhow::Result<()> {
//! # let dir = tempfile::tempdir()?;
//! # let config = drumlin_broker::config::Config::embedded(dir.path().to_owned());
//! # let broker = drumlin_broker::broker::Broker::start(config).await?;
//! # let address = broker.addresses()[0].to_string();
//! use std::time::Duration;
//!
//! use drumlin_client::{Client, Message};
//!
//! let client = Client::connect(&address).await?;
//! let producer = client.producer().build().await?;
//!
//! // Awaiting a send means that the message is stored.
//! let receipt = producer.send(Message::new("orders", "3 apples").tag("eu")).await?;
//! println!("stored at offset {} of queue {}", receipt.offset, receipt.queue_id);
//!
//! producer.shutdown(Duration::from_secs(10)).await?;
//! client.shutdown(Duration::from_secs(5)).await;
//! # broker.shutdown().await;
//! # Ok(())
//! # }
//! # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
//! ```

mod connection;
mod error;
mod message;
mod producer;
mod route;

pub mod admin;
pub mod cluster;
pub mod consumer;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use admin::Admin;
pub use cluster::Cluster;
pub use consumer::pull::{PullConsumer, PullConsumerBuilder, Queues};
pub use consumer::simple::{SimpleConsumer, SimpleConsumerBuilder};
pub use consumer::{At, Filter};
pub use drumlin_proto::ids::QueueOffset;
pub use error::{Code, Error};
pub use message::{Delivery, Message, Receipt};
pub use producer::{BatchError, Producer, ProducerBuilder, SendAck, Unsent};

use connection::{Address, Connections};
use route::Routes;

/// A connection to a cluster, by way of any of its nameservers or brokers; clones share it.
///
/// When the last clone is dropped, what it still does in the background ends by itself; use
/// [`Client::shutdown`] to wait for that.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    id: String,
    endpoints: Vec<Address>,
    connections: Arc<Connections>,
    routes: Routes,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Client {
    /// Connects to one nameserver or broker, `host:port`.
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        Self::builder().endpoints([endpoint]).build().await
    }

    /// For more than one endpoint.
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    /// Sends messages; see [`Producer`].
    pub fn producer(&self) -> ProducerBuilder {
        ProducerBuilder::new(self.clone())
    }

    /// A consumer that takes leases on messages, for the members of a consumer group.
    pub fn simple_consumer(&self, group: impl Into<String>) -> SimpleConsumerBuilder {
        SimpleConsumerBuilder::new(self.clone(), group.into())
    }

    /// A consumer that reads queues by offset, outside of any consumer group.
    pub fn pull_consumer(&self) -> PullConsumerBuilder {
        PullConsumerBuilder::new(self.clone())
    }

    /// Topics, groups and offsets.
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// Nodes, and how the copies of broker groups stand.
    pub fn cluster(&self) -> Cluster {
        Cluster::new(self.clone())
    }

    /// Stops everything that was made with this client and waits for it, at most for `deadline`.
    ///
    /// Shut producers down first: what they have not sent yet fails with [`Error::Closed`].
    pub async fn shutdown(&self, deadline: Duration) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(deadline, self.shared.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.shared.tasks.len(), "tasks left behind at shutdown");
        }
    }

    fn id(&self) -> &str {
        &self.shared.id
    }

    /// As they were given.
    fn endpoints(&self) -> &[Address] {
        &self.shared.endpoints
    }

    /// Whom to ask, in turn.
    fn access_points(&self) -> Vec<Address> {
        route::access_points(&self.shared.endpoints, self.shared.routes.leaders())
    }

    fn connections(&self) -> &Arc<Connections> {
        &self.shared.connections
    }

    fn routes(&self) -> &Routes {
        &self.shared.routes
    }

    fn tasks(&self) -> &TaskTracker {
        &self.shared.tasks
    }

    fn stop(&self) -> &CancellationToken {
        &self.shared.stop
    }
}

/// Settings of a client.
#[derive(Clone, Debug, Default)]
pub struct ClientBuilder {
    endpoints: Vec<String>,
}

impl ClientBuilder {
    /// Nameservers or brokers, each `host:port`; also several in one text, with `;` or `,` between.
    pub fn endpoints<T: Into<String>>(mut self, endpoints: impl IntoIterator<Item = T>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// Connects; at least one endpoint must answer. Lists all faults of the settings.
    pub async fn build(self) -> Result<Client, Error> {
        let texts = self.endpoints.iter().flat_map(|text| text.split([';', ',']));
        let texts = texts.filter(|text| !text.trim().is_empty());
        let (mut endpoints, mut faults) = (Vec::new(), Vec::new());
        for parsed in texts.map(Address::parse) {
            match parsed {
                Ok(address) => endpoints.push(address),
                Err(fault) => faults.push(fault),
            }
        }
        if endpoints.is_empty() && faults.is_empty() {
            faults.push("no endpoint is given".into());
        }
        if !faults.is_empty() {
            return Err(Error::Configuration { faults });
        }
        let connections = Arc::new(Connections::default());
        let mut reached = Ok(());
        for endpoint in &endpoints {
            reached = connections.check(endpoint).await;
            if reached.is_ok() {
                break;
            }
        }
        reached?;
        let shared = Shared {
            id: format!("drumlin-{}", uuid::Uuid::new_v4().simple()),
            endpoints,
            connections,
            routes: Routes::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        shared.tasks.spawn(shared.routes.clone().run(
            shared.endpoints.clone(),
            Arc::clone(&shared.connections),
            shared.stop.clone(),
        ));
        Ok(Client { shared: Arc::new(shared) })
    }
}
