use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::register_request::{Hello, Request as Told, Topics};
use drumlin_proto::native::routes_client::RoutesClient;
use drumlin_proto::native::status::Code as NativeCode;
use drumlin_proto::native::{self as api, WatchRoutesRequest};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{self as mq, AddressScheme, Code};
use drumlin_proto::route::place_of_message_group;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::fake_broker::{FakeBroker, Registered, ok, topic};
use super::*;
use crate::config::RouteMode;

type Client = MessagingServiceClient<Channel>;

struct Running {
    nameserver: Nameserver,
    address: SocketAddr,
    dir: TempDir,
}

async fn start(change: impl FnOnce(&mut Config)) -> Running {
    start_in(tempfile::tempdir().unwrap(), change).await
}

async fn start_in(dir: TempDir, change: impl FnOnce(&mut Config)) -> Running {
    let mut config = Config::embedded(dir.path().join("nameserver"));
    config.query_hold = Duration::from_millis(100);
    config.broken_grace = Duration::from_millis(20);
    change(&mut config);
    let nameserver = Nameserver::start(config).await.unwrap();
    let address = nameserver.addresses()[0];
    Running { nameserver, address, dir }
}

/// A nameserver with the leaders of the broker groups that hold topic `orders`, and a client that
/// sees all its queues.
struct Scene {
    running: Running,
    client: Client,
    brokers: Vec<FakeBroker>,
    registered: Vec<Registered>,
}

impl Scene {
    async fn start(shares: &[(&str, u32)], change: impl FnOnce(&mut Config)) -> Self {
        let running = start(change).await;
        let (mut brokers, mut registered) = (Vec::new(), Vec::new());
        for (name, _) in shares {
            let broker = FakeBroker::start(name).await;
            registered.push(broker.register(running.address, vec![topic("orders", shares)]).await);
            brokers.push(broker);
        }
        let mut client = connect(running.address).await;
        let count: u32 = shares.iter().map(|(_, queue_count)| queue_count).sum();
        let whole = |answer: &Result<mq::QueryRouteResponse, Status>| {
            let queues = answer.as_ref().map_or(0, |answer| answer.message_queues.len());
            u32::try_from(queues) == Ok(count)
        };
        query_until(&mut client, "orders", whole).await;
        Self { running, client, brokers, registered }
    }
}

async fn connect(address: SocketAddr) -> Client {
    MessagingServiceClient::connect(format!("http://{address}")).await.unwrap()
}

fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-mq-client-id", "me".parse().unwrap());
    request
}

fn resource(name: &str) -> Option<mq::Resource> {
    Some(mq::Resource { resource_namespace: String::new(), name: name.into() })
}

async fn query(client: &mut Client, name: &str) -> Result<mq::QueryRouteResponse, Status> {
    let query = mq::QueryRouteRequest { topic: resource(name), endpoints: None };
    client.query_route(call(query)).await.map(tonic::Response::into_inner)
}

/// Asks again until the answer is as wanted.
async fn query_until(
    client: &mut Client,
    name: &str,
    wanted: impl Fn(&Result<mq::QueryRouteResponse, Status>) -> bool,
) {
    loop {
        if wanted(&query(client, name).await) {
            return;
        }
    }
}

fn code(answer: &Result<mq::QueryRouteResponse, Status>) -> Option<Code> {
    answer.as_ref().ok()?.status.as_ref().map(mq::Status::code)
}

fn addresses(answer: &mq::QueryRouteResponse) -> Vec<(String, AddressScheme, String, i32)> {
    let one = |queue: &mq::MessageQueue| {
        let broker = queue.broker.clone().unwrap();
        let endpoints = broker.endpoints.unwrap();
        let address = endpoints.addresses[0].clone();
        (broker.name, endpoints.scheme(), address.host, address.port)
    };
    answer.message_queues.iter().map(one).collect()
}

fn message(topic: &str, message_group: Option<&str>) -> mq::SendMessageRequest {
    let message = mq::Message {
        topic: resource(topic),
        system_properties: Some(mq::SystemProperties {
            message_group: message_group.map(str::to_owned),
            ..Default::default()
        }),
        ..Default::default()
    };
    mq::SendMessageRequest { messages: vec![message] }
}

