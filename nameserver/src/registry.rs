//! Where brokers register: one stream each, told of the other broker groups in return.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use drumlin_proto::ids::BrokerGroupName;
use drumlin_proto::native::register_request::{Hello, Request as Told};
use drumlin_proto::native::registry_server::Registry;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    GroupRoute, RegisterRequest, RegisterResponse, Status as NativeStatus,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::memory::is_group_uuid;
use crate::route_table::{Refusal, StreamId};
use crate::shared::Shared;

/// Answers that may wait for a slow broker; behind them it is told only the newest.
const ANSWERS_MAX: usize = 16;
const NODE_CHARS_MAX: usize = 255;
/// Group UUIDs that were succeeded; operators make one at a time.
const SUCCEEDED_MAX: usize = 1024;

/// Why a registration is refused at the door.
#[derive(Debug, thiserror::Error)]
enum HelloError {
    #[error("the first message must be a hello")]
    Missing,
    #[error("this is cluster {ours}, not {told}")]
    OtherCluster { ours: String, told: String },
    #[error("{what} {told:?} is not valid")]
    Invalid { what: &'static str, told: String },
    #[error(transparent)]
    Refused(#[from] Refusal),
}

#[derive(Debug, Clone)]
pub(crate) struct RegistryService {
    pub(crate) shared: Arc<Shared>,
}

type Answers = mpsc::Sender<Result<RegisterResponse, Status>>;

#[tonic::async_trait]
impl Registry for RegistryService {
    type RegisterStream = Pin<Box<dyn Stream<Item = Result<RegisterResponse, Status>> + Send>>;

    async fn register(
        &self,
        request: Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let (answers, stream) = mpsc::channel(ANSWERS_MAX);
        let shared = Arc::clone(&self.shared);
        let peer = request.remote_addr();
        self.shared.tasks.spawn(async move {
            if let Err(error) = register(&shared, request.into_inner(), &answers).await {
                tracing::warn!(?peer, %error, "refused a broker's registration");
                // The broker may be gone already; then nobody is left to be told.
                answers.send(Ok(refusal(&error))).await.ok();
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn refusal(error: &HelloError) -> RegisterResponse {
    let code = match error {
        HelloError::Missing | HelloError::Invalid { .. } => Code::InvalidArgument,
        HelloError::OtherCluster { .. } => Code::PreconditionFailed,
        HelloError::Refused(Refusal::OtherGroupUuid { .. }) => Code::PreconditionFailed,
        HelloError::Refused(Refusal::TooMany { .. }) => Code::Busy,
        HelloError::Refused(Refusal::Replaced) => Code::Unavailable,
    };
    let status = NativeStatus { code: code.into(), message: error.to_string(), leader: None };
    RegisterResponse { status: Some(status), ..Default::default() }
}

fn check(shared: &Shared, hello: &Hello) -> Result<(), HelloError> {
    let invalid = |what, told: &str| HelloError::Invalid { what, told: told.to_owned() };
    if hello.cluster != shared.config.cluster {
        let ours = shared.config.cluster.clone();
        return Err(HelloError::OtherCluster { ours, told: hello.cluster.clone() });
    }
    BrokerGroupName::parse(&hello.broker_group)
        .map_err(|_| invalid("broker group", &hello.broker_group))?;
    if !is_group_uuid(&hello.group_uuid) {
        return Err(invalid("group UUID", &hello.group_uuid));
    }
    if hello.node.is_empty() || hello.node.len() > NODE_CHARS_MAX {
        return Err(invalid("node", &hello.node));
    }
    let usable = |port: u32| (1..=u32::from(u16::MAX)).contains(&port);
    for listener in &hello.listeners {
        let advertised = listener.advertised.as_ref();
        if !advertised.is_some_and(|address| !address.host.is_empty() && usable(address.port)) {
            return Err(invalid("advertised address of listener", &listener.name));
        }
    }
    Ok(())
}

/// One registration from its hello until its stream ends.
async fn register(
    shared: &Shared,
    mut inbound: Streaming<RegisterRequest>,
    answers: &Answers,
) -> Result<(), HelloError> {
    let first = tokio::select! {
        first = inbound.message() => first,
        () = shared.stop.cancelled() => return Ok(()),
    };
    let Ok(Some(RegisterRequest { request: Some(Told::Hello(hello)) })) = first else {
        return Err(HelloError::Missing);
    };
    check(shared, &hello)?;
    let stream = shared.directory.update(|table, now| table.hello(&hello, now))?;
    tell_succeeded(shared, &hello);
    let (broker_group, node) = (&hello.broker_group, &hello.node);
    let addresses = hello.listeners.iter().filter_map(|listener| listener.advertised.as_ref());
    let advertised = addresses.map(ToString::to_string).collect::<Vec<_>>().join(" ");
    tracing::info!(broker_group, node, advertised, "a broker registered");
    let result = exchange(shared, stream, broker_group, inbound, answers).await;
    shared.directory.update(|table, now| table.stream_broken(stream, now));
    tracing::info!(broker_group, node, "a broker's registration stream ended");
    result
}

/// Remembers which groups this one has succeeded.
fn tell_succeeded(shared: &Shared, hello: &Hello) {
    let uuids = hello.succeeds_group_uuids.iter().filter(|uuid| is_group_uuid(uuid));
    shared.succeeded.send_if_modified(|known| {
        let before = known.len();
        let told = uuids.map(|uuid| (hello.broker_group.clone(), uuid.clone()));
        known.extend(told.take(SUCCEEDED_MAX.saturating_sub(before)));
        known.len() > before
    });
}

/// Takes what a registered broker tells, and tells it of the others.
async fn exchange(
    shared: &Shared,
    stream: StreamId,
    broker_group: &str,
    mut inbound: Streaming<RegisterRequest>,
    answers: &Answers,
) -> Result<(), HelloError> {
    let mut changes = shared.directory.changes();
    let settles = tokio::time::sleep(shared.config.start_wait);
    tokio::pin!(settles);
    let mut told: Option<(Vec<GroupRoute>, bool)> = None;
    let answer = |(groups, settled): (Vec<GroupRoute>, bool), resend_topics| {
        Ok(RegisterResponse {
            status: Some(NativeStatus::default()),
            resend_topics,
            groups,
            settled,
        })
    };
    loop {
        let known = shared
            .directory
            .read(|table| (table.group_routes(broker_group), table.is_settled(Instant::now())));
        if told.as_ref() != Some(&known) {
            told = Some(known.clone());
            if answers.send(answer(known, false)).await.is_err() {
                return Ok(());
            }
        }
        // Both arms are cancellation-safe: a message or a change is taken only when it is ready.
        let message = tokio::select! {
            message = inbound.message() => message,
            changed = changes.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Ok(()),
            },
            () = &mut settles, if !settles.is_elapsed() => continue,
            () = shared.stop.cancelled() => return Ok(()),
        };
        let Ok(Some(RegisterRequest { request })) = message else { return Ok(()) };
        if take(shared, stream, request)? {
            let told = told.clone().unwrap_or_default();
            if answers.send(answer(told, true)).await.is_err() {
                return Ok(());
            }
        }
    }
}

/// Whether the broker must send all its topics.
fn take(shared: &Shared, stream: StreamId, told: Option<Told>) -> Result<bool, HelloError> {
    let resend = shared.directory.update(|table, now| match told {
        Some(Told::Heartbeat(beat)) => table.heartbeat(stream, &beat, now),
        Some(Told::Topics(topics)) => table.topics(stream, topics, now).map(|()| false),
        Some(Told::Hello(_)) | None => Ok(false),
    })?;
    Ok(resend)
}
