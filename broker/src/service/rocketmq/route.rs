//! QueryRoute and QueryAssignment: where the queues of a topic are. A query may create the topic.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::forward::administration;
use drumlin_proto::ids::TopicName;
use drumlin_proto::native;
use drumlin_proto::rocketmq::{
    Code, QueryAssignmentRequest, QueryAssignmentResponse, QueryRouteRequest, QueryRouteResponse,
};
use drumlin_proto::route;
use tokio::time::Instant;

use super::caller::Caller;
use super::status::{Fault, ok};
use super::{Edge, Service, validate};
use crate::catalog::Topic;
use crate::command::{Refusal, TopicType};
use crate::registration::wire_topic;
use crate::replica::ProposeError;
use crate::service::creations::PER_SECOND_MAX;
use crate::service::definitions::{ProposeFault, Wanted};

/// Queues of a topic that is created on first use.
const AUTO_QUEUES: u16 = 8;
/// How long a topic that the catalog group created may take to get here.
const APPLY_WAIT: Duration = Duration::from_secs(1);

impl Edge {
    pub(super) fn topic(&self, name: &TopicName) -> Result<Arc<Topic>, Fault> {
        let view = self.replica().view();
        let topic = view.state.catalog().topic_by_name(name).cloned();
        topic.ok_or_else(|| Fault::topic_not_found(name.as_str()))
    }

    /// The definition of a topic, also where this node has not applied it yet; created if that is
    /// allowed.
    async fn definition(
        &self,
        name: &TopicName,
        caller: &Caller,
        may_create: bool,
    ) -> Result<native::Topic, Fault> {
        if let Ok(topic) = self.topic(name) {
            return Ok(wire_topic(&topic));
        }
        let config = &self.context.config;
        let may_create = may_create && config.auto_create_topics && !name.is_derived();
        let catalog_group = config.catalog_group.as_str();
        if self.is_done_here(caller, catalog_group).await? {
            let topic = self.topic_or_create(name, may_create).await?;
            return Ok(wire_topic(&topic));
        }
        let topic = self.ask_catalog(name, caller, may_create).await?;
        let own = config.broker_group.as_str();
        if topic.shares.iter().any(|share| share.broker_group == own) {
            self.until_applied(name).await;
        }
        Ok(topic)
    }

    /// Asks the leader of the catalog group.
    async fn ask_catalog(
        &self,
        name: &TopicName,
        caller: &Caller,
        may_create: bool,
    ) -> Result<native::Topic, Fault> {
        let catalog_group = self.context.config.catalog_group.as_str();
        let (status, topic) = if may_create {
            let request = native::CreateTopicRequest {
                name: name.to_string(),
                queue_count: u32::from(AUTO_QUEUES),
                r#type: native::TopicType::Mixed.into(),
                broker_groups: Vec::new(),
                auto: true,
                ..Default::default()
            };
            let send = |channel, request| async move {
                administration(channel).create_topic(request).await
            };
            let answer = self.carry_to(caller, catalog_group, request, send).await?;
            (answer.status, answer.topic)
        } else {
            let request =
                native::DescribeTopicRequest { name: name.to_string(), own_group_only: true };
            let send = |channel, request| async move {
                administration(channel).describe_topic(request).await
            };
            let answer = self.carry_to(caller, catalog_group, request, send).await?;
            (answer.status, answer.topic)
        };
        use native::status::Code as Told;
        let status = status.unwrap_or_default();
        match (status.code(), topic) {
            (Told::Ok | Told::AlreadyExists, Some(topic)) => Ok(topic),
            (Told::TopicNotFound | Told::PreconditionFailed, _) => {
                Err(Fault::topic_not_found(name.as_str()))
            }
            (Told::InvalidArgument, _) => Err(Fault::new(Code::IllegalTopic, status.message)),
            (Told::Busy, _) => Err(Fault::new(Code::TooManyRequests, status.message)),
            (Told::Internal, _) => Err(Fault::new(Code::InternalServerError, status.message)),
            (_, _) => {
                let text = format!("topic {name}: {}", status.message);
                Err(Fault::new(Code::HaNotAvailable, text))
            }
        }
    }

    /// A topic that was just created gets here a little later.
    async fn until_applied(&self, name: &TopicName) {
        let mut version = self.replica().catalog_version();
        let applied = async {
            loop {
                version.mark_unchanged();
                if self.topic(name).is_ok() || version.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(APPLY_WAIT, applied).await.is_err() {
            tracing::warn!(topic = %name, "created elsewhere, but not applied here yet");
        }
    }

    /// The topic, created if that is allowed.
    async fn topic_or_create(
        &self,
        name: &TopicName,
        may_create: bool,
    ) -> Result<Arc<Topic>, Fault> {
        let missing = match self.topic(name) {
            Ok(topic) => return Ok(topic),
            Err(fault) => fault,
        };
        if !may_create {
            return Err(missing);
        }
        if !self.context.creations.topics.lock().take(Instant::now()) {
            let text = format!("{PER_SECOND_MAX} topics were created within a second");
            return Err(Fault::new(Code::TooManyRequests, text));
        }
        let started = Instant::now();
        let shares = self.context.shares(&[], u32::from(AUTO_QUEUES), true)?;
        let kind = TopicType::Mixed;
        let wanted = Wanted { name: name.clone(), kind, shares, min_copies: 1 };
        match self.context.create_topic(wanted).await {
            Ok(topic) => {
                self.context.metrics.topic_created(true, started.elapsed());
                tracing::info!(topic = %name, queues = AUTO_QUEUES, "topic created on first use");
                Ok(topic)
            }
            Err(ProposeFault::Propose(ProposeError::Refused(Refusal::TopicExists(_)))) => {
                Ok(self.context.existing_topic(name).await?)
            }
            Err(failure) => {
                self.context.metrics.topic_created(false, started.elapsed());
                Err(match failure {
                    ProposeFault::Propose(error) => {
                        self.context.metrics.propose_refused(&error);
                        error.into()
                    }
                    ProposeFault::Fault(fault) => fault.into(),
                })
            }
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
    let topic = service.edge.definition(&name, &caller, true).await?;
    let named = request.topic.unwrap_or_default();
    let route = service.edge.whereabouts.route(&topic, &service.listener);
    let message_queues = route::message_queues(&named, &route);
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
    let topic = service.edge.definition(&name, &caller, false).await?;
    let named = request.topic.unwrap_or_default();
    let route = service.edge.whereabouts.route(&topic, &service.listener);
    let assignments = route::assignments(&named, &route, false);
    if assignments.is_empty() {
        return Err(Fault::new(Code::Forbidden, format!("no readable queue of {name}")));
    }
    Ok(QueryAssignmentResponse { status: Some(ok()), assignments })
}
