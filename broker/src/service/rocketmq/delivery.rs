//! The frames of one ReceiveMessage call. What the client did not take is given back.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use drumlin_proto::ids::{GroupName, QueueKey};
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{Code, ReceiveMessageResponse, Resource, Status};
use futures::Stream;
use tokio::sync::oneshot;

use super::handle::Handle;
use super::messages::{self, Delivered, QueueReader};
use super::status::Fault;
use super::{Edge, validate};
use crate::catalog::Topic;
use crate::command::{Granted, GroupId, LeaseId};

/// One record of a granted lease.
pub(super) type Leased = (QueueKey, LeaseId, Granted);

/// How a poll ended.
#[derive(Debug)]
pub(super) struct PollEnd {
    pub(super) status: Status,
    pub(super) delivery: Option<Box<Delivery>>,
}

/// Leased messages on their way to the client. What is left when it is dropped is given back.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) edge: Arc<Edge>,
    pub(super) topic: Arc<Topic>,
    pub(super) topic_named: Resource,
    pub(super) group: GroupName,
    pub(super) group_id: GroupId,
    pub(super) invisible_ms: u64,
    pub(super) store_host: String,
    pub(super) records: VecDeque<Leased>,
    pub(super) reader: Option<QueueReader>,
}

impl Delivery {
    /// The next message; `None` when all are delivered.
    fn next(&mut self) -> Option<ReceiveMessageResponse> {
        while let Some((queue, lease, granted)) = self.records.pop_front() {
            let handle = Handle { group: self.group_id, queue, offset: granted.offset, lease };
            let delivered = Delivered {
                topic: &self.topic_named,
                queue,
                offset: granted.offset,
                attempt: granted.attempt,
                invisible_ms: self.invisible_ms,
                receipt_handle: handle.encode(&self.edge.context.config.broker_group),
                store_host: &self.store_host,
            };
            let same_queue = self.reader.take().filter(|reader| reader.queue() == queue);
            let reader = self
                .reader
                .insert(same_queue.unwrap_or_else(|| QueueReader::new(self.edge.replica(), queue)));
            let message = reader.read(granted.offset, |line, run, record| {
                messages::message(delivered, line, run, record)
            });
            match message {
                Ok(Some(message)) => {
                    let bytes = u64::try_from(message.body.len()).unwrap_or(0);
                    let retry = granted.attempt > 1;
                    let (topic, group) = (&self.topic.name, Some(&self.group));
                    self.edge.context.metrics.messages_out(topic, group, retry, 1, bytes);
                    return Some(frame(Content::Message(message)));
                }
                Ok(None) => {
                    tracing::debug!(?queue, offset = %granted.offset, "trimmed while leased");
                }
                Err(error) => {
                    tracing::error!(%error, ?queue, offset = %granted.offset, "unreadable message");
                }
            }
        }
        None
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.records.is_empty() {
            return;
        }
        let left_out = self.edge.unsent.add(self.group_id, self.records.drain(..));
        if left_out > 0 {
            tracing::warn!(left_out, "unsent messages come back when their leases end");
        }
    }
}

fn frame(content: Content) -> ReceiveMessageResponse {
    ReceiveMessageResponse { content: Some(content) }
}

#[derive(Debug)]
enum StreamState {
    Polling(oneshot::Receiver<PollEnd>),
    /// The status frame went out.
    Delivering(Option<Box<Delivery>>),
    Ended,
}

/// Status, messages, delivery timestamp, in this order.
#[derive(Debug)]
pub(super) struct ReceiveStream {
    edge: Arc<Edge>,
    state: StreamState,
}

impl ReceiveStream {
    pub(super) fn new(edge: Arc<Edge>, end: oneshot::Receiver<PollEnd>) -> Self {
        Self { edge, state: StreamState::Polling(end) }
    }
}

impl Stream for ReceiveStream {
    type Item = Result<ReceiveMessageResponse, tonic::Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let (next, content) = match &mut self.state {
            StreamState::Polling(receiver) => match ready!(Pin::new(receiver).poll(context)) {
                Ok(end) => {
                    (StreamState::Delivering(end.delivery), frame(Content::Status(end.status)))
                }
                Err(_) => {
                    let fault = Fault::new(Code::InternalServerError, "the poll was abandoned");
                    let status = frame(Content::Status(fault.status()));
                    (StreamState::Delivering(None), status)
                }
            },
            StreamState::Delivering(delivery) => {
                if let Some(message) = delivery.as_mut().and_then(|delivery| delivery.next()) {
                    return Poll::Ready(Some(Ok(message)));
                }
                let now_ms = i64::try_from(self.edge.replica().clock_ms()).unwrap_or(i64::MAX);
                let now = validate::timestamp(now_ms);
                (StreamState::Ended, frame(Content::DeliveryTimestamp(now)))
            }
            StreamState::Ended => return Poll::Ready(None),
        };
        self.state = next;
        Poll::Ready(Some(Ok(content)))
    }
}
