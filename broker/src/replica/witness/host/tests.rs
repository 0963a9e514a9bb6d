use std::net::SocketAddr;

use drumlin_proto::native::peer_client::PeerClient;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request};

use super::super::tests::{claim, group_uuid, members};
use super::*;
use crate::position::{EntryId, EntryIndex, Term};
use crate::replica::membership;
use crate::replica::wire::{self, Caller};

const ID: u64 = 3;

/// A host behind a port, and the way to it.
struct Bench {
    dir: tempfile::TempDir,
    host: WitnessHost,
    client: PeerClient<Channel>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Bench {
    async fn new() -> Self {
        Self::of(tempfile::tempdir().unwrap()).await
    }

    async fn of(dir: tempfile::TempDir) -> Self {
        let host = open(dir.path()).await.unwrap();
        let socket = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = socket.local_addr().unwrap();
        let stop = CancellationToken::new();
        let serving = Server::builder().add_routes(host.routes()).serve_with_incoming_shutdown(
            TcpIncoming::from(socket),
            stop.clone().cancelled_owned(),
        );
        let server = tokio::spawn(async move { serving.await.unwrap() });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let client = PeerClient::new(endpoint.connect().await.unwrap());
        Self { dir, host, client, stop, server }
    }

    async fn down(self) -> tempfile::TempDir {
        let Self { dir, host, client, stop, server } = self;
        drop(client);
        host.shutdown().await;
        stop.cancel();
        server.await.unwrap();
        dir
    }

    async fn restart(self) -> Self {
        Self::of(self.down().await).await
    }

    async fn adopt(&self, request: proto::AdoptRequest) -> Result<String, Status> {
        let answer = self.client.clone().adopt(called(None, request)).await?;
        Ok(answer.into_inner().directory_uuid)
    }

    async fn probe(&self, broker_group: &str) -> proto::ProbeResponse {
        let mut request = called(None, proto::ProbeRequest {});
        let caller = Caller { broker_group: broker_group.to_owned(), ..caller(None) };
        caller.write(request.metadata_mut()).unwrap();
        self.client.clone().probe(request).await.unwrap().into_inner()
    }

    async fn vote(&self, group: Uuid, term: u64, candidate: u64) -> Result<bool, Status> {
        let vote = proto::PeerVote { term, node: candidate, committed: false };
        let request = proto::VoteRequest {
            vote: Some(vote),
            last: Some(proto::PeerEntryId { term: 9, index: 9_999 }),
            leadership_transfer: false,
        };
        let answer = self.client.clone().vote(called(Some(group), request)).await?;
        Ok(answer.into_inner().granted)
    }
}

async fn open(dir: &Path) -> Result<WitnessHost, WitnessError> {
    WitnessHost::open(WitnessOptions {
        cluster: claim().cluster,
        node: claim().node,
        dir: dir.join("witness"),
        pace: Pace::default(),
    })
    .await
}

fn caller(group_uuid: Option<Uuid>) -> Caller {
    let (cluster, broker_group) = (claim().cluster, claim().broker_group.to_string());
    Caller { cluster, broker_group, group_uuid, from: 1, to: ID }
}

fn called<T>(group_uuid: Option<Uuid>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    caller(group_uuid).write(request.metadata_mut()).unwrap();
    request
}

fn adoption() -> proto::AdoptRequest {
    proto::AdoptRequest {
        cluster: claim().cluster,
        broker_group: claim().broker_group.to_string(),
        group_uuid: group_uuid().to_string(),
        node_id: ID,
        node: claim().node,
        witness: true,
        succeeds: Vec::new(),
        member_ids: Vec::new(),
    }
}

fn seed() -> proto::SeedRequest {
    let last = EntryId { term: Term::new(4), index: EntryIndex::new(1_000) };
    proto::SeedRequest {
        vote: Some(proto::PeerVote { term: 4, node: 1, committed: true }),
        last: Some(wire::id_to_wire(last)),
        membership_at: Some(proto::PeerEntryId { term: 0, index: 0 }),
        membership: membership::encode(&members()),
        manifest: None,
    }
}

#[tokio::test]
async fn exists_only_once_adopted_and_stays_over_a_restart() {
    let bench = Bench::new().await;
    assert_eq!(bench.probe("broker-a").await.group_uuid, "");
    let refused = bench.vote(group_uuid(), 1, 1).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let directory_uuid = bench.adopt(adoption()).await.unwrap();
    let bench = bench.restart().await;
    let told = bench.probe("broker-a").await;
    assert_eq!(told.group_uuid, group_uuid().to_string());
    assert_eq!((told.node.as_str(), told.node_id), ("nameserver-0", ID));
    assert_eq!(told.directory_uuid, directory_uuid);
    assert!(!told.initialised);
    assert_eq!(bench.probe("broker-b").await.group_uuid, "", "that group is not here");
    assert_eq!(bench.adopt(adoption()).await.unwrap(), directory_uuid, "the same once more");
    bench.down().await;
}

#[tokio::test]
async fn votes_go_out_once_and_survive_a_restart() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    assert!(bench.vote(group_uuid(), 5, 1).await.unwrap());
    let bench = bench.restart().await;
    assert!(!bench.vote(group_uuid(), 5, 2).await.unwrap());
    assert!(bench.vote(group_uuid(), 6, 2).await.unwrap());
    bench.down().await;
}

