//! Members of one group over real connections, and what becomes of them when links fail and logs
//! go back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native as proto;
use futures::stream;
use openraft::EntryPayload;
use openraft::async_runtime::WatchReceiver;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Status, Streaming};
use uuid::Uuid;

use super::*;
use crate::config::NodeAddress;
use crate::log::{Log, LogOptions};
use crate::replica::ProposeError;
use crate::replica::changing::ChangeError;
use crate::replica::doubt::Doubt;
use crate::replica::gate::{GateView, Gone};
use crate::replica::leadership::TransferError;
use crate::replica::membership::Role;
use crate::replica::peer_service::{
    Host, Member, MemberIdentity, PeerService, Responses, listener,
};
use crate::replica::peers::PeerStates;
use crate::replica::raft_types::{LogId, RaftEntry};
use crate::replica::start::Ended;
use crate::replica::wire::Caller;

mod group;

use group::{
    GROUP_UUID, Group, Way, closed_gate, create_topic, is_alone, is_paired, leader, log_options,
    run, send, within,
};

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
    let mut raised = status.clone();
    let raised = raised.wait_for(|status| status.term != term);
    assert!(tokio::time::timeout(Duration::from_secs(4), raised).await.is_err());
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
    // With the witness it is a quorum: it goes on leading, for several election timeouts.
    let mut status = nodes[leads].replica.raft_status();
    let lapses = status.wait_for(|status| !status.serving);
    assert!(tokio::time::timeout(Duration::from_secs(3), lapses).await.is_err());
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

fn put_back(old: &std::path::Path, home: &std::path::Path) {
    std::fs::remove_dir_all(home).unwrap();
    copy_dir(old, home);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_whose_log_went_back_is_named_and_replicated_to_again() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
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
    put_back(&old, &home);

    let mut gate = nodes[0].replica.gate();
    let is_lost =
        move |view: &GateView| view.gone.get(&(goes_back as u64 + 1)) == Some(&Gone::Lost);
    let named = tokio::spawn(async move { gate.wait_for(is_lost).await.map(drop) });
    nodes.insert(goes_back, group.start(goes_back).await);
    within("it to be named", named).await.unwrap().unwrap();
    send(&nodes[leads], 10).await;
    nodes[goes_back].until_readable(7).await;
    nodes[leads].until_mode(is_paired).await;
    for node in nodes {
        node.kill().await;
    }
    witness.kill().await;
}

/// Its tail may be lost: with its vote, or its lead, so might what it had answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_that_lost_its_power_gives_no_vote_before_it_is_whole_again() {
    let deferring = |boot| {
        let boot_id = Uuid::from_u128(boot);
        LogOptions { defer_syncs: true, boot_id, ..log_options() }
    };
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
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
    put_back(&old, &home);

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
    witness.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn witness_whose_log_went_back_is_named_and_counts_no_more() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
    let nodes = [group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    witness.until_has_all_of(&nodes[leads]).await;
    let NodeAddress { name, address } = group.node(2).clone();
    let stays = within("an answer", nodes[leads].replica.replace_witness(&name, &address)).await;
    assert_eq!(stays.unwrap(), 3, "it is there already");
    witness.kill().await;
    let (home, old) = (group.dir.path().join("2"), group.dir.path().join("old"));
    copy_dir(&home, &old);
    let witness = group.start_witness().await;
    for _ in 0..5 {
        send(&nodes[leads], 10).await;
    }
    witness.until_has_all_of(&nodes[leads]).await;
    witness.kill().await;
    put_back(&old, &home);

    let witness = group.start_witness().await;
    let mut gate = nodes[leads].replica.gate();
    let named = gate.wait_for(|view| view.gone.get(&3) == Some(&Gone::Lost));
    within("it to be named", named).await.unwrap();
    within("it to know", witness.doubt.owed().wait_for(Option::is_some)).await.unwrap();
    assert!(witness.doubt.reason().is_some_and(|reason| reason.contains("replace-witness")));
    // The two data nodes go on, and it gets nothing.
    let kept = witness.log.last();
    send(&nodes[leads], 10).await;
    nodes[1 - leads].until_readable(6).await;
    assert_eq!(witness.log.last(), kept);
    let gives_way =
        within("an answer", nodes[leads].replica.replace_witness(&name, &address)).await;
    assert!(matches!(gives_way, Err(ChangeError::NotAdopted { .. })), "{gives_way:?}");
    for node in nodes {
        node.kill().await;
    }
    witness.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_that_hears_nobody_counts_as_none_and_disturbs_nobody_when_it_is_back() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
    let nodes = [group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    nodes[leads].until_mode(is_paired).await;
    let (old, other) = (&nodes[leads].replica, &nodes[1 - leads]);
    group.set_links_of(leads, Way::Silent);
    let mut status = old.raft_status();
    within("to count as none", status.wait_for(|status| status.leader.is_none())).await.unwrap();
    assert!(!status.borrow().serving && !old.progress().leads);
    let refused = within("an answer", old.propose(run(10), None)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })), "{refused:?}");

    other.until_serving().await;
    let term = other.replica.raft_status().borrow().term;
    send(other, 10).await;
    group.set_links_of(leads, Way::Open);
    let follows = status.wait_for(|status| status.term == term && status.leader.is_some());
    within("to follow", follows).await.unwrap();
    send(other, 10).await;
    nodes[leads].until_readable(2).await;
    let now = *other.replica.raft_status().borrow();
    assert_eq!((now.term, now.serving), (term, true));
    for node in nodes {
        node.kill().await;
    }
    witness.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_whose_successor_is_gone_begins_anew() {
    let group = Group::new(2, true).await;
    let witness = group.start_witness().await;
    let nodes = [group.start(0).await, group.start(1).await];
    let leads = leader(&nodes).await;
    create_topic(&nodes[leads]).await;
    nodes[leads].until_mode(is_paired).await;
    let to = 2 - leads as u64;
    let mut peers = nodes[leads].replica.peers();
    let is_heard = peers.wait_for(|peers| peers.get(&to).is_some_and(|peer| peer.fresh));
    within("it to be heard", is_heard).await.unwrap();
    group.set_links_of(1 - leads, Way::Silent);
    let ended = nodes[leads].running.ended();
    let moved = within("an answer", nodes[leads].replica.transfer(Some(to))).await;
    assert_eq!(moved, Err(TransferError::NotTaken { id: to }));
    let ended = within("its end", ended).await;
    assert!(matches!(ended, Ended::Restart(_)), "{ended:?}");
    for node in nodes {
        node.kill().await;
    }
    witness.kill().await;
}

