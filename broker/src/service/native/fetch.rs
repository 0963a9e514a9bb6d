//! One `Fetch` stream: a task per queue that is read, which sends runs as they lie while credit is
//! left, and waits for the readable end without polling.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;

use drumlin_proto::ids::{QueueKey, QueueOffset, TopicName};
use drumlin_proto::native::fetch_request::{Open, Request};
use drumlin_proto::native::position::At;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{FetchRequest, FetchResponse, FetchedRun, Position, Status};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::{Fault, find_queue, find_topic, ok};
use crate::broker::Context;
use crate::queue::index::Line;
use crate::whereabouts::Vantage;

/// Fetches that one stream may have open.
const FETCHES_MAX: usize = 4096;
/// Runs in one response.
const RUNS_MAX: usize = 256;
/// A response is closed once it has this much.
const RESPONSE_BYTES_TARGET: u64 = 1 << 20;
/// Credit that can be given; more is as good as endless.
const CREDIT_BYTES_MAX: i64 = i64::MAX / 2;

type Responses = mpsc::Sender<Result<FetchResponse, tonic::Status>>;

/// The reading half of a stream: opens, credits and closes fetches.
#[derive(Debug)]
pub(super) struct Fetches {
    context: Arc<Context>,
    vantage: Vantage,
    responses: Responses,
    open: HashMap<u32, OpenFetch>,
    tasks: JoinSet<u32>,
}

#[derive(Debug)]
struct OpenFetch {
    /// Bytes given in all.
    credit: watch::Sender<i64>,
    ended: CancellationToken,
}

/// Adds to the bytes that may be sent in all.
fn give(credit: &watch::Sender<i64>, bytes: u64) {
    let bytes = i64::try_from(bytes).unwrap_or(CREDIT_BYTES_MAX);
    credit.send_modify(|given| *given = given.saturating_add(bytes).min(CREDIT_BYTES_MAX));
}

impl Fetches {
    pub(super) fn new(context: Arc<Context>, vantage: Vantage, responses: Responses) -> Self {
        Self { context, vantage, responses, open: HashMap::new(), tasks: JoinSet::new() }
    }

    pub(super) async fn run(
        mut self,
        mut requests: Streaming<FetchRequest>,
        stop: CancellationToken,
    ) {
        loop {
            let message = tokio::select! {
                () = stop.cancelled() => break,
                () = self.responses.closed() => break,
                message = requests.message() => message,
                Some(ended) = self.tasks.join_next() => {
                    if let Ok(fetch_id) = ended {
                        self.forget(fetch_id);
                    }
                    continue;
                }
            };
            let Ok(Some(FetchRequest { request: Some(request) })) = message else { break };
            if let Some(refusal) = self.take(request) {
                let sent = stop.run_until_cancelled(self.responses.send(Ok(refusal))).await;
                let Some(Ok(())) = sent else { break };
            }
        }
        self.tasks.shutdown().await;
    }

    /// A fetch id may have been opened again before its last task was joined.
    fn forget(&mut self, fetch_id: u32) {
        if self.open.get(&fetch_id).is_some_and(|open| open.credit.is_closed()) {
            self.open.remove(&fetch_id);
        }
    }

    fn take(&mut self, request: Request) -> Option<FetchResponse> {
        match request {
            Request::Open(open) => {
                let fetch_id = open.fetch_id;
                let refused = self.start(open).err();
                refused.map(|fault| refusal(fetch_id, fault.status(&self.vantage), None))
            }
            Request::Credit(credit) => {
                let open = self.open.get(&credit.fetch_id)?;
                give(&open.credit, credit.bytes);
                None
            }
            Request::Close(close) => {
                self.open.remove(&close.fetch_id)?.ended.cancel();
                None
            }
        }
    }

