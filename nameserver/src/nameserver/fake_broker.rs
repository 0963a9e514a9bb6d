//! A broker group's leader as tests want it: registers, records calls, answers as told.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use drumlin_proto::native::admin_server::{Admin, AdminServer};
use drumlin_proto::native::register_request::{Heartbeat, Hello, Request as Told, Topics};
use drumlin_proto::native::registry_client::RegistryClient;
use drumlin_proto::native::{self as api, Topic, TopicShare, TopicType};
use drumlin_proto::rocketmq::messaging_service_server::{MessagingService, MessagingServiceServer};
use drumlin_proto::rocketmq::{self as mq, Code};
use futures::Stream;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Frames = ReceiverStream<Result<mq::ReceiveMessageResponse, Status>>;
type Commands = ReceiverStream<Result<mq::TelemetryCommand, Status>>;

/// One Telemetry stream as the broker sees it.
pub(super) struct TelemetryCall {
    pub(super) metadata: MetadataMap,
    pub(super) inbound: Streaming<mq::TelemetryCommand>,
    pub(super) answers: mpsc::Sender<Result<mq::TelemetryCommand, Status>>,
}

/// What the fake's services share with the test.
pub(super) struct Calls {
    pub(super) sends: Mutex<Vec<(MetadataMap, mq::SendMessageRequest)>>,
    pub(super) acks: Mutex<Vec<mq::AckMessageRequest>>,
    pub(super) created: Mutex<Vec<api::CreateTopicRequest>>,
    /// Sends are answered as permits come.
    pub(super) send_permits: Semaphore,
    pub(super) frames: Mutex<Option<Frames>>,
    pub(super) telemetry: mpsc::Sender<TelemetryCall>,
}

pub(super) struct FakeBroker {
    pub(super) name: String,
    pub(super) node: String,
    /// That it leads in.
    pub(super) term: u64,
    pub(super) address: SocketAddr,
    pub(super) calls: Arc<Calls>,
    pub(super) telemetry: mpsc::Receiver<TelemetryCall>,
    /// Of its own, so that its connections break when it goes.
    runtime: Option<Runtime>,
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(super) fn ok() -> Option<mq::Status> {
    Some(mq::Status { code: Code::Ok.into(), message: String::new() })
}

pub(super) fn topic(name: &str, shares: &[(&str, u32)]) -> Topic {
    let share = |(group, queue_count): &(&str, u32)| TopicShare {
        broker_group: (*group).into(),
        queue_count: *queue_count,
    };
    Topic {
        name: name.into(),
        topic_id: 1,
        r#type: TopicType::Mixed.into(),
        shares: shares.iter().map(share).collect(),
        version: 1,
        created_ms: 1,
        ..Topic::default()
    }
}

impl FakeBroker {
    pub(super) async fn start(name: &str) -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.spawn(TcpListener::bind("127.0.0.1:0")).await.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let (telemetry_sender, telemetry) = mpsc::channel(4);
        let calls = Arc::new(Calls {
            sends: Mutex::default(),
            acks: Mutex::default(),
            created: Mutex::default(),
            send_permits: Semaphore::new(100),
            frames: Mutex::default(),
            telemetry: telemetry_sender,
        });
        let server = tonic::transport::Server::builder()
            .add_service(MessagingServiceServer::new(Service(Arc::clone(&calls))))
            .add_service(AdminServer::new(Service(Arc::clone(&calls))));
        runtime.spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        let (name, node) = (name.to_owned(), format!("{name}-0"));
        Self { name, node, term: 1, address, calls, telemetry, runtime: Some(runtime) }
    }

    /// The one that leads the same broker group after this one.
    pub(super) async fn next(&self) -> Self {
        let mut next = Self::start(&self.name).await;
        next.node = format!("{}-{}", self.name, self.term);
        next.term = self.term + 1;
        next
    }