#[tokio::test]
async fn a_query_is_answered_with_addresses_of_the_listener_it_came_in_on() {
    let running = start(|config| {
        let external = config.listeners[0].clone();
        config.listeners.push(ListenerConfig { name: "internal".into(), ..external });
    })
    .await;
    let broker = FakeBroker::start("a").await;
    let _registered = broker.register(running.address, vec![topic("orders", &[("a", 2)])]).await;
    let port = i32::from(broker.address.port());
    let listeners = running.nameserver.addresses();
    for (listener, scheme, host) in [
        (listeners[0], AddressScheme::DomainName, "localhost"),
        (listeners[1], AddressScheme::IPv4, "127.0.0.1"),
    ] {
        let mut client = connect(listener).await;
        query_until(&mut client, "orders", |answer| code(answer) == Some(Code::Ok)).await;
        let answer = query(&mut client, "orders").await.unwrap();
        let expected = ("a".to_owned(), scheme, host.to_owned(), port);
        assert_eq!(addresses(&answer), [expected.clone(), expected]);
    }
}

#[tokio::test]
async fn deltas_change_routes_and_a_broken_stream_ends_them() {
    let running = start(|config| config.auto_create_topics = false).await;
    let mut client = connect(running.address).await;
    let unavailable = query(&mut client, "orders").await.unwrap_err();
    assert_eq!(unavailable.code(), tonic::Code::Unavailable, "nobody has registered yet");
    let broker = FakeBroker::start("a").await;
    let registered = broker.register(running.address, vec![topic("orders", &[("a", 2)])]).await;
    query_until(&mut client, "orders", |answer| code(answer) == Some(Code::Ok)).await;
    let absent = query(&mut client, "paid").await.unwrap();
    assert_eq!(absent.status.as_ref().unwrap().code(), Code::TopicNotFound);
    let text = "CODE: 17  DESC: No topic route info in name server for the topic: paid";
    assert_eq!(absent.status.unwrap().message, text);
    let delta = Topics {
        full: false,
        version: 2,
        changed: vec![topic("paid", &[("a", 1)])],
        deleted: vec!["orders".into()],
    };
    registered.tell(Told::Topics(delta)).await;
    query_until(&mut client, "paid", |answer| code(answer) == Some(Code::Ok)).await;
    let gone = query(&mut client, "orders").await;
    assert_eq!(code(&gone), Some(Code::TopicNotFound));
    drop(registered);
    let ended = |answer: &Result<_, Status>| {
        answer.as_ref().is_err_and(|status| status.code() == tonic::Code::Unavailable)
    };
    query_until(&mut client, "paid", ended).await;
}

#[tokio::test]
async fn a_nameserver_that_just_started_waits_for_the_brokers_it_remembers() {
    let running = start(|_| {}).await;
    let broker = FakeBroker::start("a").await;
    let registered = broker.register(running.address, vec![topic("orders", &[("a", 1)])]).await;
    let mut client = connect(running.address).await;
    query_until(&mut client, "orders", |answer| code(answer) == Some(Code::Ok)).await;
    let memory = Memory::new(&running.dir.path().join("nameserver"));
    while memory.load().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(registered);
    running.nameserver.shutdown().await;

    let again = start_in(running.dir, |config| config.start_wait = Duration::from_hours(1)).await;
    let mut client = connect(again.address).await;
    let early = query(&mut client, "orders").await.unwrap_err();
    assert_eq!(early.code(), tonic::Code::Unavailable);
    assert!(!again.nameserver.is_settled());
    let stranger = FakeBroker::start("a").await;
    let hello = Hello { group_uuid: "ff-ff".into(), ..stranger.hello() };
    let refused = Registered::open(again.address, hello).await.answer().await;
    assert_eq!(refused.status.unwrap().code(), NativeCode::PreconditionFailed);
    let mut registered = Registered::open(again.address, broker.hello()).await;
    assert!(!registered.answer().await.settled, "it cannot say who is not there");
    let told = vec![topic("orders", &[("a", 1)])];
    let told = Topics { full: true, version: 1, changed: told, deleted: Vec::new() };
    registered.tell(Told::Topics(told)).await;
    registered.lead(1, 1).await;
    query_until(&mut client, "orders", |answer| code(answer) == Some(Code::Ok)).await;
    assert!(again.nameserver.is_settled());
    assert!(registered.answer().await.settled);
}

