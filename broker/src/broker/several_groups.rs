//! Tests of broker groups that share definitions, with a nameserver that only tells each of the
//! others.

use std::collections::BTreeMap;
use std::pin::Pin;

use bytes::Bytes;
use drumlin_proto::ids::{BrokerGroupName, TopicName};
use drumlin_proto::native::admin_client::AdminClient;
use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::register_request::Request;
use drumlin_proto::native::registry_server::{Registry, RegistryServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    CommitOffsetRequest, CreateTopicRequest, DeleteTopicRequest, DescribeTopicRequest, GroupRoute,
    ListGroupsRequest, NodeRoute, ProduceRequest, RegisterRequest, RegisterResponse,
    Status as NativeStatus, Topic, UpdateTopicRequest,
};
use drumlin_proto::record::{RecordFields, RunBuilder};
use drumlin_proto::rocketmq as mq;
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Response, Status, Streaming};

use super::*;

type Groups = BTreeMap<String, GroupRoute>;

/// Keeps every group that ever registered, dead or not.
struct Nameserver {
    groups: Arc<watch::Sender<Groups>>,
}

#[tonic::async_trait]
impl Registry for Nameserver {
    type RegisterStream = Pin<Box<dyn Stream<Item = Result<RegisterResponse, Status>> + Send>>;

