//! Sends messages: awaited, enqueued in order with the acknowledgement later, or one-way.
//!
//! A producer is a handle; one task behind it owns the queues of what waits (`dispatch`), a queue's
//! runs and their order (`lane`), and one `Produce` stream per leader (`link`).

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use drumlin_proto::record::RUN_BYTES_MAX;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Client;
use crate::error::Error;
use crate::message::{Message, Receipt, Sealed};

mod creation;
mod dispatch;
mod lane;
mod link;
mod window;

use dispatch::{Accepted, Command, Dispatcher};
use window::Window;

/// A timeout longer than this is as good as endless, and still fits behind the current time.
const TIMEOUT_MAX: Duration = Duration::from_hours(24 * 365);

/// Flushes that the producer's task may have before it; more wait for their turn.
const FLUSHES_MAX: usize = 64;

/// Settings of a producer.
#[derive(Clone, Debug)]
pub struct ProducerBuilder {
    client: Client,
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    in_flight_bytes_max: usize,
    in_flight_messages_max: usize,
    run_bytes_max: usize,
    send_timeout: Duration,
    linger: Duration,
}

impl ProducerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        let settings = Settings {
            in_flight_bytes_max: 64 << 20,
            in_flight_messages_max: 100_000,
            run_bytes_max: 512 << 10,
            send_timeout: Duration::from_secs(10),
            linger: Duration::ZERO,
        };
        Self { client, settings }
    }

    /// Bytes that may be unacknowledged; beyond them sending waits. 64 MiB by default.
    pub fn max_in_flight_bytes(mut self, bytes: usize) -> Self {
        self.settings.in_flight_bytes_max = bytes;
        self
    }

    /// Messages that may be unacknowledged; beyond them sending waits. 100,000 by default.
    pub fn max_in_flight_messages(mut self, messages: usize) -> Self {
        self.settings.in_flight_messages_max = messages;
        self
    }

    /// Bytes from which on a batch is sent without waiting for the one before it. 512 KiB by
    /// default; a single larger message is a batch of its own.
    pub fn max_batch_bytes(mut self, bytes: usize) -> Self {
        self.settings.run_bytes_max = bytes;
        self
    }

    /// How long a message may take from the call to its acknowledgement. 10 s by default.
    pub fn send_timeout(mut self, timeout: Duration) -> Self {
        self.settings.send_timeout = timeout.min(TIMEOUT_MAX);
        self
    }

    /// How long a message may wait for others to share its batch. 0 by default: batches form
    /// behind the request in flight.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.settings.linger = linger.min(TIMEOUT_MAX);
        self
    }

    /// Starts the producer, or lists all faults of the settings.
    pub async fn build(self) -> Result<Producer, Error> {
        let Settings { in_flight_bytes_max, in_flight_messages_max, run_bytes_max, .. } =
            self.settings;
        let permits_max = usize::try_from(u32::MAX >> 4).unwrap_or(usize::MAX);
        let rules = [
            ((1..=permits_max).contains(&in_flight_bytes_max), "max_in_flight_bytes: 1..=256 MiB"),
            ((1..=1 << 20).contains(&in_flight_messages_max), "max_in_flight_messages: 1..=2^20"),
            ((1..=RUN_BYTES_MAX).contains(&run_bytes_max), "max_batch_bytes: 1..=6 MiB"),
            (!self.settings.send_timeout.is_zero(), "send_timeout: more than 0"),
            (
                self.settings.linger < self.settings.send_timeout,
                "linger: shorter than send_timeout",
            ),
        ];
        let broken = rules.into_iter().filter(|(kept, _)| !kept);
        let faults: Vec<_> = broken.map(|(_, rule)| rule.to_owned()).collect();
        if !faults.is_empty() {
            return Err(Error::Configuration { faults });
        }
        if self.client.stop().is_cancelled() {
            return Err(Error::Closed);
        }
        Ok(Producer::start(self.client, self.settings))
    }
}

