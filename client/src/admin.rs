//! Administration: definitions, offsets and state, as any access point answers them.

use std::collections::VecDeque;
use std::time::Duration;

use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::{self, Status};
use tokio::time::Instant;
use tonic::transport::Channel;

pub use drumlin_proto::native::{
    DescribeBrokerResponse as BrokerState, DescribeTopicResponse as TopicState, Group, GroupQueue,
    QueueOffset as QueuePosition, QueueState, Topic, TopicShare, TopicType,
};

use crate::connection::{Address, Backoff, GRPC_BYTES_MAX};
use crate::consumer::At;
use crate::error::{Code, Error};
use crate::{Client, QueueOffset};

const TIMEOUT: Duration = Duration::from_secs(10);
/// How long to go on asking while nobody answers, as right after a start or while a group elects.
const RETRY: Duration = Duration::from_secs(5);
/// Hints at a leader that are followed in one round.
const HINTS_MAX: usize = 4;

/// A topic to be created.
#[derive(Clone, Debug)]
pub struct NewTopic {
    name: String,
    queue_count: u32,
    kind: TopicType,
    broker_groups: Vec<String>,
    min_copies: u32,
    auto: bool,
}

impl NewTopic {
    /// Takes messages of all types, in `queue_count` queues on each broker group.
    pub fn new(name: impl Into<String>, queue_count: u32) -> Self {
        let (kind, broker_groups) = (TopicType::Mixed, Vec::new());
        let name = name.into();
        Self { name, queue_count, kind, broker_groups, min_copies: 1, auto: false }
    }

    /// What messages it takes.
    pub fn kind(mut self, kind: TopicType) -> Self {
        self.kind = kind;
        self
    }

    /// Only on these; none means on all.
    pub fn broker_groups(mut self, broker_groups: impl IntoIterator<Item = String>) -> Self {
        self.broker_groups.extend(broker_groups);
        self
    }

    /// Copies that an acknowledged message must have: 1 or 2. With 2, sends are refused while a
    /// broker group has only one.
    pub fn min_copies(mut self, min_copies: u32) -> Self {
        self.min_copies = min_copies;
        self
    }

    /// An existing topic is fine; without it, only where topics are created on first use.
    pub(crate) fn auto(mut self) -> Self {
        self.auto = true;
        self
    }
}

/// What is to change of a topic. Queue lists only grow.
#[derive(Clone, Debug)]
pub struct TopicUpdate {
    request: native::UpdateTopicRequest,
}

impl TopicUpdate {
    /// Changes nothing yet.
    pub fn new(name: impl Into<String>) -> Self {
        let request = native::UpdateTopicRequest { name: name.into(), ..Default::default() };
        Self { request }
    }

    /// All broker groups that shall have queues, those that have some already among them.
    pub fn broker_groups(mut self, broker_groups: impl IntoIterator<Item = String>) -> Self {
        self.request.broker_groups.extend(broker_groups);
        self
    }

    /// Queues on each broker group.
    pub fn queue_count(mut self, queue_count: u32) -> Self {
        self.request.queue_count = queue_count;
        self
    }

    /// See [`NewTopic::min_copies`].
    pub fn min_copies(mut self, min_copies: u32) -> Self {
        self.request.min_copies = min_copies;
        self
    }
}

/// Asks the client's endpoints; clones share the client.
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

/// An answer of the admin API, which all carry a status.
trait Answer {
    fn status(&self) -> Option<&Status>;
}

macro_rules! answers {
    ($($name:ident)*) => {
        $(impl Answer for native::$name {
            fn status(&self) -> Option<&Status> {
                self.status.as_ref()
            }
        })*
    };
}

answers! {
    CreateTopicResponse UpdateTopicResponse DeleteTopicResponse ListTopicsResponse DescribeTopicResponse
    QueryOffsetsResponse ListGroupsResponse CommitOffsetResponse GetCommittedOffsetResponse
    DescribeBrokerResponse
}

/// Whether another endpoint, or the same one after a pause, may know better; the call did nothing.
fn ask_elsewhere(error: &Error) -> bool {
    matches!(error.code(), Code::Unavailable | Code::NotLeader)
}

/// Asks one endpoint after the other, and again after a pause, until one answers for the cluster.
macro_rules! ask {
    ($admin:expr, $method:ident, $request:expr) => {
        'asked: {
            let request = $request;
            let (until, mut backoff) = (Instant::now() + RETRY, Backoff::new());
            loop {
                let mut failure = Error::Closed;
                let mut hints_left = HINTS_MAX;
                let mut places = VecDeque::from($admin.client.access_points());
                while let Some(endpoint) = places.pop_front() {
                    let answer = $admin.api(&endpoint).$method(timed(&request)).await;
                    if hints_left > 0
                        && let Some(leader) = hinted(&answer)
                    {
                        hints_left -= 1;
                        places.push_front(leader);
                    }
                    match answered(&endpoint, answer) {
                        Err(error) if ask_elsewhere(&error) => failure = error,
                        settled => break 'asked settled,
                    }
                }
                let resume_at = Instant::now() + backoff.pause(fastrand::f64());
                if resume_at > until {
                    break Err(failure);
                }
                tokio::time::sleep_until(resume_at).await;
            }
        }
    };
}

