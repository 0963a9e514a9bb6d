//! `drumlin.v1.Broker`: streams of runs in and out, and what every native service says of errors.
//!
//! Runs are checked once, here. Bytes are neither copied nor encoded again on their way.

use std::pin::Pin;
use std::sync::Arc;

use drumlin_proto::ids::{QueueId, QueueKey, TopicName};
use drumlin_proto::native::broker_server::{Broker, BrokerServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    FetchRequest, FetchResponse, LeaderHint, ProduceRequest, ProduceResponse,
    Status as NativeStatus,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::Refusal;
use crate::log::ReadError;
use crate::replica::ProposeError;
use crate::whereabouts::Vantage;

mod chains;
pub(crate) mod fetch;
mod produce;

/// A body of 4 MiB makes a larger request.
pub(crate) const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Runs of one stream whose outcome was not told yet.
const UNANSWERED_MAX: usize = 1024;
/// Responses of one fetch stream that wait for the socket; each is about a MiB at most.
const FETCHED_MAX: usize = 4;

/// The native data service; clones share everything.
#[derive(Clone, Debug)]
pub struct NativeService {
    context: Arc<Context>,
    vantage: Vantage,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl NativeService {
    /// Streams run as tasks of `tasks` and end when `stop` is cancelled.
    pub fn server(
        context: Arc<Context>,
        vantage: Vantage,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> BrokerServer<Self> {
        let service = Self { context, vantage, tasks, stop };
        BrokerServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX)
    }
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Broker for NativeService {
    type ProduceStream = Responses<ProduceResponse>;
    type FetchStream = Responses<FetchResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, Status> {
        let (sender, receiver) = mpsc::channel(UNANSWERED_MAX);
        let (context, vantage) = (Arc::clone(&self.context), self.vantage.clone());
        let stream = produce::Accepting::new(Arc::clone(&context), vantage.clone(), sender);
        self.tasks.spawn(stream.run(request.into_inner(), self.stop.clone()));
        Ok(Response::new(Box::pin(produce::answers(context, vantage, receiver))))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let (sender, receiver) = mpsc::channel(FETCHED_MAX);
        let vantage = self.vantage.clone();
        let fetches = fetch::Fetches::new(Arc::clone(&self.context), vantage, sender);
        self.tasks.spawn(fetches.run(request.into_inner(), self.stop.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// A refusal as the native API tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// Of the broker group that the call is about, where that is not this node's.
    pub(crate) leader: Option<LeaderHint>,
}

impl Fault {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), leader: None }
    }

    /// The call belongs to another broker group.
    pub(crate) fn elsewhere(broker_group: &str, vantage: &Vantage, why: String) -> Self {
        Self { leader: vantage.hint(broker_group), ..Self::new(Code::NotLeader, why) }
    }

    pub(crate) fn topic_not_found(name: &str) -> Self {
        Self::new(Code::TopicNotFound, format!("topic {name} does not exist"))
    }

    pub(crate) fn invalid(error: impl std::fmt::Display) -> Self {
        Self::new(Code::InvalidArgument, error.to_string())
    }

    /// On the wire; who is not the leader says who is.
    pub(crate) fn status(self, vantage: &Vantage) -> Option<NativeStatus> {
        let own_leader = || (self.code == Code::NotLeader).then(|| vantage.own_hint()).flatten();
        let leader = self.leader.clone().or_else(own_leader);
        Some(NativeStatus { code: self.code.into(), message: self.message, leader })
    }
}

/// Success, in a response.
pub(crate) fn ok() -> Option<NativeStatus> {
    Some(NativeStatus { code: Code::Ok.into(), ..Default::default() })
}

impl From<ProposeError> for Fault {
    fn from(error: ProposeError) -> Self {
        let code = match &error {
            ProposeError::Refused(refusal) => refusal_code(refusal),
            ProposeError::Busy { .. } | ProposeError::DiskFull(_) => Code::Busy,
            ProposeError::NotLeader { .. } => Code::NotLeader,
            ProposeError::Expired => Code::DeadlineExceeded,
            ProposeError::OutOfOrder => Code::OutOfOrder,
            ProposeError::UnknownOutcome => Code::UnknownOutcome,
            ProposeError::FeatureLevel { .. } => Code::PreconditionFailed,
            ProposeError::Stopped(_) | ProposeError::TooFewCopies => Code::Unavailable,
        };
        Self::new(code, error.to_string())
    }
}

fn refusal_code(refusal: &Refusal) -> Code {
    match refusal {
        Refusal::TopicExists(_) | Refusal::GroupExists(_) => Code::AlreadyExists,
        Refusal::TopicNotFound => Code::TopicNotFound,
        Refusal::QueueNotFound | Refusal::Malformed { .. } => Code::InvalidArgument,
        Refusal::GroupNotFound => Code::GroupNotFound,
        Refusal::TooManyTopics { .. } | Refusal::TooManyGroups { .. } => Code::Busy,
        Refusal::OffsetOutOfRange { .. } => Code::OffsetOutOfRange,
        Refusal::LeaseOutdated { .. }
        | Refusal::Lease(_)
        | Refusal::TopicChanged { .. }
        | Refusal::TopicChanging
        | Refusal::CopyElsewhere { .. }
        | Refusal::CopyForked { .. } => Code::PreconditionFailed,
        Refusal::SharesShrink { .. } => Code::InvalidArgument,
    }
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        let code = match &error {
            ReadError::Trimmed { .. } | ReadError::BeyondEnd { .. } => Code::OffsetOutOfRange,
            ReadError::Io(_) => Code::Internal,
        };
        Self::new(code, error.to_string())
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        Self::from(ReadError::Io(error))
    }
}

/// The definition of a topic, by the name that a client sent.
pub(crate) fn find_topic(context: &Context, name: &str) -> Result<Arc<Topic>, Fault> {
    let name = TopicName::parse(name).map_err(Fault::invalid)?;
    let topic = context.replica.view().state.catalog().topic_by_name(&name).cloned();
    topic.ok_or_else(|| match context.replica.raft_status().borrow().serving {
        true => Fault::topic_not_found(name.as_str()),
        // It may be too new for this node to know it.
        false => Fault::new(Code::NotLeader, "this node does not lead the broker group"),
    })
}

/// A queue of a topic on this broker group, by the number that a client sent.
pub(crate) fn find_queue(
    context: &Context,
    topic: &Topic,
    queue_id: u32,
) -> Result<QueueKey, Fault> {
    // Others may have learned of queues to come a moment before this broker.
    let queue_count = topic.prepared_queue_count(&context.config.broker_group);
    match u16::try_from(queue_id) {
        Ok(queue) if queue < queue_count => {
            Ok(QueueKey { topic: topic.id, queue: QueueId::new(queue) })
        }
        _ => Err(Fault::new(
            Code::InvalidArgument,
            format!("topic {} has {queue_count} queues here, not {queue_id}", topic.name),
        )),
    }
}
