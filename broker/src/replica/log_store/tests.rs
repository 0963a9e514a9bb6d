use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{EntryPayload, StorageError};
use parking_lot::Mutex;

use super::*;
use crate::log::LogOptions;
use crate::replica::raft_types::{SnapshotMeta, StoredMembership};
use crate::replica::state_machine::Manifest;

type ManifestSnapshot = openraft::alias::SnapshotOf<TypeConfig, Manifest>;

/// The least that openraft's suite needs beside a log: it applies entries that no log holds.
#[derive(Clone, Debug, Default)]
pub(in crate::replica) struct Recorder(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<SnapshotMeta>,
}

impl RaftSnapshotBuilder<TypeConfig> for Recorder {
    type SnapshotData = Manifest;

    async fn build_snapshot(&mut self) -> io::Result<ManifestSnapshot> {
        let mut recorded = self.0.lock();
        let last_membership = recorded.membership.clone();
        let meta = SnapshotMeta { last_log_id: recorded.applied, last_membership };
        recorded.snapshot = Some(meta.clone());
        Ok(Snapshot { meta, snapshot: Manifest })
    }
}

impl RaftStateMachine<TypeConfig> for Recorder {
    type SnapshotData = Manifest;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let recorded = self.0.lock();
        Ok((recorded.applied, recorded.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some(next) = futures::StreamExt::next(&mut entries).await {
            let (entry, _) = next?;
            let mut recorded = self.0.lock();
            if let EntryPayload::Membership(members) = entry.payload {
                recorded.membership = StoredMembership::new(Some(entry.log_id), members);
            }
            recorded.applied = Some(entry.log_id);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _: Manifest) -> io::Result<()> {
        *self.0.lock() = Recorded {
            applied: meta.last_log_id,
            membership: meta.last_membership.clone(),
            snapshot: Some(meta.clone()),
        };
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<ManifestSnapshot>> {
        let meta = self.0.lock().snapshot.clone();
        Ok(meta.map(|meta| Snapshot { meta, snapshot: Manifest }))
    }
}

fn options() -> LogOptions {
    LogOptions {
        segment_bytes: 1 << 20,
        prepared_bytes: 64 << 10,
        reserve_bytes: 4096,
        ..LogOptions::new(uuid::Uuid::from_u128(7))
    }
}

fn open(dir: &Path) -> LogStore {
    let (log, _) = Log::open(&dir.join("log"), options(), None).unwrap();
    LogStore::new(log, &dir.join("committed"), None).unwrap()
}

/// A log that begins anywhere, as the suite's do: ours begin at entry 0, so what is missing below
/// the first entry is filled with blanks.
struct Filled(LogStore);

impl RaftLogReader<TypeConfig> for Filled {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<RaftEntry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.0.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, from: u64, end: u64) -> io::Result<Vec<RaftEntry>> {
        self.0.limited_get_log_entries(from, end).await
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<RaftEntry>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.0.entries_stream(range).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        self.0.read_vote().await
    }
}

impl RaftLogStorage<TypeConfig> for Filled {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        self.0.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> Self {
        Self(self.0.clone())
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        self.0.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.0.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        self.0.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut entries: Vec<RaftEntry> = entries.into_iter().collect();
        if let (None, Some(first)) = (self.0.log.last(), entries.first()) {
            let LogId { leader_id, index } = first.log_id;
            let blank = |index| RaftEntry {
                log_id: LogId::new(leader_id, index),
                payload: EntryPayload::Blank,
            };
            entries.splice(0..0, (0..index).map(blank).collect::<Vec<_>>());
        }
        self.0.append(entries, flushed).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.0.truncate_after(last).await
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        self.0.purge(upto).await
    }
}

struct InTempDirs;

impl StoreBuilder<TypeConfig, Filled, Recorder, tempfile::TempDir> for InTempDirs {
    async fn build(
        &self,
    ) -> Result<(tempfile::TempDir, Filled, Recorder), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = Filled(open(dir.path()));
        Ok((dir, store, Recorder::default()))
    }
}

#[tokio::test]
async fn openraft_finds_nothing_to_complain_of() {
    Suite::test_all(InTempDirs).await.unwrap();
}

fn blank(index: u64) -> RaftEntry {
    RaftEntry { log_id: LogId::new_term_index(1, index), payload: EntryPayload::Blank }
}

async fn append(store: &mut LogStore, entries: impl IntoIterator<Item = RaftEntry>) {
    let (flushed, synced) = <TypeConfig as TypeConfigExt>::oneshot();
    let entries: Vec<_> = entries.into_iter().collect();
    store.append(entries, IOFlushed::signal(flushed)).await.unwrap();
    synced.await.unwrap().unwrap();
}

#[tokio::test]
async fn committed_hint_is_clamped_to_what_the_log_has() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, (0..3).map(blank)).await;
    store.save_committed(Some(LogId::new_term_index(1, 9))).await.unwrap();
    assert_eq!(store.read_committed().await.unwrap(), Some(LogId::new_term_index(1, 2)));
    store.save_committed(Some(LogId::new_term_index(1, 1))).await.unwrap();
    assert_eq!(store.read_committed().await.unwrap(), Some(LogId::new_term_index(1, 1)));
    store.save_committed(Some(LogId::new_term_index(2, 1))).await.unwrap();
    assert_eq!(store.read_committed().await.unwrap(), None, "another entry than the log's");
}

