//! What the producer does when leaders fail it, with leaders that fail on cue: a broker alone does
//! not refuse one queue while another goes on.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use drumlin_client::{Client, Code, Message};
use drumlin_proto::native::broker_server::{Broker, BrokerServer};
use drumlin_proto::native::routes_server::{Routes, RoutesServer};
use drumlin_proto::native::{
    Address, FetchRequest, FetchResponse, ProduceRequest, ProduceResponse, QueueRoute, Status,
    TopicRoute, TopicType, WatchRoutesRequest, WatchRoutesResponse, status,
};
use drumlin_proto::record::Run;
use drumlin_proto::route::place_of_message_group;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Streaming};

use crate::within;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, tonic::Status>> + Send>>;
/// What to answer to a run, given its number on this leader from 0; `None` is never answered.
type Script = dyn Fn(usize, &ProduceRequest) -> Option<status::Code> + Send + Sync;

/// One leader, and access point for both.
#[derive(Clone)]
struct Leader {
    script: Arc<Script>,
    /// Bodies of what was stored, in order.
    stored: Arc<Mutex<Vec<String>>>,
    /// Runs so far.
    asked: Arc<AtomicUsize>,
    route: watch::Sender<Option<TopicRoute>>,
}

impl Leader {
    fn bodies(&self) -> Vec<String> {
        self.stored.lock().expect("not poisoned").clone()
    }
}

fn bodies(request: &ProduceRequest) -> Vec<String> {
    let run = Run::parse(request.run.clone()).expect("a valid run");
    run.records().map(|record| String::from_utf8_lossy(record.body()).into_owned()).collect()
}

