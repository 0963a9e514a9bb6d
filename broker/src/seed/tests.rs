//! A re-seed from one directory to another, through the public functions.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use drumlin_proto::native::SeedManifest;
use futures::StreamExt;
use tempfile::TempDir;

use super::donor::Donor;
use super::install::{InstallOptions, install};
use super::puller::Puller;
use super::*;
use crate::disk::RealDisk;
use crate::entry::{Entry, EntryKind};
use crate::log::inspect::LogFiles;
use crate::log::{CheckpointMark, Log, LogOptions, Vote};
use crate::position::{EntryId, EntryIndex, LogOffset, Term};
use crate::queue::index::Index;
use crate::replica::checkpoint::{CheckpointMeta, Checkpointer, IndexFound};
use crate::replica::state::{GateMode, TrimPoint};

const GROUP: Uuid = Uuid::from_u128(7);
const RECEIVER: Receiver = Receiver { group_uuid: GROUP, directory_uuid: Uuid::from_u128(21) };
/// Of the donor's leadership, synced by the receiver.
const VOTE: Vote = Vote { term: Term::new(3), node: 2, committed: true };
const DONOR: u64 = 2;
/// Bytes of one piece of a stream.
const PIECE_BYTES: usize = 10_000;

fn options() -> LogOptions {
    let mut options = LogOptions::new(GROUP);
    options.segment_bytes = 64 << 10;
    options.prepared_bytes = 16 << 10;
    options.reserve_bytes = 0;
    options
}

fn entry(term: u64, index: u64, payload_bytes: usize) -> Entry {
    let payload: Vec<u8> =
        (0..payload_bytes).map(|at| u8::try_from((at as u64 * 7 + index) % 251).unwrap()).collect();
    Entry {
        id: EntryId { term: Term::new(term), index: EntryIndex::new(index) },
        kind: EntryKind::Batch,
        clock_ms: 1_000 + index,
        item_count: 0,
        payload_crc: crc32fast::hash(&payload),
        payload: payload.into(),
    }
}

fn append(log: &Log, entries: impl IntoIterator<Item = Entry>) {
    let (done, synced) = mpsc::channel();
    let flushed = Box::new(move |result: io::Result<()>| done.send(result).unwrap());
    log.append(entries.into_iter().collect(), flushed).unwrap();
    synced.recv().unwrap().unwrap();
}

fn all(log: &Log) -> Vec<Entry> {
    let first = log.purged().map_or(EntryIndex::ZERO, |purged| purged.index.next());
    log.entries(first, EntryIndex::new(u64::MAX), u64::MAX).unwrap()
}

/// A data directory with a log and, if wanted, a checkpoint at some entry.
struct Node {
    dir: TempDir,
    log: Log,
}

impl Node {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let log = Log::open(&dir.path().join("log"), options(), None).unwrap().0;
        Self { dir, log }
    }

    fn root(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a checkpoint that has applied everything up to `applied`.
    fn checkpoint(&self, applied: u64) -> PathBuf {
        let index = EntryIndex::new(applied);
        let meta = CheckpointMeta {
            group_uuid: GROUP,
            applied: self.log.id_of(index).unwrap().unwrap(),
            end: self.log.position_of(index.next()).unwrap().unwrap_or(self.log.end()),
            gate: GateMode::Paired,
            trimmed: TrimPoint { below: EntryIndex::ZERO, position: LogOffset::ZERO },
            purged: self.log.purged(),
            membership_at: None,
            membership: Vec::new(),
        };
        let mut opened = open_checkpoints(self.root());
        let IndexFound::Ready(lines) = opened.index else { panic!("the index is damaged") };
        let durable_end = self.log.durable_end().borrow().index;
        let capture = Index::capture(&lines);
        opened.checkpointer.write(&capture, &meta, b"state", durable_end).unwrap();
        let newest = opened.checkpointer.newest().unwrap();
        self.root().join(format!("checkpoint/checkpoint-{:020}", newest.generation))
    }
}

fn open_checkpoints(root: &Path) -> crate::replica::checkpoint::Opened {
    let (dir, index) = (root.join("checkpoint"), root.join("index"));
    let disk = RealDisk;
    crate::disk::Disk::create_dir(&disk, &index).unwrap();
    Checkpointer::open(Arc::new(disk), &dir, &index, GROUP).unwrap()
}