#[tokio::test]
async fn a_held_query_is_answered_when_its_broker_registers() {
    let running = start(|config| config.query_hold = Duration::from_mins(1)).await;
    let mut client = connect(running.address).await;
    let held = tokio::spawn(async move { query(&mut client, "orders").await });
    let broker = FakeBroker::start("a").await;
    let _registered = broker.register(running.address, vec![topic("orders", &[("a", 1)])]).await;
    assert_eq!(code(&held.await.unwrap()), Some(Code::Ok));
}

#[tokio::test]
async fn another_cluster_is_refused() {
    let running = start(|_| {}).await;
    let broker = FakeBroker::start("a").await;
    let hello = Hello { cluster: "other".into(), ..broker.hello() };
    let answer = Registered::open(running.address, hello).await.answer().await;
    assert_eq!(answer.status.unwrap().code(), NativeCode::PreconditionFailed);
}

#[tokio::test]
async fn a_query_creates_the_topic_where_that_is_allowed() {
    let running = start(|_| {}).await;
    let broker = FakeBroker::start("a").await;
    let registered = broker.register(running.address, Vec::new()).await;
    let mut client = connect(running.address).await;
    query_until(&mut client, "new", |answer| code(answer) == Some(Code::Ok)).await;
    let created = broker.calls.created.lock().clone();
    assert!(created[0].auto && created[0].queue_count == 8 && created[0].name == "new");
    assert_eq!(query(&mut client, "new").await.unwrap().message_queues.len(), 8);
    let count = broker.calls.created.lock().len();
    for (name, wanted) in [("bad name", Code::IllegalTopic), ("%RETRY%g", Code::TopicNotFound)] {
        assert_eq!(code(&query(&mut client, name).await), Some(wanted), "{name}");
    }
    let anonymous = mq::QueryRouteRequest { topic: resource("new"), endpoints: None };
    let answer = client.query_route(anonymous).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().code(), Code::ClientIdRequired);
    let endpoints = Some(mq::Endpoints::default());
    let lost = mq::QueryRouteRequest { topic: resource("new"), endpoints };
    let answer = client.query_route(call(lost)).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().code(), Code::IllegalAccessPoint);
    assert_eq!(broker.calls.created.lock().len(), count);
    drop(registered);
}

#[tokio::test]
async fn via_endpoint_names_itself_and_forwards_with_metadata_and_deadline() {
    let via_endpoint = |config: &mut Config| config.route_mode = RouteMode::ViaEndpoint;
    let scene = Scene::start(&[("a", 1)], via_endpoint).await;
    let Scene { running, brokers, .. } = &scene;
    let mut client = scene.client.clone();
    let answer = query(&mut client, "orders").await.unwrap();
    let (name, _, host, port) = addresses(&answer).remove(0);
    assert_eq!((name.as_str(), host.as_str()), ("a", "127.0.0.1"));
    assert_eq!(port, i32::from(running.address.port()));

    let mut send = call(message("orders", None));
    send.set_timeout(Duration::from_secs(60));
    client.send_message(send).await.unwrap();
    let (metadata, sent) = brokers[0].calls.sends.lock().remove(0);
    assert_eq!(sent, message("orders", None));
    assert_eq!(metadata.get("x-mq-client-id").unwrap(), "me");
    let left = metadata.get("grpc-timeout").unwrap().to_str().unwrap();
    let micros: u64 = left.strip_suffix('u').unwrap().parse().unwrap();
    assert!((1..60_000_000).contains(&micros), "{left}");
}

