//! `drumlin.v1.Admin`: definitions, offsets and state, for tools and access points.
//!
//! Any broker answers for the cluster: what others know is asked of the leaders of their groups, once;
//! a call that another process sent on is answered for the own group.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::forward::{Call, FORWARDED_BY, administration};
use drumlin_proto::ids::{BrokerGroupName, GroupName, TopicName};
use drumlin_proto::native::admin_server::{Admin, AdminServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{self as api, Status as NativeStatus, TopicType as WireType};
use futures::future::join_all;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::creations::PER_SECOND_MAX;
use super::definitions::{ProposeFault, Wanted, checked_copies};
use super::native::{Fault, REQUEST_BYTES_MAX, find_topic, ok};
use super::rocketmq::told;
use crate::broker::Context;
use crate::command::{Refusal, TopicType};
use crate::registration::wire_topic;
use crate::replica::ProposeError;
use crate::whereabouts::Vantage;

mod own_group;

/// How long a change may wait for its turn.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

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
            let mut refused = api::$Response::default();
            refused.status = fault.status(&$self.vantage);
            refused
        });
        Ok(told(response, not_led))
    }};
}

/// A change of definitions: done here if this broker makes them or was told to, else asked for.
macro_rules! definition {
    ($self:ident, $request:ident, $rpc:ident, $here:ident, $Response:ident) => {{
        let here = is_sent_on(&$request) || $self.context.makes_definitions();
        let (call, message) = Call::split($request);
        let done = if here {
            $self.$here(message).await
        } else {
            let send =
                |channel, request| async move { administration(channel).$rpc(request).await };
            $self.context.ask_catalog(call, message, send).await
        };
        respond!($self, done, $Response)
    }};
}

/// The same question to several broker groups; the first answer that is not OK stands for all.
macro_rules! ask_groups {
    ($self:ident, $groups:expr, $call:expr, $message:expr, $rpc:ident, $here:ident) => {{
        let (own_group_only, call) = (true, $call);
        let message = || {
            let mut message = $message.clone();
            message.own_group_only = own_group_only;
            message
        };
        let ask = |group: BrokerGroupName| {
            let (message, call) = (message(), call.clone());
            async move {
                if $self.leads(&group) {
                    return $self.$here(message).await;
                }
                let send =
                    |channel, request| async move { administration(channel).$rpc(request).await };
                let answer = $self.context.ask_group(&group, call, message, send).await?;
                checked(answer.status.as_ref()).map(|()| answer)
            }
        };
        join_all($groups.into_iter().map(ask)).await.into_iter().collect::<Result<Vec<_>, Fault>>()
    }};
}

/// Whether another process sent the call on to this one.
fn is_sent_on<T>(request: &Request<T>) -> bool {
    request.metadata().contains_key(FORWARDED_BY)
}

fn checked(status: Option<&NativeStatus>) -> Result<(), Fault> {
    match status {
        Some(status) if status.code() == Code::Ok => Ok(()),
        Some(status) => Err(Fault::new(status.code(), status.message.clone())),
        None => Err(Fault::new(Code::Internal, "an answer without a status")),
    }
}

