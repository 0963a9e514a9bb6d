//! The same by way of a nameserver, which is all that a client is told.

use std::time::Duration;

use drumlin_client::admin::NewTopic;
use drumlin_client::{Client, Filter, Message};
use drumlin_nameserver::config::Config;
use drumlin_nameserver::nameserver::Nameserver;

use crate::{Node, read_all, within};

struct Cluster {
    nameserver: Nameserver,
    node: Node,
    _dir: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut config = Config::embedded(dir.path().to_owned());
        config.http = None;
        let nameserver = Nameserver::start(config).await.expect("the nameserver starts");
        let address = nameserver.addresses()[0].to_string();
        let node = Node::start_with(|config| config.nameservers = vec![address]).await;
        Self { nameserver, node, _dir: dir }
    }

    async fn client(&self) -> Client {
        let address = self.nameserver.addresses()[0].to_string();
        Client::connect(&address).await.expect("the nameserver answers")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_is_created_written_and_read() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    within(client.admin().create_topic(NewTopic::new("t", 2))).await.unwrap();
    let producer = client.producer().build().await.unwrap();
    let messages = (0..10).map(|n| Message::new("t", n.to_string()));
    within(producer.send_batch(messages)).await.unwrap();
    assert_eq!(read_all(&client, "t").await.len(), 10);
    let topics = within(client.admin().list_topics()).await.unwrap();
    assert_eq!(topics.iter().map(|topic| topic.name.as_str()).collect::<Vec<_>>(), ["t"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_use_creates_a_topic() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let producer = client.producer().build().await.unwrap();
    within(producer.send(Message::new("t", "x"))).await.unwrap();
    let consumer = client.simple_consumer("g").subscribe("t", Filter::All);
    let consumer = within(consumer.build()).await.unwrap();
    let received = within(consumer.receive(1, Duration::from_secs(10))).await.unwrap();
    assert_eq!(received.len(), 1);
    within(consumer.ack(&received[0])).await.unwrap();
}

/// Whichever endpoint answers is believed that a topic does not exist yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_use_creates_a_topic_while_an_endpoint_is_dead() {
    let cluster = Cluster::start().await;
    let alive = cluster.nameserver.addresses()[0].to_string();
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let dead = free.local_addr().expect("it is bound").to_string();
    drop(free);
    for (topic, endpoints) in [("t", [&dead, &alive]), ("u", [&alive, &dead])] {
        let client = Client::builder().endpoints(endpoints).build().await.expect("one answers");
        let builder = client.producer().send_timeout(Duration::from_secs(20));
        let producer = builder.build().await.unwrap();
        within(producer.send(Message::new(topic, "x"))).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producer_goes_on_after_its_broker_comes_back_elsewhere() {
    let mut cluster = Cluster::start().await;
    let client = cluster.client().await;
    let producer = client.producer().send_timeout(Duration::from_secs(25)).build().await.unwrap();
    within(producer.send(Message::new("t", "1"))).await.unwrap();
    let any_port = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    cluster.node.config.listeners[0].bind = any_port;
    cluster.node.restart().await;
    within(producer.send(Message::new("t", "2"))).await.unwrap();
    assert_eq!(read_all(&client, "t").await.len(), 2);
}