fn poll(broker_group: &str) -> mq::ReceiveMessageRequest {
    mq::ReceiveMessageRequest {
        message_queue: Some(mq::MessageQueue {
            broker: Some(mq::Broker { name: broker_group.into(), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What the next poll of this broker gets.
fn prepare_frames(broker: &FakeBroker) -> mpsc::Sender<Result<mq::ReceiveMessageResponse, Status>> {
    let (frames, stream) = mpsc::channel(1);
    *broker.calls.frames.lock() = Some(ReceiverStream::new(stream));
    frames
}

fn message_frame(body: u8) -> mq::ReceiveMessageResponse {
    let message = mq::Message { body: vec![body].into(), ..Default::default() };
    mq::ReceiveMessageResponse { content: Some(Content::Message(message)) }
}

#[tokio::test]
async fn frames_of_a_poll_pass_one_by_one() {
    let scene = Scene::start(&[("a", 1)], |_| {}).await;
    let (mut client, brokers) = (scene.client.clone(), &scene.brokers);
    let frames = prepare_frames(&brokers[0]);
    let mut received = client.receive_message(call(poll("a"))).await.unwrap().into_inner();
    for nth in 0..3 {
        let frame = message_frame(nth);
        frames.send(Ok(frame.clone())).await.unwrap();
        assert_eq!(received.message().await.unwrap(), Some(frame));
    }
    let end = Content::DeliveryTimestamp(prost_types::Timestamp { seconds: 7, nanos: 0 });
    let end = mq::ReceiveMessageResponse { content: Some(end) };
    frames.send(Ok(end.clone())).await.unwrap();
    assert_eq!(received.message().await.unwrap(), Some(end));
    assert_eq!(received.message().await.unwrap(), None);

    let mut unknown = client.receive_message(call(poll("zzz"))).await.unwrap().into_inner();
    let first = unknown.message().await.unwrap().unwrap().content;
    let Some(Content::Status(status)) = first else { panic!("the status comes first") };
    assert_eq!(status.code(), Code::BadRequest);
    let last = unknown.message().await.unwrap().unwrap().content;
    assert!(matches!(last, Some(Content::DeliveryTimestamp(_))));
}

/// What a leader had when it was killed or froze is done by the next one; a client that never asks
/// for a route again sees nothing of it.
#[tokio::test]
async fn a_call_that_its_leader_did_not_answer_is_done_by_the_next_one() {
    for killed in [true, false] {
        let mut scene = Scene::start(&[("a", 1)], |_| {}).await;
        scene.brokers[0].calls.send_permits.forget_permits(100);
        let mut client = scene.client.clone();
        let mut send = call(message("orders", None));
        send.set_timeout(Duration::from_secs(60));
        let sending = tokio::spawn(async move { client.send_message(send).await });
        while scene.brokers[0].calls.sends.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        let next = scene.brokers[0].next().await;
        if killed {
            (scene.brokers, scene.registered) = (Vec::new(), Vec::new());
        }
        let topics = vec![topic("orders", &[("a", 1)])];
        let _registered = next.register(scene.running.address, topics).await;
        let sent = sending.await.unwrap().unwrap().into_inner();
        assert_eq!(sent.status, ok(), "killed: {killed}");
        assert_eq!(next.calls.sends.lock()[0].1, message("orders", None));
    }
}

#[tokio::test]
async fn a_poll_without_messages_goes_on_at_the_next_leader_and_one_with_some_ends() {
    let mut scene = Scene::start(&[("a", 1)], |_| {}).await;
    let (empty, some) = (prepare_frames(&scene.brokers[0]), message_frame(1));
    let mut client = scene.client.clone();
    let mut polling = client.receive_message(call(poll("a"))).await.unwrap().into_inner();
    let frames = prepare_frames(&scene.brokers[0]);
    let mut served = client.receive_message(call(poll("a"))).await.unwrap().into_inner();
    frames.send(Ok(some.clone())).await.unwrap();
    assert_eq!(served.message().await.unwrap(), Some(some.clone()));

    let next = scene.brokers[0].next().await;
    let frames_of_next = prepare_frames(&next);
    (scene.brokers, scene.registered) = (Vec::new(), Vec::new());
    let topics = vec![topic("orders", &[("a", 1)])];
    let _registered = next.register(scene.running.address, topics).await;
    let end = served.message().await.unwrap().unwrap().content;
    assert!(matches!(end, Some(Content::DeliveryTimestamp(_))), "what came is kept: {end:?}");
    assert_eq!(served.message().await.unwrap(), None);
    frames_of_next.send(Ok(some.clone())).await.unwrap();
    assert_eq!(polling.message().await.unwrap(), Some(some));
    drop(empty);
}

#[tokio::test]
async fn sends_take_all_queues_in_turn_and_message_groups_their_own() {
    let scene = Scene::start(&[("a", 1), ("b", 3)], |_| {}).await;
    let (mut client, brokers) = (scene.client.clone(), &scene.brokers);
    let [a, b] = &brokers[..] else { panic!("two were started") };
    for _ in 0..8 {
        client.send_message(call(message("orders", None))).await.unwrap();
    }
    assert_eq!((a.calls.sends.lock().len(), b.calls.sends.lock().len()), (2, 6));
    for group in ["g0", "g1", "g2", "g3", "g4", "g5"] {
        client.send_message(call(message("orders", Some(group)))).await.unwrap();
        let (owner, _) = place_of_message_group(group, &[1, 3]).unwrap();
        let sends = if owner == 0 { a.calls.sends.lock() } else { b.calls.sends.lock() };
        assert_eq!(sends.last().unwrap().1, message("orders", Some(group)));
    }
}

#[tokio::test]
async fn sends_of_one_message_group_are_forwarded_one_after_the_other() {
    let scene = Scene::start(&[("a", 2)], |_| {}).await;
    let (client, brokers) = (scene.client.clone(), &scene.brokers);
    let broker = &brokers[0];
    broker.calls.send_permits.forget_permits(100);
    let send = |group: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.send_message(call(message("orders", Some(group)))).await })
    };
    let count = || broker.calls.sends.lock().len();
    let (first, second) = (send("g"), send("g"));
    while count() < 1 {
        tokio::task::yield_now().await;
    }
    let other = send("h");
    while count() < 2 {
        tokio::task::yield_now().await;
    }
    let groups: Vec<_> = broker.calls.sends.lock().iter().map(|(_, send)| send.clone()).collect();
    assert!(groups.contains(&message("orders", Some("h"))), "the second g waits for the first");
    broker.calls.send_permits.add_permits(3);
    for sent in [first, second, other] {
        assert_eq!(sent.await.unwrap().unwrap().into_inner().status, ok());
    }
    assert_eq!(count(), 3);
}

#[tokio::test]
async fn acks_go_to_the_owners_of_their_handles() {
    let scene = Scene::start(&[("a", 1), ("b", 1)], |_| {}).await;
    let (mut client, brokers) = (scene.client.clone(), &scene.brokers);
    let entry =
        |handle: &str| mq::AckMessageEntry { receipt_handle: handle.into(), ..Default::default() };
    let handles = ["a.1", "b.2", "a.3"];
    let entries = handles.map(entry).to_vec();
    let ack = mq::AckMessageRequest { topic: resource("orders"), entries, ..Default::default() };
    let answer = client.ack_message(call(ack)).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().code(), Code::Ok);
    let told: Vec<_> = answer.entries.iter().map(|entry| entry.receipt_handle.as_str()).collect();
    assert_eq!(told, handles);
    assert_eq!(brokers[0].calls.acks.lock()[0].entries, ["a.1", "a.3"].map(entry));
    assert_eq!(brokers[1].calls.acks.lock()[0].entries, [entry("b.2")]);
}

fn settings(version: &str) -> mq::TelemetryCommand {
    use mq::telemetry_command::Command;
    let user_agent = Some(mq::Ua { version: version.into(), ..Default::default() });
    let settings = mq::Settings { user_agent, ..Default::default() };
    mq::TelemetryCommand { status: ok(), command: Some(Command::Settings(settings)) }
}

#[tokio::test]
async fn a_telemetry_stream_outlives_its_broker_and_ends_with_a_refusal() {
    let running = start(|_| {}).await;
    let mut broker = FakeBroker::start("a").await;
    let _registered = broker.register(running.address, Vec::new()).await;
    let mut client = connect(running.address).await;
    let (commands, stream) = mpsc::channel(4);
    commands.send(settings("1")).await.unwrap();
    let answers = client.telemetry(call(ReceiverStream::new(stream))).await;
    let mut answers = answers.unwrap().into_inner();
    let mut first = broker.telemetry.recv().await.unwrap();
    assert_eq!(first.metadata.get("x-mq-client-id").unwrap(), "me");
    assert_eq!(first.inbound.message().await.unwrap(), Some(settings("1")));
    first.answers.send(Ok(settings("reply"))).await.unwrap();
    assert_eq!(answers.message().await.unwrap(), Some(settings("reply")));
    commands.send(settings("2")).await.unwrap();
    assert_eq!(first.inbound.message().await.unwrap(), Some(settings("2")));
    drop(first);

    let mut second = broker.telemetry.recv().await.unwrap();
    assert_eq!(second.inbound.message().await.unwrap(), Some(settings("2")));
    second.answers.send(Err(Status::invalid_argument("no"))).await.unwrap();
    let refused = answers.message().await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (tonic::Code::InvalidArgument, "no"));
}

#[tokio::test]
async fn administration_is_merged_over_all_broker_groups_of_a_topic() {
    let scene = Scene::start(&[("a", 1), ("b", 1)], |_| {}).await;
    let Scene { running, brokers, .. } = &scene;
    let mut admin = AdminClient::connect(format!("http://{}", running.address)).await.unwrap();
    let describe = api::DescribeTopicRequest { name: "orders".into(), ..Default::default() };
    let answer = admin.describe_topic(describe).await.unwrap().into_inner();
    let mut ports: Vec<u64> = answer.queues.iter().map(|queue| queue.max_offset).collect();
    ports.sort_unstable();
    let mut expected = [0, 1].map(|at: usize| u64::from(brokers[at].address.port()));
    expected.sort_unstable();
    assert_eq!(ports, expected);
    let commit = api::CommitOffsetRequest { topic: "orders".into(), ..Default::default() };
    let answer = admin.commit_offset(commit.clone()).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().code(), NativeCode::InvalidArgument, "of which group?");
    let commit = api::CommitOffsetRequest { broker_group: "b".into(), ..commit };
    let error = admin.commit_offset(commit.clone()).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unimplemented, "it reached a broker");
    let commit = api::CommitOffsetRequest { broker_group: "c".into(), ..commit };
    let answer = admin.commit_offset(commit).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().code(), NativeCode::InvalidArgument, "no such group");
}