    async fn register(
        &self,
        request: tonic::Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|message| message.request);
        let Some(Request::Hello(hello)) = first else { panic!("the first is hello") };
        let own = hello.broker_group.clone();
        let groups = Arc::clone(&self.groups);
        tokio::spawn(async move {
            while let Ok(Some(message)) = requests.message().await {
                let Some(Request::Heartbeat(beat)) = message.request else { continue };
                let (node, listeners) = (hello.node.clone(), hello.listeners.clone());
                let route = GroupRoute {
                    broker_group: hello.broker_group.clone(),
                    group_uuid: hello.group_uuid.clone(),
                    term: beat.term,
                    nodes: vec![NodeRoute { node, leader: beat.leader, listeners }],
                };
                groups.send_if_modified(|groups| {
                    let before = groups.insert(hello.broker_group.clone(), route.clone());
                    before != Some(route)
                });
            }
        });
        let answers = WatchStream::new(self.groups.subscribe()).map(move |groups| {
            let others = groups.into_iter().filter(|(name, _)| *name != own);
            let groups = others.map(|(_, group)| group).collect();
            let status = Some(NativeStatus::default());
            Ok(RegisterResponse { status, groups, settled: true, ..Default::default() })
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

async fn nameserver() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let groups = Arc::new(watch::Sender::new(Groups::new()));
    let service = RegistryServer::new(Nameserver { groups });
    let incoming = TcpIncoming::from(listener);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    address
}

struct Cluster {
    nameserver: SocketAddr,
    dirs: BTreeMap<&'static str, tempfile::TempDir>,
    brokers: BTreeMap<&'static str, Broker>,
}

impl Cluster {
    /// Groups of one node; the first owns the catalog. Returns once that knows the others.
    async fn start(names: &[&'static str]) -> Self {
        let nameserver = nameserver().await;
        let mut cluster = Self { nameserver, dirs: BTreeMap::new(), brokers: BTreeMap::new() };
        for name in names {
            cluster.dirs.insert(name, tempfile::tempdir().unwrap());
            cluster.start_broker(name).await;
        }
        for name in names {
            let whereabouts = cluster.context(name).definitions.whereabouts().unwrap();
            let mut changes = whereabouts.changes();
            while whereabouts.other_groups().len() + 1 < names.len() {
                changes.changed().await.unwrap();
            }
        }
        cluster
    }

    async fn start_broker(&mut self, name: &'static str) {
        let mut config = Config::embedded(self.dirs[name].path().to_owned());
        config.segment_bytes = 1 << 20;
        config.prepared_bytes = 1 << 20;
        config.http = None;
        config.broker_group = BrokerGroupName::parse(name).unwrap();
        config.catalog_group = BrokerGroupName::parse("a").unwrap();
        config.node = format!("{name}-0");
        config.nameservers = vec![self.nameserver.to_string()];
        self.brokers.insert(name, Broker::start(config).await.unwrap());
    }

    async fn stop(&mut self, name: &'static str) {
        self.brokers.remove(name).unwrap().shutdown().await;
    }

    async fn stop_all(mut self) {
        while let Some((_, broker)) = self.brokers.pop_first() {
            broker.shutdown().await;
        }
    }

    fn context(&self, name: &str) -> &Arc<Context> {
        self.brokers[name].context()
    }

    fn channel(&self, name: &str) -> Channel {
        let address = format!("http://{}", self.brokers[name].addresses()[0]);
        Channel::from_shared(address).unwrap().connect_lazy()
    }

    fn admin(&self, name: &str) -> AdminClient<Channel> {
        AdminClient::new(self.channel(name))
    }

    /// Asks the broker of a group.
    async fn create(&self, at: &str, topic: &str, groups: &[&str]) -> Result<Topic, NativeStatus> {
        let request = CreateTopicRequest {
            name: topic.into(),
            queue_count: 2,
            broker_groups: groups.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        };
        let answer = self.admin(at).create_topic(request).await.unwrap().into_inner();
        told(answer.status, answer.topic)
    }

    async fn update(&self, at: &str, request: UpdateTopicRequest) -> Result<Topic, NativeStatus> {
        let answer = self.admin(at).update_topic(request).await.unwrap().into_inner();
        told(answer.status, answer.topic)
    }

    async fn commit(&self, at: &str, group: &str, topic: &str) -> Result<(), NativeStatus> {
        let request = CommitOffsetRequest {
            group: group.into(),
            topic: topic.into(),
            broker_group: at.into(),
            ..Default::default()
        };
        let answer = self.admin(at).commit_offset(request).await.unwrap().into_inner();
        told(answer.status, Some(()))
    }

    /// One message to a queue, or with -1 to where its message group belongs.
    async fn produce(
        &self,
        at: &str,
        topic: &str,
        queue_id: i32,
        message_group: Option<&str>,
    ) -> Code {
        let mut builder = RunBuilder::new();
        builder.push(&RecordFields { message_id: "m", message_group, ..Default::default() });
        let run: Bytes = builder.finish();
        let (sequence, topic) = (1, topic.into());
        let request = ProduceRequest { sequence, topic, queue_id, run, ..Default::default() };
        let mut client = BrokerClient::new(self.channel(at));
        let mut answers = client.produce(stream::iter([request])).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap().status.unwrap().code()
    }

    /// Waits until all copies equal the catalog.
    async fn until_equal(&self) {
        let catalog = |name: &str| self.context(name).replica.view().state.catalog().clone();
        let others = self.brokers.keys().filter(|name| **name != "a");
        for name in others {
            let mut version = self.context(name).replica.catalog_version();
            while catalog(name).version() != catalog("a").version() {
                version.changed().await.unwrap();
            }
            assert_eq!(catalog(name).defined(), catalog("a").defined());
        }
    }
}

fn told<T>(status: Option<NativeStatus>, value: Option<T>) -> Result<T, NativeStatus> {
    let status = status.expect("every response has a status");
    if status.code() == Code::Ok { Ok(value.unwrap()) } else { Err(status) }
}

fn shares(topic: &Topic) -> Vec<(&str, u32)> {
    topic.shares.iter().map(|share| (&*share.broker_group, share.queue_count)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn definitions_are_made_by_the_catalog_group_wherever_they_are_asked_for() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let topic = cluster.create("b", "t", &[]).await.unwrap();
    assert_eq!(shares(&topic), [("a", 2), ("b", 2)]);
    let again = cluster.create("b", "t", &[]).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    for at in ["a", "b"] {
        assert_eq!(cluster.produce(at, "t", 1, None).await, Code::Ok);
    }
    cluster.commit("b", "g", "t").await.unwrap();
    cluster.until_equal().await;

    let describe = DescribeTopicRequest { name: "t".into(), ..Default::default() };
    let described = cluster.admin("b").describe_topic(describe).await.unwrap().into_inner();
    let ends: Vec<_> =
        described.queues.iter().map(|queue| (&*queue.broker_group, queue.max_offset)).collect();
    assert_eq!(ends, [("a", 0), ("a", 1), ("b", 0), ("b", 1)]);
    let listed = cluster.admin("a").list_groups(ListGroupsRequest::default()).await.unwrap();
    let groups = listed.into_inner().groups;
    assert_eq!((groups.len(), groups[0].queues.len()), (1, 1), "begun at b only");

    let delete = DeleteTopicRequest { name: "t".into() };
    let deleted = cluster.admin("b").delete_topic(delete).await.unwrap().into_inner();
    told(deleted.status, Some(())).unwrap();
    assert_eq!(cluster.produce("b", "t", 0, None).await, Code::TopicNotFound);
    let topic = cluster.create("a", "t", &["b"]).await.unwrap();
    assert_eq!((topic.topic_id, shares(&topic)), (2, vec![("b", 2)]));
    assert_eq!(cluster.produce("b", "t", 0, None).await, Code::Ok);
    cluster.until_equal().await;
    cluster.stop_all().await;
}

/// A poll of a broker group, as an official client sends it.
fn poll(broker_group: &str, topic: &str, group: &str) -> tonic::Request<mq::ReceiveMessageRequest> {
    let resource =
        |name: &str| Some(mq::Resource { name: name.to_owned(), ..mq::Resource::default() });
    let broker = Some(mq::Broker { name: broker_group.to_owned(), ..mq::Broker::default() });
    let queue = mq::MessageQueue { topic: resource(topic), broker, ..Default::default() };
    let mut poll = tonic::Request::new(mq::ReceiveMessageRequest {
        group: resource(group),
        message_queue: Some(queue),
        batch_size: 32,
        invisible_duration: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
        long_polling_timeout: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        ..Default::default()
    });
    poll.metadata_mut().insert("x-mq-client-id", "me".parse().unwrap());
    poll.set_timeout(Duration::from_secs(20));
    poll
}

/// The group is defined by the catalog group, on the way of a call that went from there to here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_poll_that_was_sent_on_creates_its_consumer_group() {
    let cluster = Cluster::start(&["a", "b"]).await;
    cluster.create("a", "t", &[]).await.unwrap();
    for (at, owner, group) in [("a", "b", "first"), ("b", "a", "second")] {
        assert_eq!(cluster.produce(owner, "t", 0, None).await, Code::Ok);
        let mut client = MessagingServiceClient::new(cluster.channel(at));
        let frames = client.receive_message(poll(owner, "t", group)).await.unwrap();
        let frames: Vec<_> = frames.into_inner().collect().await;
        let contents: Vec<_> =
            frames.into_iter().filter_map(|frame| frame.unwrap().content).collect();
        let messages = contents.iter().filter(|content| matches!(content, Content::Message(_)));
        assert_eq!(messages.count(), 1, "of {owner}, asked at {at}: {contents:?}");
    }
    cluster.until_equal().await;
    let catalog = cluster.context("b").replica.view().state.catalog().clone();
    assert_eq!(catalog.groups().count(), 2);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_exists_is_used_on_while_the_catalog_is_down() {
    let mut cluster = Cluster::start(&["a", "b"]).await;
    cluster.create("a", "t", &[]).await.unwrap();
    cluster.commit("b", "g", "t").await.unwrap();
    cluster.stop("a").await;
    assert_eq!(cluster.produce("b", "t", 0, None).await, Code::Ok);
    cluster.commit("b", "g", "t").await.unwrap();
    let refused = cluster.create("b", "u", &[]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message);
    assert!(refused.message.contains("broker group a"), "{}", refused.message);
    let refused = cluster.commit("b", "new", "t").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message);

    cluster.start_broker("a").await;
    cluster.commit("b", "new", "t").await.unwrap();
    cluster.until_equal().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_list_grows_over_groups_once_every_owner_has_it() {
    let mut cluster = Cluster::start(&["a", "b"]).await;
    let topic = cluster.create("a", "t", &["a"]).await.unwrap();
    assert_eq!((shares(&topic), topic.min_copies), (vec![("a", 2)], 1));
    assert_ne!(cluster.produce("b", "t", 0, None).await, Code::Ok);
    let update = |groups: &[&str], queue_count, min_copies| UpdateTopicRequest {
        name: "t".into(),
        broker_groups: groups.iter().map(|name| (*name).to_owned()).collect(),
        queue_count,
        min_copies,
    };
    let topic = cluster.update("b", update(&["a", "b"], 0, 0)).await.unwrap();
    assert_eq!((shares(&topic), topic.version), (vec![("a", 2), ("b", 2)], 3));
    assert_eq!(cluster.produce("b", "t", 1, None).await, Code::Ok);
    let topic = cluster.update("a", update(&[], 3, 2)).await.unwrap();
    assert_eq!((shares(&topic), topic.min_copies), (vec![("a", 3), ("b", 3)], 2));
    let shrunk = cluster.update("a", update(&["a"], 0, 0)).await.unwrap_err();
    assert_eq!(shrunk.code(), Code::InvalidArgument, "{}", shrunk.message);
    let unknown = cluster.update("a", update(&["a", "b", "c"], 0, 0)).await.unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument, "{}", unknown.message);

    // An owner that does not store the new list: nothing is changed.
    cluster.stop("b").await;
    let refused = cluster.update("a", update(&[], 4, 0)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message);
    let name = TopicName::parse("t").unwrap();
    let topic = cluster.context("a").replica.view().state.catalog().topic_by_name(&name).cloned();
    let topic = topic.unwrap();
    assert_eq!((topic.next.clone(), topic.shares[1].1), (None, 3));
    let refused = cluster.create("a", "u", &["a", "b"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{}", refused.message);
    cluster.start_broker("b").await;
    cluster.until_equal().await;
    cluster.create("b", "u", &["a", "b"]).await.unwrap();
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_was_away_learns_what_was_made_and_deleted_meanwhile() {
    let mut cluster = Cluster::start(&["a", "b", "c"]).await;
    cluster.create("a", "kept", &["a", "b"]).await.unwrap();
    cluster.create("a", "gone", &["a"]).await.unwrap();
    cluster.until_equal().await;
    cluster.stop("b").await;
    let delete = DeleteTopicRequest { name: "gone".into() };
    cluster.admin("c").delete_topic(delete).await.unwrap();
    cluster.create("c", "gone", &["c"]).await.unwrap();
    cluster.stop("a").await;
    cluster.start_broker("a").await;
    cluster.start_broker("b").await;
    cluster.until_equal().await;
    let ids: Vec<u32> = {
        let view = cluster.context("b").replica.view();
        view.state.catalog().definitions().map(|topic| topic.id.get()).collect()
    };
    assert_eq!(ids, [1, 3]);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_group_is_taken_by_its_queue_only() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let request = CreateTopicRequest {
        name: "t".into(),
        queue_count: 2,
        r#type: drumlin_proto::native::TopicType::Fifo.into(),
        ..Default::default()
    };
    let answer = cluster.admin("a").create_topic(request).await.unwrap().into_inner();
    told(answer.status, answer.topic).unwrap();
    for n in 0..8 {
        let message_group = format!("order-{n}");
        let mut taken = 0;
        for (at, queue_id) in [("a", 0), ("a", 1), ("b", 0), ("b", 1)] {
            let code = cluster.produce(at, "t", queue_id, Some(&message_group)).await;
            assert!(matches!(code, Code::Ok | Code::NotLeader | Code::PreconditionFailed));
            taken += usize::from(code == Code::Ok);
        }
        assert_eq!(taken, 1, "{message_group}");
    }
    cluster.stop_all().await;
}
