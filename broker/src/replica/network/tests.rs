//! Members of one group over real connections on loopback, each link through a proxy that can be
//! cut or go silent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{BrokerGroupName, QueueId, QueueKey, TopicId, TopicName};
use drumlin_proto::native as proto;
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use openraft::async_runtime::WatchReceiver;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::*;
use crate::command::{Command, TopicType};
use crate::config::{Config, NodeAddress};
use crate::data_dir::Identity;
use crate::disk::RealDisk;
use crate::log::{Log, LogOptions};
use crate::replica::bootstrap::Plan;
use crate::replica::checkpoint::Checkpointer;
use crate::replica::gate::{Gone, Mode, Patience};
use crate::replica::log_store::LogStore;
use crate::replica::log_store::tests::Recorder;
use crate::replica::peer_service::raft_member::{MemberParts, RaftMember, StateProvider};
use crate::replica::peer_service::{Host, Member, PeerService, listener};
use crate::replica::peers::PeerStates;
use crate::replica::start::{self, Options, Running};
use crate::replica::state::Limits;
use crate::replica::{Applied, Item, ProposeError, Replica};

const GROUP_UUID: Uuid = Uuid::from_u128(7);
const PATIENCE: Duration = Duration::from_secs(60);
const SEGMENT_BYTES: u64 = 1 << 20;

/// Adopts whatever it is told to.
#[derive(Debug)]
struct AnyHost;

#[tonic::async_trait]
impl Host for AnyHost {
    async fn probe(&self, _: &str) -> Result<proto::ProbeResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn adopt(&self, _: proto::AdoptRequest) -> Result<proto::AdoptResponse, Status> {
        Ok(proto::AdoptResponse { directory_uuid: Uuid::nil().to_string() })
    }
}

/// What a link does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Open,
    /// Connections are closed, and those that come too.
    Cut,
    /// Connections stay, and carry nothing.
    Silent,
}

/// One way from one member to another.
#[derive(Debug)]
struct Proxy {
    address: String,
    way: watch::Sender<Way>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (sender, way) = watch::channel(Way::Open);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(carry(near, target.clone(), way.clone()));
            }
        });
        Self { address, way: sender, _tasks: tasks }
    }
}

async fn carry(near: TcpStream, target: String, mut way: watch::Receiver<Way>) {
    let mut cut = way.clone();
    let carried = async {
        way.wait_for(|way| *way != Way::Silent).await.unwrap();
        let Ok(far) = TcpStream::connect(target).await else { return };
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        let ((near_read, near_write), (far_read, far_write)) =
            (near.into_split(), far.into_split());
        // Both ends go when one does.
        tokio::select! {
            () = pump(near_read, far_write, way.clone()) => {}
            () = pump(far_read, near_write, way.clone()) => {}
        }
    };
    tokio::select! {
        () = carried => {}
        _ = cut.wait_for(|way| *way == Way::Cut) => {}
    }
}

/// Carries bytes one way; holds them while the way is silent.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Way>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read_bytes @ 1..) = from.read(&mut buffer).await {
        if way.wait_for(|way| *way != Way::Silent).await.is_err()
            || to.write_all(&buffer[..read_bytes]).await.is_err()
        {
            return;
        }
    }
}

/// A data member that runs.
struct DataNode {
    replica: Replica,
    running: Running,
    serving: CancellationToken,
}

type WitnessRaft = openraft::Raft<TypeConfig, Recorder>;

struct Witness {
    raft: WitnessRaft,
    log: Log,
    _serving: tokio_util::sync::DropGuard,
}

/// A group's members by number, from 0; ids are one higher. With `has_witness` the last is one.
struct Group {
    dir: tempfile::TempDir,
    nodes: Vec<NodeAddress>,
    witness: Option<NodeAddress>,
    /// From, to.
    links: BTreeMap<(usize, usize), Proxy>,
}

