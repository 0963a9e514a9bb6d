use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::ids::TopicName;
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::fetch_request::{Open, Request};
use drumlin_proto::native::position::At;
use drumlin_proto::native::routes_client::RoutesClient;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    CommitOffsetRequest, CreateTopicRequest, CreateTopicResponse, DeleteTopicRequest,
    DescribeBrokerRequest, DescribeBrokerResponse, DescribeTopicRequest, FetchRequest,
    FetchResponse, GetCommittedOffsetRequest, Position, ProduceRequest, ProduceResponse,
    QueryOffsetsRequest, WatchRoutesRequest,
};
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use futures::stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::*;

fn config(dir: &Path) -> Config {
    Config {
        segment_bytes: 1 << 20,
        prepared_bytes: 1 << 20,
        http: None,
        ..Config::embedded(dir.to_owned())
    }
}

struct Running {
    broker: Broker,
    channel: Channel,
}

async fn start(config: Config) -> Running {
    let broker = Broker::start(config).await.unwrap();
    let address = format!("http://{}", broker.addresses()[0]);
    let channel = Channel::from_shared(address).unwrap().connect_lazy();
    Running { broker, channel }
}

fn run(bodies: &[&[u8]]) -> Bytes {
    let mut builder = RunBuilder::new();
    for body in bodies {
        builder.push(&RecordFields { message_id: "id", body, ..Default::default() });
    }
    builder.finish()
}

impl Running {
    async fn stop(self) {
        drop(self.channel);
        self.broker.shutdown().await;
    }

    fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel.clone())
    }

    async fn create(&self, name: &str, queue_count: u32) -> CreateTopicResponse {
        let request = CreateTopicRequest { name: name.into(), queue_count, ..Default::default() };
        self.admin().create_topic(request).await.unwrap().into_inner()
    }

    async fn describe(&self) -> DescribeBrokerResponse {
        self.admin().describe_broker(DescribeBrokerRequest {}).await.unwrap().into_inner()
    }

    /// All answers to a stream of these requests.
    async fn produce(&self, requests: Vec<ProduceRequest>) -> Vec<ProduceResponse> {
        let mut client = BrokerClient::new(self.channel.clone());
        let mut answers = client.produce(stream::iter(requests)).await.unwrap().into_inner();
        let mut told = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            told.push(answer);
        }
        told
    }

    async fn fetch(
        &self,
        topic: &str,
        at: At,
        credit_bytes: u64,
    ) -> (mpsc::Sender<FetchRequest>, Streaming<FetchResponse>) {
        let mut client = BrokerClient::new(self.channel.clone());
        let (sender, receiver) = mpsc::channel(4);
        let open = Open {
            fetch_id: 7,
            topic: topic.into(),
            queue_id: 0,
            from: Some(Position { at: Some(at) }),
            credit_bytes,
        };
        sender.send(FetchRequest { request: Some(Request::Open(open)) }).await.unwrap();
        let responses = client.fetch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        (sender, responses)
    }
}

fn request(sequence: u64, topic: &str, run: Bytes) -> ProduceRequest {
    ProduceRequest { sequence, topic: topic.into(), queue_id: 0, run, ..Default::default() }
}

fn code(status: Option<&drumlin_proto::native::Status>) -> Code {
    status.expect("every response has a status").code()
}

