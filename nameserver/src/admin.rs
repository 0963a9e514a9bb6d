//! Administration asked of a nameserver: sent on to the catalog group for definitions, to every
//! broker group that holds the topic for what lies in its queues.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::native::admin_server::Admin;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{self as api, Status as NativeStatus};
use futures::future::join_all;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::forward::{Call, IfLost, administration, forward};
use crate::shared::Shared;

type Answer<T> = Result<Response<T>, Status>;

#[derive(Debug, Clone)]
pub(crate) struct AdminService {
    pub(crate) shared: Arc<Shared>,
}

/// The call sent to one broker group, counted under its name.
macro_rules! to_group {
    ($self:ident, $rpc:ident, $group:expr, $call:expr, $message:expr) => {{
        $self.shared.metrics.forwards(stringify!($rpc));
        let send =
            |channel: Channel, request| async move { administration(channel).$rpc(request).await };
        forward(&$self.shared, $group, $call, $message, IfLost::Fail, send)
    }};
}

/// The same question to several broker groups at once, answers in the order of the groups.
macro_rules! to_groups {
    ($self:ident, $rpc:ident, $groups:expr, $call:expr, $message:expr) => {{
        let ask = |group: String| {
            let (message, call) = ($message.clone(), $call.clone());
            async move { to_group!($self, $rpc, &group, &call, message).await }
        };
        join_all($groups.into_iter().map(ask)).await.into_iter().collect::<Result<Vec<_>, _>>()
    }};
}

fn is_ok(status: Option<&NativeStatus>) -> bool {
    status.is_some_and(|status| status.code() == Code::Ok)
}

fn fault(code: Code, message: String) -> Option<NativeStatus> {
    Some(NativeStatus { code: code.into(), message, leader: None })
}

impl AdminService {
    fn catalog_group(&self) -> Result<String, Status> {
        let catalog = self.shared.directory.read(|table| table.catalog_group().map(str::to_owned));
        catalog.ok_or_else(|| Status::unavailable("the catalog group has not registered yet"))
    }

    /// Broker groups that hold a topic; the catalog group, which then says so, if none is known.
    fn groups_of(&self, topic: &str) -> Result<Vec<String>, Status> {
        match self.shared.directory.read(|table| table.topic(topic)) {
            Some(definition) if !definition.shares.is_empty() => {
                Ok(definition.shares.iter().map(|share| share.broker_group.clone()).collect())
            }
            _ => self.catalog_group().map(|group| vec![group]),
        }
    }

    /// The broker group that a queue id belongs to: the one named, else the only one it can mean.
    fn group_of_queue(
        &self,
        topic: &str,
        named: &str,
    ) -> Result<Result<String, Option<NativeStatus>>, Status> {
        if !named.is_empty() {
            let known = self.shared.directory.read(|table| table.knows_group(named));
            let unknown =
                || fault(Code::InvalidArgument, format!("there is no broker group {named}"));
            return Ok(known.then(|| named.to_owned()).ok_or_else(unknown));
        }
        let mut groups = self.groups_of(topic)?;
        let only = groups.pop().filter(|_| groups.is_empty());
        let several = || {
            let text = format!("topic {topic} has queues on several broker groups: name one");
            fault(Code::InvalidArgument, text)
        };
        Ok(only.ok_or_else(several))
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_topic(
        &self,
        request: Request<api::CreateTopicRequest>,
    ) -> Answer<api::CreateTopicResponse> {
        let (call, create) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, create_topic, &group, &call, create).await.map(Response::new)
    }