/// The donor with 300 entries in segments, of which the oldest are dropped, and what it gives.
fn donor() -> (Node, Donor, SeedManifest) {
    let node = Node::new();
    append(&node.log, (0..150).map(|i| entry(1, i, 900)));
    append(&node.log, (150..300).map(|i| entry(3, i, 900)));
    let checkpoint = node.checkpoint(200);
    let upto = node.log.id_of(EntryIndex::new(99)).unwrap().unwrap();
    node.log.purge(upto, node.log.end()).unwrap();
    node.log.retain_from(EntryIndex::new(100)).unwrap();
    assert!(node.log.oldest_index() > EntryIndex::ZERO, "retention must drop something");
    let donor = Donor::new(None);
    let manifest =
        donor.open(&checkpoint, node.log.export().unwrap().unwrap(), Instant::now()).unwrap();
    (node, donor, manifest)
}

/// Gives a donor's files in small pieces, and breaks off after so many of them.
#[derive(Debug)]
struct Direct {
    donor: Donor,
    pieces_left: AtomicU64,
}

#[derive(Debug)]
struct Held(Arc<Direct>);

impl Held {
    fn new(donor: &Donor, pieces: u64) -> Self {
        Self(Arc::new(Direct { donor: donor.clone(), pieces_left: AtomicU64::new(pieces) }))
    }
}

impl Peers for Held {
    fn pull(&self, donor: u64, request: PullRequest) -> BoxFuture<'_, Result<Chunks, Status>> {
        assert_eq!(donor, DONOR);
        let this = Arc::clone(&self.0);
        Box::pin(async move {
            let mut whole = this.donor.pull(&request)?;
            let mut pieces = Vec::new();
            while let Some(chunk) = whole.next().await {
                let chunk = chunk?;
                pieces.extend(chunk.chunks(PIECE_BYTES).map(Bytes::copy_from_slice));
            }
            let given = pieces.into_iter().map(move |piece| {
                let left = this.pieces_left.load(Ordering::Relaxed);
                this.pieces_left.store(left.saturating_sub(1), Ordering::Relaxed);
                if left == 0 { Err(Status::unavailable("cut off")) } else { Ok(piece) }
            });
            Ok(futures::stream::iter(given).boxed())
        })
    }
}

/// Pulls until it is complete or an attempt is cut off.
async fn pull(puller: &Puller, manifest: &SeedManifest) -> bool {
    let begun = puller.offer(DONOR, VOTE, manifest);
    assert!(begun.all_bytes > 0);
    puller.ended().await;
    *puller.complete().borrow()
}

/// A node that fell behind: some of its entries are the group's, some never were.
fn receiver() -> Node {
    let node = Node::new();
    append(&node.log, (0..50).map(|i| entry(1, i, 900)));
    append(&node.log, (50..60).map(|i| entry(2, i, 300)));
    node.log.save_vote(VOTE).unwrap().blocking_recv().unwrap().unwrap();
    node
}

fn install_options(root: &Path) -> InstallOptions {
    InstallOptions {
        root: root.to_owned(),
        receiver: RECEIVER,
        hint_file: "committed",
        committed: Some(EntryIndex::new(49)),
        quarantine_bytes_max: 1 << 20,
    }
}

fn mark_of(root: &Path) -> CheckpointMark {
    open_checkpoints(root).checkpoint.unwrap().meta.mark()
}

#[test]
fn an_interrupted_copy_goes_on_and_becomes_the_log() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (given, donor, manifest) = donor();
    let receiver = receiver();
    let mut attempts = 0;
    // A new process each time, with what the last one gathered.
    loop {
        let peers = Arc::new(Held::new(&donor, 7));
        let puller = Puller::new(receiver.root(), RECEIVER, peers);
        attempts += 1;
        assert!(attempts < 100, "nothing is kept between attempts");
        if runtime.block_on(pull(&puller, &manifest)) {
            break;
        }
        assert_eq!(install(&install_options(receiver.root())).unwrap(), None);
    }
    assert!(attempts > 2, "{attempts} attempts");
    receiver.log.close();

    let last = install(&install_options(receiver.root())).unwrap();
    assert_eq!(last, given.log.last());
    let log_dir = receiver.root().join("log");
    let orphans: Vec<_> = std::fs::read_dir(log_dir.join("quarantine")).unwrap().collect();
    assert_eq!(orphans.len(), 1, "entries 50 to 59 never were the group's");

    let (log, _) = Log::open(&log_dir, options(), Some(mark_of(receiver.root()))).unwrap();
    let held: Vec<Entry> =
        all(&log).into_iter().filter(|entry| entry.id.index.get() > 99).collect();
    assert!(held == all(&given.log), "from {:?} to {:?}", held.first().map(|e| e.id), log.last());
    assert_eq!(log.vote(), Some(VOTE));
    assert_eq!(log.purged().map(|id| id.index.next()), Some(given.log.oldest_index()));
    append(&log, [entry(3, 300, 100)]);
    log.close();
    assert_eq!(install(&install_options(receiver.root())).unwrap(), None);
    let files = LogFiles::open(receiver.root()).unwrap();
    let incarnations: Vec<u64> = files.segments().iter().map(|s| s.header.incarnation).collect();
    assert!(incarnations.is_sorted_by(|a, b| a < b), "{incarnations:?}");
    let (log, _) = Log::open(&log_dir, options(), Some(mark_of(receiver.root()))).unwrap();
    assert_eq!(log.last(), Some(entry(3, 300, 100).id));
}