impl Group {
    async fn new(data_count: usize, has_witness: bool) -> Self {
        let member_count = data_count + usize::from(has_witness);
        let held: Vec<_> = (0..member_count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let mut nodes: Vec<_> = held
            .iter()
            .enumerate()
            .map(|(number, held)| NodeAddress {
                name: format!("a-{number}"),
                address: held.local_addr().unwrap().to_string(),
            })
            .collect();
        let mut links = BTreeMap::new();
        for from in 0..data_count {
            for to in (0..member_count).filter(|to| *to != from) {
                links.insert((from, to), Proxy::to(nodes[to].address.clone()).await);
            }
        }
        let witness = has_witness.then(|| nodes.pop()).flatten();
        Self { dir: tempfile::tempdir().unwrap(), nodes, witness, links }
    }

    fn node(&self, number: usize) -> &NodeAddress {
        self.nodes.get(number).or(self.witness.as_ref()).unwrap()
    }

    fn identity(number: usize) -> MemberIdentity {
        MemberIdentity {
            cluster: "c".into(),
            broker_group: "a".into(),
            group_uuid: GROUP_UUID,
            node_id: number as u64 + 1,
        }
    }

    fn path(&self, number: usize, name: &str) -> std::path::PathBuf {
        let path = self.dir.path().join(number.to_string());
        std::fs::create_dir_all(path.join("log")).unwrap();
        path.join(name)
    }

    fn set_links_of(&self, number: usize, way: Way) {
        for ((from, to), proxy) in &self.links {
            if *from == number || *to == number {
                proxy.way.send_replace(way);
            }
        }
    }

    /// Serves the member on its port until the token is cancelled, and its connections are gone.
    async fn serve(&self, number: usize, member: Arc<dyn Member>) -> CancellationToken {
        let listener_address = &self.node(number).address;
        let bound = TcpListener::bind(listener_address).await.unwrap();
        let service = PeerService::new("c".into(), Arc::new(AnyHost));
        service.join(member);
        let stop = CancellationToken::new();
        let incoming = TcpIncoming::from(bound).with_nodelay(Some(true));
        let server = listener().add_service(service.server());
        let serving = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        tokio::spawn(async move { serving.await.unwrap() });
        stop
    }

    async fn start(&self, number: usize) -> DataNode {
        self.start_on(number, log_options()).await
    }

    async fn start_on(&self, number: usize, log_options: LogOptions) -> DataNode {
        let identity = Identity {
            cluster: "c".into(),
            broker_group: BrokerGroupName::parse("a").unwrap(),
            node: self.node(number).name.clone(),
            group_uuid: GROUP_UUID,
            succeeds: Vec::new(),
            directory_uuid: Uuid::from_u128(number as u128),
            node_id: number as u64 + 1,
        };
        let config = Config {
            cluster: "c".into(),
            broker_group: identity.broker_group.clone(),
            node: identity.node.clone(),
            replicas: self.nodes.clone(),
            witness: self.witness.clone(),
            ..Config::embedded(self.path(number, "unused"))
        };
        let links = self.links.iter().filter(|((from, _), _)| *from == number);
        let addresses =
            links.map(|((_, to), proxy)| (self.node(*to).name.clone(), proxy.address.clone()));
        let options = Options {
            plan: Plan::of(&config),
            preferred_leader: None,
            peer_address: self.node(number).address.clone(),
            addresses: addresses.collect(),
            data_dir: self.path(number, "log"),
            hint_path: self.path(number, "committed"),
            checkpoint_interval_bytes: u64::MAX,
            seed_bytes_per_second_max: None,
            limits: Limits { topics_max: 10, groups_max: 10 },
            in_flight_bytes_max: 64 << 20,
            clock_step_max: Duration::from_secs(10),
            heartbeat_interval: config.heartbeat_interval,
            election_timeout_min: config.election_timeout_min,
            election_timeout_max: config.election_timeout_max,
            peer_silence_max: Duration::from_secs(1),
            settle_timeout: Duration::from_secs(2),
            commit_seconds: Histogram::new([1.0]),
            elections: Counter::default(),
            identity,
        };
        let (checkpoints, index) = (self.path(number, "checkpoint"), self.path(number, "index"));
        let opened =
            Checkpointer::open(Arc::new(RealDisk), &checkpoints, &index, GROUP_UUID).unwrap();
        let log_dir = self.path(number, "log");
        let open_log = move |mark| Log::open(&log_dir, log_options, mark).map(|(log, _)| log);
        let (replica, running) = start::start(options, opened, open_log).await.unwrap();
        let serving = self.serve(number, replica.member()).await;
        DataNode { replica, running, serving }
    }

    async fn start_witness(&self) -> Witness {
        let number = self.nodes.len();
        let (log, _) = Log::open(&self.path(number, "log"), log_options(), None).unwrap();
        let store = LogStore::new(log.clone(), &self.path(number, "committed"), None).unwrap();
        let links = Links::new(LinkParts {
            identity: Self::identity(number),
            role: Role::Witness,
            addresses: BTreeMap::new(),
            heartbeat_interval: Duration::from_millis(100),
            gating: Gating::new(Patience {
                silence_max: Duration::from_secs(2),
                new_leader_silence_max: Duration::from_millis(300),
            }),
            giving: None,
        });
        let config = openraft::Config {
            heartbeat_interval: 100,
            election_timeout_min: 500,
            election_timeout_max: 900,
            enable_elect: false,
            snapshot_policy: openraft::SnapshotPolicy::Never,
            enable_pre_vote: Some(true),
            ..openraft::Config::default()
        };
        let config = Arc::new(config.validate().unwrap());
        let id = number as u64 + 1;
        let raft = WitnessRaft::new(id, config, links, store, Recorder::default()).await.unwrap();
        let parts = MemberParts::new(Self::identity(number), Role::Witness, no_state());
        let member = Arc::new(RaftMember::new(raft.clone(), parts));
        let serving = self.serve(number, member).await.drop_guard();
        Witness { raft, log, _serving: serving }
    }
}

fn no_state() -> StateProvider {
    Arc::new(proto::StateResponse::default)
}

fn log_options() -> LogOptions {
    LogOptions {
        segment_bytes: SEGMENT_BYTES,
        prepared_bytes: SEGMENT_BYTES,
        reserve_bytes: 4096,
        boot_id: Uuid::from_u128(1),
        ..LogOptions::new(GROUP_UUID)
    }
}

async fn within<T>(what: &str, waited: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, waited).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

impl DataNode {
    /// As a process that is gone: nobody answers, nothing is finished.
    async fn kill(self) {
        self.serving.cancel();
        self.running.shutdown().await;
    }