    fn start(&mut self, open: Open) -> Result<(), Fault> {
        self.forget(open.fetch_id);
        if self.open.contains_key(&open.fetch_id) {
            return Err(Fault::invalid(format!("fetch {} is open already", open.fetch_id)));
        }
        if self.open.len() >= FETCHES_MAX {
            return Err(Fault::invalid(format!("{FETCHES_MAX} fetches are open already")));
        }
        let (credit, given) = watch::channel(0);
        give(&credit, open.credit_bytes);
        let ended = CancellationToken::new();
        let fetch_id = open.fetch_id;
        self.open.insert(fetch_id, OpenFetch { credit, ended: ended.clone() });
        let begin = Begin {
            context: Arc::clone(&self.context),
            vantage: self.vantage.clone(),
            responses: self.responses.clone(),
            open,
            credit: given,
        };
        self.tasks.spawn(async move {
            ended.run_until_cancelled(begin.run()).await;
            fetch_id
        });
        Ok(())
    }
}

/// Says where the queue begins and ends, where that is known: a reader resumes within it.
fn refusal(
    fetch_id: u32,
    status: Option<Status>,
    range: Option<(QueueOffset, QueueOffset)>,
) -> FetchResponse {
    let (min_offset, max_offset) = range.map_or((0, 0), |(min, end)| (min.get(), end.get()));
    FetchResponse { fetch_id, status, min_offset, max_offset, ..Default::default() }
}

/// The offset of a position, the nearest that exists; `None` if there is no such queue.
pub(crate) fn resolve(
    context: &Context,
    queue: QueueKey,
    position: Option<&Position>,
) -> Result<Option<QueueOffset>, Fault> {
    let Some((min, end)) = context.replica.queue_range(queue) else { return Ok(None) };
    let at = position.and_then(|position| position.at.as_ref());
    let offset = match at {
        Some(At::Offset(offset)) => QueueOffset::new(*offset),
        Some(At::TimeMs(time_ms)) => {
            let time_ms = u64::try_from(*time_ms).unwrap_or(0);
            let line = context.replica.view().index.locate_time(queue, time_ms)?;
            line.map_or(end, |line| line.base_offset)
        }
        Some(At::Latest(true)) => end,
        Some(At::Earliest(true)) => min,
        Some(At::Latest(false) | At::Earliest(false)) | None => {
            return Err(Fault::invalid("a position is needed"));
        }
    };
    Ok(Some(offset.clamp(min, end)))
}

/// A fetch that is about to begin.
#[derive(Debug)]
struct Begin {
    context: Arc<Context>,
    vantage: Vantage,
    responses: Responses,
    open: Open,
    credit: watch::Receiver<i64>,
}

impl Begin {
    async fn run(self) {
        let Self { context, vantage, responses, open, credit } = self;
        let found = Self::find(&context, &open).await;
        let (topic, queue, next) = match found {
            Ok(found) => found,
            Err(fault) => {
                let refused = refusal(open.fetch_id, fault.status(&vantage), None);
                responses.send(Ok(refused)).await.ok();
                return;
            }
        };
        let fetch = Fetch {
            context,
            vantage,
            responses,
            fetch_id: open.fetch_id,
            topic,
            queue,
            next,
            credit,
            used: 0,
            start_told: false,
        };
        fetch.run().await;
    }

    /// Only a leader that has applied all that was committed before can say where a queue ends: what
    /// a reader was given by another one is not taken back.
    async fn find(
        context: &Context,
        open: &Open,
    ) -> Result<(TopicName, QueueKey, QueueOffset), Fault> {
        context.replica.read_barrier().await?;
        let topic = find_topic(context, &open.topic)?;
        let queue = find_queue(context, &topic, open.queue_id)?;
        let start = resolve(context, queue, open.from.as_ref())?
            .ok_or_else(|| Fault::topic_not_found(&open.topic))?;
        Ok((topic.name.clone(), queue, start))
    }
}

