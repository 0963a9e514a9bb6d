//! Groups of several nodes: brokers of one process that talk over real connections.

use std::time::Duration;

use drumlin_proto::ids::{QueueId, QueueKey, TopicId, TopicName};
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use uuid::Uuid;

use super::*;
use crate::command::{Command, Outcome, TopicType};
use crate::config::{Flush, ListenerConfig, NodeAddress};
use crate::data_dir::{Claim, Found};
use crate::free_ports::free_address;
use crate::log::{Log, LogOptions};
use crate::replica::changing::ChangeError;
use crate::replica::elect::{Candidate, ElectError};
use crate::replica::{Applied, Item, ProposeError};

const PATIENCE: Duration = Duration::from_secs(60);

/// Directories and ports of the nodes of one group.
struct Group {
    dir: tempfile::TempDir,
    nodes: Vec<NodeAddress>,
}

impl Group {
    fn new(node_count: usize) -> Self {
        let nodes = (0..node_count).map(|number| NodeAddress {
            name: format!("broker-a-{number}"),
            address: free_address(),
        });
        Self { dir: tempfile::tempdir().unwrap(), nodes: nodes.collect() }
    }

    fn config(&self, number: usize) -> Config {
        let NodeAddress { name, address } = self.nodes[number].clone();
        let bind = address.parse().unwrap();
        Config {
            node: name.clone(),
            peers: Some(ListenerConfig { name: "peers".into(), bind, advertised: None }),
            replicas: self.nodes.clone(),
            segment_bytes: 1 << 20,
            prepared_bytes: 1 << 20,
            http: None,
            ..Config::embedded(self.dir.path().join(name))
        }
    }

    async fn start(&self, number: usize) -> Broker {
        Broker::start(self.config(number)).await.unwrap()
    }

    /// All at once.
    async fn start_all(&self) -> Vec<Broker> {
        let starting = (0..self.nodes.len()).map(|number| self.start(number));
        tokio::time::timeout(PATIENCE, futures::future::join_all(starting)).await.unwrap()
    }
}

/// Waits until one of them serves as the leader.
async fn leader(brokers: &[Broker]) -> usize {
    let waiting = brokers.iter().enumerate().map(|(number, broker)| {
        Box::pin(async move {
            let mut status = broker.context().replica.raft_status();
            status.wait_for(|status| status.serving).await.unwrap();
            number
        })
    });
    let elected = futures::future::select_all(waiting);
    tokio::time::timeout(PATIENCE, elected).await.unwrap().0
}

fn queue() -> QueueKey {
    QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) }
}

async fn create_topic(broker: &Broker) {
    let name = TopicName::parse("orders").unwrap();
    let shares = vec![(broker.context().config.broker_group.clone(), 1)];
    let create = Command::CreateTopic { name, kind: TopicType::Normal, shares };
    let created = broker.context().replica.propose(Item::Command(create), None).await.unwrap();
    assert!(matches!(created, Applied::Command(Outcome::TopicCreated { .. })), "{created:?}");
}

async fn send(broker: &Broker, body: &str) -> Result<Applied, ProposeError> {
    let mut builder = RunBuilder::new();
    builder.push(&RecordFields { message_id: "m", body: body.as_bytes(), ..Default::default() });
    let run = Run::parse(builder.finish()).unwrap();
    broker.context().replica.propose(Item::Run { queue: queue(), run }, None).await
}