impl AdminService {
    pub fn server(context: Arc<Context>, vantage: Vantage) -> AdminServer<Self> {
        AdminServer::new(Self { context, vantage }).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    fn own_group(&self) -> &BrokerGroupName {
        &self.context.config.broker_group
    }

    fn leads(&self, broker_group: &BrokerGroupName) -> bool {
        broker_group == self.own_group() && self.context.replica.raft_status().borrow().serving
    }

    async fn create(
        &self,
        request: api::CreateTopicRequest,
    ) -> Result<api::CreateTopicResponse, Fault> {
        let context = &self.context;
        self.owns_catalog()?;
        if request.auto && !context.config.auto_create_topics {
            let text = "topics are not created on first use here";
            return Err(Fault::new(Code::PreconditionFailed, text));
        }
        let name = TopicName::parse(&request.name).map_err(Fault::invalid)?;
        if name.is_derived() {
            let text = format!("topics like {name} belong to their consumer groups");
            return Err(Fault::invalid(text));
        }
        if request.auto {
            if let Ok(topic) = find_topic(context, name.as_str()) {
                let topic = Some(wire_topic(&topic));
                return Ok(api::CreateTopicResponse { status: ok(), topic });
            }
            if !context.creations.topics.lock().take(Instant::now()) {
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
        let min_copies = checked_copies(request.min_copies.max(1))?;
        let shares = context.shares(&request.broker_groups, request.queue_count, request.auto)?;
        let wanted = Wanted { name: name.clone(), kind, shares, min_copies };
        let started = Instant::now();
        let (status, topic) = match context.create_topic(wanted).await {
            Ok(topic) => (ok(), topic),
            Err(ProposeFault::Propose(exists @ ProposeError::Refused(Refusal::TopicExists(_)))) => {
                let status = match request.auto {
                    true => ok(),
                    false => Fault::from(exists).status(&self.vantage),
                };
                (status, context.existing_topic(&name).await?)
            }
            Err(failure) => {
                context.metrics.topic_created(false, started.elapsed());
                return Err(match failure {
                    ProposeFault::Propose(error) => error.into(),
                    ProposeFault::Fault(fault) => fault,
                });
            }
        };
        context.metrics.topic_created(true, started.elapsed());
        Ok(api::CreateTopicResponse { status, topic: Some(wire_topic(&topic)) })
    }

    /// Changes that were sent here by someone who is mistaken are refused.
    fn owns_catalog(&self) -> Result<(), Fault> {
        if self.context.owns_catalog() {
            return Ok(());
        }
        let owner = &self.context.config.catalog_group;
        let text = format!("broker group {owner} owns the catalog: ask it");
        Err(Fault::elsewhere(owner.as_str(), &self.vantage, text))
    }

    async fn update(
        &self,
        request: api::UpdateTopicRequest,
    ) -> Result<api::UpdateTopicResponse, Fault> {
        self.owns_catalog()?;
        let topic = self.context.update_topic(&request).await?;
        Ok(api::UpdateTopicResponse { status: ok(), topic: Some(wire_topic(&topic)) })
    }

    async fn delete(
        &self,
        request: api::DeleteTopicRequest,
    ) -> Result<api::DeleteTopicResponse, Fault> {
        self.owns_catalog()?;
        self.context.delete_topic(&request.name).await?;
        Ok(api::DeleteTopicResponse { status: ok() })
    }

    async fn group(
        &self,
        request: api::CreateGroupRequest,
    ) -> Result<api::CreateGroupResponse, Fault> {
        self.owns_catalog()?;
        let name = GroupName::parse(&request.name).map_err(Fault::invalid)?;
        let group = self.context.group_or_create(&name, None).await?;
        Ok(api::CreateGroupResponse { status: ok(), group_id: group.0 })
    }

    /// The broker groups that hold a topic; this one, which then says so, if none does.
    fn owners(&self, topic: &str) -> Result<Vec<BrokerGroupName>, Fault> {
        match find_topic(&self.context, topic) {
            Ok(topic) => Ok(topic.shares.iter().map(|(name, _)| name.clone()).collect()),
            Err(missing) if missing.code == Code::TopicNotFound => {
                Ok(vec![self.own_group().clone()])
            }
            Err(fault) => Err(fault),
        }
    }

    fn all_groups(&self) -> Vec<BrokerGroupName> {
        let others = self.context.definitions.whereabouts().map(|known| known.other_groups());
        let others = others.into_iter().flatten();
        let mut names: Vec<_> =
            others.filter_map(|name| BrokerGroupName::parse(&name).ok()).collect();
        names.push(self.own_group().clone());
        names
    }

    async fn describe(
        &self,
        call: Call,
        request: api::DescribeTopicRequest,
    ) -> Result<api::DescribeTopicResponse, Fault> {
        let groups = self.owners(&request.name)?;
        let answers = ask_groups!(self, groups, call, request, describe_topic, describe_here)?;
        let mut merged = api::DescribeTopicResponse { status: ok(), ..Default::default() };
        for answer in answers {
            let told = merged.topic.into_iter().chain(answer.topic);
            merged.topic = told.max_by_key(|topic| topic.version);
            merged.queues.extend(answer.queues);
        }
        merged.queues.sort_by_key(|queue| (queue.broker_group.clone(), queue.queue_id));
        Ok(merged)
    }

    async fn offsets(
        &self,
        call: Call,
        request: api::QueryOffsetsRequest,
    ) -> Result<api::QueryOffsetsResponse, Fault> {
        let groups = self.owners(&request.topic)?;
        let answers = ask_groups!(self, groups, call, request, query_offsets, offsets_here)?;
        let mut offsets: Vec<_> = answers.into_iter().flat_map(|answer| answer.offsets).collect();
        offsets.sort_by_key(|offset| (offset.broker_group.clone(), offset.queue_id));
        Ok(api::QueryOffsetsResponse { status: ok(), offsets })
    }

    async fn groups(
        &self,
        call: Call,
        request: api::ListGroupsRequest,
    ) -> Result<api::ListGroupsResponse, Fault> {
        let groups = self.all_groups();
        let answers = ask_groups!(self, groups, call, request, list_groups, list_here)?;
        let mut queues: BTreeMap<String, Vec<api::GroupQueue>> = BTreeMap::new();
        for group in answers.into_iter().flat_map(|answer| answer.groups) {
            queues.entry(group.name).or_default().extend(group.queues);
        }
        let groups = queues.into_iter().map(|(name, queues)| api::Group { name, queues });
        Ok(api::ListGroupsResponse { status: ok(), groups: groups.collect() })
    }

    async fn list_here(&self, _: api::ListGroupsRequest) -> Result<api::ListGroupsResponse, Fault> {
        self.groups_here().await
    }

    async fn topics(
        &self,
        call: Call,
        request: api::ListTopicsRequest,
    ) -> Result<api::ListTopicsResponse, Fault> {
        if self.leads(self.own_group()) {
            return self.topics_here().await;
        }
        let send =
            |channel, request| async move { administration(channel).list_topics(request).await };
        self.context.ask_group(self.own_group(), call, request, send).await
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_topic(
        &self,
        request: Request<api::CreateTopicRequest>,
    ) -> Answer<api::CreateTopicResponse> {
        definition!(self, request, create_topic, create, CreateTopicResponse)
    }

    async fn update_topic(
        &self,
        request: Request<api::UpdateTopicRequest>,
    ) -> Answer<api::UpdateTopicResponse> {
        definition!(self, request, update_topic, update, UpdateTopicResponse)
    }

    async fn create_group(
        &self,
        request: Request<api::CreateGroupRequest>,
    ) -> Answer<api::CreateGroupResponse> {
        definition!(self, request, create_group, group, CreateGroupResponse)
    }

    async fn delete_topic(
        &self,
        request: Request<api::DeleteTopicRequest>,
    ) -> Answer<api::DeleteTopicResponse> {
        definition!(self, request, delete_topic, delete, DeleteTopicResponse)
    }

    async fn list_topics(
        &self,
        request: Request<api::ListTopicsRequest>,
    ) -> Answer<api::ListTopicsResponse> {
        let here = is_sent_on(&request);
        let (call, list) = Call::split(request);
        let topics = if here { self.topics_here().await } else { self.topics(call, list).await };
        respond!(self, topics, ListTopicsResponse)
    }

    async fn describe_topic(
        &self,
        request: Request<api::DescribeTopicRequest>,
    ) -> Answer<api::DescribeTopicResponse> {
        let here = is_sent_on(&request) || request.get_ref().own_group_only;
        let (call, describe) = Call::split(request);
        let described = match here {
            true => self.describe_here(describe).await,
            false => self.describe(call, describe).await,
        };
        respond!(self, described, DescribeTopicResponse)
    }

    async fn query_offsets(
        &self,
        request: Request<api::QueryOffsetsRequest>,
    ) -> Answer<api::QueryOffsetsResponse> {
        let here = is_sent_on(&request) || request.get_ref().own_group_only;
        let (call, query) = Call::split(request);
        let offsets = match here {
            true => self.offsets_here(query).await,
            false => self.offsets(call, query).await,
        };
        respond!(self, offsets, QueryOffsetsResponse)
    }

    async fn list_groups(
        &self,
        request: Request<api::ListGroupsRequest>,
    ) -> Answer<api::ListGroupsResponse> {
        let here = is_sent_on(&request) || request.get_ref().own_group_only;
        let (call, list) = Call::split(request);
        let groups = if here { self.groups_here().await } else { self.groups(call, list).await };
        respond!(self, groups, ListGroupsResponse)
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
