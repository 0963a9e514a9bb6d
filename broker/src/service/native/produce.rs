//! One `Produce` stream: requests are proposed as they come, outcomes told in the same order.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{QueueKey, TopicName};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{ProduceRequest, ProduceResponse};
use drumlin_proto::record::{RecordKind, Run};
use futures::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::chains::Chains;
use super::{Fault, find_queue, find_topic, ok};
use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::{MessageGroupPlace, TopicType};
use crate::replica::{Applied, Item, ProposeError};
use crate::whereabouts::Vantage;

/// For requests that name no timeout.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(3);

type Outcome = Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send>>;

/// What a run is, for its answer and the metrics. Not the run itself: a client that reads no answers
/// must not make the broker keep what it sent.
#[derive(Debug)]
struct Accepted {
    queue: QueueKey,
    topic: TopicName,
    record_count: u32,
    normal: Sizes,
    fifo: Sizes,
}

impl Accepted {
    fn new(queue: QueueKey, topic: TopicName, run: &Run) -> Self {
        let (mut normal, mut fifo) = (Sizes::default(), Sizes::default());
        for record in run.records() {
            match record.kind() {
                RecordKind::Fifo => fifo.add(record.body().len()),
                _ => normal.add(record.body().len()),
            }
        }
        Self { queue, topic, record_count: run.record_count(), normal, fifo }
    }
}

/// Sizes of bodies in the same space for any number of them: exact in sum and count, and each in its
/// class. The last size of a class is a power of two, as the last one of any bucket of the metrics.
#[derive(Debug, Default)]
struct Sizes {
    /// Count and bytes of each class.
    classes: [(u32, u64); Self::CLASSES],
}

impl Sizes {
    /// A body has at most 4 MiB.
    const CLASSES: usize = 23;

    fn add(&mut self, body_bytes: usize) {
        let class = body_bytes.max(1).next_power_of_two().trailing_zeros();
        let class = usize::try_from(class).map_or(Self::CLASSES - 1, |c| c.min(Self::CLASSES - 1));
        let (count, bytes) = &mut self.classes[class];
        *count += 1;
        *bytes += body_bytes as u64;
    }

    /// Sizes that fall into the same classes with the same sums.
    fn iter(&self) -> impl Iterator<Item = u64> {
        self.classes.iter().flat_map(|(count, bytes)| {
            let count = u64::from(*count);
            (0..count).map(move |at| bytes / count + u64::from(at < bytes % count))
        })
    }
}

/// What the answering half takes: a request's turn, or how the stream ends.
pub(super) type Turn = Result<Pending, Status>;

/// A request that was read, to be answered in its turn.
pub(super) struct Pending {
    sequence: u64,
    proposed: Result<(Accepted, Outcome), Fault>,
}

/// The reading half of a stream.
#[derive(Debug)]
pub(super) struct Accepting {
    context: Arc<Context>,
    vantage: Vantage,
    pending: mpsc::Sender<Turn>,
    chains: Chains,
    next_queue: u16,
}

impl Accepting {
    pub(super) fn new(
        context: Arc<Context>,
        vantage: Vantage,
        pending: mpsc::Sender<Turn>,
    ) -> Self {
        Self { context, vantage, pending, chains: Chains::new(), next_queue: fastrand::u16(..) }
    }

    /// Reads until the client ends the stream, breaks it, or the broker stops.
    pub(super) async fn run(
        mut self,
        mut requests: Streaming<ProduceRequest>,
        stop: CancellationToken,
    ) {
        while let Some(Ok(Some(request))) = stop.run_until_cancelled(requests.message()).await {
            // Room first: what is proposed must be answered.
            let pending = self.pending.clone();
            let reserved = stop.run_until_cancelled(pending.reserve()).await;
            let Some(Ok(place)) = reserved else { break };
            if !self.chains.make_room() {
                let text = "too many queues have failed on this stream and were not resumed";
                place.send(Err(Status::resource_exhausted(text)));
                break;
            }
            let sequence = request.sequence;
            let proposed = self.propose(request);
            place.send(Ok(Pending { sequence, proposed }));
        }
    }