/// Waits until the node shows this many records of the queue.
async fn until_readable(broker: &Broker, record_count: u64) {
    let replica = &broker.context().replica;
    let mut readable = replica.readable_end();
    let waiting = async {
        while replica.queue_range(queue()).is_none_or(|(_, end)| end.get() < record_count) {
            readable.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

/// Stores a second record with whoever leads, and waits until all show both.
async fn go_on(brokers: &[Broker]) {
    send(&brokers[leader(brokers).await], "after").await.unwrap();
    for broker in brokers {
        until_readable(broker, 2).await;
    }
}

async fn stop_all(brokers: Vec<Broker>) {
    for broker in brokers {
        broker.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_become_a_group_whose_followers_have_all_of_it() {
    let group = Group::new(3);
    let brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    for number in 0..20 {
        send(&brokers[leads], &number.to_string()).await.unwrap();
    }
    for broker in &brokers {
        until_readable(broker, 20).await;
    }
    let follower = (leads + 1) % 3;
    let refused = send(&brokers[follower], "not here").await.unwrap_err();
    let leader_id = brokers[leads].context().identity.node_id;
    assert!(
        matches!(refused, ProposeError::NotLeader { leader: Some(id) } if id == leader_id),
        "{refused}"
    );
    stop_all(brokers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn founder_that_comes_last_makes_the_group_and_all_survive_a_restart() {
    let group = Group::new(3);
    let founder_last = async {
        let early = futures::future::join(group.start(1), group.start(2));
        let mut early = std::pin::pin!(early);
        let waits = tokio::time::timeout(Duration::from_secs(1), &mut early).await;
        assert!(waits.is_err(), "they start only as members");
        let founder = group.start(0).await;
        let (first, second) = early.await;
        vec![founder, first, second]
    };
    let brokers = Box::pin(tokio::time::timeout(PATIENCE, founder_last)).await.unwrap();
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    send(&brokers[leads], "kept").await.unwrap();
    stop_all(brokers).await;
    let brokers = group.start_all().await;
    go_on(&brokers).await;
    stop_all(brokers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_three_go_on_without_the_leader() {
    let group = Group::new(3);
    let mut brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    send(&brokers[leads], "before").await.unwrap();
    brokers.remove(leads).shutdown().await;
    go_on(&brokers).await;
    stop_all(brokers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_that_stops_lets_another_lead_before_it_goes() {
    let group = Group::new(3);
    let mut brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    for broker in &brokers {
        until_peers_are_heard(broker, 2).await;
    }
    let stopping = brokers.remove(leads);
    let before = brokers[0].context().replica.raft_status().borrow().term;
    stopping.context().replica.hand_over().await;
    let status = *stopping.context().replica.raft_status().borrow();
    let id = stopping.context().identity.node_id;
    assert!(status.leader.is_some_and(|leader| leader != id), "{status:?}");
    assert_eq!(status.term.get(), before.get() + 1, "one election, at once");
    stopping.shutdown().await;
    let leads = leader(&brokers).await;
    send(&brokers[leads], "after").await.unwrap();
    stop_all(brokers).await;
}

async fn until_peers_are_heard(broker: &Broker, count: usize) {
    let mut peers = broker.context().replica.peers();
    let heard = peers.wait_for(|peers| peers.values().filter(|peer| peer.fresh).count() == count);
    tokio::time::timeout(PATIENCE, heard).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_that_is_added_takes_the_place_of_a_lost_one() {
    let mut group = Group::new(4);
    let spare = group.nodes.pop().unwrap();
    let mut brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    send(&brokers[leads], "before").await.unwrap();
    group.nodes.push(spare.clone());
    let adding = async {
        let replica = &brokers[leads].context().replica;
        let id = loop {
            // Until its port answers.
            match replica.add_member(&spare.name, &spare.address).await {
                Ok(id) => break id,
                Err(ChangeError::NotAdopted { .. }) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        assert!(id > 3, "{id} is new");
        id
    };
    let (id, added) = tokio::time::timeout(PATIENCE, async {
        // Its configuration has four nodes, an even number, which only a first start refuses.
        futures::future::join(adding, group.start(3)).await
    })
    .await
    .unwrap();
    until_readable(&added, 1).await;
    let replica = brokers[leads].context().replica.clone();
    let again = replica.add_member(&spare.name, &spare.address).await.unwrap();
    assert_eq!(again, id, "as where the answer to the first never arrived");
    let member = replica.add_member(&group.nodes[1].name, &group.nodes[1].address).await;
    assert!(matches!(member, Err(ChangeError::NotAdopted { .. })), "{member:?}");
    let even = replica.promote(id, None).await.unwrap_err();
    assert!(matches!(even, ChangeError::Even { data_count: 4 }), "{even}");
    let lost = (leads + 1) % 3;
    let lost_id = brokers[lost].context().identity.node_id;
    replica.promote(id, Some(lost_id)).await.unwrap();
    let members: Vec<_> = replica.members().into_keys().collect();
    assert!(members.contains(&id) && !members.contains(&lost_id), "{members:?}");
    let gone = replica.remove(lost_id).await.unwrap_err();
    assert!(matches!(gone, ChangeError::NoMember { .. }), "{gone}");
    brokers.remove(lost).shutdown().await;
    brokers.push(added);
    go_on(&brokers).await;
    stop_all(brokers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_node_goes_on_alone_only_by_an_unsafe_election() {
    let group = Group::new(3);
    let brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    send(&brokers[leads], "kept").await.unwrap();
    for broker in &brokers {
        until_readable(broker, 1).await;
    }
    let old_uuid = brokers[0].context().identity.group_uuid;
    let locked = Candidate::of(&group.config(0)).await.unwrap_err();
    assert!(matches!(locked, ElectError::DataDir(_)), "{locked}");
    stop_all(brokers).await;
    let candidate = Candidate::of(&group.config(0)).await.unwrap();
    assert_eq!(candidate.others.len(), 2);
    assert_eq!(candidate.lacking_count(), None, "nobody answers");
    let new_uuid = candidate.elect().await.unwrap();
    let survivor = group.start(0).await;
    let identity = survivor.context().identity.clone();
    assert_eq!((identity.group_uuid, identity.succeeds), (new_uuid, vec![old_uuid]));
    send(&survivor, "after").await.unwrap();
    until_readable(&survivor, 2).await;
    // The others go on waiting for each other and do not disturb it.
    let old = group.start(1).await;
    let alone = Candidate::of(&group.config(2)).await.unwrap();
    let said: Vec<_> = alone.others.iter().map(|other| other.said.is_ok()).collect();
    assert_eq!(said, [false, true], "the survivor is of another group now");
    assert_eq!(alone.lacking_count(), Some(0));
    drop(alone);
    send(&survivor, "undisturbed").await.unwrap();
    let status = *old.context().replica.raft_status().borrow();
    assert!(!status.serving, "{status:?}");
    old.shutdown().await;
    survivor.shutdown().await;
    let alone = Candidate::of(&group.config(0)).await.unwrap_err();
    assert!(matches!(alone, ElectError::AloneAlready), "{alone}");
    let survivor = group.start(0).await;
    until_readable(&survivor, 3).await;
    survivor.shutdown().await;
}

/// It may have voted, and answered for entries, in what it has lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_whose_log_is_gone_does_not_come_back_under_its_old_id() {
    let group = Group::new(3);
    let mut brokers = group.start_all().await;
    let leads = leader(&brokers).await;
    create_topic(&brokers[leads]).await;
    send(&brokers[leads], "kept").await.unwrap();
    for broker in &brokers {
        until_readable(broker, 1).await;
    }
    let lost = (leads + 1) % 3;
    brokers.remove(lost).shutdown().await;
    let data_dir = group.config(lost).data_dir;
    for folder in ["log", "index", "checkpoint"] {
        std::fs::remove_dir_all(data_dir.join(folder)).unwrap();
    }
    let refused = Broker::start(group.config(lost)).await.unwrap_err();
    assert!(refused.to_string().contains("cluster add"), "{refused}");
    go_on(&brokers).await;
    stop_all(brokers).await;
}

/// Nobody else has what it may have lost, so it waits for nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lone_node_that_defers_its_syncs_goes_on_after_a_loss_of_power() {
    let dir = tempfile::tempdir().unwrap();
    let start_in = |data_dir: std::path::PathBuf| {
        Broker::start(Config { flush: Flush::Async, http: None, ..Config::embedded(data_dir) })
    };
    let broker = start_in(dir.path().join("now")).await.unwrap();
    create_topic(&broker).await;
    send(&broker, "kept").await.unwrap();
    broker.shutdown().await;
    // As a start on another boot behind a log that was not closed leaves it, and its writer then.
    let log_dir = dir.path().join("now").join("log");
    let identity = DataDir::open(&dir.path().join("now"), &claim()).unwrap();
    let Found::Owned(data_dir) = identity else { panic!("it is empty") };
    let options = LogOptions {
        defer_syncs: true,
        boot_id: Uuid::from_u128(1),
        ..LogOptions::new(data_dir.identity().log_uuid())
    };
    drop(Log::open(&log_dir, options, None).unwrap());
    drop(data_dir);
    let broker = start_in(dir.path().join("now")).await.unwrap();
    assert!(!broker.context().replica.own_state().fenced);
    send(&broker, "after").await.unwrap();
    until_readable(&broker, 2).await;
    broker.shutdown().await;
}

fn claim() -> Claim {
    let Config { cluster, broker_group, node, .. } = Config::embedded("".into());
    Claim { cluster, broker_group, node }
}
