//! A replica as a whole, over real files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{BrokerGroupName, GroupName, QueueId, TopicName};
use drumlin_proto::record::{RecordFields, RunBuilder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;

use super::checkpoint::Checkpointer;
use super::restore::RestoreError;
use super::start::{Ended, Options, Running, StartError};
use super::*;
use crate::command::{ClientKey, GroupStart, Lease, LeaseId, TopicType};
use crate::data_dir::Identity;
use crate::disk::RealDisk;
use crate::log::faulty::{Fault, FaultyDisk};
use crate::log::{Directory, LogOptions, Storage};
use crate::replica::state::Limits;

const GROUP_UUID: uuid::Uuid = uuid::Uuid::from_u128(7);
const SEGMENT_BYTES: u64 = 64 << 10;

/// The directory of one replica.
struct Home(tempfile::TempDir);

struct Node {
    replica: Replica,
    running: Running,
}

fn broker_group() -> BrokerGroupName {
    BrokerGroupName::parse("a").unwrap()
}

fn queue(number: u16) -> QueueKey {
    QueueKey { topic: TopicId::new(1), queue: QueueId::new(number) }
}

fn run(body: &[u8]) -> Run {
    let mut builder = RunBuilder::new();
    builder.push(&RecordFields { message_id: "m", body, ..Default::default() });
    Run::parse(builder.finish()).unwrap()
}

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    async fn try_start(&self) -> Result<Node, StartError> {
        std::fs::create_dir_all(self.path("log")).unwrap();
        let storage = Directory::open(&self.path("log")).unwrap();
        self.try_start_on(Arc::new(storage)).await
    }

    /// Serving, on a disk to be broken later.
    async fn start_on(&self, disk: &FaultyDisk) -> Node {
        let node = self.try_start_on(Arc::new(disk.clone())).await.unwrap();
        node.running.until_serving().await.unwrap();
        node
    }

    fn faulty_disk(&self) -> FaultyDisk {
        std::fs::create_dir_all(self.path("log")).unwrap();
        FaultyDisk::open(&self.path("log")).unwrap()
    }

    /// Not serving yet.
    async fn try_start_on(&self, storage: Arc<dyn Storage>) -> Result<Node, StartError> {
        let options = Options {
            identity: Identity {
                cluster: "c".into(),
                broker_group: broker_group(),
                node: "a-0".into(),
                group_uuid: GROUP_UUID,
                succeeds: Vec::new(),
                directory_uuid: uuid::Uuid::from_u128(8),
                node_id: 1,
            },
            plan: None,
            peer_address: String::new(),
            addresses: BTreeMap::new(),
            preferred_leader: None,
            data_dir: self.0.path().to_owned(),
            hint_path: self.path("committed"),
            seed_bytes_per_second_max: None,
            checkpoint_interval_bytes: u64::MAX,
            limits: Limits { topics_max: 10, groups_max: 10 },
            in_flight_bytes_max: 64 << 20,
            clock_step_max: Duration::from_secs(10),
            heartbeat_interval: Duration::from_millis(100),
            election_timeout_min: Duration::from_millis(500),
            election_timeout_max: Duration::from_millis(900),
            peer_silence_max: Duration::from_secs(2),
            settle_timeout: Duration::from_secs(2),
            commit_seconds: Histogram::new([1.0]),
            elections: Counter::default(),
        };
        let (checkpoints, index) = (self.path("checkpoint"), self.path("index"));
        let opened =
            Checkpointer::open(Arc::new(RealDisk), &checkpoints, &index, GROUP_UUID).unwrap();
        let open_log = move |mark| {
            let options = LogOptions {
                segment_bytes: SEGMENT_BYTES,
                prepared_bytes: SEGMENT_BYTES,
                reserve_bytes: 4096,
                boot_id: uuid::Uuid::from_u128(1),
                ..LogOptions::new(GROUP_UUID)
            };
            Log::open_with(storage, options, mark).map(|(log, _)| log)
        };
        let (replica, running) = start::start(options, opened, open_log).await?;
        Ok(Node { replica, running })
    }

    async fn start(&self) -> Node {
        let node = self.try_start().await.unwrap();
        node.running.until_serving().await.unwrap();
        node
    }

    /// A copy as a crash would leave it: whatever the files hold now.
    fn copy(&self) -> Self {
        let copy = Self::new();
        copy_dir(self.0.path(), copy.0.path());
        copy
    }

    fn files(&self, dir: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path(dir)).unwrap();
        let paths: BTreeSet<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.into_iter().collect()
    }
}