#[tokio::test]
async fn calls_of_another_group_or_for_another_member_are_refused() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    let refused = bench.vote(Uuid::from_u128(99), 5, 1).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let mut request = called(Some(group_uuid()), proto::StateRequest {});
    Caller { to: 4, ..caller(Some(group_uuid())) }.write(request.metadata_mut()).unwrap();
    let refused = bench.client.clone().state(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    bench.down().await;
}

#[tokio::test]
async fn adoption_of_another_cluster_node_or_role_is_refused() {
    let bench = Bench::new().await;
    let changes: [fn(&mut proto::AdoptRequest); 5] = [
        |request| request.cluster = "west".into(),
        |request| request.node = "nameserver-1".into(),
        |request| request.witness = false,
        |request| request.node_id = 0,
        |request| request.group_uuid = "x".into(),
    ];
    for change in changes {
        let mut request = adoption();
        change(&mut request);
        assert!(bench.adopt(request.clone()).await.is_err(), "{request:?}");
    }
    assert_eq!(bench.host.groups(), []);
    bench.down().await;
}

#[tokio::test]
async fn another_group_of_the_same_name_needs_to_succeed_it() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    let new = Uuid::from_u128(70);
    let request = proto::AdoptRequest { group_uuid: new.to_string(), ..adoption() };
    let refused = bench.adopt(request.clone()).await.unwrap_err();
    assert!(refused.message().contains("hosts member 3"), "{refused}");
    let succeeds = vec![group_uuid().to_string()];
    bench.adopt(proto::AdoptRequest { succeeds, ..request }).await.unwrap();
    assert!(bench.vote(group_uuid(), 5, 1).await.is_err(), "the old one is out of use");
    let bench = bench.restart().await;
    assert_eq!(bench.probe("broker-a").await.group_uuid, new.to_string());
    assert!(bench.vote(new, 5, 1).await.unwrap());
    bench.down().await;
}

#[tokio::test]
async fn voter_is_not_replaced_under_another_id() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    bench.client.clone().seed(called(Some(group_uuid()), seed())).await.unwrap();
    let replacement = proto::AdoptRequest { node_id: 5, ..adoption() };
    let refused = bench.adopt(replacement.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let bench = bench.restart().await;
    assert!(bench.probe("broker-a").await.initialised);
    assert!(bench.adopt(replacement).await.is_err());
    bench.down().await;
}

/// It never hears of the membership that it is not in: the next leader of the group says so.
#[tokio::test]
async fn voter_that_the_group_has_taken_out_gives_way() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    bench.client.clone().seed(called(Some(group_uuid()), seed())).await.unwrap();
    let still = proto::AdoptRequest { node_id: 5, member_ids: vec![1, ID, 5], ..adoption() };
    bench.adopt(still).await.unwrap_err();
    let out = proto::AdoptRequest { node_id: 5, member_ids: vec![1, 2, 5], ..adoption() };
    bench.adopt(out).await.unwrap();
    assert_eq!(bench.probe("broker-a").await.node_id, 5);
    bench.down().await;
}

