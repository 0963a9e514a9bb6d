//! The edge as a client sees it: a real log and replica, real sockets.

use std::time::Duration;

use drumlin_proto::ids::BrokerGroupName;
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::*;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Server};

use super::*;
use crate::broker::opening::{open_data_dir, start_replica};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::replica::start::Running;
use crate::service::creations::Creations;
use crate::service::definitions::Definitions;

mod forwarding;
mod hostile;
mod receiving;
mod routing;
mod sending;
mod sessions;

const TOPIC: &str = "orders";
const GROUP: &str = "readers";

/// One broker without its configuration's detours.
struct Fixture {
    edge: Arc<Edge>,
    client: MessagingServiceClient<Channel>,
    address: native::Address,
    /// What nameservers tell of other broker groups.
    others: watch::Sender<Arc<Vec<native::GroupRoute>>>,
    server: JoinHandle<()>,
    running: Running,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

impl Fixture {
    async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), change).await
    }

    async fn start_in(dir: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::embedded(dir.path().to_owned());
        config.segment_bytes = 16 << 20;
        config.prepared_bytes = 1 << 20;
        config.invisible_min = Duration::from_millis(10);
        change(&mut config);
        let metrics = Arc::new(Metrics::default());
        let data_dir = open_data_dir(&config).unwrap();
        let (replica, running) = start_replica(&config, &data_dir, &metrics).await.unwrap();
        let identity = data_dir.identity().clone();
        let context = Arc::new(Context {
            config,
            identity,
            replica,
            metrics,
            creations: Creations::default(),
            definitions: Definitions::default(),
        });
        let stop = CancellationToken::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = native::Address { host: "127.0.0.1".into(), port: u32::from(port) };
        let others = watch::Sender::new(Arc::default());
        let advertised = Some(address.clone());
        let named = native::Listener { name: "external".into(), advertised };
        let whereabouts = Whereabouts::new(
            context.config.broker_group.to_string(),
            vec![named],
            context.replica.raft_status(),
            context.replica.peers(),
            others.subscribe(),
        );
        let edge = Edge::start(context, whereabouts, stop.clone());
        let router = Server::builder()
            .add_service(edge.messaging("external", address.clone()))
            .add_service(edge.admin())
            .add_service(edge.forwarding());
        let stopped = stop.clone().cancelled_owned();
        let server = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            router.serve_with_incoming_shutdown(incoming, stopped).await.unwrap();
        });
        let client = MessagingServiceClient::connect(format!("http://127.0.0.1:{port}"))
            .await
            .unwrap()
            .max_encoding_message_size(64 << 20)
            .max_decoding_message_size(64 << 20);
        Self { edge, client, address, others, server, running, stop, dir }
    }

    fn service(&self) -> Service {
        let (edge, advertised) = (self.edge.clone(), self.address.clone());
        Service { edge, listener: "external".into(), advertised }
    }

    async fn stop(self) -> tempfile::TempDir {
        self.stop.cancel();
        drop(self.client);
        self.server.await.unwrap();
        self.edge.stopped().await;
        drop(self.edge);
        self.running.shutdown().await;
        self.dir
    }

    async fn restart(self) -> Self {
        Self::start_in(self.stop().await, |_| ()).await
    }

    /// Creates a topic by asking for its route.
    async fn topic(&self, name: &str) -> Vec<MessageQueue> {
        let request = QueryRouteRequest { topic: resource(name), endpoints: None };
        let answer = self.client.clone().query_route(call(request)).await.unwrap().into_inner();
        assert_eq!(code(&answer.status), Code::Ok, "{answer:?}");
        answer.message_queues
    }

    async fn send(&self, messages: Vec<Message>) -> SendMessageResponse {
        let request = call(SendMessageRequest { messages });
        self.client.clone().send_message(request).await.unwrap().into_inner()
    }

    /// Sends messages that must be stored.
    async fn store(&self, messages: Vec<Message>) -> SendMessageResponse {
        let answer = self.send(messages).await;
        assert_eq!(code(&answer.status), Code::Ok, "{answer:?}");
        answer
    }

    async fn receive(&self, request: ReceiveMessageRequest) -> Received {
        let stream = self.client.clone().receive_message(slow_call(request)).await.unwrap();
        frames(stream.into_inner()).await
    }

    async fn ack(&self, message: &Message) -> Code {
        let answer = self.ack_all(&[message]).await;
        assert_eq!(answer.entries.len(), 1);
        code(&answer.status)
    }

    async fn ack_all(&self, messages: &[&Message]) -> AckMessageResponse {
        let entry = |message: &&Message| AckMessageEntry {
            message_id: system(message).message_id.clone(),
            receipt_handle: system(message).receipt_handle().to_owned(),
            lite_topic: None,
        };
        let request = AckMessageRequest {
            group: resource(GROUP),
            topic: resource(TOPIC),
            entries: messages.iter().map(entry).collect(),
        };
        self.client.clone().ack_message(call(request)).await.unwrap().into_inner()
    }

    async fn change(
        &self,
        receipt_handle: &str,
        invisible: Duration,
    ) -> ChangeInvisibleDurationResponse {
        let request = ChangeInvisibleDurationRequest {
            group: resource(GROUP),
            topic: resource(TOPIC),
            receipt_handle: receipt_handle.to_owned(),
            invisible_duration: wire(invisible),
            message_id: "ignored".into(),
            ..ChangeInvisibleDurationRequest::default()
        };
        self.client.clone().change_invisible_duration(call(request)).await.unwrap().into_inner()
    }
}

