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
use tonic::Status;
use tonic::transport::server::TcpIncoming;
use uuid::Uuid;

use super::super::{LinkParts, Links};
use crate::command::{Command, TopicType};
use crate::config::{Config, NodeAddress};
use crate::data_dir::Identity;
use crate::disk::RealDisk;
use crate::free_ports::free_address;
use crate::log::{Log, LogOptions};
use crate::replica::bootstrap::Plan;
use crate::replica::checkpoint::Checkpointer;
use crate::replica::doubt::Doubt;
use crate::replica::gate::{Mode, Patience};
use crate::replica::gating::Gating;
use crate::replica::log_store::LogStore;
use crate::replica::log_store::tests::Recorder;
use crate::replica::membership::Role;
use crate::replica::peer_service::raft_member::{MemberParts, RaftMember, StateProvider};
use crate::replica::peer_service::{Host, Member, MemberIdentity, PeerService, listener};
use crate::replica::raft_types::TypeConfig;
use crate::replica::start::{self, Options, Running};
use crate::replica::state::Limits;
use crate::replica::{Applied, Item, ProposeError, Replica};

pub(super) const GROUP_UUID: Uuid = Uuid::from_u128(7);
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const SEGMENT_BYTES: u64 = 1 << 20;

/// Takes what its group is founded with, and nothing else.
#[derive(Debug)]
pub(super) struct FoundingHost {
    node: String,
    node_id: u64,
}

#[tonic::async_trait]
impl Host for FoundingHost {
    async fn probe(&self, _: &str) -> Result<proto::ProbeResponse, Status> {
        Ok(proto::ProbeResponse {
            cluster: "c".into(),
            broker_group: "a".into(),
            node: self.node.clone(),
            group_uuid: GROUP_UUID.to_string(),
            node_id: self.node_id,
            ..proto::ProbeResponse::default()
        })
    }

    async fn adopt(&self, asked: proto::AdoptRequest) -> Result<proto::AdoptResponse, Status> {
        if !asked.member_ids.is_empty() {
            return Err(Status::failed_precondition("this is another member already"));
        }
        Ok(proto::AdoptResponse { directory_uuid: Uuid::nil().to_string() })
    }
}

/// What a link does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Open,
    /// Connections are closed, and those that come too.
    Cut,
    /// Connections stay, and carry nothing.
    Silent,
}

/// One way from one member to another.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) address: String,
    pub(super) way: watch::Sender<Way>,
    pub(super) _tasks: JoinSet<()>,
}