#[tonic::async_trait]
impl Broker for Leader {
    type ProduceStream = Answers<ProduceResponse>;
    type FetchStream = Answers<FetchResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<ProduceRequest>>,
    ) -> Result<Response<Self::ProduceStream>, tonic::Status> {
        let (leader, mut failed, mut number) = (self.clone(), HashSet::new(), 0);
        let answers = request.into_inner().filter_map(move |request| {
            let request = match request {
                Ok(request) => request,
                Err(error) => return Some(Err(error)),
            };
            if request.resume {
                failed.remove(&request.queue_id);
            }
            let code = match failed.contains(&request.queue_id) {
                true => Some(status::Code::OutOfOrder),
                false => (leader.script)(number, &request),
            };
            number += 1;
            leader.asked.fetch_add(1, Ordering::Relaxed);
            let code = code?;
            if code == status::Code::Ok {
                leader.stored.lock().expect("not poisoned").extend(bodies(&request));
            } else {
                failed.insert(request.queue_id);
            }
            let status = Some(Status { code: code.into(), ..Default::default() });
            Some(Ok(ProduceResponse { sequence: request.sequence, status, ..Default::default() }))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn fetch(
        &self,
        _: Request<Streaming<FetchRequest>>,
    ) -> Result<Response<Self::FetchStream>, tonic::Status> {
        Err(tonic::Status::unimplemented("not needed"))
    }
}

#[tonic::async_trait]
impl Routes for Leader {
    type WatchRoutesStream = Answers<WatchRoutesResponse>;

    async fn watch_routes(
        &self,
        request: Request<Streaming<WatchRoutesRequest>>,
    ) -> Result<Response<Self::WatchRoutesStream>, tonic::Status> {
        let (sender, answers) = mpsc::channel(4);
        let mut route = self.route.subscribe();
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    asked = requests.message() => if !matches!(asked, Ok(Some(_))) { break },
                    changed = route.changed() => if changed.is_err() { break },
                }
                let routes = route.borrow_and_update().iter().cloned().collect();
                let status = Some(Status::default());
                if sender.send(Ok(WatchRoutesResponse { status, routes })).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Leaders of the broker groups a, b, ..., each with `queue_count` queues of topic t.
struct Cluster {
    leaders: Vec<Leader>,
    addresses: Vec<SocketAddr>,
    _servers: Vec<AbortOnDropHandle<()>>,
}

impl Cluster {
    async fn start(queue_count: u32, scripts: Vec<Arc<Script>>) -> Self {
        let (mut leaders, mut addresses, mut servers) = (Vec::new(), Vec::new(), Vec::new());
        let route = watch::Sender::new(None);
        for script in scripts {
            let (stored, asked) = (Arc::default(), Arc::default());
            let leader = Leader { script, stored, asked, route: route.clone() };
            let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            addresses.push(socket.local_addr().expect("it is bound"));
            let server = tonic::transport::Server::builder()
                .add_service(BrokerServer::new(leader.clone()))
                .add_service(RoutesServer::new(leader.clone()))
                .serve_with_incoming(TcpListenerStream::new(socket));
            let task = tokio::spawn(async move { server.await.expect("the server runs") });
            servers.push(AbortOnDropHandle::new(task));
            leaders.push(leader);
        }
        let queues = addresses.iter().zip(["a", "b", "c"]).map(|(address, group)| QueueRoute {
            broker_group: group.into(),
            queue_count,
            leader: Some(Address { host: "127.0.0.1".into(), port: address.port().into() }),
            term: 1,
        });
        route.send_replace(Some(TopicRoute {
            topic: "t".into(),
            exists: true,
            r#type: TopicType::Mixed.into(),
            topic_id: 1,
            queues: queues.collect(),
        }));
        Self { leaders, addresses, _servers: servers }
    }

    async fn client(&self) -> Client {
        // The last one always goes on.
        let address = self.addresses.last().expect("there is a leader");
        Client::connect(&address.to_string()).await.expect("it answers")
    }
}

fn always(code: status::Code) -> Arc<Script> {
    Arc::new(move |_, _| Some(code))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_without_a_group_leave_a_busy_broker() {
    let scripts = vec![always(status::Code::Busy), always(status::Code::Ok)];
    let cluster = Cluster::start(2, scripts).await;
    let client = cluster.client().await;
    let producer = client.producer().build().await.unwrap();
    for n in 0..20 {
        let receipt = within(producer.send(Message::new("t", n.to_string()))).await.unwrap();
        assert_eq!(&*receipt.broker_group, "b");
    }
    let mut stored: Vec<u32> =
        cluster.leaders[1].bodies().iter().map(|body| body.parse().unwrap()).collect();
    stored.sort_unstable();
    assert_eq!(stored, (0..20).collect::<Vec<_>>(), "each once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_a_group_stay_and_fail_at_their_deadline() {
    let scripts = vec![always(status::Code::Busy), always(status::Code::Busy)];
    let cluster = Cluster::start(1, scripts).await;
    let client = cluster.client().await;
    let producer =
        client.producer().send_timeout(Duration::from_millis(300)).build().await.unwrap();
    let message = Message::new("t", "x").message_group("g");
    let error = within(producer.send(message)).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.to_string().contains("BUSY"), "{error} does not say why");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_outcome_is_never_sent_to_another_queue() {
    let scripts = vec![always(status::Code::UnknownOutcome), always(status::Code::Ok)];
    let cluster = Cluster::start(1, scripts).await;
    let client = cluster.client().await;
    let producer =
        client.producer().send_timeout(Duration::from_millis(300)).build().await.unwrap();
    let sends = (0..10).map(|n| producer.send(Message::new("t", n.to_string())));
    let results = within(futures::future::join_all(sends)).await;
    let stored = cluster.leaders[1].bodies();
    for (n, result) in results.iter().enumerate() {
        match result {
            Ok(receipt) => assert_eq!(&*receipt.broker_group, "b"),
            Err(error) => {
                assert_eq!(error.code(), Code::UnknownOutcome);
                assert!(!stored.contains(&n.to_string()), "{n} may be stored twice");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_survives_a_leader_that_fails_every_third_run() {
    let every_third: Arc<Script> = Arc::new(|number, _| match number % 3 {
        1 => Some(status::Code::NotLeader),
        _ => Some(status::Code::Ok),
    });
    let cluster = Cluster::start(2, vec![every_third]).await;
    let client = cluster.client().await;
    let builder = client.producer().max_batch_bytes(600).max_in_flight_messages(50);
    let producer = builder.build().await.unwrap();
    let mut acks = Vec::new();
    for n in 0..300 {
        let message = Message::new("t", n.to_string()).message_group(format!("g{}", n % 2));
        acks.push(producer.enqueue(message).await.unwrap());
    }
    for ack in acks {
        within(ack).await.unwrap();
    }
    for group in 0..2 {
        let stored = cluster.leaders[0].bodies().into_iter();
        let of_group: Vec<u32> =
            stored.map(|body| body.parse().unwrap()).filter(|n| n % 2 == group).collect();
        let sent: Vec<_> = (0..300).filter(|n| n % 2 == group).collect();
        assert_eq!(of_group, sent, "group {group}");
    }
}

/// A longer queue list gives a message group another queue: what was queued for the old one goes to
/// the new one, ahead of what came later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_group_moves_with_its_queue_and_keeps_its_order() {
    let scripts = vec![always(status::Code::PreconditionFailed), always(status::Code::Ok)];
    let cluster = Cluster::start(1, scripts).await;
    let whole = cluster.leaders[0].route.borrow().clone().expect("there is one");
    let mut short = whole.clone();
    short.queues.truncate(1);
    cluster.leaders[0].route.send_replace(Some(short));
    let client = cluster.client().await;
    let producer = client.producer().max_batch_bytes(600).build().await.unwrap();
    let on_b =
        |group: &String| place_of_message_group(group, &[1, 1]).map(|(share, _)| share) == Some(1);
    let group = (0..).map(|n| format!("g{n}")).find(on_b).expect("one of many");
    let message = |n: u32| Message::new("t", n.to_string()).message_group(&group);
    let mut acks = Vec::new();
    for n in 0..50 {
        acks.push(producer.enqueue(message(n)).await.unwrap());
    }
    // Refused at least once, so that runs are on their way back.
    while cluster.leaders[0].asked.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    cluster.leaders[0].route.send_replace(Some(whole));
    for n in 50..100 {
        acks.push(producer.enqueue(message(n)).await.unwrap());
    }
    for ack in acks {
        assert_eq!(&*within(ack).await.unwrap().broker_group, "b");
    }
    let stored: Vec<u32> =
        cluster.leaders[1].bodies().iter().map(|body| body.parse().unwrap()).collect();
    assert_eq!(stored, (0..100).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_frozen_leader_was_sent_goes_to_the_next_one() {
    let frozen: Arc<Script> = Arc::new(|_, _| None);
    let cluster = Cluster::start(1, vec![frozen, always(status::Code::Ok)]).await;
    // The two are leaders of one group, one after the other.
    let lead = |number: usize, term| {
        cluster.leaders[number].route.send_modify(|route| {
            let queues = &mut route.as_mut().expect("there is one").queues;
            queues.truncate(1);
            let port = cluster.addresses[number].port().into();
            queues[0].leader = Some(Address { host: "127.0.0.1".into(), port });
            queues[0].term = term;
        });
    };
    lead(0, 1);
    let client = cluster.client().await;
    let producer = client.producer().build().await.unwrap();
    let mut acks = Vec::new();
    for n in 0..3 {
        let message = Message::new("t", n.to_string()).message_group("g");
        acks.push(within(producer.enqueue(message)).await.unwrap());
    }
    lead(1, 2);
    for ack in acks {
        within(ack).await.unwrap();
    }
    assert_eq!(cluster.leaders[1].bodies(), ["0", "1", "2"]);
}
