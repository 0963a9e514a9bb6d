//! A broker group of three nodes: what clients notice when they ask the wrong one, and when the
//! leader goes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use drumlin_broker::broker::Broker;
use drumlin_broker::config::{Config, ListenerConfig, NodeAddress};
use drumlin_client::admin::NewTopic;
use drumlin_client::{At, Client, Filter, Message, Queues};
use drumlin_nameserver::nameserver::Nameserver;
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::{self as api, status};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{self as mq, Code};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use crate::{read_all, within};

/// Nodes of broker group broker-a, by number.
struct Group {
    brokers: Vec<Option<Broker>>,
    configs: Vec<Config>,
    _dir: tempfile::TempDir,
}

impl Group {
    async fn start(nameservers: Vec<String>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // All held at once, so that no port is given twice.
        let bind = || std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let (peers, clients): (Vec<_>, Vec<_>) = (0..3).map(|_| (bind(), bind())).unzip();
        let address = |socket: &std::net::TcpListener| socket.local_addr().expect("it is bound");
        let replicas: Vec<NodeAddress> = (0..)
            .zip(&peers)
            .map(|(n, socket)| NodeAddress {
                name: format!("broker-a-{n}"),
                address: address(socket).to_string(),
            })
            .collect();
        let listener = |name: &str, bind: SocketAddr| ListenerConfig {
            name: name.into(),
            bind,
            advertised: None,
        };
        let config = |((n, peer), client): ((usize, &std::net::TcpListener), _)| Config {
            node: replicas[n].name.clone(),
            peers: Some(listener("peers", address(peer))),
            listeners: vec![listener("external", address(client))],
            replicas: replicas.clone(),
            nameservers: nameservers.clone(),
            http: None,
            ..Config::embedded(dir.path().join(n.to_string()))
        };
        let configs: Vec<Config> = peers.iter().enumerate().zip(&clients).map(config).collect();
        drop((peers, clients));
        let starting = configs.iter().map(|config| Broker::start(config.clone()));
        let started = within(futures::future::join_all(starting)).await;
        let brokers = started.into_iter().map(|broker| Some(broker.expect("it starts"))).collect();
        Self { brokers, configs, _dir: dir }
    }

    fn address(&self, number: usize) -> SocketAddr {
        self.configs[number].listeners[0].bind
    }

    async fn client(&self) -> Client {
        let addresses = (0..3).map(|number| self.address(number).to_string());
        Client::builder().endpoints(addresses).build().await.expect("one answers")
    }

    /// The node that leads, once the others know it.
    async fn leader(&self) -> usize {
        let running = self.brokers.iter().enumerate();
        let running = running.filter_map(|(number, broker)| Some((number, broker.as_ref()?)));
        let serving = running.clone().map(|(number, broker)| {
            let mut status = broker.context().replica.raft_status();
            Box::pin(async move {
                status.wait_for(|status| status.serving).await.expect("it runs");
                number
            })
        });
        let leader = within(futures::future::select_all(serving)).await.0;
        let id = self.brokers[leader].as_ref().map(|b| b.context().identity.node_id);
        for (_, broker) in running {
            let replica = &broker.context().replica;
            let mut status = replica.raft_status();
            within(status.wait_for(|status| status.leader == id)).await.expect("it runs");
            let mut peers = replica.peers();
            let told = |peers: &drumlin_broker::replica::peers::PeerStates| {
                Some(broker.context().identity.node_id) == id
                    || id.and_then(|id| peers.get(&id)).is_some_and(|leader| leader.fresh)
            };
            within(peers.wait_for(told)).await.expect("it runs");
        }
        leader
    }

    async fn stop(&mut self, number: usize) {
        if let Some(broker) = self.brokers[number].take() {
            broker.shutdown().await;
        }
    }

    async fn stop_all(mut self) {
        let stopping = self.brokers.iter_mut().filter_map(Option::take).map(Broker::shutdown);
        futures::future::join_all(stopping).await;
    }
}

fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("x-mq-client-id", "me".parse().expect("plain text"));
    request.set_timeout(Duration::from_secs(10));
    request
}

fn resource(name: &str) -> Option<mq::Resource> {
    Some(mq::Resource { name: name.into(), ..mq::Resource::default() })
}

fn message(body: &str, message_group: Option<&str>) -> mq::SendMessageRequest {
    let system = mq::SystemProperties {
        message_id: format!("id-{body}"),
        message_group: message_group.map(str::to_owned),
        body_encoding: mq::Encoding::Identity.into(),
        ..Default::default()
    };
    let message = mq::Message {
        topic: resource("t"),
        system_properties: Some(system),
        body: body.to_owned().into(),
        ..Default::default()
    };
    mq::SendMessageRequest { messages: vec![message] }
}

fn poll() -> mq::ReceiveMessageRequest {
    let broker = mq::Broker { name: "broker-a".into(), ..mq::Broker::default() };
    let queue =
        mq::MessageQueue { topic: resource("t"), broker: Some(broker), ..Default::default() };
    mq::ReceiveMessageRequest {
        group: resource("g"),
        message_queue: Some(queue),
        batch_size: 32,
        invisible_duration: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
        long_polling_timeout: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
        ..Default::default()
    }
}