    async fn until_serving(&self) {
        let mut status = self.replica.raft_status();
        within("to serve", status.wait_for(|status| status.serving)).await.unwrap();
    }

    async fn until_readable(&self, record_count: u64) {
        let mut readable = self.replica.readable_end();
        let reached = async {
            while self.replica.queue_range(queue()).is_none_or(|(_, end)| end.get() < record_count)
            {
                readable.changed().await.unwrap();
            }
        };
        within("to be readable", reached).await;
    }

    async fn until_mode(&self, wanted: fn(&Mode) -> bool) {
        let mut gate = self.replica.gate();
        within("the mode", gate.wait_for(|view| wanted(&view.mode))).await.unwrap();
    }
}

fn is_alone(mode: &Mode) -> bool {
    matches!(mode, Mode::Alone { .. })
}

fn is_paired(mode: &Mode) -> bool {
    *mode == Mode::Paired
}

fn queue() -> QueueKey {
    QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) }
}

/// Waits until one of them serves.
async fn leader<'n>(nodes: impl IntoIterator<Item = &'n DataNode>) -> usize {
    let serving = nodes.into_iter().enumerate().map(|(number, node)| {
        Box::pin(async move {
            node.until_serving().await;
            number
        })
    });
    futures::future::select_all(serving).await.0
}

