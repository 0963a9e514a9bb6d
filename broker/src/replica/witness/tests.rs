use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::ids::BrokerGroupName;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest};
use openraft::storage::Snapshot;
use uuid::Uuid;

use super::voter::{Pace, Voter};
use super::{WitnessError, directory};
use crate::data_dir::{Bootstrap, Claim};
use crate::entry::{Entry, EntryKind};
use crate::position::{EntryId, EntryIndex, Term};
use crate::replica::membership::{self, BrokerNode, Role};
use crate::replica::raft_types::{
    Membership, RaftEntry, RaftVote, SnapshotMeta, StoredMembership, TypeConfig, log_id, to_raft,
};
use crate::replica::state_machine::Manifest;

const NODE_ID: u64 = 3;

pub(super) fn claim() -> Claim {
    Claim {
        cluster: "east".into(),
        broker_group: BrokerGroupName::parse("broker-a").unwrap(),
        node: "nameserver-0".into(),
    }
}

pub(super) fn group_uuid() -> Uuid {
    Uuid::from_u128(7)
}

fn bootstrap() -> Bootstrap {
    let (group_uuid, directory_uuid) = (group_uuid(), Uuid::from_u128(8));
    Bootstrap { group_uuid, succeeds: Vec::new(), directory_uuid, node_id: NODE_ID }
}

fn id(term: u64, index: u64) -> EntryId {
    EntryId { term: Term::new(term), index: EntryIndex::new(index) }
}

pub(super) fn members() -> Membership {
    let node =
        |name: &str, role| BrokerNode { name: name.to_owned(), address: format!("{name}:1"), role };
    let nodes = BTreeMap::from([
        (1, node("broker-a-0", Role::Data)),
        (2, node("broker-a-1", Role::Data)),
        (NODE_ID, node("nameserver-0", Role::Witness)),
    ]);
    Membership::new(vec![BTreeSet::from([1, 2, NODE_ID])], nodes).unwrap()
}

fn entry(id: EntryId, kind: EntryKind, payload: Bytes) -> Entry {
    let payload_crc = crc32fast::hash(&payload);
    Entry { id, kind, clock_ms: 5, item_count: 0, payload_crc, payload }
}

/// What stands for a batch in a witness's log.
fn stub(term: u64, index: u64) -> Entry {
    let payload = Bytes::copy_from_slice(&[u8::try_from(index % 251).unwrap(); 12]);
    entry(id(term, index), EntryKind::Batch, payload)
}

/// A witness in a directory of its own, and what its leader does.
struct Bench {
    parent: tempfile::TempDir,
    voter: Voter,
}

impl Bench {
    async fn new() -> Self {
        let parent = tempfile::tempdir().unwrap();
        let dir = directory::create(parent.path(), &claim(), bootstrap()).unwrap();
        let voter = Voter::open(&dir, Pace::default()).await.unwrap();
        Self { parent, voter }
    }

    /// A group of three whose membership is committed.
    async fn member() -> Self {
        let bench = Self::new().await;
        let first = entry(id(0, 0), EntryKind::Membership, membership::encode(&members()));
        bench.append(1, None, vec![first], Some(id(0, 0))).await;
        bench
    }

    async fn restart(self) -> Self {
        let dir = self.voter.dir().to_owned();
        self.voter.shutdown().await;
        let voter = Voter::open(&dir, Pace::default()).await.unwrap();
        Self { parent: self.parent, voter }
    }

    async fn append(
        &self,
        term: u64,
        previous: Option<EntryId>,
        entries: Vec<Entry>,
        committed: Option<EntryId>,
    ) {
        let entries: Vec<RaftEntry> = entries.into_iter().map(|e| to_raft(e).unwrap()).collect();
        let request = AppendEntriesRequest::<TypeConfig> {
            vote: RaftVote::new_committed(term, 1),
            prev_log_id: previous.map(log_id),
            entries,
            leader_commit: committed.map(log_id),
        };
        let answer = self.voter.raft().append_entries(request).await.unwrap();
        assert!(matches!(answer, AppendEntriesResponse::Success), "{answer:?}");
    }