/// What it names was committed, but a cut that makes room for it may wait for the disk when the
/// process dies.
#[tokio::test]
async fn tail_of_an_older_term_is_not_committed_by_a_hint_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, (0..3).map(blank)).await;
    for index in [2, 9] {
        store.save_committed(Some(LogId::new_term_index(2, index))).await.unwrap();
        assert_eq!(store.read_committed().await.unwrap(), None, "hint at {index}");
    }
}

#[tokio::test]
async fn torn_hint_counts_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, [blank(0)]).await;
    assert_eq!(store.read_committed().await.unwrap(), None);
    store.save_committed(Some(LogId::new_term_index(1, 0))).await.unwrap();
    let path = dir.path().join("committed");
    let mut bytes = Vec::new();
    while bytes.len() < 24 {
        std::thread::yield_now();
        bytes = std::fs::read(&path).unwrap();
    }
    let mut again = LogStore::new(store.log.clone(), &path, None).unwrap();
    assert_eq!(again.read_committed().await.unwrap(), Some(LogId::new_term_index(1, 0)));
    bytes[3] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(again.read_committed().await.unwrap(), None);
}

#[tokio::test]
async fn vote_and_membership_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let members = super::super::raft_types::Membership::new_with_defaults(
        vec![std::collections::BTreeSet::from([4])],
        [4],
    );
    let membership = RaftEntry {
        log_id: LogId::new_term_index(0, 0),
        payload: EntryPayload::Membership(members),
    };
    let vote = RaftVote::new_committed(3, 4);
    let mut store = open(dir.path());
    append(&mut store, [membership.clone()]).await;
    store.save_vote(&vote).await.unwrap();
    store.log.close();
    drop(store);
    let mut store = open(dir.path());
    assert_eq!(store.read_vote().await.unwrap(), Some(vote));
    assert_eq!(store.try_get_log_entries(..).await.unwrap(), [membership]);
}

fn gate_entry(term: u64, index: u64, kind: EntryKind) -> RaftEntry {
    let entry = crate::entry::Entry {
        id: EntryId { term: Term::new(term), index: EntryIndex::new(index) },
        kind,
        clock_ms: 0,
        item_count: 0,
        payload_crc: 0,
        payload: bytes::Bytes::new(),
    };
    to_raft(entry).unwrap()
}

#[tokio::test]
async fn mode_follows_appends_and_truncations_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let alone_at = |index| Mode::Alone { at: EntryIndex::new(index) };
    let mut store = open(dir.path());
    let facts = store.facts();
    assert_eq!(facts.borrow().mode, Mode::Paired);
    append(&mut store, [blank(0), gate_entry(1, 1, EntryKind::Alone)]).await;
    assert_eq!(facts.borrow().mode, alone_at(1));
    assert_eq!(facts.borrow().end, EntryIndex::new(2));
    store.save_committed(Some(LogId::new_term_index(1, 1))).await.unwrap();
    append(&mut store, [gate_entry(2, 2, EntryKind::Paired), gate_entry(2, 3, EntryKind::Alone)])
        .await;
    let began = EntryId { term: Term::new(2), index: EntryIndex::new(2) };
    assert_eq!((facts.borrow().mode, facts.borrow().term_start), (alone_at(3), Some(began)));
    store.truncate_after(Some(LogId::new_term_index(2, 2))).await.unwrap();
    assert_eq!(facts.borrow().mode, Mode::Paired);
    store.truncate_after(Some(LogId::new_term_index(1, 1))).await.unwrap();
    assert_eq!(facts.borrow().mode, alone_at(1), "what was committed before stands again");
    assert_eq!(facts.borrow().end, EntryIndex::new(2));
    store.log.close();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.facts().borrow().mode, alone_at(1));
    assert_eq!(store.facts().borrow().end, EntryIndex::new(2));
}

#[tokio::test]
async fn mode_of_the_checkpoint_stands_where_the_log_behind_it_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, [blank(0), gate_entry(1, 1, EntryKind::Paired), blank(2)]).await;
    let log = store.log.clone();
    let at = EntryId { term: Term::new(1), index: EntryIndex::new(2) };
    let hint = dir.path().join("committed");
    let behind = LogStore::new(log.clone(), &hint, Some((at, GateMode::Alone))).unwrap();
    assert_eq!(behind.facts().borrow().mode, Mode::Alone { at: at.index });
    let before = EntryId { index: EntryIndex::new(0), ..at };
    let before = LogStore::new(log, &hint, Some((before, GateMode::Alone))).unwrap();
    assert_eq!(before.facts().borrow().mode, Mode::Paired, "the log behind it says so");
}