/// Who leads, if it is not the one that was asked.
fn hinted<A: Answer>(answer: &Result<tonic::Response<A>, tonic::Status>) -> Option<Address> {
    let hint = answer.as_ref().ok()?.get_ref().status()?.leader.as_ref()?;
    Address::of_native(hint.address.as_ref()?).ok()
}

fn answered<A: Answer>(
    endpoint: &Address,
    answer: Result<tonic::Response<A>, tonic::Status>,
) -> Result<A, Error> {
    let answer = answer.map_err(|status| Error::of_call(endpoint.as_str(), &status))?;
    let answer = answer.into_inner();
    Error::of_native(answer.status()).map_or(Ok(answer), Err)
}

impl Admin {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Creates a topic; one of the same name is [`crate::Code::AlreadyExists`].
    pub async fn create_topic(&self, topic: NewTopic) -> Result<Topic, Error> {
        let request = native::CreateTopicRequest {
            name: topic.name,
            queue_count: topic.queue_count,
            r#type: topic.kind.into(),
            broker_groups: topic.broker_groups,
            auto: topic.auto,
            min_copies: topic.min_copies,
        };
        let topic = ask!(self, create_topic, request)?.topic.ok_or_else(|| missing("topic"))?;
        self.client.routes().expect(&topic.name);
        Ok(topic)
    }

    /// Changes a topic, and tells what it is then.
    pub async fn update_topic(&self, update: TopicUpdate) -> Result<Topic, Error> {
        ask!(self, update_topic, update.request)?.topic.ok_or_else(|| missing("topic"))
    }

    /// Deletes a topic and all that is in it.
    pub async fn delete_topic(&self, name: &str) -> Result<(), Error> {
        let request = native::DeleteTopicRequest { name: name.into() };
        ask!(self, delete_topic, request).map(drop)
    }

    /// All topics, by name.
    pub async fn list_topics(&self) -> Result<Vec<Topic>, Error> {
        let request = native::ListTopicsRequest {};
        Ok(ask!(self, list_topics, request)?.topics)
    }

    /// A topic's definition and the ends of its queues.
    pub async fn describe_topic(&self, name: &str) -> Result<TopicState, Error> {
        let request = native::DescribeTopicRequest { name: name.into(), own_group_only: false };
        ask!(self, describe_topic, request)
    }

    /// Where `at` lies in each queue; [`At::Latest`] gives the end offsets of now.
    pub async fn query_offsets(&self, topic: &str, at: At) -> Result<Vec<QueuePosition>, Error> {
        let request = native::QueryOffsetsRequest {
            topic: topic.into(),
            at: Some(at.to_native()),
            own_group_only: false,
        };
        Ok(ask!(self, query_offsets, request)?.offsets)
    }

    /// All consumer groups and how far they are.
    pub async fn list_groups(&self) -> Result<Vec<Group>, Error> {
        let request = native::ListGroupsRequest { own_group_only: false };
        Ok(ask!(self, list_groups, request)?.groups)
    }

    /// Sets what a consumer group reads next in one queue.
    pub async fn commit_offset(
        &self,
        group: &str,
        topic: &str,
        (broker_group, queue_id): (&str, u32),
        offset: QueueOffset,
    ) -> Result<(), Error> {
        let request = native::CommitOffsetRequest {
            group: group.into(),
            topic: topic.into(),
            queue_id,
            offset: offset.get(),
            broker_group: broker_group.into(),
        };
        ask!(self, commit_offset, request).map(drop)
    }

    /// What a consumer group reads next in one queue; `None` if nothing was ever committed.
    pub async fn committed_offset(
        &self,
        group: &str,
        topic: &str,
        (broker_group, queue_id): (&str, u32),
    ) -> Result<Option<QueueOffset>, Error> {
        let request = native::GetCommittedOffsetRequest {
            group: group.into(),
            topic: topic.into(),
            queue_id,
            broker_group: broker_group.into(),
        };
        Ok(ask!(self, get_committed_offset, request)?.offset.map(QueueOffset::new))
    }

    /// The broker that answers first among the endpoints.
    pub async fn describe_broker(&self) -> Result<BrokerState, Error> {
        let request = native::DescribeBrokerRequest {};
        ask!(self, describe_broker, request)
    }

    fn api(&self, endpoint: &Address) -> AdminClient<Channel> {
        AdminClient::new(self.client.connections().channel(endpoint))
            .max_decoding_message_size(GRPC_BYTES_MAX)
    }
}

fn timed<T: Clone>(request: &T) -> tonic::Request<T> {
    let mut timed = tonic::Request::new(request.clone());
    timed.set_timeout(TIMEOUT);
    timed
}

fn missing(field: &str) -> Error {
    Error::Protocol { reason: format!("an answer without {field}") }
}
