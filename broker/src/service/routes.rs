//! `drumlin.v1.Routes`: where topics are, told at once and again whenever it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use drumlin_proto::ids::{BrokerGroupName, DERIVED_TOPIC_CHARS_MAX, TopicName};
use drumlin_proto::native::routes_server::{Routes, RoutesServer};
use drumlin_proto::native::{
    Address, QueueRoute, TopicRoute, TopicType as WireType, WatchRoutesRequest, WatchRoutesResponse,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::native::{Fault, REQUEST_BYTES_MAX, ok};
use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::TopicType;
use crate::replica::RaftStatus;

/// Topics that one stream may watch.
const WATCHED_MAX: usize = 10_000;
/// Responses that wait for the socket.
const WAITING_MAX: usize = 4;

/// Routes as seen from one listener.
#[derive(Clone, Debug)]
pub struct RoutesService {
    context: Arc<Context>,
    /// Of the listener that the query comes in on.
    advertised: Address,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl RoutesService {
    /// Streams run as tasks of `tasks` and end when `stop` is cancelled.
    pub fn server(
        context: Arc<Context>,
        advertised: Address,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> RoutesServer<Self> {
        let service = Self { context, advertised, tasks, stop };
        RoutesServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    /// The routes of all these topics as of one moment.
    fn routes<'a>(&self, names: impl Iterator<Item = &'a String>) -> Vec<TopicRoute> {
        let view = self.context.replica.view();
        let catalog = view.state.catalog();
        let found = names.map(|name| {
            let topic = TopicName::parse(name).ok().and_then(|name| catalog.topic_by_name(&name));
            (name, topic.cloned())
        });
        let found: Vec<_> = found.collect();
        drop(view);
        let status = *self.context.replica.raft_status().borrow();
        let route = |(name, topic): (&String, Option<Arc<Topic>>)| {
            topic.map_or_else(|| absent(name.clone()), |topic| self.route_of(&topic, status))
        };
        found.into_iter().map(route).collect()
    }

    fn route_of(&self, topic: &Topic, status: RaftStatus) -> TopicRoute {
        let own = &self.context.config.broker_group;
        let queue_route = |(group, queue_count): &(BrokerGroupName, u16)| {
            let leads = group == own && status.serving;
            QueueRoute {
                broker_group: group.to_string(),
                queue_count: u32::from(*queue_count),
                leader: leads.then(|| self.advertised.clone()),
                term: if leads { status.term.get() } else { 0 },
            }
        };
        TopicRoute {
            topic: topic.name.to_string(),
            exists: true,
            r#type: wire_type(topic.kind).into(),
            topic_id: topic.id.get(),
            queues: topic.shares.iter().map(queue_route).collect(),
        }
    }
}

fn absent(topic: String) -> TopicRoute {
    TopicRoute { topic, ..TopicRoute::default() }
}

/// A topic's type on the wire.
pub(crate) fn wire_type(kind: TopicType) -> WireType {
    match kind {
        TopicType::Normal => WireType::Normal,
        TopicType::Fifo => WireType::Fifo,
        TopicType::Mixed => WireType::Mixed,
    }
}

#[tonic::async_trait]
impl Routes for RoutesService {
    type WatchRoutesStream =
        Pin<Box<dyn Stream<Item = Result<WatchRoutesResponse, Status>> + Send>>;

    async fn watch_routes(
        &self,
        request: Request<Streaming<WatchRoutesRequest>>,
    ) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let (responses, receiver) = mpsc::channel(WAITING_MAX);
        let watching = watch(self.clone(), request.into_inner(), responses);
        self.tasks.spawn(watching);
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn watch(
    service: RoutesService,
    mut requests: Streaming<WatchRoutesRequest>,
    responses: mpsc::Sender<Result<WatchRoutesResponse, Status>>,
) {
    let mut catalog = service.context.replica.catalog_version();
    let mut status = service.context.replica.raft_status();
    let mut told: BTreeMap<String, TopicRoute> = BTreeMap::new();
    let mut watched: BTreeSet<String> = BTreeSet::new();
    loop {
        let asked = tokio::select! {
            () = service.stop.cancelled() => return,
            () = responses.closed() => return,
            message = requests.message() => match message {
                Ok(Some(request)) => Some(request.topics),
                Ok(None) | Err(_) => return,
            },
            changed = catalog.changed() => if changed.is_ok() { None } else { return },
            changed = status.changed() => if changed.is_ok() { None } else { return },
        };
        let mut routes = Vec::new();
        if let Some(topics) = asked {
            if topics.len() > WATCHED_MAX {
                let fault = Fault::invalid(format!("{WATCHED_MAX} topics can be watched at most"));
                let status = fault.status();
                let refused = WatchRoutesResponse { status, routes: Vec::new() };
                responses.send(Ok(refused)).await.ok();
                return;
            }
            told.clear();
            // No topic will ever have a longer name: told once, there is nothing to watch.
            let fits = |name: &String| name.len() <= DERIVED_TOPIC_CHARS_MAX;
            let (names, too_long): (Vec<_>, Vec<_>) = topics.into_iter().partition(fits);
            watched = names.into_iter().collect();
            routes.extend(too_long.into_iter().map(absent));
        }
        for route in service.routes(watched.iter()) {
            if told.get(&route.topic) != Some(&route) {
                told.insert(route.topic.clone(), route.clone());
                routes.push(route);
            }
        }
        let is_news = !routes.is_empty();
        let response = WatchRoutesResponse { status: ok(), routes };
        if is_news {
            let sent = service.stop.run_until_cancelled(responses.send(Ok(response))).await;
            let Some(Ok(())) = sent else { return };
        }
    }
}