fn copy_dir(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir_all(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

impl Node {
    async fn stop(self) {
        self.running.shutdown().await;
    }

    async fn command(&self, command: Command) -> Outcome {
        match self.replica.propose(Item::Command(command), None).await.unwrap() {
            Applied::Command(outcome) => outcome,
            Applied::Run { .. } => unreachable!("a command was proposed"),
        }
    }

    async fn send(&self, number: u16, body: &[u8]) -> QueueOffset {
        let item = Item::Run { queue: queue(number), run: run(body) };
        match self.replica.propose(item, None).await.unwrap() {
            Applied::Run { base_offset, .. } => base_offset,
            Applied::Command(_) => unreachable!("a run was proposed"),
        }
    }

    /// A topic of two queues, a group that has leased the first record of the first queue.
    async fn furnish(&self) -> LeaseId {
        let shares = vec![(broker_group(), 2)];
        let name = TopicName::parse("t").unwrap();
        self.command(Command::CreateTopic { name, kind: TopicType::Normal, shares }).await;
        let name = GroupName::parse("g").unwrap();
        let Outcome::GroupCreated { group } =
            self.command(Command::CreateGroup { name, start: GroupStart::Earliest }).await
        else {
            unreachable!("a group was created")
        };
        self.send(0, b"leased").await;
        let lease = Lease {
            group,
            queue: queue(0),
            client: ClientKey(5),
            auto_renew: false,
            invisible_ms: 3_600_000,
            from: QueueOffset::ZERO,
            skip_to: QueueOffset::new(1),
            fresh: vec![QueueOffset::ZERO],
            again: Vec::new(),
            unwanted: Vec::new(),
        };
        match self.command(Command::Lease(lease)).await {
            Outcome::Leased { lease, .. } => lease,
            outcome => unreachable!("{outcome:?} came of a lease"),
        }
    }

    /// Enough for several segments.
    async fn fill(&self, records: u16) {
        let body = vec![b'x'; 4 << 10];
        for number in 0..records {
            self.send(number % 2, &body).await;
        }
    }

    fn with_state<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.replica.view().state)
    }

    fn bodies(&self, number: u16) -> Vec<(u64, usize)> {
        let lines = self.replica.lines_from(queue(number), QueueOffset::ZERO, 10_000).unwrap();
        let bodies = lines.iter().flat_map(|line| {
            let run = Run::from_log(self.replica.read_run(line).unwrap()).unwrap();
            run.verify().unwrap();
            let sizes: Vec<usize> = run.records().map(|record| record.body().len()).collect();
            (line.base_offset.get()..).zip(sizes)
        });
        bodies.collect()
    }

    /// What must be equal after restarts, which add entries without content.
    fn content(&self) -> (Vec<Vec<(u64, usize)>>, String) {
        let view = self.replica.view();
        let leases: Vec<_> = view.state.groups().iter().map(|item| format!("{item:?}")).collect();
        let ranges: Vec<_> = view.state.queue_ranges().collect();
        let catalog = view.state.catalog().clone();
        drop(view);
        (vec![self.bodies(0), self.bodies(1)], format!("{catalog:?} {ranges:?} {leases:?}"))
    }

    async fn trim_to_segment(&self, number: usize) -> EntryIndex {
        let (below, position) = self.replica.log().segment_bases()[number];
        assert_eq!(self.command(Command::Trim { below, position }).await, Outcome::Done);
        below
    }

    /// Waits until the log has dropped what lies wholly below an entry.
    async fn until_dropped(&self, below: EntryIndex) {
        while self.replica.log().oldest_index() < below {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_of_calls_is_the_order_in_the_log() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    let items =
        (0..500_u32).map(|number| Item::Run { queue: queue(1), run: run(&number.to_le_bytes()) });
    let answers: Vec<_> = items.map(|item| node.replica.propose(item, None)).collect();
    for (expected, answer) in (0..).zip(answers) {
        let Applied::Run { base_offset, .. } = answer.await.unwrap() else { unreachable!() };
        assert_eq!(base_offset.get(), expected);
    }
    let lines = node.replica.lines_from(queue(1), QueueOffset::ZERO, 1000).unwrap();
    let runs = lines.iter().map(|line| node.replica.read_run(line).unwrap());
    let bodies: Vec<u32> = runs
        .flat_map(|bytes| {
            let run = Run::from_log(bytes).unwrap();
            run.records().map(|r| r.body().try_into().unwrap()).collect::<Vec<[u8; 4]>>()
        })
        .map(u32::from_le_bytes)
        .collect();
    assert_eq!(bodies, (0..500).collect::<Vec<u32>>());
    assert!(lines.len() < 500, "what waited together was merged");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_and_orderly_stop_both_keep_everything() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    node.fill(40).await;
    let content = node.content();
    let crashed = home.copy();
    node.stop().await;
    for home in [home, crashed] {
        let node = home.start().await;
        assert_eq!(node.content(), content);
        assert_eq!(node.send(0, b"next").await.get(), 21, "no offset is given twice");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_full_replay_and_rebuilt_index_agree() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    node.fill(30).await;
    node.replica.checkpoint().await.unwrap();
    node.fill(10).await;
    let with_checkpoint = home.copy();
    let replayed = home.copy();
    let without_index = home.copy();
    node.stop().await;
    std::fs::remove_dir_all(replayed.path("checkpoint")).unwrap();
    std::fs::remove_dir_all(replayed.path("index")).unwrap();
    std::fs::remove_dir_all(without_index.path("index")).unwrap();
    let mut digests = BTreeSet::new();
    let mut contents = Vec::new();
    for home in [with_checkpoint, replayed, without_index] {
        let node = home.start().await;
        digests.insert(node.replica.view().state.digest().unwrap());
        contents.push(node.content());
        node.stop().await;
    }
    assert_eq!(digests.len(), 1, "{digests:?}");
    assert!(contents.iter().all(|content| *content == contents[0]));
    assert_eq!(contents[0].0[0].len(), 21);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trims_wait_for_both_checkpoints_and_lose_no_definitions() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    node.fill(60).await;
    node.replica.checkpoint().await.unwrap();
    node.fill(60).await;
    node.replica.checkpoint().await.unwrap();
    let below = node.trim_to_segment(2).await;
    node.until_dropped(below).await;
    let content = node.content();
    assert!(content.0[0].len() < 61, "the oldest records are gone");
    let first_kept = content.0[0][0].0;
    let crashed = home.copy();
    node.stop().await;

    let newest = crashed.files("checkpoint").pop().unwrap();
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    for home in [home, crashed] {
        let node = home.start().await;
        assert_eq!(node.content(), content);
        assert_eq!(node.replica.queue_range(queue(0)).unwrap().0.get(), first_kept);
        let committed = node.with_state(|state| {
            assert!(state.catalog().topic_by_name(&TopicName::parse("t").unwrap()).is_some());
            let group = state.catalog().group_by_name(&GroupName::parse("g").unwrap()).unwrap();
            state.leases(group.id, queue(0)).unwrap().committed()
        });
        assert!(committed.get() >= first_kept, "trimmed records are settled");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_survives_the_loss_of_the_newer_checkpoint() {
    let home = Home::new();
    let node = home.start().await;
    let lease = node.furnish().await;
    node.replica.checkpoint().await.unwrap();
    node.send(0, b"more").await;
    node.replica.checkpoint().await.unwrap();
    let crashed = home.copy();
    node.stop().await;
    let newest = crashed.files("checkpoint").pop().unwrap();
    std::fs::write(newest, b"nothing").unwrap();
    for home in [home, crashed] {
        let node = home.start().await;
        let held = node.with_state(|state| {
            let (_, _, leases) = state.groups().iter().next().unwrap();
            leases.flight(QueueOffset::ZERO).unwrap().lease
        });
        assert_eq!(held, lease);
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trimmed_log_without_a_checkpoint_is_refused() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    node.fill(60).await;
    node.replica.checkpoint().await.unwrap();
    node.send(0, b"more").await;
    node.replica.checkpoint().await.unwrap();
    let below = node.trim_to_segment(2).await;
    node.until_dropped(below).await;
    node.stop().await;
    std::fs::remove_dir_all(home.path("checkpoint")).unwrap();
    let refused = home.try_start().await.map(|_| ()).unwrap_err();
    let StartError::Restore(RestoreError::CheckpointMissing { oldest }) = refused else {
        panic!("{refused}")
    };
    assert!(oldest > EntryIndex::ZERO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_taken_after_the_stop() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    let replica = node.replica.clone();
    node.stop().await;
    let item = Item::Run { queue: queue(0), run: run(b"late") };
    let refused = replica.propose(item, None).await;
    assert!(matches!(refused, Err(ProposeError::Stopped(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_write_or_sync_acknowledges_nothing_and_ends_the_node() {
    for operation in 1..8 {
        let home = Home::new();
        let disk = home.faulty_disk();
        let node = home.start_on(&disk).await;
        node.furnish().await;
        disk.fail_at(operation, Fault::Error);
        let mut acked = 0;
        let failure = loop {
            let item = Item::Run { queue: queue(1), run: run(b"x") };
            match node.replica.propose(item, None).await {
                Ok(_) => acked += 1,
                Err(error) => break error,
            }
        };
        assert!(
            matches!(
                failure,
                ProposeError::UnknownOutcome
                    | ProposeError::Stopped(_)
                    | ProposeError::NotLeader { .. }
            ),
            "operation {operation}: {failure}"
        );
        assert!(matches!(node.running.ended().await, Ended::Failed(_)));
        assert_eq!(node.bodies(1).len(), acked, "nothing else became readable");
        let range = node.replica.queue_range(queue(1)).unwrap();
        assert_eq!(range.1.get(), u64::try_from(acked).unwrap());
        node.stop().await;
    }
}

#[tokio::test]
async fn a_log_that_closes_itself_fails_an_idle_replica() {
    let home = Home::new();
    let node = home.start().await;
    let ended = node.running.ended();
    // As after a write that failed and nobody waited for.
    let log = node.replica.log().clone();
    tokio::task::spawn_blocking(move || log.close()).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), ended).await.unwrap();
    let reason = ended.reason();
    assert!(reason.contains("the log is closed"), "{reason}");
    assert!(!node.replica.raft_status().borrow().serving);
    node.running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_ends_while_a_write_waits_for_space() {
    let home = Home::new();
    let disk = home.faulty_disk();
    let node = home.start_on(&disk).await;
    node.furnish().await;
    disk.fail_at(1, Fault::Full(u32::MAX));
    let mut full = node.replica.log().disk_full();
    let item = || Item::Run { queue: queue(1), run: run(&[b'x'; 8 << 10]) };
    // More than a segment, and than the reserve.
    let answers: Vec<_> = (0..64).map(|_| node.replica.propose(item(), None)).collect();
    full.wait_for(|full| *full).await.unwrap();
    tokio::time::timeout(Duration::from_secs(30), node.stop()).await.unwrap();
    let mut unknown = 0;
    for answer in answers {
        match tokio::time::timeout(Duration::from_secs(5), answer).await.unwrap() {
            Ok(_) | Err(ProposeError::Stopped(_)) => {}
            Err(ProposeError::UnknownOutcome) => unknown += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(unknown > 0, "nothing waited for space");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_waits_for_the_feature_level_that_introduced_it() {
    let home = Home::new();
    let node = home.start().await;
    let unreleased = || Item::Command(Command::Unreleased);
    let refused = node.replica.propose(unreleased(), None).await.unwrap_err();
    let (needed, level) = (command::level::FEATURE_LEVEL_MAX, 1);
    let named = matches!(refused, ProposeError::FeatureLevel { needed: n, level: l }
        if (n, l) == (needed, level));
    assert!(named, "{refused}");
    let raise = |level| Command::RaiseFeatureLevel { level, release: "0.9".into() };
    node.command(raise(needed)).await;
    assert_eq!(node.replica.feature_level(), needed);
    node.replica.propose(unreleased(), None).await.unwrap();
    node.stop().await;

    let node = home.start().await;
    assert_eq!(node.replica.feature_level(), needed, "it outlives a restart");
    // As if a newer release had led: this one must not go on.
    let told = node.running.ended();
    drop(node.replica.propose(Item::Command(raise(needed + 1)), None));
    let Ended::Failed(reason) = told.await else { panic!("it began anew") };
    assert!(!reason.is_empty());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn start_that_cannot_serve_says_why() {
    let mut reasons = 0;
    for operation in 1..30 {
        let home = Home::new();
        let disk = home.faulty_disk();
        disk.fail_at(operation, Fault::PowerLoss);
        let Ok(node) = home.try_start_on(Arc::new(disk)).await else { continue };
        let served = node.running.until_serving();
        match tokio::time::timeout(Duration::from_secs(60), served).await.unwrap() {
            Ok(()) => {}
            Err(reason) => {
                assert!(!reason.is_empty());
                reasons += 1;
            }
        }
        node.stop().await;
    }
    assert!(reasons > 0, "each start failed at once or served");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rebuilt_index_leaves_out_runs_that_were_refused() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    let early = QueueKey { topic: TopicId::new(2), queue: QueueId::new(0) };
    let send = |body: &'static [u8]| {
        node.replica.propose(Item::Run { queue: early, run: run(body) }, None)
    };
    let refused = send(b"refused").await;
    assert!(matches!(refused, Err(ProposeError::Refused(Refusal::TopicNotFound))), "{refused:?}");
    let (name, shares) = (TopicName::parse("t2").unwrap(), vec![(broker_group(), 1)]);
    let created =
        node.command(Command::CreateTopic { name, kind: TopicType::Normal, shares }).await;
    assert_eq!(created, Outcome::TopicCreated { topic: early.topic });
    send(b"stored").await.unwrap();
    let lines = node.replica.lines_from(early, QueueOffset::ZERO, 9).unwrap();
    assert_eq!(lines.len(), 1);
    node.replica.checkpoint().await.unwrap();
    node.stop().await;
    std::fs::remove_dir_all(home.path("index")).unwrap();
    let node = home.start().await;
    assert_eq!(node.replica.lines_from(early, QueueOffset::ZERO, 9).unwrap(), lines);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_that_cannot_be_written_ends_the_node() {
    let home = Home::new();
    let node = home.start().await;
    node.furnish().await;
    let content = node.content();
    std::fs::rename(home.path("checkpoint"), home.path("away")).unwrap();
    std::fs::write(home.path("checkpoint"), b"not a directory").unwrap();
    node.replica.checkpoint().await.unwrap_err();
    let ended = node.running.ended().await;
    let reason = ended.reason();
    assert!(reason.contains("checkpoint"), "{reason}");
    node.stop().await;
    std::fs::remove_file(home.path("checkpoint")).unwrap();
    std::fs::rename(home.path("away"), home.path("checkpoint")).unwrap();
    let node = home.start().await;
    assert_eq!(node.content(), content);
    node.stop().await;
}