    fn propose(&mut self, request: ProduceRequest) -> Result<(Accepted, Outcome), Fault> {
        let timeout = match request.timeout_ms {
            0 => TIMEOUT_DEFAULT,
            ms => Duration::from_millis(u64::from(ms)),
        };
        let deadline = Instant::now() + timeout;
        let named = (request.topic.as_str(), request.queue_id);
        if self.chains.follows_unplaced(named.0, named.1, request.resume) {
            return Err(ProposeError::OutOfOrder.into());
        }
        let parsed = Run::parse(request.run).map_err(Fault::invalid);
        let placed = self.place(named, parsed.as_ref().ok());
        let (topic, queue) =
            placed.inspect_err(|_| self.chains.refuse_unplaced(named.0, named.1))?;
        let chain = self.chains.chain(queue, request.resume);
        let run = parsed.and_then(|run| check_types(&topic, &run).map(|()| run));
        let run = run.inspect_err(|_| chain.break_here())?;
        let accepted = Accepted::new(queue, topic.name.clone(), &run);
        let item = Item::Run { queue, run };
        let outcome = self.context.replica.propose_in_order(item, Some(deadline), chain);
        Ok((accepted, Box::pin(outcome)))
    }

    fn place(
        &mut self,
        (topic, queue_id): (&str, i32),
        run: Option<&Run>,
    ) -> Result<(Arc<Topic>, QueueKey), Fault> {
        let topic = find_topic(&self.context, topic)?;
        let queue = self.choose_queue(&topic, queue_id, run)?;
        Ok((topic, queue))
    }

    /// The queue asked for; for -1 the one of the message group, or the next in turn.
    fn choose_queue(
        &mut self,
        topic: &Topic,
        queue_id: i32,
        run: Option<&Run>,
    ) -> Result<QueueKey, Fault> {
        let own = &self.context.config.broker_group;
        let message_group = run.and_then(|run| run.records().find_map(|r| r.message_group()));
        let queue = match (queue_id, message_group) {
            (-1, None) => {
                self.next_queue = self.next_queue.wrapping_add(1);
                self.next_queue % topic.queue_count(own).max(1)
            }
            (-1, Some(message_group)) => self.queue_of(topic, message_group)?,
            (asked, _) => u16::try_from(asked).map_err(Fault::invalid)?,
        };
        // Whoever chose did so by a queue list that may be another one.
        for message_group in
            run.iter().flat_map(|run| run.records()).filter_map(|r| r.message_group())
        {
            if self.queue_of(topic, message_group)? != queue {
                let text = format!(
                    "queue {queue} of {} is not the one of message group {message_group}: its \
                     queue list has changed",
                    topic.name
                );
                return Err(Fault::new(Code::PreconditionFailed, text));
            }
        }
        find_queue(&self.context, topic, u32::from(queue))
    }

    /// The queue of a message group, which must be one of this broker group.
    fn queue_of(&self, topic: &Topic, message_group: &str) -> Result<u16, Fault> {
        match topic.place_of(message_group) {
            MessageGroupPlace::Queue(owner, queue)
                if *owner == self.context.config.broker_group =>
            {
                Ok(queue)
            }
            MessageGroupPlace::Queue(owner, _) => Err(Fault::elsewhere(
                owner.as_str(),
                &self.vantage,
                format!("broker group {owner} holds the queue of this message group"),
            )),
            MessageGroupPlace::Moving => {
                let text = format!("the queue list of {} is being changed", topic.name);
                Err(Fault::new(Code::Busy, text))
            }
            MessageGroupPlace::Nowhere => Err(Fault::topic_not_found(topic.name.as_str())),
        }
    }
}

/// Whether the topic takes records of these kinds.
fn check_types(topic: &Topic, run: &Run) -> Result<(), Fault> {
    let refused =
        run.records().map(|record| record.kind()).find(|kind| !match (topic.kind, kind) {
            (TopicType::Normal | TopicType::Mixed, RecordKind::Normal) => true,
            (TopicType::Fifo | TopicType::Mixed, RecordKind::Fifo) => true,
            (TopicType::Normal, RecordKind::Fifo) | (TopicType::Fifo, RecordKind::Normal) => false,
            (_, RecordKind::Delay | RecordKind::Transaction) => false,
        });
    match refused {
        Some(kind) => Err(Fault::new(
            Code::PreconditionFailed,
            format!("topic {} of type {:?} takes no {kind:?} messages", topic.name, topic.kind),
        )),
        None => Ok(()),
    }
}