/// Sends messages; clones share its window and its connections.
///
/// Dropping the last clone lets what was accepted go on in the background until it is acknowledged
/// or its deadline passes. [`Producer::shutdown`] waits for it.
///
/// A message whose acknowledgement got lost, as when its leader dies, is sent again to the next
/// leader, in its order, so it may be stored twice. Failures are retried until the send timeout;
/// [`crate::Code::DeadlineExceeded`] then means that it was not stored,
/// [`crate::Code::UnknownOutcome`] that it may have been. [`Receipt::degraded`] tells of an
/// acknowledgement that only one copy stands for.
///
/// ```
/// # async fn example() -> anyhow::Result<()> {
/// # let dir = tempfile::tempdir()?;
/// # let config = drumlin_broker::config::Config::embedded(dir.path().to_owned());
/// # let broker = drumlin_broker::broker::Broker::start(config).await?;
/// # let address = broker.addresses()[0].to_string();
/// # let client = drumlin_client::Client::connect(&address).await?;
/// use drumlin_client::Message;
///
/// let producer = client.producer().build().await?;
/// // One message group is one order: these are stored as they were enqueued.
/// let packed = producer.enqueue(Message::new("orders", "packed").message_group("o-1")).await?;
/// let sent = producer.enqueue(Message::new("orders", "sent").message_group("o-1")).await?;
/// assert!(packed.await?.offset < sent.await?.offset);
/// # broker.shutdown().await;
/// # Ok(())
/// # }
/// # tokio::runtime::Runtime::new().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Producer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    window: Arc<Window>,
    commands: mpsc::Sender<Command>,
    /// Room for flushes among the commands, so that they never take that of messages.
    flushes: Arc<Semaphore>,
    send_timeout: Duration,
    stop: CancellationToken,
    task: Mutex<Option<JoinHandle<u64>>>,
    ids: MessageIds,
}

/// Message ids: random for the producer, counted within it.
#[derive(Debug)]
struct MessageIds {
    producer: u64,
    next: AtomicU64,
}

impl MessageIds {
    fn new() -> Self {
        Self { producer: uuid::Uuid::new_v4().as_u64_pair().1, next: AtomicU64::new(0) }
    }

    fn next(&self) -> String {
        format!("{:016X}{:016X}", self.producer, self.next.fetch_add(1, Ordering::Relaxed))
    }
}

impl Producer {
    fn start(client: Client, settings: Settings) -> Self {
        let window =
            Arc::new(Window::new(settings.in_flight_bytes_max, settings.in_flight_messages_max));
        // The window bounds the messages; the rest is room for flushes.
        let (commands, receiver) = mpsc::channel(settings.in_flight_messages_max + FLUSHES_MAX);
        let flushes = Arc::new(Semaphore::new(FLUSHES_MAX));
        let (stop, send_timeout) = (client.stop().child_token(), settings.send_timeout);
        let tasks = client.tasks().clone();
        let dispatcher = Dispatcher::new(client, settings, Arc::clone(&window), stop.clone());
        let task = Mutex::new(Some(tasks.spawn(dispatcher.run(receiver))));
        let ids = MessageIds::new();
        Self {
            shared: Arc::new(Shared { window, commands, flushes, send_timeout, stop, task, ids }),
        }
    }

    /// Sends a message and resolves when it is acknowledged: stored for good.
    ///
    /// Cancelling it after the first poll does not take the message back.
    pub async fn send(&self, message: Message) -> Result<Receipt, Error> {
        self.enqueue(message).await?.await
    }

    /// Accepts a message, waiting for room in the window only. Messages of one message group are
    /// stored in the order in which this returned for them.
    ///
    /// Cancelled while it waits, nothing is sent.
    pub async fn enqueue(&self, message: Message) -> Result<SendAck, Error> {
        let (topic, sealed) = self.seal(message)?;
        let charge = self.shared.window.charge_of(sealed.fields().record_bytes());
        let admitted = self.shared.window.admit(charge);
        match tokio::time::timeout(self.shared.send_timeout, admitted).await {
            Ok(admitted) => admitted?,
            Err(_) => return Err(self.shared.window.full()),
        }
        self.accept(topic, sealed, charge, true)
    }

    /// Sends a message without an acknowledgement. Never waits: without room in the window it
    /// fails with [`Error::WindowFull`].
    pub fn send_oneway(&self, message: Message) -> Result<(), Error> {
        let (topic, sealed) = self.seal(message)?;
        let charge = self.shared.window.charge_of(sealed.fields().record_bytes());
        self.shared.window.try_admit(charge)?;
        self.accept(topic, sealed, charge, false).map(drop)
    }

