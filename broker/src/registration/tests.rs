use std::net::SocketAddr;
use std::pin::Pin;

use drumlin_proto::native::registry_server::{Registry, RegistryServer};
use drumlin_proto::native::{NodeRoute, Status as NativeStatus};
use futures::Stream;
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Response, Status};

use super::*;
use crate::position::Term;

type Answers = mpsc::Sender<Result<RegisterResponse, Status>>;

/// A nameserver that hands each stream to the test.
#[derive(Debug)]
struct Nameserver {
    streams: mpsc::Sender<(Streaming<RegisterRequest>, Answers)>,
}

#[tonic::async_trait]
impl Registry for Nameserver {
    type RegisterStream = Pin<Box<dyn Stream<Item = Result<RegisterResponse, Status>> + Send>>;

    async fn register(
        &self,
        request: tonic::Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let (answers, stream) = mpsc::channel(4);
        self.streams.send((request.into_inner(), answers)).await.unwrap();
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

async fn nameserver() -> (SocketAddr, mpsc::Receiver<(Streaming<RegisterRequest>, Answers)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (streams, received) = mpsc::channel(4);
    let service = RegistryServer::new(Nameserver { streams });
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (address, received)
}

fn topic(name: &str, version: u64) -> Topic {
    Topic { name: name.into(), version, ..Default::default() }
}

fn topics(version: u64, topics: &[Topic]) -> Arc<Announced> {
    let topics = topics.iter().map(|topic| (topic.name.clone(), topic.clone())).collect();
    Arc::new(Announced { version, topics })
}

fn hello() -> Hello {
    Hello { cluster: "c".into(), broker_group: "a".into(), node: "a0".into(), ..Default::default() }
}

async fn next(stream: &mut Streaming<RegisterRequest>) -> Request {
    stream.message().await.unwrap().unwrap().request.unwrap()
}

/// The next message that is not the periodic heartbeat.
async fn next_topics(stream: &mut Streaming<RegisterRequest>) -> Topics {
    loop {
        if let Request::Topics(topics) = next(stream).await {
            return topics;
        }
    }
}

fn group(name: &str, term: u64, nodes_count: usize) -> GroupRoute {
    let nodes = vec![NodeRoute::default(); nodes_count];
    GroupRoute { broker_group: name.into(), term, nodes, ..Default::default() }
}

fn answer(groups: Vec<GroupRoute>, resend_topics: bool) -> Result<RegisterResponse, Status> {
    let status = Some(NativeStatus::default());
    Ok(RegisterResponse { status, groups, resend_topics, settled: true })
}

struct Running {
    registration: Registration,
    status: watch::Sender<RaftStatus>,
    topics: watch::Sender<Arc<Announced>>,
    stop: CancellationToken,
}

fn start(nameservers: &[SocketAddr], first: Arc<Announced>) -> Running {
    let (status, status_receiver) = watch::channel(RaftStatus::default());
    let (topics, topics_receiver) = watch::channel(first);
    let stop = CancellationToken::new();
    let told = Told { hello: hello(), status: status_receiver, topics: topics_receiver };
    let names: Vec<String> = nameservers.iter().map(SocketAddr::to_string).collect();
    let registration = Registration::begin(told, &names, stop.clone());
    Running { registration, status, topics, stop }
}

#[tokio::test]
async fn a_stream_begins_with_hello_topics_and_heartbeat_then_tells_changes_at_once() {
    let (address, mut streams) = nameserver().await;
    let running = start(&[address], topics(3, &[topic("x", 1), topic("y", 1)]));
    let (mut stream, answers) = streams.recv().await.unwrap();
    assert_eq!(next(&mut stream).await, Request::Hello(hello()));
    let Request::Topics(first) = next(&mut stream).await else { panic!("topics come second") };
    assert!(first.full && first.version == 3 && first.changed.len() == 2);
    let quiet = Heartbeat { term: 0, leader: false, topics_version: 3 };
    assert_eq!(next(&mut stream).await, Request::Heartbeat(quiet));
    assert!(!*running.registration.registered().borrow());
    answers.send(answer(vec![group("b", 1, 1)], false)).await.unwrap();
    running.registration.registered().wait_for(|registered| *registered).await.unwrap();
    assert_eq!(**running.registration.other_groups().borrow(), [group("b", 1, 1)]);

    let leads = RaftStatus { term: Term::new(4), leader: Some(1), serving: true };
    running.status.send_replace(leads);
    let told = Heartbeat { term: 4, leader: true, topics_version: 3 };
    while next(&mut stream).await != Request::Heartbeat(told) {}

    running.topics.send_replace(topics(5, &[topic("y", 2), topic("z", 1)]));
    let delta = next_topics(&mut stream).await;
    assert!(!delta.full && delta.version == 5);
    assert_eq!(delta.changed, [topic("y", 2), topic("z", 1)]);
    assert_eq!(delta.deleted, ["x"]);

    answers.send(answer(Vec::new(), true)).await.unwrap();
    let again = next_topics(&mut stream).await;
    assert!(again.full && again.changed.len() == 2);
    running.stop.cancel();
    running.registration.join().await;
}

#[tokio::test]
async fn a_broken_stream_is_opened_again() {
    let (address, mut streams) = nameserver().await;
    let running = start(&[address], topics(1, &[]));
    for _ in 0..3 {
        let (mut stream, answers) = streams.recv().await.unwrap();
        assert_eq!(next(&mut stream).await, Request::Hello(hello()));
        answers.send(answer(Vec::new(), false)).await.unwrap();
        // Both halves end here.
        drop((stream, answers));
    }
    running.stop.cancel();
    running.registration.join().await;
}

#[test]
fn of_several_nameservers_the_newest_term_counts() {
    let told = [
        Some(vec![group("b", 4, 1), group("c", 1, 1)]),
        Some(vec![group("b", 5, 0), group("c", 1, 2), group("d", 1, 1)]),
    ];
    assert_eq!(merge(&[], &told), [group("b", 5, 0), group("c", 1, 2), group("d", 1, 1)]);
}

#[test]
fn what_is_known_outlives_nameservers_and_goes_back_to_no_older_term() {
    let known = [group("b", 4, 2), group("c", 3, 2)];
    assert_eq!(merge(&known, &[None, None]), known, "nobody is there to tell");
    assert_eq!(merge(&known, &[Some(Vec::new()), None]), known, "one that has just begun");
    let told = [Some(vec![group("b", 4, 0), group("c", 2, 1)]), None];
    assert_eq!(merge(&known, &told), [group("b", 4, 0), group("c", 3, 2)]);
    let successor = GroupRoute { group_uuid: "new".into(), ..group("c", 1, 1) };
    let told = [None, Some(vec![successor.clone()])];
    assert_eq!(merge(&known, &told), [group("b", 4, 2), successor]);
}

#[tokio::test]
async fn the_term_of_a_candidate_is_not_told() {
    let (address, mut streams) = nameserver().await;
    let running = start(&[address], topics(1, &[]));
    let (mut stream, answers) = streams.recv().await.unwrap();
    answers.send(answer(Vec::new(), false)).await.unwrap();
    let beat = |term, leader| Request::Heartbeat(Heartbeat { term, leader, topics_version: 1 });
    let follows = RaftStatus { term: Term::new(4), leader: Some(2), serving: false };
    running.status.send_replace(follows);
    while next(&mut stream).await != beat(4, false) {}
    running.status.send_replace(RaftStatus { term: Term::new(5), leader: None, serving: false });
    assert_eq!(next(&mut stream).await, beat(4, false));
    running.status.send_replace(RaftStatus { term: Term::new(6), leader: Some(1), serving: true });
    while next(&mut stream).await != beat(6, true) {}
    running.stop.cancel();
    running.registration.join().await;
}