/// The answering half: ends when the reading half has ended and everything is answered.
pub(super) fn answers(
    context: Arc<Context>,
    vantage: Vantage,
    pending: mpsc::Receiver<Turn>,
) -> impl Stream<Item = Result<ProduceResponse, Status>> + Send {
    stream::unfold((context, vantage, pending), |(context, vantage, mut pending)| async move {
        let response = match pending.recv().await? {
            Ok(next) => Ok(answer(&context, &vantage, next).await),
            Err(end) => Err(end),
        };
        Some((response, (context, vantage, pending)))
    })
    .fuse()
}

async fn answer(
    context: &Context,
    vantage: &Vantage,
    Pending { sequence, proposed }: Pending,
) -> ProduceResponse {
    let (accepted, outcome) = match proposed {
        Ok((accepted, outcome)) => (accepted, outcome.await),
        Err(fault) => {
            let status = fault.status(vantage);
            return ProduceResponse { sequence, status, ..Default::default() };
        }
    };
    let queue_id = u32::from(accepted.queue.queue.get());
    let record_count = accepted.record_count;
    match outcome {
        Ok(Applied::Run { base_offset, store_time_ms, degraded }) => {
            count(context, &accepted);
            ProduceResponse {
                sequence,
                status: ok(),
                queue_id,
                base_offset: base_offset.get(),
                record_count,
                store_time_ms: i64::try_from(store_time_ms).unwrap_or(i64::MAX),
                degraded,
            }
        }
        Ok(Applied::Command(outcome)) => unreachable!("{outcome:?} came of a run"),
        Err(error) => {
            context.metrics.propose_refused(&error);
            let status = Fault::from(error).status(vantage);
            ProduceResponse { sequence, status, queue_id, ..Default::default() }
        }
    }
}

fn count(context: &Context, accepted: &Accepted) {
    let Accepted { topic, normal, fifo, .. } = accepted;
    for (kind, sizes) in [(RecordKind::Normal, normal), (RecordKind::Fifo, fifo)] {
        let mut sizes = sizes.iter().peekable();
        if sizes.peek().is_some() {
            context.metrics.messages_in(topic, kind, sizes);
        }
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::{QueueId, TopicId};
    use drumlin_proto::record::{RecordFields, RunBuilder};

    use super::*;

    #[test]
    fn sizes_keep_their_class_sum_and_count() {
        let bodies = [0, 1, 2, 3, 4, 1000, 1001, 1024, 1025, 4096, 4 << 20];
        let mut sizes = Sizes::default();
        bodies.iter().for_each(|bytes| sizes.add(*bytes));
        let told: Vec<u64> = sizes.iter().collect();
        assert_eq!(told.len(), bodies.len());
        assert_eq!(told.iter().sum::<u64>(), bodies.iter().map(|b| *b as u64).sum::<u64>());
        for bound in [1, 2, 4, 1024, 4096, 512 << 10, 1 << 20] {
            let within = bodies.iter().filter(|bytes| **bytes as u64 <= bound).count();
            assert_eq!(told.iter().filter(|bytes| **bytes <= bound).count(), within, "{bound}");
        }
    }

    #[test]
    fn what_waits_to_be_answered_does_not_keep_the_run() {
        let mut builder = RunBuilder::with_capacity(1 << 20);
        let body = vec![0; 1 << 19];
        let fields = RecordFields { message_id: "m", body: &body, ..RecordFields::default() };
        builder.push(&fields);
        let bytes = builder.finish();
        let kept = bytes.clone();
        let run = Run::parse(bytes).unwrap();
        let queue = QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) };
        let accepted = Accepted::new(queue, TopicName::parse("t").unwrap(), &run);
        drop(run);
        assert_eq!(accepted.record_count, 1);
        assert!(kept.is_unique(), "the bytes are still referred to");
    }
}