/// One queue being read.
#[derive(Debug)]
struct Fetch {
    context: Arc<Context>,
    vantage: Vantage,
    responses: Responses,
    fetch_id: u32,
    topic: TopicName,
    queue: QueueKey,
    next: QueueOffset,
    /// Bytes that may be sent in all.
    credit: watch::Receiver<i64>,
    used: i64,
    start_told: bool,
}

impl Fetch {
    /// Until the reader goes, or this node does not lead any more.
    async fn run(mut self) {
        let mut status = self.context.replica.raft_status();
        // The guard must not live on; a replica that has ended serves nobody either.
        let deposed = async move { drop(status.wait_for(|status| !status.serving).await) };
        tokio::select! {
            () = self.serve() => {}
            () = deposed => {
                let text = "this node does not lead the broker group any more";
                let refused = Fault::new(Code::NotLeader, text).status(&self.vantage);
                self.responses.send(Ok(refusal(self.fetch_id, refused, None))).await.ok();
            }
        }
    }

    async fn serve(&mut self) {
        loop {
            let used = self.used;
            if self.start_told && self.credit.wait_for(|given| *given > used).await.is_err() {
                return;
            }
            let wakes = self.context.replica.topic_wakes(self.queue.topic);
            let mut woken = pin!(wakes.notified());
            woken.as_mut().enable();
            let response = match self.read() {
                Ok(response) => response,
                Err(fault) => {
                    let range = self.context.replica.queue_range(self.queue);
                    let refused = refusal(self.fetch_id, fault.status(&self.vantage), range);
                    self.responses.send(Ok(refused)).await.ok();
                    return;
                }
            };
            if response.runs.is_empty() && response.start_offset.is_none() {
                woken.await;
            } else if self.responses.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }

    /// What can be sent now; without runs at the end of the queue.
    fn read(&mut self) -> Result<FetchResponse, Fault> {
        let range = self.context.replica.queue_range(self.queue);
        let (min, end) = range.ok_or_else(|| Fault::topic_not_found(self.topic.as_str()))?;
        self.next = self.next.max(min);
        let mut response = FetchResponse {
            fetch_id: self.fetch_id,
            status: ok(),
            runs: Vec::new(),
            min_offset: min.get(),
            max_offset: end.get(),
            start_offset: (!self.start_told).then_some(self.next.get()),
        };
        self.start_told = true;
        let credit = *self.credit.borrow() - self.used;
        if self.next >= end || credit <= 0 {
            return Ok(response);
        }
        let bytes_max = u64::try_from(credit).unwrap_or(0).min(RESPONSE_BYTES_TARGET);
        let mut bytes = 0;
        for line in self.context.replica.lines_from(self.queue, self.next, RUNS_MAX)? {
            if bytes >= bytes_max {
                break;
            }
            bytes += u64::from(line.bytes);
            self.next = line.end_offset();
            response.runs.push(self.fetched(&line)?);
        }
        self.used = self.used.saturating_add(i64::try_from(bytes).unwrap_or(CREDIT_BYTES_MAX));
        Ok(response)
    }

    fn fetched(&self, line: &Line) -> Result<FetchedRun, Fault> {
        let run = self.context.replica.read_run(line)?;
        let (count, bytes) = (u64::from(line.count), u64::from(line.bytes));
        self.context.metrics.messages_out(&self.topic, None, false, count, bytes);
        Ok(FetchedRun {
            base_offset: line.base_offset.get(),
            store_time_ms: i64::try_from(line.newest_ms).unwrap_or(i64::MAX),
            run,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_tells_the_range_of_the_queue() {
        let trimmed = Status { code: Code::OffsetOutOfRange.into(), ..Status::default() };
        let range = (QueueOffset::new(7), QueueOffset::new(9));
        let refused = refusal(3, Some(trimmed), Some(range));
        assert_eq!((refused.fetch_id, refused.min_offset, refused.max_offset), (3, 7, 9));
        assert_eq!(refused.status.unwrap().code(), Code::OffsetOutOfRange);
    }
}
