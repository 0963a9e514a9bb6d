//! Finds the route of a topic for one listener; holds a query that cannot be answered yet, and
//! creates the topic where that is allowed.

use std::sync::Arc;
use std::time::Instant;

use drumlin_proto::ids::TopicName;
use drumlin_proto::native::status::Code as NativeCode;
use drumlin_proto::native::{Address, CreateTopicRequest, Topic, TopicRoute, TopicType};
use drumlin_proto::rocketmq::Code;
use tonic::Status;

use crate::config::RouteMode;
use crate::forward::{Call, IfLost, administration, forward};
use crate::route_table::RouteTable;
use crate::shared::Shared;

/// One of this nameserver's listeners.
#[derive(Debug)]
pub(crate) struct ListenerAddress {
    pub(crate) name: String,
    pub(crate) advertised: Address,
}

/// Why there is no route.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("CODE: 17  DESC: No topic route info in name server for the topic: {0}")]
    NotFound(TopicName),
    #[error("{0}")]
    Unavailable(String),
    #[error("topic {topic} was not created: {reason}")]
    NotCreated { topic: TopicName, code: Code, reason: String },
}

/// What the table has to say of a topic.
enum Known {
    /// With an address for every share.
    Whole(TopicRoute),
    /// With an address for some.
    Part(TopicRoute),
    /// It exists, but none of its broker groups has a live process.
    Unreachable,
    Absent,
    /// Brokers that may know it have not registered yet.
    Unsettled,
}

fn look(table: &RouteTable, topic: &TopicName, listener: &str, now: Instant) -> Known {
    let Some(definition) = table.topic(topic.as_str()) else {
        let settled = table.is_settled(now) && !table.is_empty();
        return if settled { Known::Absent } else { Known::Unsettled };
    };
    let route = table.route(&definition, listener);
    let addressed = route.queues.iter().filter(|queue| queue.leader.is_some()).count();
    if addressed == 0 {
        Known::Unreachable
    } else if addressed == route.queues.len() {
        Known::Whole(route)
    } else {
        Known::Part(route)
    }
}

/// Finds the route of a topic; creates the topic if it is absent and `may_create`.
pub(crate) async fn find(
    shared: &Shared,
    listener: &ListenerAddress,
    topic: &TopicName,
    call: &Call,
    may_create: bool,
) -> Result<TopicRoute, LookupError> {
    let deadline = call.hold_until(shared.config.query_hold);
    let name = listener.name.as_str();
    let decide = |table: &RouteTable| {
        let now = Instant::now();
        match look(table, topic, name, now) {
            known @ (Known::Whole(_) | Known::Absent) => Some(known),
            known @ Known::Part(_) if table.is_settled(now) => Some(known),
            Known::Part(_) | Known::Unreachable | Known::Unsettled => None,
        }
    };
    let known = match shared.directory.wait_for(deadline, decide).await {
        Some(known) => known,
        None => shared.directory.read(|table| look(table, topic, name, Instant::now())),
    };
    let route = match known {
        Known::Whole(route) | Known::Part(route) => route,
        Known::Unreachable => {
            let text = format!("no process that holds topic {topic} is there");
            return Err(LookupError::Unavailable(text));
        }
        Known::Unsettled => {
            let text = "not all brokers have registered yet".to_owned();
            return Err(LookupError::Unavailable(text));
        }
        Known::Absent if may_create && shared.config.auto_create_topics => {
            create(shared, listener, topic, call).await?
        }
        Known::Absent => return Err(LookupError::NotFound(topic.clone())),
    };
    Ok(as_seen_from(shared, listener, route))
}

/// With `via-endpoint`, every address that is there becomes this nameserver's own.
fn as_seen_from(shared: &Shared, listener: &ListenerAddress, mut route: TopicRoute) -> TopicRoute {
    if shared.config.route_mode == RouteMode::ViaEndpoint {
        for leader in route.queues.iter_mut().filter_map(|queue| queue.leader.as_mut()) {
            leader.clone_from(&listener.advertised);
        }
    }
    route
}

/// Asks the catalog group for the topic and waits until its route is known.
async fn create(
    shared: &Shared,
    listener: &ListenerAddress,
    topic: &TopicName,
    call: &Call,
) -> Result<TopicRoute, LookupError> {
    if topic.is_derived() {
        return Err(LookupError::NotFound(topic.clone()));
    }
    let definition = ask_catalog(shared, topic, call).await?;
    let deadline = call.hold_until(shared.config.query_hold);
    let whole = |table: &RouteTable| match look(table, topic, &listener.name, Instant::now()) {
        Known::Whole(route) => Some(route),
        Known::Part(_) | Known::Unreachable | Known::Absent | Known::Unsettled => None,
    };
    if let Some(route) = shared.directory.wait_for(deadline, whole).await {
        return Ok(route);
    }
    let route = shared.directory.read(|table| table.route(&definition, &listener.name));
    if route.queues.iter().any(|queue| queue.leader.is_some()) {
        return Ok(route);
    }
    Err(LookupError::Unavailable(format!("topic {topic} was created, but nobody serves it yet")))
}

async fn ask_catalog(
    shared: &Shared,
    topic: &TopicName,
    call: &Call,
) -> Result<Arc<Topic>, LookupError> {
    let Some(catalog) = shared.directory.read(|table| table.catalog_group().map(str::to_owned))
    else {
        let text = "the catalog group has not registered yet".to_owned();
        return Err(LookupError::Unavailable(text));
    };
    let request = CreateTopicRequest {
        name: topic.to_string(),
        queue_count: shared.config.auto_create_queue_count,
        r#type: TopicType::Mixed.into(),
        auto: true,
        ..CreateTopicRequest::default()
    };
    let send =
        |channel, request| async move { administration(channel).create_topic(request).await };
    // One that is there already is as good.
    let answer = forward(shared, &catalog, call, request, IfLost::Repeat, send).await;
    let answer = answer.map_err(|status: Status| LookupError::Unavailable(status.to_string()))?;
    let status = answer.status.unwrap_or_default();
    let refused = |code| LookupError::NotCreated {
        topic: topic.clone(),
        code,
        reason: status.message.clone(),
    };
    match (status.code(), answer.topic) {
        (NativeCode::Ok | NativeCode::AlreadyExists, Some(definition)) => Ok(Arc::new(definition)),
        (NativeCode::TopicNotFound | NativeCode::PreconditionFailed, _) => {
            Err(LookupError::NotFound(topic.clone()))
        }
        (NativeCode::InvalidArgument, _) => Err(refused(Code::IllegalTopic)),
        (NativeCode::Busy, _) => Err(refused(Code::TooManyRequests)),
        (NativeCode::NotLeader | NativeCode::Unavailable, _) => {
            Err(LookupError::Unavailable(status.message))
        }
        (_, _) => Err(refused(Code::InternalServerError)),
    }
}