#[tokio::test]
async fn watched_routes_are_pushed_as_they_change() {
    let running = start(|_| {}).await;
    let mut client = RoutesClient::connect(format!("http://{}", running.address)).await.unwrap();
    let (watch, stream) = mpsc::channel(1);
    let topics = vec!["orders".to_owned(), "other".to_owned()];
    watch.send(WatchRoutesRequest { topics }).await.unwrap();
    let mut pushed = client.watch_routes(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let broker = FakeBroker::start("a").await;
    let registered = broker.register(running.address, vec![topic("orders", &[("a", 1)])]).await;
    let port = u32::from(broker.address.port());
    let mut orders = None;
    let mut next = async |wanted: &dyn Fn(&api::TopicRoute) -> bool| {
        loop {
            for route in pushed.message().await.unwrap().unwrap().routes {
                if wanted(&route) {
                    orders = Some(route);
                    return;
                }
            }
        }
    };
    next(&|route| route.topic == "other" && !route.exists).await;
    let led = |route: &api::TopicRoute| {
        let leader = route.queues.first().and_then(|queue| queue.leader.as_ref());
        leader.is_some_and(|leader| leader.port == port)
    };
    drop(registered);
    let _registered = broker.register(running.address, vec![topic("orders", &[("a", 4)])]).await;
    next(&|route| led(route) && route.queues[0].queue_count == 4).await;
    assert!(orders.is_some_and(|route| route.exists && route.queues[0].term == 1));
}

async fn http_get(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn health_and_metrics_are_served() {
    let with_http = |config: &mut Config| config.http = Some("127.0.0.1:0".parse().unwrap());
    let empty = start(with_http).await;
    let http = empty.nameserver.http_address().unwrap();
    assert!(http_get(http, "/readyz").await.starts_with("HTTP/1.1 200"), "it remembers nobody");
    let scene = Scene::start(&[("a", 1)], with_http).await;
    let http = scene.running.nameserver.http_address().unwrap();
    assert!(http_get(http, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(http_get(http, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = http_get(http, "/metrics").await;
    let labels = "cluster=\"drumlin\",node_type=\"nameserver\",node_id=\"nameserver-0\"";
    for line in [
        format!("drumlin_registered_brokers{{{labels}}} 1"),
        format!("rocketmq_topic_number{{{labels}}} 1"),
        format!("drumlin_route_queries_total{{{labels},answer=\"found\"}} 1"),
        format!("process_start_time_seconds{{{labels}}}"),
    ] {
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
}

#[tokio::test]
async fn addresses_that_nobody_can_dial_are_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::embedded(dir.path().to_owned());
    config.listeners[0].bind = "0.0.0.0:0".parse().unwrap();
    let error = Nameserver::start(config.clone()).await.unwrap_err();
    assert!(matches!(error, StartError::AdvertisesUnspecified { .. }), "{error}");
    config.listeners[0].advertised = Some(("localhost".into(), 9876));
    config.listeners.push(config.listeners[0].clone());
    let error = Nameserver::start(config).await.unwrap_err();
    assert!(matches!(error, StartError::ListenerTwice(_)), "{error}");
}