#[tokio::test]
async fn witness_of_a_group_that_was_succeeded_is_taken_out_of_use_for_good() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    bench.host.retire_succeeded("broker-z", &group_uuid().to_string()).await;
    bench.host.retire_succeeded("broker-a", &Uuid::from_u128(72).to_string()).await;
    assert_eq!(bench.host.groups().len(), 1, "it is another one's");
    bench.host.retire_succeeded("broker-a", &group_uuid().to_string()).await;
    assert_eq!(bench.host.groups().len(), 0);
    let bench = bench.restart().await;
    assert_eq!(bench.probe("broker-a").await.group_uuid, "");
    assert!(bench.vote(group_uuid(), 5, 1).await.is_err());
    bench.down().await;
}

#[tokio::test]
async fn one_that_never_became_a_voter_gives_way() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    bench.adopt(proto::AdoptRequest { node_id: 5, ..adoption() }).await.unwrap();
    assert_eq!(bench.probe("broker-a").await.node_id, 5);
    bench.down().await;
}

#[tokio::test]
async fn witness_without_its_votes_stays_out_and_others_go_on() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    let other = Uuid::from_u128(71);
    let second = proto::AdoptRequest {
        broker_group: "broker-b".into(),
        group_uuid: other.to_string(),
        ..adoption()
    };
    bench.adopt(second).await.unwrap();
    let dir = bench.down().await;
    let lost = dir.path().join("witness").join(group_uuid().to_string()).join("log").join("vote");
    fs::remove_file(lost).unwrap();
    let bench = Bench::of(dir).await;
    assert_eq!(bench.host.groups().len(), 1);
    assert!(bench.vote(group_uuid(), 5, 1).await.is_err());
    let refused = bench.adopt(adoption()).await.unwrap_err();
    assert!(refused.message().contains("forgotten votes"), "{refused}");
    bench.down().await;
}

#[tokio::test]
async fn witness_that_lost_what_it_answered_stays_out_until_it_is_replaced() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    let heartbeat = proto::AppendRequest {
        vote: Some(proto::PeerVote { term: 4, node: 1, committed: true }),
        answered_end: 5,
        ..proto::AppendRequest::default()
    };
    let request = called(Some(group_uuid()), futures::stream::iter([heartbeat]));
    let mut answers = bench.client.clone().append(request).await.unwrap().into_inner();
    let lost = answers.message().await.unwrap_err();
    assert_eq!(lost.code(), Code::DataLoss, "{lost}");
    let refused = bench.vote(group_uuid(), 5, 1).await.unwrap_err();
    assert!(refused.message().contains("replace-witness"), "{refused}");
    let seeded = bench.client.clone().seed(called(Some(group_uuid()), seed())).await;
    assert_eq!(seeded.unwrap_err().code(), Code::DataLoss);

    let bench = bench.restart().await;
    assert_eq!(bench.host.groups(), []);
    let refused = bench.adopt(adoption()).await.unwrap_err();
    assert!(refused.message().contains("entries that it had answered"), "{refused}");
    let member_ids = vec![1, 2, ID, 5];
    bench.adopt(proto::AdoptRequest { node_id: 5, member_ids, ..adoption() }).await.unwrap();
    assert_eq!(bench.probe("broker-a").await.node_id, 5);
    let bench = bench.restart().await;
    assert_eq!(bench.probe("broker-a").await.node_id, 5);
    bench.down().await;
}

#[tokio::test]
async fn heartbeats_that_owe_nothing_are_answered() {
    let bench = Bench::new().await;
    bench.adopt(adoption()).await.unwrap();
    let vote = Some(proto::PeerVote { term: 4, node: 1, committed: true });
    let heartbeat = proto::AppendRequest { vote, ..proto::AppendRequest::default() };
    let of_an_older_leader = proto::AppendRequest {
        vote: Some(proto::PeerVote { term: 3, node: 2, committed: true }),
        answered_end: 5,
        ..proto::AppendRequest::default()
    };
    for request in [heartbeat, of_an_older_leader] {
        let request = called(Some(group_uuid()), futures::stream::iter([request]));
        let mut answers = bench.client.clone().append(request).await.unwrap().into_inner();
        assert!(answers.message().await.unwrap().is_some());
    }
    assert!(bench.vote(group_uuid(), 5, 1).await.is_ok());
    bench.down().await;
}

#[tokio::test]
async fn folder_is_one_process_s_alone() {
    let bench = Bench::new().await;
    assert!(matches!(open(bench.dir.path()).await, Err(WitnessError::Directory(_))));
    bench.down().await;
}