/// A member that takes a stream of appends, answers nothing, and tells when it ended.
#[derive(Debug)]
struct Sink {
    identity: MemberIdentity,
    begun: tokio::sync::mpsc::UnboundedSender<CancellationToken>,
}

#[tonic::async_trait]
impl Member for Sink {
    fn identity(&self) -> &MemberIdentity {
        &self.identity
    }

    fn append(
        &self,
        mut requests: Streaming<proto::AppendRequest>,
    ) -> Responses<proto::AppendResponse> {
        let ended = CancellationToken::new();
        self.begun.send(ended.clone()).unwrap();
        // Also where a reset of the stream ends it.
        let ended = ended.drop_guard();
        Box::pin(stream::once(async move {
            let _ended = ended;
            while let Ok(Some(_)) = requests.message().await {}
            Err(Status::cancelled("it ended"))
        }))
    }

    async fn pre_vote(&self, _: proto::VoteRequest) -> Result<proto::VoteResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn vote(&self, _: proto::VoteRequest) -> Result<proto::VoteResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn transfer_leadership(
        &self,
        _: proto::TransferLeadershipRequest,
    ) -> Result<proto::TransferLeadershipResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn seed(&self, _: proto::SeedRequest) -> Result<proto::SeedResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn pull(&self, _: proto::PullRequest) -> Result<Responses<proto::PullResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn entries(&self, _: proto::EntriesRequest) -> Result<proto::EntriesResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    fn state(&self) -> proto::StateResponse {
        proto::StateResponse::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_the_gate_ends_with_its_stream() {
    let group = Group::new(1, true).await;
    let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
    let sink = Arc::new(Sink { identity: Group::identity(1), begun });
    let serving = group.serve(1, sink).await;
    let (log, _) = Log::open(&group.path(0, "log"), log_options(), None).unwrap();
    let mut links = Links::new(LinkParts {
        identity: Group::identity(0),
        role: Role::Data,
        addresses: BTreeMap::new(),
        heartbeat_interval: Duration::from_millis(100),
        gating: closed_gate(),
        giving: None,
        doubt: Arc::new(Doubt::new(Role::Data, log)),
    });
    let address = group.node(1).address.clone();
    let node = BrokerNode { name: "w".into(), address, role: Role::Witness };
    let mut link = links.new_client(2, &node).await;
    let entry = RaftEntry { log_id: LogId::new_term_index(1, 1), payload: EntryPayload::Blank };
    let request = AppendEntriesRequest {
        vote: RaftVote::new_committed(1, 1),
        prev_log_id: None,
        entries: vec![entry],
        leader_commit: None,
    };
    let option = RPCOption::new(Duration::from_millis(100));
    let answers = link.stream_append(stream::iter([request]), option).await.unwrap();
    let ended = within("a stream", begins.recv()).await.unwrap();
    assert!(!ended.is_cancelled());
    drop(answers);
    within("its end", ended.cancelled()).await;
    serving.cancel();
}

/// Takes its time to adopt.
#[derive(Debug, Default)]
struct SlowHost {
    asked: Notify,
    goes_on: Notify,
    adopted: Notify,
}

#[tonic::async_trait]
impl Host for SlowHost {
    async fn probe(&self, _: &str) -> Result<proto::ProbeResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn adopt(&self, _: proto::AdoptRequest) -> Result<proto::AdoptResponse, Status> {
        self.asked.notify_one();
        self.goes_on.notified().await;
        self.adopted.notify_one();
        Ok(proto::AdoptResponse::default())
    }
}

#[tokio::test]
async fn adoption_goes_on_where_its_caller_gives_up() {
    let host = Arc::new(SlowHost::default());
    let bound = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = bound.local_addr().unwrap().to_string();
    let service = PeerService::new("c".into(), Arc::clone(&host) as Arc<dyn Host>);
    let stop = CancellationToken::new();
    let server = listener().add_service(service.server());
    let stopped = stop.clone().cancelled_owned();
    let serving = server.serve_with_incoming_shutdown(TcpIncoming::from(bound), stopped);
    let serving = tokio::spawn(serving);
    let caller =
        Caller { cluster: "c".into(), broker_group: "a".into(), group_uuid: None, from: 1, to: 2 };
    let mut request = Request::new(proto::AdoptRequest::default());
    caller.write(request.metadata_mut()).unwrap();
    let asking = tokio::spawn(async move {
        let channel = endpoint(&address).unwrap().connect().await.unwrap();
        client(channel).adopt(request).await.map(drop)
    });
    within("the question", host.asked.notified()).await;
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    // Then nothing of the call is left.
    stop.cancel();
    within("its end", serving).await.unwrap().unwrap();
    host.goes_on.notify_one();
    within("the adoption", host.adopted.notified()).await;
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
