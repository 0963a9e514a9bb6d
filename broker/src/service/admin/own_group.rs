//! What this broker's own group answers: queue ends, offsets, its replica.

use std::sync::Arc;

use drumlin_proto::ids::{GroupName, QueueKey, QueueOffset};
use drumlin_proto::native as api;
use drumlin_proto::native::status::Code;
use tokio::time::Instant;

use super::{AdminService, CHANGE_TIMEOUT};
use crate::catalog::{ConsumerGroup, Topic};
use crate::command::{Command, GroupId};
use crate::registration::wire_topic;
use crate::replica::Item;
use crate::service::native::fetch::resolve;
use crate::service::native::{Fault, find_queue, find_topic, ok};

impl AdminService {
    /// Reads wait for all that was committed before.
    async fn settled(&self) -> Result<(), Fault> {
        Ok(self.context.replica.read_barrier().await?)
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

    pub(super) async fn describe_here(
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

    pub(super) async fn offsets_here(
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

    pub(super) async fn topics_here(&self) -> Result<api::ListTopicsResponse, Fault> {
        self.settled().await?;
        let view = self.context.replica.view();
        let topics = view.state.catalog().topics().map(|topic| wire_topic(topic)).collect();
        Ok(api::ListTopicsResponse { status: ok(), topics })
    }

    pub(super) async fn groups_here(&self) -> Result<api::ListGroupsResponse, Fault> {
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

    pub(super) async fn commit(
        &self,
        request: api::CommitOffsetRequest,
    ) -> Result<api::CommitOffsetResponse, Fault> {
        let name = GroupName::parse(&request.group).map_err(Fault::invalid)?;
        let topic = find_topic(&self.context, &request.topic)?;
        self.owns_queues(&topic, &request.broker_group)?;
        let queue = find_queue(&self.context, &topic, request.queue_id)?;
        let group = self.context.group_or_create(&name, None).await?;
        let offset = QueueOffset::new(request.offset);
        let commit = Item::Command(Command::CommitOffset { group, queue, offset });
        let deadline = Some(Instant::now() + CHANGE_TIMEOUT);
        self.context.replica.propose(commit, deadline).await?;
        Ok(api::CommitOffsetResponse { status: ok() })
    }

    pub(super) async fn committed(
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

    pub(super) async fn broker(&self) -> Result<api::DescribeBrokerResponse, Fault> {
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
