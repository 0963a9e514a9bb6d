//! `apache.rocketmq.v2` as official RocketMQ 5 clients speak it: a thin edge over the replica.
//!
//! Turns calls into items and items' outcomes into statuses. A business fault is a `Status` in an
//! OK reply, never a gRPC error. It holds no messages and no offsets; what it owns is who is
//! connected, what is being planned for polls in flight, and the tasks behind long polls.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use drumlin_proto::forward::{Forwarder, NOT_LED};
use drumlin_proto::native;
use drumlin_proto::native::forwarding_server::ForwardingServer;
use drumlin_proto::rocketmq::admin_server::AdminServer;
use drumlin_proto::rocketmq::messaging_service_server::MessagingServiceServer;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response};

use crate::broker::Context;
use crate::metrics::labels::Processor;
use crate::replica::{Applied, Item, ProposeError, Replica};
use crate::service::clients::Clients;
use crate::whereabouts::Whereabouts;

mod admin;
mod alive;
mod caller;
mod carry;
mod delivery;
mod handle;
mod lease;
mod messages;
mod messaging;
mod plan;
mod poll;
mod presence;
mod receive;
mod renew;
mod route;
mod send;
mod settings;
mod status;
mod telemetry;
#[cfg(test)]
mod tests;
mod unsent;
mod validate;

use caller::Caller;
use drumlin_proto::rocketmq::Code;
use plan::Plans;
use status::{Answer, Fault};
use unsent::Unsent;

/// A body of 4 MiB makes a larger request.
const REQUEST_BYTES_MAX: usize = 16 << 20;
/// Long polls waiting at once.
const POLLS_MAX: usize = 10_000;
/// Polls that read queues at once, each on a thread that may wait for the disk.
const SCANS_MAX: usize = 8;
/// How long a call waits for a leader, within its deadline.
const ELECTION_WAIT: Duration = Duration::from_secs(5);
/// Left of a deadline for the reply's way.
const REPLY_MARGIN: Duration = Duration::from_millis(500);