    pub(super) fn hello(&self) -> Hello {
        let listener = |name: &str, host: &str| api::Listener {
            name: name.into(),
            advertised: Some(api::Address {
                host: host.into(),
                port: u32::from(self.address.port()),
            }),
        };
        Hello {
            cluster: "drumlin".into(),
            broker_group: self.name.clone(),
            group_uuid: "00-01".into(),
            node: self.node.clone(),
            listeners: vec![listener("internal", "127.0.0.1"), listener("external", "localhost")],
            catalog: self.name == "a",
            succeeds_group_uuids: Vec::new(),
        }
    }

    /// Registers as leader in its term with these topics.
    pub(super) async fn register(&self, nameserver: SocketAddr, topics: Vec<Topic>) -> Registered {
        let mut registered = Registered::open(nameserver, self.hello()).await;
        let told = Topics { full: true, version: 1, changed: topics, deleted: Vec::new() };
        registered.tell(Told::Topics(told)).await;
        registered.lead(self.term, 1).await;
        assert_eq!(registered.answer().await.status.unwrap().code(), api::status::Code::Ok);
        registered
    }
}

/// An open registration stream; dropping it breaks it.
pub(super) struct Registered {
    told: mpsc::Sender<api::RegisterRequest>,
    answers: Streaming<api::RegisterResponse>,
}