    async fn update_topic(
        &self,
        request: Request<api::UpdateTopicRequest>,
    ) -> Answer<api::UpdateTopicResponse> {
        let (call, update) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, update_topic, &group, &call, update).await.map(Response::new)
    }

    async fn create_group(
        &self,
        request: Request<api::CreateGroupRequest>,
    ) -> Answer<api::CreateGroupResponse> {
        let (call, create) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, create_group, &group, &call, create).await.map(Response::new)
    }

    async fn delete_topic(
        &self,
        request: Request<api::DeleteTopicRequest>,
    ) -> Answer<api::DeleteTopicResponse> {
        let (call, delete) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, delete_topic, &group, &call, delete).await.map(Response::new)
    }

    async fn list_topics(
        &self,
        request: Request<api::ListTopicsRequest>,
    ) -> Answer<api::ListTopicsResponse> {
        let (call, list) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, list_topics, &group, &call, list).await.map(Response::new)
    }

    async fn describe_topic(
        &self,
        request: Request<api::DescribeTopicRequest>,
    ) -> Answer<api::DescribeTopicResponse> {
        let (call, mut describe) = Call::split(request);
        let groups = self.groups_of(&describe.name)?;
        describe.own_group_only = true;
        let answers = to_groups!(self, describe_topic, groups, call, describe)?;
        let mut merged = api::DescribeTopicResponse::default();
        for answer in answers {
            if !is_ok(answer.status.as_ref()) {
                return Ok(Response::new(answer));
            }
            merged.status = answer.status;
            let told = merged.topic.into_iter().chain(answer.topic);
            merged.topic = told.max_by_key(|topic| topic.version);
            merged.queues.extend(answer.queues);
        }
        merged.queues.sort_by_key(|queue| (queue.broker_group.clone(), queue.queue_id));
        Ok(Response::new(merged))
    }

    async fn query_offsets(
        &self,
        request: Request<api::QueryOffsetsRequest>,
    ) -> Answer<api::QueryOffsetsResponse> {
        let (call, mut query) = Call::split(request);
        query.own_group_only = true;
        let groups = self.groups_of(&query.topic)?;
        let answers = to_groups!(self, query_offsets, groups, call, query)?;
        let mut merged = api::QueryOffsetsResponse::default();
        for answer in answers {
            if !is_ok(answer.status.as_ref()) {
                return Ok(Response::new(answer));
            }
            merged.status = answer.status;
            merged.offsets.extend(answer.offsets);
        }
        merged.offsets.sort_by_key(|offset| (offset.broker_group.clone(), offset.queue_id));
        Ok(Response::new(merged))
    }

    async fn list_groups(
        &self,
        request: Request<api::ListGroupsRequest>,
    ) -> Answer<api::ListGroupsResponse> {
        let (call, mut list) = Call::split(request);
        list.own_group_only = true;
        let groups = self.shared.directory.read(|table| table.live_groups());
        if groups.is_empty() {
            return Err(Status::unavailable("no broker has registered yet"));
        }
        let answers = to_groups!(self, list_groups, groups, call, list)?;
        let mut queues: BTreeMap<String, Vec<api::GroupQueue>> = BTreeMap::new();
        let mut status = None;
        for answer in answers {
            if !is_ok(answer.status.as_ref()) {
                return Ok(Response::new(answer));
            }
            status = answer.status;
            for group in answer.groups {
                queues.entry(group.name).or_default().extend(group.queues);
            }
        }
        let groups = queues.into_iter().map(|(name, queues)| api::Group { name, queues });
        Ok(Response::new(api::ListGroupsResponse { status, groups: groups.collect() }))
    }

    async fn commit_offset(
        &self,
        request: Request<api::CommitOffsetRequest>,
    ) -> Answer<api::CommitOffsetResponse> {
        let (call, commit) = Call::split(request);
        let group = match self.group_of_queue(&commit.topic, &commit.broker_group)? {
            Ok(group) => group,
            Err(status) => return Ok(Response::new(api::CommitOffsetResponse { status })),
        };
        to_group!(self, commit_offset, &group, &call, commit).await.map(Response::new)
    }

    async fn get_committed_offset(
        &self,
        request: Request<api::GetCommittedOffsetRequest>,
    ) -> Answer<api::GetCommittedOffsetResponse> {
        let (call, get) = Call::split(request);
        let group = match self.group_of_queue(&get.topic, &get.broker_group)? {
            Ok(group) => group,
            Err(status) => {
                return Ok(Response::new(api::GetCommittedOffsetResponse { status, offset: None }));
            }
        };
        to_group!(self, get_committed_offset, &group, &call, get).await.map(Response::new)
    }

    /// Of the catalog group's leader.
    async fn describe_broker(
        &self,
        request: Request<api::DescribeBrokerRequest>,
    ) -> Answer<api::DescribeBrokerResponse> {
        let (call, describe) = Call::split(request);
        let group = self.catalog_group()?;
        to_group!(self, describe_broker, &group, &call, describe).await.map(Response::new)
    }
}