/// The frames of one ReceiveMessage call.
#[derive(Debug)]
struct Received {
    status: Status,
    messages: Vec<Message>,
}

impl Received {
    fn code(&self) -> Code {
        self.status.code()
    }

    fn bodies(&self) -> Vec<&str> {
        self.messages.iter().map(|message| std::str::from_utf8(&message.body).unwrap()).collect()
    }
}

/// Reads a stream to its end: a status, messages, a delivery timestamp, in this order.
async fn frames(mut stream: tonic::Streaming<ReceiveMessageResponse>) -> Received {
    let first = stream.message().await.unwrap().unwrap().content;
    let Some(Content::Status(status)) = first else { panic!("begins with {first:?}") };
    let mut messages = Vec::new();
    loop {
        match stream.message().await.unwrap().unwrap().content {
            Some(Content::Message(message)) => messages.push(message),
            Some(Content::DeliveryTimestamp(time)) => {
                assert!(time.seconds > 0);
                break;
            }
            other => panic!("{other:?} within the messages"),
        }
    }
    assert!(stream.message().await.unwrap().is_none(), "frames behind the last");
    Received { status, messages }
}

fn call_as<T>(client_id: &'static str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-mq-client-id", client_id.parse().unwrap());
    request.set_timeout(Duration::from_secs(10));
    request
}

fn call<T>(message: T) -> Request<T> {
    call_as("client-1", message)
}

fn slow_call<T>(message: T) -> Request<T> {
    let mut request = call(message);
    request.set_timeout(Duration::from_secs(30));
    request
}

fn resource(name: &str) -> Option<Resource> {
    Some(Resource { resource_namespace: String::new(), name: name.into() })
}

fn wire(duration: Duration) -> Option<prost_types::Duration> {
    Some(prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap(),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap(),
    })
}

fn code(status: &Option<Status>) -> Code {
    status.as_ref().map_or(Code::Unspecified, Status::code)
}

fn system(message: &Message) -> &SystemProperties {
    message.system_properties.as_ref().unwrap()
}

fn message(body: &str) -> Message {
    let system = SystemProperties {
        message_id: format!("01{body}"),
        message_type: MessageType::Normal.into(),
        body_encoding: Encoding::Identity.into(),
        born_host: "laptop".into(),
        ..SystemProperties::default()
    };
    Message {
        topic: resource(TOPIC),
        user_properties: Default::default(),
        system_properties: Some(system),
        body: body.to_owned().into(),
    }
}

fn tagged(body: &str, tag: &str) -> Message {
    let mut message = message(body);
    message.system_properties.as_mut().unwrap().tag = Some(tag.into());
    message
}

fn grouped(body: &str, message_group: &str) -> Message {
    let mut message = message(body);
    message.system_properties.as_mut().unwrap().message_group = Some(message_group.into());
    message
}

/// A simple consumer's poll.
fn poll(wait: Duration, invisible: Duration) -> ReceiveMessageRequest {
    ReceiveMessageRequest {
        group: resource(GROUP),
        message_queue: Some(MessageQueue { topic: resource(TOPIC), ..MessageQueue::default() }),
        filter_expression: Some(FilterExpression {
            r#type: FilterType::Tag.into(),
            expression: "*".into(),
        }),
        batch_size: 32,
        invisible_duration: wire(invisible),
        auto_renew: false,
        long_polling_timeout: wire(wait),
        attempt_id: None,
    }
}

/// A push consumer's poll.
fn push_poll(wait: Duration) -> ReceiveMessageRequest {
    ReceiveMessageRequest {
        invisible_duration: None,
        auto_renew: true,
        attempt_id: Some("b1946ac9-2492-4d23-8b5a-bc6a0f4f3d2e".into()),
        ..poll(wait, Duration::ZERO)
    }
}

fn filtered(expression: &str, wait: Duration) -> ReceiveMessageRequest {
    let expression =
        FilterExpression { r#type: FilterType::Tag.into(), expression: expression.into() };
    ReceiveMessageRequest {
        filter_expression: Some(expression),
        ..poll(wait, Duration::from_secs(30))
    }
}

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);
const LEASE: Duration = Duration::from_secs(30);

fn broker_group() -> BrokerGroupName {
    BrokerGroupName::parse("broker-a").unwrap()
}
