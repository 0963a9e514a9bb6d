//! QueryRoute and QueryAssignment: where the queues of a topic are. A query may create the topic.

use std::sync::Arc;

use drumlin_proto::ids::TopicName;
use drumlin_proto::native::{QueueRoute, TopicRoute, TopicType as WireType};
use drumlin_proto::rocketmq::{
    Code, QueryAssignmentRequest, QueryAssignmentResponse, QueryRouteRequest, QueryRouteResponse,
};
use drumlin_proto::route;
use tokio::time::Instant;

use super::caller::Caller;
use super::status::{Fault, ok};
use super::{Edge, Service, validate};
use crate::catalog::Topic;
use crate::command::{Command, Refusal, TopicType};
use crate::replica::{Item, ProposeError};
use crate::service::creations::PER_SECOND_MAX;

/// Queues of a topic that is created on first use.
const AUTO_QUEUES: u16 = 8;

fn wire_type(kind: TopicType) -> WireType {
    match kind {
        TopicType::Normal => WireType::Normal,
        TopicType::Fifo => WireType::Fifo,
        TopicType::Mixed => WireType::Mixed,
    }
}

impl Edge {
    pub(super) fn topic(&self, name: &TopicName) -> Result<Arc<Topic>, Fault> {
        let view = self.replica().view();
        let topic = view.state.catalog().topic_by_name(name).cloned();
        topic.ok_or_else(|| Fault::topic_not_found(name.as_str()))
    }

    /// The topic, created if that is allowed.
    async fn topic_or_create(
        &self,
        name: &TopicName,
        caller: &Caller,
    ) -> Result<Arc<Topic>, Fault> {
        let config = &self.context.config;
        let missing = match self.topic(name) {
            Ok(topic) => return Ok(topic),
            Err(fault) => fault,
        };
        let owns_catalog = config.catalog_group == config.broker_group;
        if !config.auto_create_topics || name.is_derived() || !owns_catalog {
            return Err(missing);
        }
        if !self.context.creations.topics.lock().take(Instant::now()) {
            let text = format!("{PER_SECOND_MAX} topics were created within a second");
            return Err(Fault::new(Code::TooManyRequests, text));
        }
        let started = Instant::now();
        let command = Command::CreateTopic {
            name: name.clone(),
            kind: TopicType::Mixed,
            shares: vec![(config.broker_group.clone(), AUTO_QUEUES)],
        };
        match self.decided(Item::Command(command), caller).await? {
            Ok(_) => {
                self.context.metrics.topic_created(true, started.elapsed());
                tracing::info!(topic = %name, queues = AUTO_QUEUES, "topic created on first use");
            }
            Err(ProposeError::Refused(Refusal::TopicExists(_))) => {}
            Err(error) => {
                self.context.metrics.topic_created(false, started.elapsed());
                self.context.metrics.propose_refused(&error);
                return Err(error.into());
            }
        }
        self.topic(name)
    }
}

impl Service {
    /// Only this broker group's part has an address that this node knows.
    fn route_of(&self, topic: &Topic) -> TopicRoute {
        let own = &self.edge.context.config.broker_group;
        let term = self.edge.replica().raft_status().borrow().term.get();
        let queues = topic.shares.iter().map(|(broker_group, queue_count)| QueueRoute {
            broker_group: broker_group.to_string(),
            queue_count: u32::from(*queue_count),
            leader: (broker_group == own).then(|| self.advertised.clone()),
            term,
        });
        TopicRoute {
            topic: topic.name.to_string(),
            exists: true,
            r#type: wire_type(topic.kind).into(),
            topic_id: topic.id.get(),
            queues: queues.collect(),
        }
    }
}

pub(super) async fn query_route(
    service: &Service,
    caller: Arc<Caller>,
    request: QueryRouteRequest,
) -> Result<QueryRouteResponse, Fault> {
    let name = validate::topic_name(request.topic.as_ref(), &caller.namespace)?;
    validate::access_point(request.endpoints.as_ref())?;
    service.edge.serving(&caller).await?;
    let topic = service.edge.topic_or_create(&name, &caller).await?;
    let named = request.topic.unwrap_or_default();
    let message_queues = route::message_queues(&named, &service.route_of(&topic));
    if message_queues.is_empty() {
        let text = format!("no queue of {name} has an address");
        return Err(Fault::new(Code::InternalServerError, text));
    }
    Ok(QueryRouteResponse { status: Some(ok()), message_queues })
}

pub(super) async fn query_assignment(
    service: &Service,
    caller: Arc<Caller>,
    request: QueryAssignmentRequest,
) -> Result<QueryAssignmentResponse, Fault> {
    let name = validate::topic_name(request.topic.as_ref(), &caller.namespace)?;
    validate::group_name(request.group.as_ref(), &caller.namespace)?;
    validate::access_point(request.endpoints.as_ref())?;
    service.edge.serving(&caller).await?;
    let topic = service.edge.topic(&name)?;
    let named = request.topic.unwrap_or_default();
    let assignments = route::assignments(&named, &service.route_of(&topic), false);
    if assignments.is_empty() {
        return Err(Fault::new(Code::Forbidden, format!("no readable queue of {name}")));
    }
    Ok(QueryAssignmentResponse { status: Some(ok()), assignments })
}
