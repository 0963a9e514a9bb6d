//! One `Produce` stream: requests are proposed as they come, outcomes told in the same order.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{QueueKey, TopicName};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{ProduceRequest, ProduceResponse};
use drumlin_proto::record::{RecordKind, Run};
use drumlin_proto::route::place_of_message_group;
use futures::{Stream, StreamExt, stream};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use super::{Fault, find_queue, find_topic, ok};
use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::TopicType;
use crate::replica::{Applied, Chain, Item, ProposeError};

/// For requests that name no timeout.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(3);
/// Queues that one stream may have failed in: beyond it the stream ends.
const CHAINS_MAX: usize = 65_536;

type Outcome = Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send>>;

/// What a run is, for its answer and the metrics.
#[derive(Clone, Debug)]
struct Accepted {
    queue: QueueKey,
    topic: TopicName,
    run: Run,
}

/// A request that was read, to be answered in its turn.
pub(super) struct Pending {
    sequence: u64,
    proposed: Result<(Accepted, Outcome), Fault>,
}

/// The reading half of a stream.
#[derive(Debug)]
pub(super) struct Accepting {
    context: Arc<Context>,
    pending: mpsc::Sender<Pending>,
    chains: HashMap<QueueKey, Chain>,
    next_queue: u16,
}

impl Accepting {
    pub(super) fn new(context: Arc<Context>, pending: mpsc::Sender<Pending>) -> Self {
        Self { context, pending, chains: HashMap::new(), next_queue: fastrand::u16(..) }
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
            let Ok(place) = pending.reserve().await else { break };
            let sequence = request.sequence;
            let proposed = self.propose(request);
            place.send(Pending { sequence, proposed });
            if self.chains.len() > CHAINS_MAX {
                break;
            }
        }
    }

    fn propose(&mut self, request: ProduceRequest) -> Result<(Accepted, Outcome), Fault> {
        let timeout = match request.timeout_ms {
            0 => TIMEOUT_DEFAULT,
            ms => Duration::from_millis(u64::from(ms)),
        };
        let deadline = Instant::now() + timeout;
        let topic = find_topic(&self.context, &request.topic)?;
        let parsed = Run::parse(request.run).map_err(Fault::invalid);
        let queue = self.choose_queue(&topic, request.queue_id, parsed.as_ref().ok())?;
        if request.resume {
            self.chains.remove(&queue);
        }
        let chain = self.chains.entry(queue).or_default();
        let run = parsed.and_then(|run| check_types(&topic, &run).map(|()| run));
        let run = run.inspect_err(|_| chain.break_here())?;
        let item = Item::Run { queue, run: run.clone() };
        let outcome = self.context.replica.propose_in_order(item, Some(deadline), chain);
        let accepted = Accepted { queue, topic: topic.name.clone(), run };
        Ok((accepted, Box::pin(outcome)))
    }

    /// The queue asked for; for -1 the one of the message group, or the next in turn.
    fn choose_queue(
        &mut self,
        topic: &Topic,
        queue_id: i32,
        run: Option<&Run>,
    ) -> Result<QueueKey, Fault> {
        if queue_id != -1 {
            let queue = u32::try_from(queue_id).map_err(Fault::invalid)?;
            return find_queue(&self.context, topic, queue);
        }
        let message_group = run.and_then(|run| run.records().next()?.message_group());
        let Some(message_group) = message_group else {
            let queue_count = topic.queue_count(&self.context.config.broker_group).max(1);
            self.next_queue = self.next_queue.wrapping_add(1);
            return find_queue(&self.context, topic, u32::from(self.next_queue % queue_count));
        };
        let counts: Vec<u32> = topic.shares.iter().map(|(_, count)| u32::from(*count)).collect();
        let place = place_of_message_group(message_group, &counts)
            .and_then(|(share, queue)| Some((&topic.shares.get(share)?.0, queue)));
        match place {
            Some((owner, queue)) if *owner == self.context.config.broker_group => {
                find_queue(&self.context, topic, queue)
            }
            Some((owner, _)) => Err(Fault::new(
                Code::NotLeader,
                format!("broker group {owner} holds the queue of this message group"),
            )),
            None => Err(Fault::topic_not_found(topic.name.as_str())),
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
    pending: mpsc::Receiver<Pending>,
) -> impl Stream<Item = Result<ProduceResponse, Status>> + Send {
    stream::unfold((context, pending), |(context, mut pending)| async move {
        let next = pending.recv().await?;
        let response = answer(&context, next).await;
        Some((Ok(response), (context, pending)))
    })
    .fuse()
}

async fn answer(context: &Context, Pending { sequence, proposed }: Pending) -> ProduceResponse {
    let (accepted, outcome) = match proposed {
        Ok((accepted, outcome)) => (accepted, outcome.await),
        Err(fault) => {
            return ProduceResponse { sequence, status: fault.status(), ..Default::default() };
        }
    };
    let queue_id = u32::from(accepted.queue.queue.get());
    let record_count = accepted.run.record_count();
    match outcome {
        Ok(Applied::Run { base_offset, store_time_ms }) => {
            count(context, &accepted);
            ProduceResponse {
                sequence,
                status: ok(),
                queue_id,
                base_offset: base_offset.get(),
                record_count,
                store_time_ms: i64::try_from(store_time_ms).unwrap_or(i64::MAX),
                degraded: false,
            }
        }
        Ok(Applied::Command(outcome)) => unreachable!("{outcome:?} came of a run"),
        Err(error) => {
            context.metrics.propose_refused(&error);
            let status = Fault::from(error).status();
            ProduceResponse { sequence, status, queue_id, ..Default::default() }
        }
    }
}

fn count(context: &Context, accepted: &Accepted) {
    let Accepted { topic, run, .. } = accepted;
    for kind in [RecordKind::Normal, RecordKind::Fifo] {
        let of_kind = run.records().filter(|record| record.kind() == kind);
        let mut sizes = of_kind.map(|record| record.body().len() as u64).peekable();
        if sizes.peek().is_some() {
            context.metrics.messages_in(topic, kind, sizes);
        }
    }
}
