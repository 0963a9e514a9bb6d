//! Reads queues by offset, outside of any consumer group, as a `Stream`.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_util::sync::DropGuard;

use crate::Client;
use crate::consumer::At;
use crate::error::Error;
use crate::message::Delivery;

mod follow;

/// Runs that wait between the connections and the reader of the stream; credit bounds their bytes.
const BATCHES_MAX: usize = 4;

/// Which queues of a topic are read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Queues {
    /// All of them, also those that are added later.
    All,
    /// Pairs of broker group and queue id.
    Some(BTreeSet<(String, u32)>),
}

impl Queues {
    pub fn some<T: Into<String>>(queues: impl IntoIterator<Item = (T, u32)>) -> Self {
        Self::Some(queues.into_iter().map(|(group, queue_id)| (group.into(), queue_id)).collect())
    }

    fn contains(&self, broker_group: &str, queue_id: u32) -> bool {
        match self {
            Self::All => true,
            Self::Some(queues) => queues.contains(&(broker_group.to_owned(), queue_id)),
        }
    }
}

/// What is read, and from where.
#[derive(Clone, Debug)]
pub struct PullConsumerBuilder {
    client: Client,
    plan: Plan,
}

#[derive(Clone, Debug)]
struct Plan {
    assigned: Vec<(String, Queues)>,
    from: At,
    stop_at_end: bool,
    buffered_bytes_max: usize,
}

impl PullConsumerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        let plan = Plan {
            assigned: Vec::new(),
            from: At::Earliest,
            stop_at_end: false,
            buffered_bytes_max: 16 << 20,
        };
        Self { client, plan }
    }

    /// Adds queues of a topic.
    pub fn assign(mut self, topic: impl Into<String>, queues: Queues) -> Self {
        self.plan.assigned.push((topic.into(), queues));
        self
    }

    /// Where to begin in every queue; [`At::Earliest`] by default.
    pub fn seek(mut self, from: At) -> Self {
        self.plan.from = from;
        self
    }

    /// Ends the stream behind what is readable now, instead of waiting for more.
    pub fn stop_at_end(mut self) -> Self {
        self.plan.stop_at_end = true;
        self
    }

    /// Bytes that may be on their way to the reader of the stream. 16 MiB by default; every queue
    /// gets its share, but at least 64 KiB.
    pub fn max_buffered_bytes(mut self, bytes: usize) -> Self {
        self.plan.buffered_bytes_max = bytes;
        self
    }

    /// Begins to read. Faults of the settings are the first item of the stream.
    pub fn into_stream(self) -> PullConsumer {
        let (batches, receiver) = mpsc::channel(BATCHES_MAX);
        let stop = self.client.stop().child_token();
        let tasks = self.client.tasks().clone();
        tasks.spawn(follow::run(self.client, self.plan, batches, stop.clone()));
        PullConsumer { batches: receiver, current: VecDeque::new(), _stop: stop.drop_guard() }
    }
}

/// Records of all assigned queues, each queue's in order.
///
/// It goes on behind the last record it gave after a connection broke or a leader changed; an error
/// ends the queue it is about. It ends by itself with [`PullConsumerBuilder::stop_at_end`], else
/// when the client is shut down.
///
/// ```
/// # async fn example() -> anyhow::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let config = drumlin_broker::config::Config::embedded(dir.path().to_owned());
/// # let broker = drumlin_broker::broker::Broker::start(config).await?;
/// # let address = broker.addresses()[0].to_string();
/// # let client = drumlin_client::Client::connect(&address).await?;
/// # let producer = client.producer().build().await?;
/// # producer.send(drumlin_client::Message::new("orders", "3 apples")).await?;
/// use drumlin_client::{At, Queues};
///
/// let assigned = client.pull_consumer().assign("orders", Queues::All);
/// let mut records = assigned.seek(At::Earliest).stop_at_end().into_stream();
/// while let Some(record) = records.next().await {
///     let record = record?;
///     println!("{} at offset {}", record.body_text(), record.offset);
/// }
/// # broker.shutdown().await;
/// # Ok(())
/// # }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Debug)]
pub struct PullConsumer {
    batches: mpsc::Receiver<Result<VecDeque<Delivery>, Error>>,
    current: VecDeque<Delivery>,
    _stop: DropGuard,
}

impl PullConsumer {
    /// The next record; `None` when the stream has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Delivery, Error>> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }
}

impl Stream for PullConsumer {
    type Item = Result<Delivery, Error>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Delivery, Error>>> {
        loop {
            if let Some(delivery) = self.current.pop_front() {
                return Poll::Ready(Some(Ok(delivery)));
            }
            match std::task::ready!(self.batches.poll_recv(context)) {
                Some(Ok(batch)) => self.current = batch,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }
}