fn code(status: Option<mq::Status>) -> Code {
    status.expect("a status").code()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn official_clients_are_served_by_any_node_of_the_group() {
    let group = Group::start(Vec::new()).await;
    let leader = group.leader().await;
    let leader_port = i32::from(group.address(leader).port());
    let follower = format!("http://{}", group.address((leader + 1) % 3));
    let mut client = MessagingServiceClient::connect(follower).await.unwrap();
    // Asked of a follower it creates the topic at the leader, and names that.
    let query = mq::QueryRouteRequest { topic: resource("t"), endpoints: None };
    let route = within(client.query_route(call(query))).await.unwrap().into_inner();
    assert_eq!(code(route.status), Code::Ok);
    for queue in &route.message_queues {
        let endpoints = queue.broker.clone().unwrap().endpoints.unwrap();
        assert_eq!(endpoints.addresses[0].port, leader_port);
    }
    for (body, message_group) in [("1", None), ("2", Some("x")), ("3", Some("x"))] {
        let sent = client.send_message(call(message(body, message_group)));
        let sent = within(sent).await.unwrap().into_inner();
        assert_eq!(code(sent.status), Code::Ok);
        assert_eq!(sent.entries[0].message_id, format!("id-{body}"));
    }
    let mut handles = Vec::new();
    let mut bodies = BTreeSet::new();
    while bodies.len() < 3 {
        let frames = within(client.receive_message(call(poll()))).await.unwrap();
        let mut frames = frames.into_inner();
        while let Some(frame) = within(frames.message()).await.unwrap() {
            if let Some(Content::Message(message)) = frame.content {
                bodies.insert(String::from_utf8(message.body.to_vec()).unwrap());
                handles.push(message.system_properties.unwrap().receipt_handle.unwrap());
            }
        }
    }
    assert_eq!(bodies, ["1", "2", "3"].map(str::to_owned).into());
    let change = mq::ChangeInvisibleDurationRequest {
        group: resource("g"),
        topic: resource("t"),
        receipt_handle: handles.pop().unwrap(),
        invisible_duration: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..Default::default()
    };
    let changed =
        within(client.change_invisible_duration(call(change))).await.unwrap().into_inner();
    assert_eq!(code(changed.status), Code::Ok);
    handles.push(changed.receipt_handle);
    let entry = |receipt_handle| mq::AckMessageEntry { receipt_handle, ..Default::default() };
    let ack = mq::AckMessageRequest {
        group: resource("g"),
        topic: resource("t"),
        entries: handles.into_iter().map(entry).collect(),
    };
    let acked = within(client.ack_message(call(ack))).await.unwrap().into_inner();
    assert_eq!(code(acked.status), Code::Ok, "{:?}", acked.entries);
    group.stop_all().await;
}

/// A poll that waits where leadership leaves finds nothing, which is no error, and the next call goes
/// on to the new leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_poll_ends_without_an_error_when_leadership_moves() {
    let group = Group::start(Vec::new()).await;
    let leader = group.leader().await;
    let address = format!("http://{}", group.address(leader));
    let mut client = MessagingServiceClient::connect(address).await.unwrap();
    let query = mq::QueryRouteRequest { topic: resource("t"), endpoints: None };
    within(client.query_route(call(query))).await.unwrap();
    let mut waiting = within(client.receive_message(call(poll()))).await.unwrap().into_inner();
    let replica = &group.brokers[leader].as_ref().expect("it runs").context().replica;
    // Refused while nobody is known to have all that the leader has.
    while within(replica.transfer(None)).await.is_err() {
        tokio::task::yield_now().await;
    }
    let first = within(waiting.message()).await.unwrap().expect("a frame").content;
    let Some(Content::Status(status)) = first else { panic!("{first:?} comes first") };
    assert_eq!(status.code(), Code::MessageNotFound, "{}", status.message);
    assert!(!status.message.contains("until the poll ended"), "nothing came in between");
    let sent = within(client.send_message(call(message("1", None)))).await.unwrap().into_inner();
    assert_eq!(code(sent.status), Code::Ok);
    let frames = within(client.receive_message(call(poll()))).await.unwrap().into_inner();
    let frames: Vec<_> = within(frames.collect()).await;
    let is_message = |frame: &Result<mq::ReceiveMessageResponse, _>| {
        frame.as_ref().is_ok_and(|frame| matches!(frame.content, Some(Content::Message(_))))
    };
    assert_eq!(frames.iter().filter(|frame| is_message(frame)).count(), 1, "{frames:?}");
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn native_streams_at_a_follower_are_told_who_leads() {
    let group = Group::start(Vec::new()).await;
    let leader = group.leader().await;
    let client = Client::connect(&group.address(leader).to_string()).await.unwrap();
    within(client.admin().create_topic(NewTopic::new("t", 1))).await.unwrap();
    let follower = format!("http://{}", group.address((leader + 1) % 3));
    let check = |status: Option<api::Status>| {
        let status = status.expect("a status");
        assert_eq!(status.code(), status::Code::NotLeader, "{}", status.message);
        let hint = status.leader.expect("the leader is known");
        assert_eq!(hint.broker_group, "broker-a");
        let port = u32::from(group.address(leader).port());
        assert_eq!(hint.address.map(|address| address.port), Some(port));
        assert!(hint.term > 0);
    };
    let mut admin = AdminClient::connect(follower.clone()).await.unwrap();
    let listed = within(admin.list_topics(api::ListTopicsRequest {})).await.unwrap().into_inner();
    let names: Vec<_> = listed.topics.iter().map(|topic| topic.name.as_str()).collect();
    assert_eq!(names, ["t"], "what is asked once is sent on");

    let mut broker = BrokerClient::connect(follower).await.unwrap();
    let (fetches, requests) = tokio::sync::mpsc::channel(1);
    let open = api::fetch_request::Open {
        fetch_id: 1,
        topic: "t".into(),
        queue_id: 0,
        from: Some(api::Position { at: Some(api::position::At::Earliest(true)) }),
        credit_bytes: 1,
    };
    let request = Some(api::fetch_request::Request::Open(open));
    fetches.send(api::FetchRequest { request }).await.unwrap();
    let mut fetched =
        within(broker.fetch(ReceiverStream::new(requests))).await.unwrap().into_inner();
    check(within(fetched.message()).await.unwrap().expect("an answer").status);
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producer_and_consumers_go_on_in_order_at_the_next_leader() {
    let mut group = Group::start(Vec::new()).await;
    let leader = group.leader().await;
    let client = group.client().await;
    within(client.admin().create_topic(NewTopic::new("t", 2))).await.unwrap();
    let producer = client.producer().send_timeout(Duration::from_secs(25)).build().await.unwrap();
    let pulled = client.pull_consumer().assign("t", Queues::All).seek(At::Earliest);
    let mut pulled = pulled.into_stream();
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let mut acks = Vec::new();
    for n in 0..300_u32 {
        if n == 100 {
            group.stop(leader).await;
        }
        let message = Message::new("t", n.to_string()).message_group(format!("g{}", n % 2));
        acks.push(within(producer.enqueue(message)).await.unwrap());
        tokio::task::yield_now().await;
    }
    for ack in acks {
        within(ack).await.unwrap();
    }
    assert_ne!(group.leader().await, leader);
    let stored = read_all(&client, "t").await;
    for parity in 0..2 {
        let bodies = stored.iter().map(|d| d.body_text().parse::<u32>().unwrap());
        let mut first_seen = BTreeSet::new();
        // A retry after a lost answer may store a message twice, but never ahead of its turn.
        let order: Vec<u32> =
            bodies.filter(|n| n % 2 == parity).filter(|n| first_seen.insert(*n)).collect();
        assert_eq!(order, (0..300).filter(|n| n % 2 == parity).collect::<Vec<_>>());
    }
    // The stream that was open all the time saw what the log holds, offset by offset.
    let mut next = std::collections::BTreeMap::<u32, u64>::new();
    for _ in 0..stored.len() {
        let delivery = within(pulled.next()).await.unwrap().unwrap();
        let expected = next.entry(delivery.queue_id).or_default();
        assert_eq!(delivery.offset.get(), *expected, "in queue {}", delivery.queue_id);
        *expected += 1;
    }
    let mut received = BTreeSet::new();
    while received.len() < 300 {
        for delivery in within(consumer.receive(32, Duration::from_secs(5))).await.unwrap() {
            received.insert(delivery.body_text().parse::<u32>().unwrap());
            within(consumer.ack(&delivery)).await.unwrap();
        }
    }
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_on_and_begin_without_nameservers_once_they_know_brokers() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut config = drumlin_nameserver::config::Config::embedded(dir.path().to_owned());
    config.http = None;
    let nameserver = Nameserver::start(config).await.expect("the nameserver starts");
    let address = nameserver.addresses()[0].to_string();
    let mut group = Group::start(vec![address.clone()]).await;
    let leader = group.leader().await;
    let client = Client::connect(&address).await.unwrap();
    within(client.admin().create_topic(NewTopic::new("t", 1))).await.unwrap();
    let producer = client.producer().send_timeout(Duration::from_secs(25)).build().await.unwrap();
    within(producer.send(Message::new("t", "with"))).await.unwrap();
    nameserver.shutdown().await;
    within(producer.send(Message::new("t", "without"))).await.unwrap();
    let late = group.client().await;
    within(late.producer().build().await.unwrap().send(Message::new("t", "late"))).await.unwrap();
    group.stop((leader + 1) % 3).await;
    within(producer.send(Message::new("t", "fewer"))).await.unwrap();
    assert_eq!(read_all(&late, "t").await.len(), 4);
    group.stop_all().await;
}