    /// Whether it votes for this candidate.
    async fn votes_for(&self, term: u64, candidate: u64, last: Option<EntryId>) -> bool {
        let request = VoteRequest::new(RaftVote::new(term, candidate), last.map(log_id));
        self.voter.raft().vote(request).await.unwrap().vote_granted
    }

    async fn until_applied(&self, index: u64) {
        let wait = self.voter.raft().wait(Some(Duration::from_secs(10)));
        wait.applied_index_at_least(Some(index), "the witness applies").await.unwrap();
    }
}

async fn refusal(dir: &Path) -> WitnessError {
    Voter::open(dir, Pace::default()).await.unwrap_err()
}

#[tokio::test]
async fn vote_survives_a_restart() {
    let bench = Bench::new().await;
    assert!(bench.votes_for(5, 1, None).await);
    let bench = bench.restart().await;
    assert!(!bench.votes_for(5, 2, None).await, "it would vote twice in a term");
    assert!(!bench.votes_for(4, 2, None).await);
    assert!(bench.votes_for(6, 2, None).await);
}

#[tokio::test]
async fn headers_survive_a_restart_and_are_judged_by() {
    let bench = Bench::member().await;
    let entries = vec![stub(1, 1), entry(id(1, 2), EntryKind::Alone, Bytes::new()), stub(1, 3)];
    bench.append(1, Some(id(0, 0)), entries.clone(), Some(id(1, 2))).await;
    let bench = bench.restart().await;
    let kept = bench.voter.log().entries(EntryIndex::new(1), EntryIndex::new(4), u64::MAX);
    assert_eq!(kept.unwrap(), entries);
    assert!(!bench.votes_for(2, 2, Some(id(1, 2))).await, "an older log than its own");
    assert!(bench.votes_for(2, 2, Some(id(1, 3))).await);
}

#[tokio::test]
async fn conflicting_tail_is_replaced() {
    let bench = Bench::member().await;
    bench.append(1, Some(id(0, 0)), vec![stub(1, 1), stub(1, 2)], None).await;
    bench.append(2, Some(id(1, 1)), vec![stub(2, 2)], None).await;
    let bench = bench.restart().await;
    assert_eq!(bench.voter.log().last(), Some(id(2, 2)));
}

#[tokio::test]
async fn never_leads_whatever_asks_for_it() {
    let bench = Bench::member().await;
    let raft = bench.voter.raft();
    raft.trigger().elect(false).await.unwrap();
    let wait = raft.wait(Some(Duration::from_millis(300)));
    let led = wait.metrics(|metrics| metrics.state.is_leader(), "it leads").await;
    assert!(led.is_err());
}

#[tokio::test]
async fn trims_bound_its_disk() {
    let bench = Bench::member().await;
    let mut last = id(0, 0);
    for _ in 0..12 {
        let from = last.index.get() + 1;
        let entries: Vec<_> = (from..from + 10_000).map(|index| stub(1, index)).collect();
        let next = entries.last().unwrap().id;
        bench.append(1, Some(last), entries, Some(next)).await;
        last = next;
    }
    bench.until_applied(last.index.get()).await;
    assert!(bench.voter.log().segment_bases().len() > 2);
    bench.voter.trim_upto().send_replace(Some(last));
    let mut metrics = bench.voter.raft().metrics();
    while bench.voter.log().segment_bases().len() > 1 {
        tokio::time::timeout(Duration::from_secs(1), metrics.changed()).await.ok();
    }
    assert!(bench.voter.log().oldest_index() > EntryIndex::ZERO);
    let bench = bench.restart().await;
    assert!(bench.voter.log().oldest_index() > EntryIndex::ZERO);
    bench.append(1, Some(last), vec![stub(1, last.index.get() + 1)], None).await;
    assert!(bench.voter.votes().await, "the membership went with its entry");
}

#[tokio::test]
async fn trims_stop_at_what_was_applied() {
    let bench = Bench::member().await;
    bench.append(1, Some(id(0, 0)), vec![stub(1, 1), stub(1, 2)], None).await;
    bench.voter.trim_upto().send_replace(Some(id(1, 2)));
    let bench = bench.restart().await;
    assert_eq!(bench.voter.log().oldest_index(), EntryIndex::ZERO);
}

