//! `drumlin.v1.Admin`: definitions, offsets and state, for tools and access points.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{BrokerGroupName, GroupName, QueueKey, QueueOffset, TopicName};
use drumlin_proto::native::admin_server::{Admin, AdminServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{self as api, TopicType as WireType};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::creations::PER_SECOND_MAX;
use super::native::fetch::resolve;
use super::native::{Fault, REQUEST_BYTES_MAX, find_queue, find_topic, ok};
use super::rocketmq::told;
use crate::broker::Context;
use crate::catalog::{ConsumerGroup, Topic};
use crate::command::{Command, GroupId, GroupStart, Outcome, Refusal, TopicType};
use crate::registration::wire_topic;
use crate::replica::{Applied, Item, ProposeError};
use crate::whereabouts::Vantage;

/// How long a change may wait for its turn.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Queues of a topic that names no number.
const QUEUE_COUNT_DEFAULT: u16 = 8;
/// Queues of one topic on one broker group: each costs memory for as long as the topic exists.
const QUEUE_COUNT_MAX: u16 = 1024;

/// The administration service; clones share everything.
#[derive(Clone, Debug)]
pub struct AdminService {
    context: Arc<Context>,
    vantage: Vantage,
}

type Answer<T> = Result<Response<T>, Status>;

/// A response whose status says what went wrong, if anything did.
macro_rules! respond {
    ($self:ident, $work:expr, $Response:ident) => {{
        let response: Result<api::$Response, Fault> = $work;
        let not_led = response.as_ref().is_err_and(|fault| fault.code == Code::NotLeader);
        let response = response.unwrap_or_else(|fault| {
            let status = fault.status(&$self.vantage);
            api::$Response { status, ..Default::default() }
        });
        Ok(told(response, not_led))
    }};
}

impl AdminService {
    pub fn server(context: Arc<Context>, vantage: Vantage) -> AdminServer<Self> {
        AdminServer::new(Self { context, vantage }).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    async fn change(&self, command: Command) -> Result<Outcome, Fault> {
        Ok(self.try_change(command).await?)
    }

    async fn try_change(&self, command: Command) -> Result<Outcome, ProposeError> {
        let deadline = Some(Instant::now() + CHANGE_TIMEOUT);
        match self.context.replica.propose(Item::Command(command), deadline).await? {
            Applied::Command(outcome) => Ok(outcome),
            Applied::Run { .. } => unreachable!("a command was proposed"),
        }
    }

    /// Reads wait for all that was committed before.
    async fn settled(&self) -> Result<(), Fault> {
        Ok(self.context.replica.read_barrier().await?)
    }

    fn own_group(&self) -> &BrokerGroupName {
        &self.context.config.broker_group
    }

    fn shares(
        &self,
        request: &api::CreateTopicRequest,
    ) -> Result<Vec<(BrokerGroupName, u16)>, Fault> {
        let queue_count = match request.queue_count {
            0 => QUEUE_COUNT_DEFAULT,
            count => u16::try_from(count)
                .ok()
                .filter(|count| *count <= QUEUE_COUNT_MAX)
                .ok_or_else(|| {
                    Fault::invalid(format!("a topic has at most {QUEUE_COUNT_MAX} queues a group"))
                })?,
        };
        for name in &request.broker_groups {
            if name != self.own_group().as_str() {
                return Err(Fault::invalid(format!("broker group {name} is not known")));
            }
        }
        Ok(vec![(self.own_group().clone(), queue_count)])
    }

    async fn create(
        &self,
        request: api::CreateTopicRequest,
    ) -> Result<api::CreateTopicResponse, Fault> {
        let config = &self.context.config;
        if config.broker_group != config.catalog_group {
            let owner = &config.catalog_group;
            let text = format!("broker group {owner} owns the catalog: ask it");
            return Err(Fault::elsewhere(owner.as_str(), &self.vantage, text));
        }
        if request.auto && !config.auto_create_topics {
            let text = "topics are not created on first use here";
            return Err(Fault::new(Code::PreconditionFailed, text));
        }
        let name = TopicName::parse(&request.name).map_err(Fault::invalid)?;
        if name.is_derived() {
            let text = format!("topics like {name} belong to their consumer groups");
            return Err(Fault::invalid(text));
        }
        if request.auto {
            if let Ok(topic) = find_topic(&self.context, name.as_str()) {
                let topic = Some(wire_topic(&topic));
                return Ok(api::CreateTopicResponse { status: ok(), topic });
            }
            if !self.context.creations.topics.lock().take(Instant::now()) {
                let text = format!("{PER_SECOND_MAX} topics were created within a second");
                return Err(Fault::new(Code::Busy, text));
            }
        }
        let kind = match request.r#type() {
            WireType::Unspecified if request.auto => TopicType::Mixed,
            WireType::Unspecified | WireType::Normal => TopicType::Normal,
            WireType::Fifo => TopicType::Fifo,
            WireType::Mixed => TopicType::Mixed,
        };
        let shares = self.shares(&request)?;
        let started = Instant::now();
        let created =
            self.try_change(Command::CreateTopic { name: name.clone(), kind, shares }).await;
        let status = match created {
            Ok(_) => ok(),
            Err(ProposeError::Refused(Refusal::TopicExists(_))) if request.auto => ok(),
            Err(error @ ProposeError::Refused(Refusal::TopicExists(_))) => {
                Fault::from(error).status(&self.vantage)
            }
            Err(error) => {
                self.context.metrics.topic_created(false, started.elapsed());
                return Err(error.into());
            }
        };
        self.context.metrics.topic_created(true, started.elapsed());
        let topic = find_topic(&self.context, name.as_str())?;
        Ok(api::CreateTopicResponse { status, topic: Some(wire_topic(&topic)) })
    }

    async fn delete(
        &self,
        request: api::DeleteTopicRequest,
    ) -> Result<api::DeleteTopicResponse, Fault> {
        let topic = find_topic(&self.context, &request.name)?;
        self.change(Command::DeleteTopic { topic: topic.id }).await?;
        Ok(api::DeleteTopicResponse { status: ok() })
    }

    fn queue_state(&self, queue: QueueKey) -> Result<Option<api::QueueState>, Fault> {
        let replica = &self.context.replica;
        let Some((min, end)) = replica.queue_range(queue) else { return Ok(None) };
        let last = end.get().checked_sub(1).filter(|last| *last >= min.get());
        let newest = match last {
            Some(last) => replica.lines_from(queue, QueueOffset::new(last), 1)?.pop(),
            None => None,
        };
        Ok(Some(api::QueueState {
            broker_group: self.own_group().to_string(),
            queue_id: u32::from(queue.queue.get()),
            min_offset: min.get(),
            max_offset: end.get(),
            newest_ms: newest.map_or(0, |line| i64::try_from(line.newest_ms).unwrap_or(i64::MAX)),
        }))
    }

    async fn describe(
        &self,
        request: api::DescribeTopicRequest,
    ) -> Result<api::DescribeTopicResponse, Fault> {
        self.settled().await?;
        let topic = find_topic(&self.context, &request.name)?;
        let mut queues = Vec::new();
        for queue in topic.queues(self.own_group()) {
            queues.extend(self.queue_state(queue)?);
        }
        let topic = Some(wire_topic(&topic));
        Ok(api::DescribeTopicResponse { status: ok(), topic, queues })
    }

    async fn offsets(
        &self,
        request: api::QueryOffsetsRequest,
    ) -> Result<api::QueryOffsetsResponse, Fault> {
        self.settled().await?;
        let topic = find_topic(&self.context, &request.topic)?;
        let mut offsets = Vec::new();
        for queue in topic.queues(self.own_group()) {
            let Some(offset) = resolve(&self.context, queue, request.at.as_ref())? else {
                return Err(Fault::topic_not_found(&request.topic));
            };
            offsets.push(api::QueueOffset {
                broker_group: self.own_group().to_string(),
                queue_id: u32::from(queue.queue.get()),
                offset: offset.get(),
            });
        }
        Ok(api::QueryOffsetsResponse { status: ok(), offsets })
    }

    async fn topics(&self) -> Result<api::ListTopicsResponse, Fault> {
        self.settled().await?;
        let view = self.context.replica.view();
        let topics = view.state.catalog().topics().map(|topic| wire_topic(topic)).collect();
        Ok(api::ListTopicsResponse { status: ok(), topics })
    }

    async fn groups(&self) -> Result<api::ListGroupsResponse, Fault> {
        self.settled().await?;
        let groups: Vec<Arc<ConsumerGroup>> =
            self.context.replica.view().state.catalog().groups().cloned().collect();
        let groups = groups.iter().map(|group| self.wire_group(group)).collect();
        Ok(api::ListGroupsResponse { status: ok(), groups })
    }

    fn wire_group(&self, group: &ConsumerGroup) -> api::Group {
        let replica = &self.context.replica;
        let now_ms = replica.clock_ms();
        let view = replica.view();
        let begun = view.state.groups().queues(group.id);
        let queues = begun.filter_map(|(queue, leases)| {
            let topic = view.state.catalog().topic(queue.topic)?;
            let range = view.state.queue_range(queue)?;
            let backlog = leases.backlog(now_ms, range.end);
            Some(api::GroupQueue {
                topic: topic.name.to_string(),
                broker_group: self.own_group().to_string(),
                queue_id: u32::from(queue.queue.get()),
                min_offset: range.min.get(),
                committed_offset: leases.committed().get(),
                pulled_offset: leases.next().get(),
                max_offset: range.end.get(),
                in_flight: backlog.in_flight,
                in_retry: backlog.in_retry,
            })
        });
        api::Group { name: group.name.to_string(), queues: queues.collect() }
    }

    fn group_id(&self, name: &GroupName) -> Option<GroupId> {
        let view = self.context.replica.view();
        view.state.catalog().group_by_name(name).map(|group| group.id)
    }

    /// A consumer group begins to exist with the first offset committed for it.
    async fn group_or_create(&self, name: &GroupName) -> Result<GroupId, Fault> {
        if let Some(id) = self.group_id(name) {
            return Ok(id);
        }
        let started = Instant::now();
        if !self.context.creations.groups.lock().take(started) {
            let text = format!("{PER_SECOND_MAX} consumer groups were created within a second");
            return Err(Fault::new(Code::Busy, text));
        }
        let create = Command::CreateGroup { name: name.clone(), start: GroupStart::Earliest };
        let created = match self.try_change(create).await {
            Ok(Outcome::GroupCreated { group })
            | Err(ProposeError::Refused(Refusal::GroupExists(group))) => Ok(group),
            Ok(outcome) => unreachable!("{outcome:?} came of creating a group"),
            Err(error) => Err(error.into()),
        };
        self.context.metrics.group_created(created.is_ok(), started.elapsed());
        created
    }

    async fn create_group(
        &self,
        request: api::CreateGroupRequest,
    ) -> Result<api::CreateGroupResponse, Fault> {
        let name = GroupName::parse(&request.name).map_err(Fault::invalid)?;
        let group = self.group_or_create(&name).await?;
        Ok(api::CreateGroupResponse { status: ok(), group_id: group.0 })
    }

    /// Whether a queue id means one of this broker group: it is named, or the only one that holds
    /// the topic.
    fn owns_queues(&self, topic: &Topic, broker_group: &str) -> Result<(), Fault> {
        let own = self.own_group();
        let named = match topic.shares.as_slice() {
            [(only, _)] if broker_group.is_empty() => only.as_str(),
            _ if broker_group.is_empty() => {
                let text =
                    format!("topic {} has queues on several broker groups: name one", topic.name);
                return Err(Fault::invalid(text));
            }
            _ => broker_group,
        };
        if named == own.as_str() {
            return Ok(());
        }
        let text = format!("broker group {named} holds that queue");
        Err(Fault::elsewhere(named, &self.vantage, text))
    }

    async fn commit(
        &self,
        request: api::CommitOffsetRequest,
    ) -> Result<api::CommitOffsetResponse, Fault> {
        let name = GroupName::parse(&request.group).map_err(Fault::invalid)?;
        let topic = find_topic(&self.context, &request.topic)?;
        self.owns_queues(&topic, &request.broker_group)?;
        let queue = find_queue(&self.context, &topic, request.queue_id)?;
        let group = self.group_or_create(&name).await?;
        let offset = QueueOffset::new(request.offset);
        self.change(Command::CommitOffset { group, queue, offset }).await?;
        Ok(api::CommitOffsetResponse { status: ok() })
    }

    async fn committed(
        &self,
        request: api::GetCommittedOffsetRequest,
    ) -> Result<api::GetCommittedOffsetResponse, Fault> {
        self.settled().await?;
        let name = GroupName::parse(&request.group).map_err(Fault::invalid)?;
        let topic = find_topic(&self.context, &request.topic)?;
        self.owns_queues(&topic, &request.broker_group)?;
        let queue = find_queue(&self.context, &topic, request.queue_id)?;
        let missing = format!("consumer group {name} does not exist");
        let group = self.group_id(&name).ok_or_else(|| Fault::new(Code::GroupNotFound, missing))?;
        let view = self.context.replica.view();
        let offset = view.state.leases(group, queue).map(|leases| leases.committed().get());
        Ok(api::GetCommittedOffsetResponse { status: ok(), offset })
    }

    async fn broker(&self) -> Result<api::DescribeBrokerResponse, Fault> {
        let context = &self.context;
        let progress = context.replica.progress();
        let state = context.replica.view().state.clone();
        let applied_index = state.applied().map_or(0, |id| id.index.get());
        let trimmed_index = state.trimmed().below.get();
        let digest = tokio::task::spawn_blocking(move || state.digest()).await;
        let internal = |error: String| Fault::new(Code::Internal, error);
        let state_digest = digest
            .map_err(|error| internal(error.to_string()))?
            .map_err(|error| internal(error.to_string()))?;
        let last = |end: crate::position::EntryIndex| end.previous().map_or(0, |last| last.get());
        Ok(api::DescribeBrokerResponse {
            status: ok(),
            cluster: context.config.cluster.clone(),
            broker_group: self.own_group().to_string(),
            node: context.config.node.clone(),
            group_uuid: context.identity.group_uuid.to_string(),
            term: progress.term.get(),
            leader: progress.leads,
            appended_index: last(progress.appended_end),
            durable_index: last(progress.durable_end),
            committed_index: last(progress.committed_end),
            applied_index,
            trimmed_index,
            state_digest,
        })
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_topic(
        &self,
        request: Request<api::CreateTopicRequest>,
    ) -> Answer<api::CreateTopicResponse> {
        respond!(self, self.create(request.into_inner()).await, CreateTopicResponse)
    }

    async fn update_topic(
        &self,
        _: Request<api::UpdateTopicRequest>,
    ) -> Answer<api::UpdateTopicResponse> {
        let fault = Fault::new(Code::Unsupported, "topics cannot be changed yet");
        respond!(self, Err(fault), UpdateTopicResponse)
    }

    async fn create_group(
        &self,
        request: Request<api::CreateGroupRequest>,
    ) -> Answer<api::CreateGroupResponse> {
        respond!(self, self.create_group(request.into_inner()).await, CreateGroupResponse)
    }

    async fn delete_topic(
        &self,
        request: Request<api::DeleteTopicRequest>,
    ) -> Answer<api::DeleteTopicResponse> {
        respond!(self, self.delete(request.into_inner()).await, DeleteTopicResponse)
    }

    async fn list_topics(
        &self,
        _: Request<api::ListTopicsRequest>,
    ) -> Answer<api::ListTopicsResponse> {
        respond!(self, self.topics().await, ListTopicsResponse)
    }

    async fn describe_topic(
        &self,
        request: Request<api::DescribeTopicRequest>,
    ) -> Answer<api::DescribeTopicResponse> {
        respond!(self, self.describe(request.into_inner()).await, DescribeTopicResponse)
    }

    async fn query_offsets(
        &self,
        request: Request<api::QueryOffsetsRequest>,
    ) -> Answer<api::QueryOffsetsResponse> {
        respond!(self, self.offsets(request.into_inner()).await, QueryOffsetsResponse)
    }

    async fn list_groups(
        &self,
        _: Request<api::ListGroupsRequest>,
    ) -> Answer<api::ListGroupsResponse> {
        respond!(self, self.groups().await, ListGroupsResponse)
    }

    async fn commit_offset(
        &self,
        request: Request<api::CommitOffsetRequest>,
    ) -> Answer<api::CommitOffsetResponse> {
        respond!(self, self.commit(request.into_inner()).await, CommitOffsetResponse)
    }

    async fn get_committed_offset(
        &self,
        request: Request<api::GetCommittedOffsetRequest>,
    ) -> Answer<api::GetCommittedOffsetResponse> {
        respond!(self, self.committed(request.into_inner()).await, GetCommittedOffsetResponse)
    }

    async fn describe_broker(
        &self,
        _: Request<api::DescribeBrokerRequest>,
    ) -> Answer<api::DescribeBrokerResponse> {
        respond!(self, self.broker().await, DescribeBrokerResponse)
    }
}
