//! Routes pushed to SDK clients.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use drumlin_proto::native::routes_server::Routes;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    Status as NativeStatus, TopicRoute, WatchRoutesRequest, WatchRoutesResponse,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::lookup::ListenerAddress;
use crate::route_table::RouteTable;
use crate::shared::Shared;

/// Topics that one stream may watch.
const TOPICS_MAX: usize = 10_000;
const ANSWERS_MAX: usize = 4;

#[derive(Debug, Clone)]
pub(crate) struct RoutesService {
    pub(crate) shared: Arc<Shared>,
    pub(crate) listener: Arc<ListenerAddress>,
}

type Answers = mpsc::Sender<Result<WatchRoutesResponse, Status>>;

#[tonic::async_trait]
impl Routes for RoutesService {
    type WatchRoutesStream =
        Pin<Box<dyn Stream<Item = Result<WatchRoutesResponse, Status>> + Send>>;

    async fn watch_routes(
        &self,
        request: Request<Streaming<WatchRoutesRequest>>,
    ) -> Result<Response<Self::WatchRoutesStream>, Status> {
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        let (shared, listener) = (Arc::clone(&self.shared), Arc::clone(&self.listener));
        self.shared.tasks.spawn(async move {
            watch(&shared, &listener, request.into_inner(), &answers).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// What is to be told of a topic; nothing yet while brokers that may know it have not registered.
fn told_of(table: &RouteTable, topic: &str, listener: &str, now: Instant) -> Option<TopicRoute> {
    match table.topic(topic) {
        Some(definition) => Some(table.route(&definition, listener)),
        None if table.is_settled(now) && !table.is_empty() => Some(RouteTable::absent_route(topic)),
        None => None,
    }
}

async fn watch(
    shared: &Shared,
    listener: &ListenerAddress,
    mut inbound: Streaming<WatchRoutesRequest>,
    answers: &Answers,
) {
    let mut changes = shared.directory.changes();
    let mut watched: BTreeMap<String, Option<TopicRoute>> = BTreeMap::new();
    let settles_at = Instant::now() + shared.config.start_wait;
    let settles = tokio::time::sleep_until(settles_at.into());
    tokio::pin!(settles);
    loop {
        // All arms are cancellation-safe: a message or a change is taken only when it is ready.
        tokio::select! {
            request = inbound.message() => {
                let Ok(Some(request)) = request else { return };
                if request.topics.len() > TOPICS_MAX {
                    let message = format!("{TOPICS_MAX} topics may be watched at once");
                    let status = Some(NativeStatus { code: Code::InvalidArgument.into(), message, leader: None });
                    let refusal = WatchRoutesResponse { status, routes: Vec::new() };
                    answers.send(Ok(refusal)).await.ok();
                    return;
                }
                watched = request.topics.into_iter().map(|topic| (topic, None)).collect();
            }
            changed = changes.changed() => if changed.is_err() { return },
            () = &mut settles, if !settles.is_elapsed() => {}
            () = answers.closed() => return,
            () = shared.stop.cancelled() => return,
        }
        let now = Instant::now();
        let routes = shared.directory.read(|table| {
            let mut routes = Vec::new();
            for (topic, known) in &mut watched {
                let told = told_of(table, topic, &listener.name, now);
                if told.is_some() && told != *known {
                    routes.extend(told.clone());
                    *known = told;
                }
            }
            routes
        });
        if !routes.is_empty() {
            let answer = WatchRoutesResponse { status: Some(NativeStatus::default()), routes };
            if answers.send(Ok(answer)).await.is_err() {
                return;
            }
        }
    }
}
