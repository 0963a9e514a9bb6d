use std::path::Path;

use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::*;
use crate::config::NodeAddress;
use crate::data_dir::Found;
use crate::replica::peer_service::PeerService;

const PATIENCE: Duration = Duration::from_secs(30);

/// A node that is not started yet, with its port.
struct Home {
    dir: tempfile::TempDir,
    name: String,
    listener: tokio::net::TcpListener,
}

impl Home {
    async fn new(name: &str) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            name: name.into(),
            listener: tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(),
        }
    }

    fn address(&self) -> NodeAddress {
        let address = self.listener.local_addr().unwrap().to_string();
        NodeAddress { name: self.name.clone(), address }
    }
}

fn claim(name: &str) -> Claim {
    let config = Config::embedded("unused".into());
    Claim { cluster: config.cluster, broker_group: config.broker_group, node: name.into() }
}

fn empty(dir: &Path, name: &str) -> EmptyDataDir {
    match DataDir::open(dir, &claim(name)).unwrap() {
        Found::Empty(empty) => empty,
        Found::Owned(owned) => panic!("{owned:?}"),
    }
}

fn plan(own: &str, nodes: Vec<NodeAddress>) -> Plan {
    let node = own.to_owned();
    Plan::of(&Config { node, replicas: nodes, ..Config::embedded("unused".into()) }).unwrap()
}

/// A door whose port answers until the guard is dropped.
fn open_door(home: Home) -> (Arc<Door>, tempfile::TempDir, DropGuard) {
    let door = Arc::new(Door::of_empty(empty(home.dir.path(), &home.name)));
    let stop = CancellationToken::new();
    let serving = Server::builder()
        .add_service(PeerService::new(claim("").cluster, door.clone()).server())
        .serve_with_incoming_shutdown(
            TcpIncoming::from(home.listener),
            stop.clone().cancelled_owned(),
        );
    tokio::spawn(serving);
    (door, home.dir, stop.drop_guard())
}

fn request(node: &str, group: u128, id: u64) -> AdoptRequest {
    let claim = claim(node);
    AdoptRequest {
        cluster: claim.cluster,
        broker_group: claim.broker_group.to_string(),
        group_uuid: Uuid::from_u128(group).to_string(),
        node_id: id,
        node: claim.node,
        witness: false,
        succeeds: Vec::new(),
        member_ids: Vec::new(),
    }
}

#[test]
fn ids_go_to_data_nodes_by_name_and_then_to_the_witness() {
    let node = |name: &str| NodeAddress { name: name.into(), address: format!("{name}:1") };
    let config = Config {
        replicas: vec![node("b-1"), node("b-0")],
        witness: Some(node("a-nameserver")),
        node: "b-1".into(),
        ..Config::embedded("unused".into())
    };
    let plan = Plan::of(&config).unwrap();
    let members: Vec<_> =
        plan.membership().into_iter().map(|(id, node)| (id, node.name, node.role)).collect();
    let expected = [
        (1, "b-0".to_owned(), Role::Data),
        (2, "b-1".to_owned(), Role::Data),
        (3, "a-nameserver".to_owned(), Role::Witness),
    ];
    assert_eq!(members, expected);
    assert!(!plan.founds());
    assert!(Plan::of(&Config { replicas: vec![node("b-0")], ..config }).is_none());
}