impl Registered {
    pub(super) async fn open(nameserver: SocketAddr, hello: Hello) -> Self {
        let (told, stream) = mpsc::channel(8);
        let request = Some(Told::Hello(hello));
        told.send(api::RegisterRequest { request }).await.unwrap();
        let mut client = RegistryClient::connect(format!("http://{nameserver}")).await.unwrap();
        let answers = client.register(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { told, answers }
    }

    pub(super) async fn tell(&self, told: Told) {
        self.told.send(api::RegisterRequest { request: Some(told) }).await.unwrap();
    }

    pub(super) async fn lead(&self, term: u64, topics_version: u64) {
        self.tell(Told::Heartbeat(Heartbeat { term, leader: true, topics_version })).await;
    }

    pub(super) async fn answer(&mut self) -> api::RegisterResponse {
        self.answers.message().await.unwrap().expect("an answer")
    }
}

struct Service(Arc<Calls>);

macro_rules! not_faked {
    ($($rpc:ident: $request:ty => $response:ty;)*) => {
        $(
            fn $rpc<'life, 'call>(
                &'life self,
                _request: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'call>>
            where
                'life: 'call,
                Self: 'call,
            {
                Box::pin(std::future::ready(Err(Status::unimplemented(stringify!($rpc)))))
            }
        )*
    };
}

#[tonic::async_trait]
impl MessagingService for Service {
    type ReceiveMessageStream = Answers<mq::ReceiveMessageResponse>;
    type PullMessageStream = Answers<mq::PullMessageResponse>;
    type TelemetryStream = Commands;

    async fn heartbeat(
        &self,
        _request: Request<mq::HeartbeatRequest>,
    ) -> Result<Response<mq::HeartbeatResponse>, Status> {
        Ok(Response::new(mq::HeartbeatResponse { status: ok() }))
    }

    async fn send_message(
        &self,
        request: Request<mq::SendMessageRequest>,
    ) -> Result<Response<mq::SendMessageResponse>, Status> {
        let (metadata, _, send) = request.into_parts();
        self.0.sends.lock().push((metadata, send));
        self.0.send_permits.acquire().await.expect("never closed").forget();
        Ok(Response::new(mq::SendMessageResponse { status: ok(), entries: Vec::new() }))
    }

    async fn receive_message(
        &self,
        _request: Request<mq::ReceiveMessageRequest>,
    ) -> Result<Response<Self::ReceiveMessageStream>, Status> {
        let frames = self.0.frames.lock().take();
        let frames = frames.ok_or_else(|| Status::internal("no frames were prepared"))?;
        Ok(Response::new(Box::pin(frames)))
    }

    async fn ack_message(
        &self,
        request: Request<mq::AckMessageRequest>,
    ) -> Result<Response<mq::AckMessageResponse>, Status> {
        let ack = request.into_inner();
        let entry = |entry: &mq::AckMessageEntry| mq::AckMessageResultEntry {
            message_id: entry.message_id.clone(),
            receipt_handle: entry.receipt_handle.clone(),
            status: ok(),
        };
        let entries = ack.entries.iter().map(entry).collect();
        self.0.acks.lock().push(ack);
        Ok(Response::new(mq::AckMessageResponse { status: ok(), entries }))
    }

    async fn telemetry(
        &self,
        request: Request<Streaming<mq::TelemetryCommand>>,
    ) -> Result<Response<Self::TelemetryStream>, Status> {
        let (metadata, _, inbound) = request.into_parts();
        let (answers, stream) = mpsc::channel(4);
        let call = TelemetryCall { metadata, inbound, answers };
        self.0.telemetry.send(call).await.map_err(|_| Status::internal("nobody looks"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    not_faked! {
        query_route: mq::QueryRouteRequest => mq::QueryRouteResponse;
        query_assignment: mq::QueryAssignmentRequest => mq::QueryAssignmentResponse;
        forward_message_to_dead_letter_queue: mq::ForwardMessageToDeadLetterQueueRequest
            => mq::ForwardMessageToDeadLetterQueueResponse;
        pull_message: mq::PullMessageRequest => Self::PullMessageStream;
        update_offset: mq::UpdateOffsetRequest => mq::UpdateOffsetResponse;
        get_offset: mq::GetOffsetRequest => mq::GetOffsetResponse;
        query_offset: mq::QueryOffsetRequest => mq::QueryOffsetResponse;
        end_transaction: mq::EndTransactionRequest => mq::EndTransactionResponse;
        notify_client_termination: mq::NotifyClientTerminationRequest
            => mq::NotifyClientTerminationResponse;
        change_invisible_duration: mq::ChangeInvisibleDurationRequest
            => mq::ChangeInvisibleDurationResponse;
        recall_message: mq::RecallMessageRequest => mq::RecallMessageResponse;
        sync_lite_subscription: mq::SyncLiteSubscriptionRequest
            => mq::SyncLiteSubscriptionResponse;
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn create_topic(
        &self,
        request: Request<api::CreateTopicRequest>,
    ) -> Result<Response<api::CreateTopicResponse>, Status> {
        let create = request.into_inner();
        let created = topic(&create.name, &[("a", create.queue_count)]);
        self.0.created.lock().push(create);
        let status = Some(api::Status::default());
        Ok(Response::new(api::CreateTopicResponse { status, topic: Some(created) }))
    }

    async fn describe_topic(
        &self,
        request: Request<api::DescribeTopicRequest>,
    ) -> Result<Response<api::DescribeTopicResponse>, Status> {
        let port = request.local_addr().map_or(0, |address| address.port());
        let queue = api::QueueState { max_offset: u64::from(port), ..Default::default() };
        Ok(Response::new(api::DescribeTopicResponse {
            status: Some(api::Status::default()),
            topic: Some(topic(&request.get_ref().name, &[])),
            queues: vec![queue],
        }))
    }

    not_faked! {
        update_topic: api::UpdateTopicRequest => api::UpdateTopicResponse;
        create_group: api::CreateGroupRequest => api::CreateGroupResponse;
        delete_topic: api::DeleteTopicRequest => api::DeleteTopicResponse;
        list_topics: api::ListTopicsRequest => api::ListTopicsResponse;
        query_offsets: api::QueryOffsetsRequest => api::QueryOffsetsResponse;
        list_groups: api::ListGroupsRequest => api::ListGroupsResponse;
        commit_offset: api::CommitOffsetRequest => api::CommitOffsetResponse;
        get_committed_offset: api::GetCommittedOffsetRequest
            => api::GetCommittedOffsetResponse;
        describe_broker: api::DescribeBrokerRequest => api::DescribeBrokerResponse;
    }
}