fn bodies(responses: &FetchResponse) -> Vec<Vec<u8>> {
    let runs = responses.runs.iter().map(|run| Run::from_log(run.run.clone()).unwrap());
    runs.flat_map(|run| run.records().map(|r| r.body().to_vec()).collect::<Vec<_>>()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_produced_is_fetched_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    assert_eq!(code(running.create("t", 2).await.status.as_ref()), Code::Ok);
    let runs = [run(&[b"a", b"b"]), run(&[b"c"]), run(&[b"d"])];
    let requests = (1..).zip(runs).map(|(sequence, run)| request(sequence, "t", run)).collect();
    let answers = running.produce(requests).await;
    let told: Vec<_> =
        answers.iter().map(|a| (a.sequence, code(a.status.as_ref()), a.base_offset)).collect();
    assert_eq!(told, [(1, Code::Ok, 0), (2, Code::Ok, 2), (3, Code::Ok, 3)]);
    let before = running.describe().await;
    running.stop().await;

    let running = start(config(dir.path())).await;
    let after = running.describe().await;
    assert!(after.applied_index > before.applied_index, "a new term has an entry");
    assert!(!after.state_digest.is_empty());
    assert_eq!(after.group_uuid, before.group_uuid);
    let (_requests, mut responses) = running.fetch("t", At::Earliest(true), 1 << 20).await;
    let first = responses.message().await.unwrap().unwrap();
    assert_eq!((first.start_offset, first.max_offset), (Some(0), 4));
    assert_eq!(bodies(&first), [b"a", b"b", b"c", b"d"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fetch_waits_at_the_end_and_for_credit() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    running.create("t", 1).await;
    let (requests, mut responses) = running.fetch("t", At::Latest(true), 1).await;
    let opened = responses.message().await.unwrap().unwrap();
    assert_eq!((opened.start_offset, opened.runs.len()), (Some(0), 0));
    running.produce(vec![request(1, "t", run(&[b"a"]))]).await;
    let first = responses.message().await.unwrap().unwrap();
    assert_eq!(bodies(&first), [b"a"]);
    running.produce(vec![request(1, "t", run(&[b"b"]))]).await;
    let silent = tokio::time::timeout(Duration::from_millis(200), responses.message()).await;
    assert!(silent.is_err(), "the credit is used up: {silent:?}");
    let credit = drumlin_proto::native::fetch_request::Credit { fetch_id: 7, bytes: 1000 };
    requests.send(FetchRequest { request: Some(Request::Credit(credit)) }).await.unwrap();
    assert_eq!(bodies(&responses.message().await.unwrap().unwrap()), [b"b"]);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_behind_a_failed_one_are_refused_until_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    running.create("t", 1).await;
    let good = || run(&[b"good"]);
    let resumed = ProduceRequest { resume: true, ..request(4, "t", good()) };
    let requests = vec![
        request(1, "t", good()),
        request(2, "t", Bytes::from_static(b"no run")),
        request(3, "t", good()),
        resumed,
        request(5, "t", good()),
        request(6, "nowhere", good()),
        request(7, "nowhere", good()),
    ];
    let answers = running.produce(requests).await;
    let codes: Vec<_> = answers.iter().map(|answer| code(answer.status.as_ref())).collect();
    let expected = [
        Code::Ok,
        Code::InvalidArgument,
        Code::OutOfOrder,
        Code::Ok,
        Code::Ok,
        Code::TopicNotFound,
        Code::OutOfOrder,
    ];
    assert_eq!(codes, expected);
    assert_eq!(answers[4].base_offset, 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_and_offsets_are_administered() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let mut admin = running.admin();
    let first = running.create("t", 3).await.topic.unwrap();
    assert_eq!(code(running.create("t", 3).await.status.as_ref()), Code::AlreadyExists);
    running.produce(vec![request(1, "t", run(&[b"a", b"b"]))]).await;
    let described = DescribeTopicRequest { name: "t".into(), ..Default::default() };
    let described = admin.describe_topic(described).await.unwrap().into_inner();
    let ends: Vec<_> = described.queues.iter().map(|queue| queue.max_offset).collect();
    assert_eq!(ends, [2, 0, 0]);
    assert!(described.queues[0].newest_ms > 0);
    let at = Some(Position { at: Some(At::TimeMs(described.queues[0].newest_ms)) });
    let offsets = QueryOffsetsRequest { topic: "t".into(), at, own_group_only: false };
    let offsets = admin.query_offsets(offsets).await.unwrap().into_inner().offsets;
    assert_eq!(offsets.iter().map(|o| o.offset).collect::<Vec<_>>(), [0, 0, 0]);

    let commit = |offset| CommitOffsetRequest {
        group: "g".into(),
        topic: "t".into(),
        queue_id: 0,
        offset,
        ..Default::default()
    };
    let status = admin.commit_offset(commit(1)).await.unwrap().into_inner().status;
    assert_eq!(code(status.as_ref()), Code::Ok);
    let status = admin.commit_offset(commit(3)).await.unwrap().into_inner().status;
    assert_eq!(code(status.as_ref()), Code::OffsetOutOfRange);
    let asked = GetCommittedOffsetRequest {
        group: "g".into(),
        topic: "t".into(),
        queue_id: 0,
        ..Default::default()
    };
    let committed = admin.get_committed_offset(asked).await.unwrap().into_inner();
    assert_eq!(committed.offset, Some(1));

    let delete = DeleteTopicRequest { name: "t".into() };
    let status = admin.delete_topic(delete).await.unwrap().into_inner().status;
    assert_eq!(code(status.as_ref()), Code::Ok);
    let again = running.create("t", 1).await.topic.unwrap();
    assert!(again.topic_id > first.topic_id);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn creation_on_first_use_is_bounded_and_makes_no_derived_topics() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let mut admin = running.admin();
    let auto = |name: String| CreateTopicRequest { name, auto: true, ..Default::default() };
    let derived = admin.create_topic(auto("%DLQ%g".into())).await.unwrap().into_inner();
    assert_eq!(code(derived.status.as_ref()), Code::InvalidArgument);
    // A second that began in the future goes on for as long as the test.
    let second = tokio::time::Instant::now() + Duration::from_secs(60);
    while running.broker.context().creations.topics.lock().take(second) {}
    let mut codes = Vec::new();
    for _ in 0..2 {
        let answer = admin.create_topic(auto("t".into())).await.unwrap().into_inner();
        codes.push(code(answer.status.as_ref()));
        running.create("t", 1).await;
    }
    assert_eq!(codes, [Code::Busy, Code::Ok], "what exists needs no creation");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watched_routes_are_told_at_once_and_when_they_change() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(config(dir.path())).await;
    let mut client = RoutesClient::new(running.channel.clone());
    let (sender, receiver) = mpsc::channel(1);
    let topics = vec!["x".repeat(256), "t".into()];
    sender.send(WatchRoutesRequest { topics }).await.unwrap();
    let watching = client.watch_routes(ReceiverStream::new(receiver)).await.unwrap();
    let mut responses = watching.into_inner();
    let absent = responses.message().await.unwrap().unwrap().routes;
    assert_eq!(absent.iter().map(|route| route.exists).collect::<Vec<_>>(), [false, false]);
    running.create("t", 4).await;
    let mut told = responses.message().await.unwrap().unwrap().routes;
    assert_eq!(told.len(), 1, "a name that no topic can have is not watched");
    let route = told.remove(0);
    let port = u32::from(running.broker.addresses()[0].port());
    assert_eq!(route.queues[0].queue_count, 4);
    assert_eq!(route.queues[0].leader.as_ref().unwrap().port, port);
    assert_eq!(TopicName::parse("t").unwrap().as_str(), route.topic);
    running.stop().await;
}