impl Proxy {
    pub(super) async fn to(target: String) -> Self {
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

pub(super) async fn carry(near: TcpStream, target: String, mut way: watch::Receiver<Way>) {
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
pub(super) async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
) {
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
pub(super) struct DataNode {
    pub(super) replica: Replica,
    pub(super) running: Running,
    pub(super) serving: CancellationToken,
}

pub(super) type WitnessRaft = openraft::Raft<TypeConfig, Recorder>;

pub(super) struct Witness {
    pub(super) raft: WitnessRaft,
    pub(super) log: Log,
    pub(super) doubt: Arc<Doubt>,
    pub(super) serving: CancellationToken,
}

/// A group's members by number, from 0; ids are one higher. With `has_witness` the last is one.
pub(super) struct Group {
    pub(super) dir: tempfile::TempDir,
    pub(super) nodes: Vec<NodeAddress>,
    pub(super) witness: Option<NodeAddress>,
    /// From, to.
    pub(super) links: BTreeMap<(usize, usize), Proxy>,
}

impl Group {
    pub(super) async fn new(data_count: usize, has_witness: bool) -> Self {
        let member_count = data_count + usize::from(has_witness);
        let node = |number| NodeAddress { name: format!("a-{number}"), address: free_address() };
        let mut nodes: Vec<_> = (0..member_count).map(node).collect();
        let mut links = BTreeMap::new();
        for from in 0..data_count {
            for to in (0..member_count).filter(|to| *to != from) {
                links.insert((from, to), Proxy::to(nodes[to].address.clone()).await);
            }
        }
        let witness = has_witness.then(|| nodes.pop()).flatten();
        Self { dir: tempfile::tempdir().unwrap(), nodes, witness, links }
    }

    pub(super) fn node(&self, number: usize) -> &NodeAddress {
        self.nodes.get(number).or(self.witness.as_ref()).unwrap()
    }

    pub(super) fn identity(number: usize) -> MemberIdentity {
        MemberIdentity {
            cluster: "c".into(),
            broker_group: "a".into(),
            group_uuid: GROUP_UUID,
            node_id: number as u64 + 1,
        }
    }

    pub(super) fn path(&self, number: usize, name: &str) -> std::path::PathBuf {
        let path = self.dir.path().join(number.to_string());
        std::fs::create_dir_all(path.join("log")).unwrap();
        path.join(name)
    }

    pub(super) fn set_links_of(&self, number: usize, way: Way) {
        for ((from, to), proxy) in &self.links {
            if *from == number || *to == number {
                proxy.way.send_replace(way);
            }
        }
    }

    /// Serves the member on its port until the token is cancelled, and its connections are gone.
    pub(super) async fn serve(&self, number: usize, member: Arc<dyn Member>) -> CancellationToken {
        let listener_address = &self.node(number).address;
        let bound = TcpListener::bind(listener_address).await.unwrap();
        let node = self.node(number).name.clone();
        let host = FoundingHost { node, node_id: number as u64 + 1 };
        let service = PeerService::new("c".into(), Arc::new(host));
        service.join(member);
        let stop = CancellationToken::new();
        let incoming = TcpIncoming::from(bound).with_nodelay(Some(true));
        let server = listener().add_service(service.server());
        let serving = server.serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        tokio::spawn(async move { serving.await.unwrap() });
        stop
    }

    pub(super) async fn start(&self, number: usize) -> DataNode {
        self.start_on(number, log_options()).await
    }

    pub(super) async fn start_on(&self, number: usize, log_options: LogOptions) -> DataNode {
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

    pub(super) async fn start_witness(&self) -> Witness {
        let number = self.nodes.len();
        let (log, _) = Log::open(&self.path(number, "log"), log_options(), None).unwrap();
        let store = LogStore::new(log.clone(), &self.path(number, "committed"), None).unwrap();
        let doubt = Arc::new(Doubt::new(Role::Witness, log.clone()));
        let links = Links::new(LinkParts {
            identity: Self::identity(number),
            role: Role::Witness,
            addresses: BTreeMap::new(),
            heartbeat_interval: Duration::from_millis(100),
            gating: closed_gate(),
            giving: None,
            doubt: Arc::clone(&doubt),
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
        let parts =
            MemberParts::new(Self::identity(number), Role::Witness, no_state(), Arc::clone(&doubt));
        let member = Arc::new(RaftMember::new(raft.clone(), parts));
        let serving = self.serve(number, member).await;
        Witness { raft, log, doubt, serving }
    }
}

/// Of a node that never leads.
pub(super) fn closed_gate() -> Gating {
    Gating::new(Patience {
        silence_max: Duration::from_secs(2),
        new_leader_silence_max: Duration::from_millis(300),
    })
}

pub(super) fn no_state() -> StateProvider {
    Arc::new(proto::StateResponse::default)
}

pub(super) fn log_options() -> LogOptions {
    LogOptions {
        segment_bytes: SEGMENT_BYTES,
        prepared_bytes: SEGMENT_BYTES,
        reserve_bytes: 4096,
        boot_id: Uuid::from_u128(1),
        ..LogOptions::new(GROUP_UUID)
    }
}

pub(super) async fn within<T>(what: &str, waited: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, waited).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

impl DataNode {
    /// As a process that is gone: nobody answers, nothing is finished.
    pub(super) async fn kill(self) {
        self.serving.cancel();
        self.running.shutdown().await;
    }

    pub(super) async fn until_serving(&self) {
        let mut status = self.replica.raft_status();
        within("to serve", status.wait_for(|status| status.serving)).await.unwrap();
    }

    pub(super) async fn until_readable(&self, record_count: u64) {
        let mut readable = self.replica.readable_end();
        let reached = async {
            while self.replica.queue_range(queue()).is_none_or(|(_, end)| end.get() < record_count)
            {
                readable.changed().await.unwrap();
            }
        };
        within("to be readable", reached).await;
    }

    pub(super) async fn until_mode(&self, wanted: fn(&Mode) -> bool) {
        let mut gate = self.replica.gate();
        within("the mode", gate.wait_for(|view| wanted(&view.mode))).await.unwrap();
    }
}

pub(super) fn is_alone(mode: &Mode) -> bool {
    matches!(mode, Mode::Alone { .. })
}

pub(super) fn is_paired(mode: &Mode) -> bool {
    *mode == Mode::Paired
}

pub(super) fn queue() -> QueueKey {
    QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) }
}

/// Waits until one of them serves.
pub(super) async fn leader<'n>(nodes: impl IntoIterator<Item = &'n DataNode>) -> usize {
    let serving = nodes.into_iter().enumerate().map(|(number, node)| {
        Box::pin(async move {
            node.until_serving().await;
            number
        })
    });
    futures::future::select_all(serving).await.0
}

/// Tries until it is stored; the leader may lose the lead meanwhile.
pub(super) async fn store(node: &DataNode, item: Item) -> Applied {
    let stored = async {
        loop {
            match node.replica.propose(item.clone(), None).await {
                Ok(applied) => return applied,
                Err(ProposeError::Refused(refusal)) => panic!("{refusal}"),
                Err(_) => node.until_serving().await,
            }
        }
    };
    within("to be stored", stored).await
}

pub(super) async fn create_topic(node: &DataNode) {
    let name = TopicName::parse("orders").unwrap();
    let shares = vec![(BrokerGroupName::parse("a").unwrap(), 1)];
    let create = Command::CreateTopic { name, kind: TopicType::Normal, shares };
    store(node, Item::Command(create)).await;
}

/// One message.
pub(super) fn run(body_bytes: usize) -> Item {
    let mut builder = RunBuilder::new();
    let body = vec![b'x'; body_bytes];
    builder.push(&RecordFields { message_id: "m", body: &body, ..Default::default() });
    let run = Run::parse(builder.finish()).unwrap();
    Item::Run { queue: queue(), run }
}

pub(super) async fn send(node: &DataNode, body_bytes: usize) {
    store(node, run(body_bytes)).await;
}

impl Witness {
    pub(super) async fn kill(self) {
        self.serving.cancel();
        self.raft.shutdown().await.unwrap();
        tokio::task::spawn_blocking(move || self.log.close()).await.unwrap();
    }

    /// Waits until its log reaches as far as the leader's, and the leader was told so.
    pub(super) async fn until_has_all_of(&self, leader: &DataNode) {
        let last = leader.replica.log().last().map(|id| id.index.get());
        let id = *self.raft.node_id();
        let mut told = leader.replica.shared.raft.metrics();
        let told = told.wait_until(|metrics| {
            let matched = metrics.replication.as_ref().and_then(|all| all.get(&id).copied());
            matched.flatten().map(|id| id.index) >= last
        });
        within("the witness to have all", told).await.unwrap();
    }
}
