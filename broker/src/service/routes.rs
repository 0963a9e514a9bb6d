//! `drumlin.v1.Routes`: where topics are, told at once and again whenever it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use drumlin_proto::ids::{DERIVED_TOPIC_CHARS_MAX, TopicName};
use drumlin_proto::native::routes_server::{Routes, RoutesServer};
use drumlin_proto::native::{TopicRoute, WatchRoutesRequest, WatchRoutesResponse};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::native::{Fault, REQUEST_BYTES_MAX, ok};
use crate::broker::Context;
use crate::catalog::Topic;
use crate::registration::wire_topic;
use crate::whereabouts::Vantage;

/// Topics that one stream may watch.
const WATCHED_MAX: usize = 10_000;
/// Responses that wait for the socket.
const WAITING_MAX: usize = 4;

/// Routes as seen from one listener.
#[derive(Clone, Debug)]
pub struct RoutesService {
    context: Arc<Context>,
    vantage: Vantage,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl RoutesService {
    /// Streams run as tasks of `tasks` and end when `stop` is cancelled.
    pub fn server(
        context: Arc<Context>,
        vantage: Vantage,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> RoutesServer<Self> {
        let service = Self { context, vantage, tasks, stop };
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
        let route = |(name, topic): (&String, Option<Arc<Topic>>)| match topic {
            Some(topic) => self.vantage.route(&wire_topic(&topic)),
            None => absent(name.clone()),
        };
        found.into_iter().map(route).collect()
    }
}

fn absent(topic: String) -> TopicRoute {
    TopicRoute { topic, ..TopicRoute::default() }
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
    let mut places = service.vantage.changes();
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
            changed = places.changed() => if changed.is_some() { None } else { return },
        };
        let mut routes = Vec::new();
        if let Some(topics) = asked {
            if topics.len() > WATCHED_MAX {
                let fault = Fault::invalid(format!("{WATCHED_MAX} topics can be watched at most"));
                let status = fault.status(&service.vantage);
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