#[tokio::test]
async fn log_begins_anew_behind_a_snapshot() {
    let bench = Bench::new().await;
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(id(4, 1_000))),
        last_membership: StoredMembership::new(Some(log_id(id(0, 0))), members()),
    };
    let snapshot = Snapshot { meta, snapshot: Manifest };
    let vote = RaftVote::new_committed(4, 1);
    bench.voter.raft().install_full_snapshot(vote, snapshot).await.unwrap();
    bench.append(4, Some(id(4, 1_000)), vec![stub(4, 1_001)], None).await;
    let bench = bench.restart().await;
    assert!(bench.voter.votes().await);
    assert_eq!(bench.voter.log().last(), Some(id(4, 1_001)));
    assert!(!bench.votes_for(5, 2, Some(id(4, 1_000))).await);
    bench.append(4, Some(id(4, 1_001)), vec![stub(4, 1_002)], Some(id(4, 1_002))).await;
    bench.until_applied(1_002).await;
}

#[tokio::test]
async fn witness_that_forgot_its_votes_is_refused() {
    let bench = Bench::member().await;
    let dir = bench.voter.dir().to_owned();
    bench.voter.shutdown().await;
    fs::remove_file(directory::log_dir(&dir).join("vote")).unwrap();
    let error = refusal(&dir).await;
    assert!(matches!(error, WitnessError::Forgot { .. }), "{error}");
    fs::remove_dir_all(directory::log_dir(&dir)).unwrap();
    let error = refusal(&dir).await;
    assert!(error.to_string().contains("replace-witness"), "{error}");
    fs::remove_file(dir.join("identity")).unwrap();
    let error = refusal(&dir).await;
    assert!(matches!(error, WitnessError::Forgot { .. }), "{error}");
}

#[tokio::test]
async fn trimmed_log_without_what_it_had_applied_is_refused() {
    let bench = Bench::new().await;
    let meta = SnapshotMeta {
        last_log_id: Some(log_id(id(4, 1_000))),
        last_membership: StoredMembership::new(Some(log_id(id(0, 0))), members()),
    };
    let snapshot = Snapshot { meta, snapshot: Manifest };
    let vote = RaftVote::new_committed(4, 1);
    bench.voter.raft().install_full_snapshot(vote, snapshot).await.unwrap();
    let dir = bench.voter.dir().to_owned();
    bench.append(4, Some(id(4, 1_000)), vec![stub(4, 1_001)], None).await;
    bench.voter.shutdown().await;
    let file = dir.join("applied");
    let good = fs::read(&file).unwrap();
    fs::write(&file, &good[1..]).unwrap();
    let error = refusal(&dir).await.to_string();
    assert!(error.contains("/applied is damaged"), "{error}");
    fs::remove_file(&file).unwrap();
    let error = refusal(&dir).await;
    assert!(matches!(error, WitnessError::Forgot { .. }), "{error}");
}

#[tokio::test]
async fn directory_of_another_group_is_refused() {
    let bench = Bench::new().await;
    let dir = bench.voter.dir().to_owned();
    bench.voter.shutdown().await;
    let other = dir.with_file_name(Uuid::from_u128(9).to_string());
    fs::rename(&dir, &other).unwrap();
    let error = refusal(&other).await;
    assert!(matches!(error, WitnessError::OtherOwner { what: "group", .. }), "{error}");
    let identity = other.join("identity");
    let mut bytes = fs::read(&identity).unwrap();
    bytes[20] ^= 1;
    fs::write(&identity, bytes).unwrap();
    let error = refusal(&other).await.to_string();
    assert!(error.contains("identity is damaged"), "{error}");
}

#[tokio::test]
async fn crash_before_the_directory_was_whole_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let half = parent.path().join(format!("{}.new", group_uuid()));
    fs::create_dir_all(half.join("log")).unwrap();
    fs::write(half.join("log").join("vote"), b"half").unwrap();
    let dir = directory::create(parent.path(), &claim(), bootstrap()).unwrap();
    let voter = Voter::open(&dir, Pace::default()).await.unwrap();
    assert!(!voter.votes().await);
    voter.shutdown().await;
}