/// Tries until it is stored; the leader may lose the lead meanwhile.
async fn store(node: &DataNode, item: Item) -> Applied {
    let stored = async {
        loop {
            match node.replica.propose(item.clone(), None).await {
                Ok(applied) => return applied,
                Err(ProposeError::Refused(refusal)) => panic!("{refusal}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    within("to be stored", stored).await
}

async fn create_topic(node: &DataNode) {
    let name = TopicName::parse("orders").unwrap();
    let shares = vec![(BrokerGroupName::parse("a").unwrap(), 1)];
    let create = Command::CreateTopic { name, kind: TopicType::Normal, shares };
    store(node, Item::Command(create)).await;
}

async fn send(node: &DataNode, body_bytes: usize) {
    let mut builder = RunBuilder::new();
    let body = vec![b'x'; body_bytes];
    builder.push(&RecordFields { message_id: "m", body: &body, ..Default::default() });
    let run = Run::parse(builder.finish()).unwrap();
    store(node, Item::Run { queue: queue(), run }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_that_was_away_gets_what_it_missed_from_the_segments() {
    let group = Group::new(3, false).await;
    let nodes = [group.start(0).await, group.start(1).await, group.start(2).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    let away = (leads + 1) % 3;
    let mut nodes = Vec::from(nodes);
    nodes.remove(away).kill().await;
    let leads = leader(&nodes).await;
    // Several segments, so that none of it is in memory any more.
    for _ in 0..40 {
        send(&nodes[leads], 100_000).await;
    }
    let back = group.start(away).await;
    back.until_readable(40).await;
    for node in nodes.into_iter().chain([back]) {
        node.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isolated_node_does_not_raise_its_term() {
    let group = Group::new(3, false).await;
    let nodes = [group.start(0).await, group.start(1).await, group.start(2).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    let isolated = (leads + 1) % 3;
    let status = nodes[isolated].replica.raft_status();
    let term = nodes[leads].replica.raft_status().borrow().term;
    within("its term", status.clone().wait_for(|status| status.term == term)).await.unwrap();
    group.set_links_of(isolated, Way::Cut);
    // Long enough for several elections, each of which would be seen.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(status.borrow().term, term);
    assert!(nodes[leads].replica.raft_status().borrow().serving);
    group.set_links_of(isolated, Way::Open);
    send(&nodes[leads], 10).await;
    nodes[isolated].until_readable(1).await;
    for node in nodes {
        node.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pair_with_a_witness_survives_the_loss_of_either_data_node() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
    let mut nodes = vec![group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    send(&nodes[leads], 10).await;
    nodes[leads].until_mode(is_paired).await;
    // The witness never has more than both.
    let fed = witness.log.last().unwrap();
    assert!(nodes.iter().all(|node| node.replica.log().last() >= Some(fed)));

    // The follower goes: the leader goes on alone.
    let away = 1 - leads;
    nodes.remove(away).kill().await;
    send(&nodes[0], 10).await;
    nodes[0].until_mode(is_alone).await;
    let gone = nodes[0].replica.gate().borrow().gone.clone();
    assert_eq!(gone.get(&(away as u64 + 1)), Some(&Gone::Refuses));

    // It comes back: they are a pair again.
    nodes.insert(away, group.start(away).await);
    nodes[leads].until_mode(is_paired).await;
    nodes[away].until_readable(2).await;
    send(&nodes[leads], 10).await;

    // The leader goes: the other one leads, with everything.
    nodes.remove(leads).kill().await;
    nodes[0].until_serving().await;
    nodes[0].until_readable(3).await;
    send(&nodes[0], 10).await;
    nodes[0].until_mode(is_alone).await;
    for node in nodes {
        node.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_peer_is_given_up_after_its_time() {
    let group = Group::new(2, true).await;
    let _witness = group.start_witness().await;
    let nodes = [group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    nodes[leads].until_mode(is_paired).await;
    let proxy = &group.links[&(leads, 1 - leads)];
    proxy.way.send_replace(Way::Silent);
    send(&nodes[leads], 10).await;
    nodes[leads].until_mode(is_alone).await;
    proxy.way.send_replace(Way::Open);
    nodes[leads].until_mode(is_paired).await;
    nodes[1 - leads].until_readable(1).await;
    for node in nodes {
        node.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn witness_never_leads_whatever_triggers_it() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
    let nodes = [group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    for _ in 0..5 {
        witness.raft.trigger().elect(false).await.unwrap();
        send(&nodes[leader(&nodes).await], 10).await;
        let leader = witness.raft.metrics().borrow_watched().current_leader;
        assert_ne!(leader, Some(3));
    }
    for node in nodes {
        node.kill().await;
    }
}

/// As the files of a stopped node, to be put back later.
fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_whose_log_went_back_is_replicated_to_again() {
    let group = Group::new(2, true).await;
    let _witness = group.start_witness().await;
    let mut nodes = vec![group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    let goes_back = 1 - leads;
    create_topic(&nodes[leads]).await;
    send(&nodes[leads], 10).await;
    nodes[goes_back].until_readable(1).await;
    nodes.remove(goes_back).kill().await;
    let (home, old) = (group.dir.path().join(goes_back.to_string()), group.dir.path().join("old"));
    copy_dir(&home, &old);
    nodes.insert(goes_back, group.start(goes_back).await);
    for _ in 0..5 {
        send(&nodes[leads], 10).await;
    }
    nodes[leads].until_mode(is_paired).await;
    nodes[goes_back].until_readable(6).await;
    nodes.remove(goes_back).kill().await;
    std::fs::remove_dir_all(&home).unwrap();
    copy_dir(&old, &home);
    nodes.insert(goes_back, group.start(goes_back).await);
    send(&nodes[leads], 10).await;
    nodes[goes_back].until_readable(7).await;
    nodes[leads].until_mode(is_paired).await;
    for node in nodes {
        node.kill().await;
    }
}

/// Its tail may be lost: with its vote, or its lead, so might what it had answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_that_lost_its_power_gives_no_vote_before_it_is_whole_again() {
    let deferring = |boot| {
        let boot_id = Uuid::from_u128(boot);
        LogOptions { defer_syncs: true, boot_id, ..log_options() }
    };
    let group = Group::new(2, true).await;
    let _witness = group.start_witness().await;
    let mut nodes =
        vec![group.start_on(0, deferring(1)).await, group.start_on(1, deferring(1)).await];
    let leads = leader(&nodes).await;
    let lost = 1 - leads;
    create_topic(&nodes[leads]).await;
    send(&nodes[leads], 10).await;
    nodes[lost].until_readable(1).await;
    nodes[leads].until_mode(is_paired).await;
    let (home, old) = (group.dir.path().join(lost.to_string()), group.dir.path().join("old"));
    // As it is while it runs: not closed.
    copy_dir(&home, &old);
    for _ in 0..5 {
        send(&nodes[leads], 10).await;
    }
    nodes[lost].until_readable(6).await;
    nodes.remove(lost).kill().await;
    nodes.remove(0).kill().await;
    std::fs::remove_dir_all(&home).unwrap();
    copy_dir(&old, &home);

    let back = group.start_on(lost, deferring(2)).await;
    assert!(back.replica.own_state().fenced);
    let vote = proto::PeerVote { term: 100, node: leads as u64 + 1, committed: false };
    let last = Some(proto::PeerEntryId { term: 99, index: 1_000 });
    let request = proto::VoteRequest { vote: Some(vote), last, leadership_transfer: false };
    let member = back.replica.member();
    assert_eq!(member.pre_vote(request).await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(member.vote(request).await.unwrap_err().code(), Code::Unavailable);
    let to = lost as u64 + 1;
    let lead = proto::TransferLeadershipRequest { to, ..Default::default() };
    assert_eq!(member.transfer_leadership(lead).await.unwrap_err().code(), Code::Unavailable);

    // The witness alone is enough for the other one to lead, which then has it all.
    let kept = group.start_on(leads, deferring(1)).await;
    back.until_readable(6).await;
    within("it votes again", async {
        let mut peers = kept.replica.peers();
        let whole = |peers: &PeerStates| peers.get(&to).is_some_and(|peer| !peer.state.fenced);
        peers.wait_for(whole).await.unwrap();
    })
    .await;
    kept.until_mode(is_paired).await;
    kept.kill().await;
    back.until_serving().await;
    back.until_readable(6).await;
    back.kill().await;
}

#[tokio::test]
async fn callers_of_others_are_turned_away() {
    let group = Group::new(1, false).await;
    let node = group.start(0).await;
    let channel = endpoint(&group.nodes[0].address).unwrap().connect().await.unwrap();
    let mut client = client(channel);
    let right = Caller {
        cluster: "c".into(),
        broker_group: "a".into(),
        group_uuid: Some(GROUP_UUID),
        from: 2,
        to: 1,
    };
    let mut state_as = async |caller: Caller| {
        let mut request = Request::new(proto::StateRequest {});
        caller.write(request.metadata_mut()).unwrap();
        client.state(request).await.map(drop).map_err(|status| status.code())
    };
    assert_eq!(state_as(right.clone()).await, Ok(()));
    let wrong = [
        Caller { cluster: "d".into(), ..right.clone() },
        Caller { broker_group: "b".into(), ..right.clone() },
        Caller { group_uuid: Some(Uuid::from_u128(8)), ..right.clone() },
        Caller { group_uuid: None, ..right.clone() },
        Caller { to: 2, ..right },
    ];
    for caller in wrong {
        assert_eq!(state_as(caller).await, Err(Code::FailedPrecondition));
    }
    node.kill().await;
}