    /// Sends messages in order and resolves when all of them are settled. Not atomic: some may be
    /// stored when others fail.
    pub async fn send_batch(
        &self,
        messages: impl IntoIterator<Item = Message>,
    ) -> Result<Vec<Receipt>, BatchError> {
        let mut acks = Vec::new();
        for message in messages {
            acks.push(self.enqueue(message).await);
        }
        let mut results = Vec::with_capacity(acks.len());
        for ack in acks {
            results.push(match ack {
                Ok(ack) => ack.await,
                Err(error) => Err(error),
            });
        }
        if results.iter().any(Result::is_err) {
            return Err(BatchError { results });
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Waits until everything accepted before the call is acknowledged or failed; how each fared
    /// is told by its [`SendAck`].
    pub async fn flush(&self) -> Result<(), Error> {
        let (done, flushed) = oneshot::channel();
        let room = Arc::clone(&self.shared.flushes).acquire_owned().await;
        let flush = Command::Flush { done, _room: room.map_err(|_| Error::Closed)? };
        self.shared.commands.send(flush).await.map_err(|_| Error::Closed)?;
        flushed.await.map_err(|_| Error::Closed)
    }

    /// Accepts no more messages, on no clone, flushes for at most `deadline` and ends the producer.
    ///
    /// What is then still unacknowledged fails with [`Error::Closed`], and is counted.
    pub async fn shutdown(&self, deadline: Duration) -> Result<(), Unsent> {
        self.shared.window.close();
        // Whether it flushed or not is told by the count of what is left.
        drop(tokio::time::timeout(deadline, self.flush()).await);
        self.shared.stop.cancel();
        let task = self.shared.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(task) = task else { return Ok(()) };
        match task.await {
            Ok(0) => Ok(()),
            Ok(messages) => Err(Unsent { messages }),
            Err(error) => {
                tracing::error!(%error, "producer task failed");
                Ok(())
            }
        }
    }

    fn seal(&self, message: Message) -> Result<(String, Sealed), Error> {
        let topic = message.topic().to_owned();
        let sealed = message.seal(now_ms(), || self.shared.ids.next())?;
        Ok((topic, sealed))
    }

    fn accept(
        &self,
        topic: String,
        sealed: Sealed,
        charge: u32,
        acked: bool,
    ) -> Result<SendAck, Error> {
        let (ack, receipt) = oneshot::channel();
        let now = Instant::now();
        let accepted = Accepted {
            topic,
            sealed,
            charge,
            accepted_at: now,
            deadline: now + self.shared.send_timeout,
            ack: acked.then_some(ack),
        };
        match self.shared.commands.try_send(Command::Send(Box::new(accepted))) {
            Ok(()) => Ok(SendAck { receipt }),
            Err(_) => {
                self.shared.window.release(charge, 1);
                Err(Error::Closed)
            }
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the edge where a message gets its born time")]
fn now_ms() -> i64 {
    let now = std::time::SystemTime::now();
    match now.duration_since(std::time::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(_) => 0,
    }
}

/// The acknowledgement of an enqueued message, still to come. Dropping it changes nothing but that
/// a failure is only logged.
#[derive(Debug)]
#[must_use = "a failure is only told here"]
pub struct SendAck {
    receipt: oneshot::Receiver<Result<Receipt, Error>>,
}

impl Future for SendAck {
    type Output = Result<Receipt, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let settled = std::task::ready!(Pin::new(&mut self.receipt).poll(context));
        Poll::Ready(settled.unwrap_or(Err(Error::Closed)))
    }
}

/// Some messages of a batch failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{} of {} messages failed, first: {}", self.failed(), results.len(), self.first())]
pub struct BatchError {
    /// One for each message, in order.
    pub results: Vec<Result<Receipt, Error>>,
}

impl BatchError {
    fn failed(&self) -> usize {
        self.results.iter().filter(|result| result.is_err()).count()
    }

    fn first(&self) -> Error {
        let first = self.results.iter().find_map(|result| result.as_ref().err());
        first.cloned().unwrap_or(Error::Closed)
    }
}

/// A shutdown left messages behind, each of which may or may not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{messages} messages were not acknowledged before the shutdown's deadline")]
pub struct Unsent {
    pub messages: u64,
}