/// What all listeners of one broker share.
#[derive(Debug)]
pub struct Edge {
    context: Arc<Context>,
    clients: Clients,
    plans: Plans,
    polls: Semaphore,
    /// Of polls that read queues to filter them.
    scans: Semaphore,
    /// Queue that the next message without a message group goes to, over all topics.
    next_queue: AtomicU32,
    unsent: Unsent,
    whereabouts: Whereabouts,
    forwarder: Forwarder,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Edge {
    /// Starts the tasks that renew leases and tell leaders which clients live; they run until `stop`.
    pub fn start(
        context: Arc<Context>,
        whereabouts: Whereabouts,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let edge = Arc::new(Self {
            context,
            clients: Clients::default(),
            plans: Plans::default(),
            polls: Semaphore::new(POLLS_MAX),
            scans: Semaphore::new(SCANS_MAX),
            next_queue: AtomicU32::new(0),
            unsent: Unsent::default(),
            whereabouts,
            forwarder: Forwarder::default(),
            tasks: TaskTracker::new(),
            stop,
        });
        edge.tasks.spawn(renew::renew_while_alive(edge.clone()));
        edge.tasks.spawn(unsent::give_back_all(edge.clone()));
        edge.tasks.spawn(alive::tell_leaders(edge.clone()));
        edge
    }

    /// The service of the listener of this name, which clients reach at `advertised`.
    pub fn messaging(
        self: &Arc<Self>,
        listener: &str,
        advertised: native::Address,
    ) -> MessagingServiceServer<Service> {
        let service = Service { edge: self.clone(), listener: listener.into(), advertised };
        MessagingServiceServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    /// What other brokers tell of clients whose calls they send here.
    pub fn forwarding(self: &Arc<Self>) -> ForwardingServer<alive::Forwarding> {
        let service = alive::Forwarding::new(self.clone());
        ForwardingServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    /// RocketMQ's own administration, which is not built yet.
    pub fn admin(&self) -> AdminServer<admin::Admin> {
        AdminServer::new(admin::Admin).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    pub fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Waits for the tasks, once the token given at start was cancelled.
    pub async fn stopped(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.give_back().await;
    }

    fn replica(&self) -> &Replica {
        &self.context.replica
    }

    /// Proposes at once, in the order of the calls, and waits for the outcome until the caller must
    /// be answered.
    fn decided(
        &self,
        item: Item,
        caller: &Caller,
    ) -> impl Future<Output = Result<Result<Applied, ProposeError>, Fault>> + Send + use<> {
        let until = caller.answer_by(Instant::now());
        let outcome = self.replica().propose(item, Some(until));
        async move { timeout_at(until, outcome).await.map_err(|_| Fault::late()) }
    }

    /// Runs one unary call: metadata first, then the work; every fault becomes a status.
    async fn call<Q, A: Answer, F>(
        self: &Arc<Self>,
        listener: &Arc<str>,
        rpc: &'static str,
        request: Request<Q>,
        work: impl FnOnce(Arc<Caller>, Q) -> F,
    ) -> Response<A>
    where
        F: Future<Output = Result<A, Fault>>,
    {
        let started = Instant::now();
        let _working = self.context.metrics.in_progress(Processor::of_call(rpc));
        let caller = Caller::from_metadata(request.metadata(), listener, started).map(Arc::new);
        let mut not_led = false;
        let mut answer = match &caller {
            Ok(caller) => {
                self.clients.touch(&caller.client_id, started);
                work(caller.clone(), request.into_inner()).await
            }
            Err(fault) => Err(fault.clone()),
        }
        .unwrap_or_else(|fault| {
            not_led = fault.not_led;
            let mut answer = A::default();
            *answer.status_mut() = Some(fault.status());
            answer
        });
        let code = match (answer.status_mut(), &caller) {
            (Some(status), Ok(caller)) => {
                caller.bearable(status);
                status.code()
            }
            (status, _) => status.as_ref().map_or(Code::Unspecified, |status| status.code()),
        };
        self.note(rpc, caller.as_deref().ok(), code, started);
        told(answer, not_led)
    }

    /// One line and one sample per call.
    fn note(&self, rpc: &'static str, caller: Option<&Caller>, code: Code, started: Instant) {
        let took = started.elapsed();
        let long_polling = rpc == "ReceiveMessage";
        self.context.metrics.rpc(rpc, code.as_str_name(), long_polling, took);
        tracing::debug!(
            rpc,
            client = caller.map_or("", |caller| caller.client_id.as_str()),
            language = caller.map_or("", |caller| caller.language.as_str()),
            request_id = caller.map_or("", |caller| caller.request_id.as_str()),
            version = caller.map_or("", |caller| caller.version.as_str()),
            timeout_ms = caller.and_then(|caller| caller.remaining(started)).map(|d| d.as_millis()),
            code = code.as_str_name(),
            ?took,
            "call"
        );
    }
}

/// An answer, and for whoever sent the call on whether it is to be sent elsewhere.
pub(crate) fn told<A>(answer: A, not_led: bool) -> Response<A> {
    let mut response = Response::new(answer);
    if not_led {
        response.metadata_mut().insert(NOT_LED, MetadataValue::from_static("1"));
    }
    response
}

/// One listener's service.
#[derive(Clone, Debug)]
pub struct Service {
    edge: Arc<Edge>,
    listener: Arc<str>,
    /// Where clients of this listener reach this broker.
    advertised: native::Address,
}

impl Service {
    async fn call<Q, A: Answer, F>(
        &self,
        rpc: &'static str,
        request: Request<Q>,
        work: impl FnOnce(Arc<Caller>, Q) -> F,
    ) -> Response<A>
    where
        F: Future<Output = Result<A, Fault>>,
    {
        self.edge.call(&self.listener, rpc, request, work).await
    }
}