#[tokio::test]
async fn adoption_is_given_once_and_equal_ids_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let door = Door::of_empty(empty(dir.path(), "a-1"));
    assert_eq!(door.introduction().group_uuid, "");
    for (wrong, what) in [
        (AdoptRequest { cluster: "west".into(), ..request("a-1", 5, 2) }, "cluster"),
        (AdoptRequest { broker_group: "z".into(), ..request("a-1", 5, 2) }, "broker group"),
        (request("a-0", 5, 2), "node"),
        (AdoptRequest { witness: true, ..request("a-1", 5, 2) }, "data node"),
        (AdoptRequest { group_uuid: "x".into(), ..request("a-1", 5, 2) }, "UUID"),
    ] {
        let refused = door.be_adopted(wrong).await.unwrap_err();
        assert!(refused.message().contains(what), "{refused}");
    }
    let first = door.be_adopted(request("a-1", 5, 2)).await.unwrap();
    let again = door.be_adopted(request("a-1", 5, 2)).await.unwrap();
    assert_eq!(first, again);
    for other in [request("a-1", 6, 2), request("a-1", 5, 3)] {
        let refused = door.be_adopted(other).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    }
    let data_dir = door.claimed().await.unwrap();
    assert_eq!(data_dir.identity().group_uuid, Uuid::from_u128(5));
    assert_eq!(data_dir.identity().node_id, 2);
    assert_eq!(data_dir.identity().directory_uuid.to_string(), first.directory_uuid);
    // As after a restart.
    let door = Door::of_member(data_dir.identity());
    assert_eq!(door.be_adopted(request("a-1", 5, 2)).await.unwrap(), first);
    door.be_adopted(request("a-1", 6, 2)).await.unwrap_err();
}

#[tokio::test]
async fn founder_waits_until_every_member_answers() {
    let homes = [Home::new("a-0").await, Home::new("a-1").await, Home::new("a-2").await];
    let nodes: Vec<_> = homes.iter().map(Home::address).collect();
    let [first, second, third] = homes;
    let (founder, _founder_dir, _serving) = open_door(first);
    let (other, _other_dir, _serving_other) = open_door(second);
    let plan = plan("a-0", nodes);
    let mut joining = std::pin::pin!(join(&plan, &founder));
    // The third has its port, but answers nothing.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut joining).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(founder.introduction().group_uuid, "");
    let (_last, _last_dir, _serving_last) = open_door(third);
    let data_dir = tokio::time::timeout(PATIENCE, joining).await.unwrap().unwrap();
    assert_eq!(data_dir.identity().node_id, 1);
    assert_eq!(other.introduction().group_uuid, "", "others are adopted by the group, later");
}

#[tokio::test]
async fn node_with_an_empty_directory_waits_beside_a_running_group() {
    let homes = [Home::new("a-0").await, Home::new("a-1").await];
    let mut nodes: Vec<_> = homes.iter().map(Home::address).collect();
    nodes.push(NodeAddress { name: "a-2".into(), address: "127.0.0.1:1".into() });
    let [first, second] = homes;
    let (founder, _founder_dir, _serving) = open_door(first);
    let (member, _member_dir, _serving_member) = open_door(second);
    member.be_adopted(request("a-1", 5, 2)).await.unwrap();
    let plan = plan("a-0", nodes);
    let answer = plan.links()[0].probe().await.unwrap();
    let link = &plan.links()[0];
    let waits = obstacle(&plan, link, Ok(answer.clone())).unwrap();
    assert!(waits.contains("knows nothing of"), "{waits}");
    let runs = ProbeResponse { initialised: true, ..answer };
    let waits = plan.exists_already(link, &runs);
    assert!(waits.contains("run `drumlin cluster add broker-a a-0@127.0.0.1:"), "{waits}");
    let joining = tokio::time::timeout(Duration::from_secs(1), join(&plan, &founder)).await;
    assert!(joining.is_err(), "{joining:?}");
    assert_eq!(founder.introduction().group_uuid, "");
    let told = plan.waiting.borrow().clone();
    assert!(told.contains("knows nothing of") && told.contains("a-2 at 127.0.0.1:1"), "{told}");
}

#[tokio::test]
async fn callers_of_another_cluster_are_turned_away() {
    let home = Home::new("a-1").await;
    let nodes = vec![NodeAddress { name: "a-0".into(), address: "127.0.0.1:1".into() }];
    let nodes = [nodes, vec![home.address()]].concat();
    let (_door, _dir, _serving) = open_door(home);
    let other = Plan { cluster: "west".into(), ..plan("a-0", nodes) };
    let refused = other.links()[0].probe().await.unwrap_err();
    assert!(refused.contains("this cluster is called"), "{refused}");
}