#[test]
fn a_copy_is_not_used_once_another_leader_was_recognised() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (_given, donor, manifest) = donor();
    let receiver = receiver();
    let peers = Arc::new(Held::new(&donor, u64::MAX));
    let puller = Puller::new(receiver.root(), RECEIVER, peers);
    assert!(runtime.block_on(pull(&puller, &manifest)));
    let later = Vote { term: Term::new(4), node: 1, committed: false };
    receiver.log.save_vote(later).unwrap().blocking_recv().unwrap().unwrap();
    receiver.log.close();
    assert_eq!(install(&install_options(receiver.root())).unwrap(), None);
    let (log, _) = Log::open(&receiver.root().join("log"), options(), None).unwrap();
    assert_eq!(log.last().map(|id| id.index), Some(EntryIndex::new(59)));
}

#[test]
fn damage_on_the_way_is_found_and_taken_anew() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (_given, donor, manifest) = donor();
    let receiver = receiver();
    let peers = Arc::new(Held::new(&donor, 3));
    let puller = Puller::new(receiver.root(), RECEIVER, peers);
    assert!(!runtime.block_on(pull(&puller, &manifest)));
    let folder = receiver.root().join(FOLDER).join("log");
    let damaged = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[5_000] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();

    let puller = Puller::new(receiver.root(), RECEIVER, Arc::new(Held::new(&donor, u64::MAX)));
    assert!(!runtime.block_on(pull(&puller, &manifest)), "the frame's checksum cannot match");
    assert!(!damaged.try_exists().unwrap());
    assert!(runtime.block_on(pull(&puller, &manifest)));
}

#[test]
fn a_held_file_outlives_retention_and_is_not_used_again() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (given, donor, manifest) = donor();
    let first = manifest.files.iter().find(|file| file.path.starts_with("log/")).unwrap();
    let before = std::fs::read(given.root().join(&first.path)).unwrap();
    let upto = given.log.id_of(EntryIndex::new(250)).unwrap().unwrap();
    given.log.purge(upto, given.log.end()).unwrap();
    given.log.retain_from(EntryIndex::new(251)).unwrap();
    append(&given.log, (300..500).map(|i| entry(3, i, 900)));
    assert!(!given.root().join(&first.path).try_exists().unwrap());
    let request =
        PullRequest { seed_id: manifest.seed_id.clone(), path: first.path.clone(), from: 0 };
    let chunks = donor.pull(&request).unwrap();
    let chunks: Vec<Bytes> = runtime.block_on(chunks.map(Result::unwrap).collect());
    assert_eq!(chunks.concat(), before[..usize::try_from(first.bytes).unwrap()]);
}

#[test]
fn paths_that_leave_the_folder_are_refused() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (_given, donor, mut manifest) = donor();
    manifest.files[1].path = "log/../../identity".to_owned();
    let receiver = receiver();
    let puller = Puller::new(receiver.root(), RECEIVER, Arc::new(Held::new(&donor, u64::MAX)));
    assert!(!runtime.block_on(pull(&puller, &manifest)));
    assert!(!receiver.root().join(FOLDER).try_exists().unwrap());
}

#[test]
fn trims_wait_for_a_re_seed_that_advances_and_no_longer() {
    let (_given, donor, _) = donor();
    let minute = Duration::from_mins(1);
    let begun = Instant::now();
    assert!(!donor.allows_trims(50, begun));
    donor.note(1, 10, 100, begun + 5 * minute);
    assert!(!donor.allows_trims(50, begun + 14 * minute));
    donor.note(1, 10, 100, begun + 14 * minute);
    let late = begun + 16 * minute;
    assert!(donor.allows_trims(50, late), "it has not advanced for so long");
    donor.expire(late);
    assert!(!donor.is_open());

    let (_given, donor, _) = self::donor();
    assert!(donor.allows_trims(85, begun), "space matters more");
    assert!(!donor.is_open());

    let (_given, donor, _) = self::donor();
    donor.note(1, 10, 100, begun);
    donor.done(1);
    assert!(donor.allows_trims(50, begun));
}
