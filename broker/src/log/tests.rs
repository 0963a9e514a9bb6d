//! The log through its public functions, on a real directory.

mod damage;
mod deferred;
mod driver;
mod faults;
mod golden;
mod model;

use std::sync::mpsc;

use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::entry::{EntryKind, FRAME_HEADER_BYTES};

pub(super) fn options() -> LogOptions {
    let mut options = LogOptions::new(uuid::Uuid::from_u128(7));
    options.segment_bytes = 64 << 10;
    options.prepared_bytes = 16 << 10;
    options.boot_id = uuid::Uuid::from_u128(1);
    options
}

pub(super) fn entry(term: u64, index: u64, payload: impl Into<Vec<u8>>) -> Entry {
    let payload = Bytes::from(payload.into());
    Entry {
        id: EntryId { term: Term::new(term), index: EntryIndex::new(index) },
        kind: EntryKind::Batch,
        clock_ms: 1_000 + index,
        item_count: 1,
        payload_crc: crc32fast::hash(&payload),
        payload,
    }
}

/// In memory where the machine offers that: what the tests prove does not depend on the disk.
fn temp_dir() -> TempDir {
    TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap()
}

/// Payload of a given size that tells entries apart.
pub(super) fn payload(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| ((seed * 31 + at * 7) % 251) as u8).collect()
}

/// Appends and waits for the sync.
pub(super) fn append_synced(log: &Log, entries: Vec<Entry>) -> io::Result<()> {
    let (done, synced) = mpsc::channel();
    let flushed = Box::new(move |result| done.send(result).expect("the test waits"));
    log.append(entries, flushed).map_err(io::Error::other)?;
    synced.recv().map_err(io::Error::other)?
}

pub(super) fn all(log: &Log) -> Vec<Entry> {
    let first = log.purged().map_or(EntryIndex::ZERO, |purged| purged.index.next());
    log.entries(first, EntryIndex::new(u64::MAX), u64::MAX).expect("readable")
}

fn open(dir: &TempDir) -> (Log, RecoveryReport) {
    Log::open(dir.path(), options(), None).expect("opens")
}

fn segment_names(dir: &TempDir) -> Vec<String> {
    let files = Directory::existing(dir.path()).expect("there").list("").expect("readable");
    files.into_iter().map(|(name, _)| name).filter(|name| name.ends_with(".log")).collect()
}

#[test]
fn entries_come_back_after_reopening() {
    let dir = TempDir::new().unwrap();
    let entries: Vec<Entry> = (0..100).map(|i| entry(1, i, payload(i, 900))).collect();
    let (log, report) = open(&dir);
    assert!(report.clean);
    for batch in entries.chunks(7) {
        append_synced(&log, batch.to_vec()).unwrap();
    }
    assert_eq!(all(&log), entries);
    let end = log.end();
    log.close();
    assert!(segment_names(&dir).len() > 1, "100 entries of 900 bytes must roll");

    let (log, report) = open(&dir);
    assert_eq!(report.scanned_entries, 100);
    assert_eq!(report.torn_tail, None);
    assert!(report.clean);
    assert_eq!(all(&log), entries);
    assert_eq!(log.end(), end);
    assert_eq!(log.last(), Some(entries[99].id));
    assert_eq!(log.durable_end().borrow().index, EntryIndex::new(100));
}

#[test]
fn unsynced_entries_are_readable_at_once() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let written = entry(1, 0, payload(0, 100));
    log.append(vec![written.clone()], Box::new(|_| {})).unwrap();
    assert_eq!(all(&log), vec![written.clone()]);
    assert_eq!(log.last(), Some(written.id));
    assert_eq!(log.end().get(), written.frame_bytes());
    let at = LogOffset::new(FRAME_HEADER_BYTES as u64 + 10);
    assert_eq!(log.read(at, 20).unwrap(), written.payload.slice(10..30));
}

#[test]
fn payloads_are_read_by_position_from_the_map() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let entries: Vec<Entry> = (0..200).map(|i| entry(1, i, payload(i, 1000))).collect();
    append_synced(&log, entries.clone()).unwrap();
    for written in &entries {
        let at = log.position_of(written.id.index).unwrap().unwrap();
        let payload_at = at.advance(FRAME_HEADER_BYTES as u64);
        assert_eq!(log.read(payload_at, 1000).unwrap(), written.payload);
        assert_eq!(log.id_of(written.id.index).unwrap(), Some(written.id));
    }
    let end = log.end();
    assert!(matches!(log.read(end, 1), Err(ReadError::BeyondEnd { .. })));
}

#[test]
fn an_entry_larger_than_a_segment_gets_its_own() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let sizes = [10, 300_000, 10, 70_000, 5_000_000, 1];
    let entries: Vec<Entry> =
        (0u64..).zip(sizes).map(|(i, bytes)| entry(1, i, payload(i, bytes))).collect();
    append_synced(&log, entries.clone()).unwrap();
    assert_eq!(all(&log), entries);
    log.close();
    let (log, _) = open(&dir);
    assert_eq!(all(&log), entries);
}

#[test]
fn a_cut_goes_to_quarantine_and_survives_reopening() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let old: Vec<Entry> = (0..200).map(|i| entry(1, i, payload(i, 1000))).collect();
    append_synced(&log, old.clone()).unwrap();
    let before = *log.durable_end().borrow();
    log.truncate_after(Some(EntryIndex::new(99))).unwrap();
    let lowered = *log.durable_end().borrow();
    assert_eq!(lowered.index, EntryIndex::new(100));
    assert!(lowered > before, "the order of durable ends is by incarnation first");
    assert_eq!(log.last(), Some(old[99].id));
    let new: Vec<Entry> = (100..120).map(|i| entry(2, i, payload(i + 1, 500))).collect();
    append_synced(&log, new.clone()).unwrap();
    let expected: Vec<Entry> = old[..100].iter().chain(&new).cloned().collect();
    assert_eq!(all(&log), expected);
    log.close();
    assert!(!Directory::existing(dir.path()).unwrap().list("quarantine").unwrap().is_empty());
    let (log, report) = open(&dir);
    assert_eq!(report.torn_tail, None);
    assert_eq!(all(&log), expected);
}

#[test]
fn a_cut_to_nothing_starts_over() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..10).map(|i| entry(1, i, payload(i, 50))).collect()).unwrap();
    log.truncate_after(None).unwrap();
    assert_eq!(log.last(), None);
    let fresh = entry(2, 0, payload(9, 60));
    append_synced(&log, vec![fresh.clone()]).unwrap();
    log.close();
    let (log, _) = open(&dir);
    assert_eq!(all(&log), vec![fresh]);
}

#[test]
fn the_newest_vote_is_found_again() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    assert_eq!(log.vote(), None);
    let vote = |term| Vote { term: Term::new(term), node: term * 10, committed: term == 3 };
    for term in 1..=3 {
        log.save_vote(vote(term)).unwrap().blocking_recv().unwrap().unwrap();
        assert_eq!(log.vote(), Some(vote(term)));
    }
    drop(log);
    let (log, report) = open(&dir);
    assert!(!report.clean, "it was not closed");
    assert_eq!(log.vote(), Some(vote(3)));
}

#[test]
fn trimmed_segments_go_once_purged_and_positions_stay() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let entries: Vec<Entry> = (0..300).map(|i| entry(1, i, payload(i, 1000))).collect();
    append_synced(&log, entries.clone()).unwrap();
    let count = segment_names(&dir).len();
    log.retain_from(EntryIndex::new(150)).unwrap();
    assert_eq!(segment_names(&dir).len(), count, "Raft may still ask for all of them");
    let upto = entries[149].id;
    let position = log.position_of(upto.index.next()).unwrap().unwrap();
    log.purge(upto, position).unwrap();
    log.retain_from(EntryIndex::new(150)).unwrap();
    assert!(segment_names(&dir).len() < count);
    assert!(matches!(log.read(LogOffset::ZERO, 1), Err(ReadError::Trimmed { .. })));
    assert_eq!(all(&log), entries[150..]);
    let more: Vec<Entry> = (300..500).map(|i| entry(1, i, payload(i, 1000))).collect();
    append_synced(&log, more.clone()).unwrap();
    log.close();

    let (log, _) = open(&dir);
    let purged = log.purged().unwrap();
    assert!(purged.index < EntryIndex::new(150));
    let kept = usize::try_from(purged.index.get() + 1).unwrap();
    let expected: Vec<Entry> = entries[kept..].iter().chain(&more).cloned().collect();
    assert_eq!(all(&log), expected);
}

#[test]
fn a_purge_beyond_the_end_begins_anew() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..10).map(|i| entry(1, i, payload(i, 50))).collect()).unwrap();
    let upto = EntryId { term: Term::new(3), index: EntryIndex::new(99) };
    log.purge(upto, LogOffset::new(8_000)).unwrap();
    assert_eq!(log.last(), Some(upto));
    assert_eq!(log.end(), LogOffset::new(8_000));
    let next = entry(3, 100, payload(1, 70));
    append_synced(&log, vec![next.clone()]).unwrap();
    log.close();
    let (log, _) = open(&dir);
    assert_eq!(log.purged(), Some(upto));
    assert_eq!(all(&log), vec![next]);
}

#[test]
fn only_what_lies_behind_the_checkpoint_is_scanned() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let entries: Vec<Entry> = (0..300).map(|i| entry(1, i, payload(i, 1000))).collect();
    append_synced(&log, entries.clone()).unwrap();
    let applied = entries[249].id;
    let end = log.position_of(applied.index.next()).unwrap().unwrap();
    drop(log);
    let mark = CheckpointMark { applied, end };
    let (log, report) = Log::open(dir.path(), options(), Some(mark)).unwrap();
    assert_eq!(report.scanned_entries, 50);
    assert_eq!(all(&log), entries);
}

#[test]
fn appends_after_close_are_refused() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    log.close();
    assert!(log.append(vec![entry(1, 0, payload(0, 1))], Box::new(|_| {})).is_err());
    assert!(log.closed().borrow().is_some());
}

#[test]
fn who_found_an_entry_before_a_cut_can_still_read_it() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..40).map(|i| entry(1, i, payload(i, 200))).collect()).unwrap();
    let segment = Arc::clone(&log.view().segments[0]);
    log.truncate_after(Some(EntryIndex::new(9))).unwrap();
    append_synced(&log, vec![entry(2, 10, payload(1, 10))]).unwrap();
    let cut = EntryIndex::new(30);
    let at = segment.locate(cut).unwrap();
    assert_eq!(segment.frame_at(at, cut).unwrap().id.index, cut);
    assert_eq!(log.entries(EntryIndex::new(9), cut, u64::MAX).unwrap().len(), 2);
}

#[test]
fn a_second_cut_puts_only_what_it_drops_into_quarantine() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..40).map(|i| entry(1, i, payload(i, 200))).collect()).unwrap();
    log.truncate_after(Some(EntryIndex::new(19))).unwrap();
    append_synced(&log, vec![entry(2, 20, payload(1, 10))]).unwrap();
    log.truncate_after(Some(EntryIndex::new(9))).unwrap();
    append_synced(&log, vec![entry(3, 10, payload(1, 10))]).unwrap();
    let copies = Directory::existing(dir.path()).unwrap().list("quarantine").unwrap();
    let of_first = |name: &str| name.ends_with("00000000000000000010.cut");
    let (_, bytes) = copies.iter().find(|(name, _)| of_first(name)).unwrap();
    assert_eq!(*bytes, 128 + 10 * entry(1, 0, payload(0, 200)).frame_bytes());
}

#[test]
fn a_cut_to_where_the_log_began_anew_keeps_what_lay_before_forgotten() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let upto = EntryId { term: Term::new(3), index: EntryIndex::new(99) };
    log.purge(upto, LogOffset::new(8_000)).unwrap();
    append_synced(&log, vec![entry(3, 100, payload(1, 70))]).unwrap();
    log.truncate_after(Some(upto.index)).unwrap();
    append_synced(&log, vec![entry(4, 100, payload(2, 70))]).unwrap();
    assert!(log.view().segments.back().unwrap().header().anew);
}

#[test]
fn a_purge_at_another_entry_begins_anew() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..10).map(|i| entry(1, i, payload(i, 50))).collect()).unwrap();
    let upto = EntryId { term: Term::new(3), index: EntryIndex::new(4) };
    log.purge(upto, LogOffset::new(8_000)).unwrap();
    assert_eq!((log.last(), log.end()), (Some(upto), LogOffset::new(8_000)));
    append_synced(&log, vec![entry(3, 5, payload(1, 70))]).unwrap();
    log.close();
    assert_eq!(open(&dir).0.purged(), Some(upto));
}

#[test]
fn nobody_holds_a_segment_that_is_gone() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    append_synced(&log, (0..300).map(|i| entry(1, i, payload(i, 1000))).collect()).unwrap();
    let segment = Arc::clone(&log.view().segments[0]);
    let upto = log.id_of(EntryIndex::new(149)).unwrap().unwrap();
    log.purge(upto, LogOffset::ZERO).unwrap();
    log.retain_from(EntryIndex::new(150)).unwrap();
    // As a reader does that was slow.
    log.view().keep_table_of_sealed(&segment);
    assert_eq!(Arc::strong_count(&segment), 1);
}

#[test]
fn a_start_takes_the_reserve_and_clears_what_a_crash_left() {
    use std::os::unix::fs::MetadataExt;
    let dir = TempDir::new().unwrap();
    let reserve = dir.path().join("reserve");
    let unfinished = dir.path().join("quarantine/0000000001-00000000000000000002.tmp");
    std::fs::create_dir(dir.path().join("quarantine")).unwrap();
    std::fs::write(&unfinished, b"part").unwrap();
    std::fs::write(&reserve, b"").unwrap();
    let (log, _) = open(&dir);
    assert!(!*log.disk_full().borrow());
    assert!(std::fs::metadata(&reserve).unwrap().blocks() * 512 >= 64 << 10);
    assert!(!unfinished.try_exists().unwrap());
}

/// Waits for something that another thread does.
fn until(mut reached: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !reached() {
        assert!(began.elapsed().as_secs() < 60, "it did not happen");
        std::thread::yield_now();
    }
}

#[test]
fn close_ends_a_log_that_refused_an_append() {
    let dir = TempDir::new().unwrap();
    let mut few = options();
    few.tail_bytes_max = 500;
    let (log, _) = Log::open(dir.path(), few, None).unwrap();
    let too_large = entry(1, 0, payload(0, 1000));
    assert!(log.append(vec![too_large], Box::new(|_| {})).is_err());
    let (told, ended) = mpsc::channel();
    std::thread::spawn(move || {
        log.close();
        told.send(()).unwrap();
    });
    let minute = std::time::Duration::from_secs(60);
    ended.recv_timeout(minute).expect("close must not wait for ever");
    assert!(!open(&dir).1.clean, "it closed itself");
}

#[test]
fn who_appends_behind_a_close_is_told() {
    let dir = TempDir::new().unwrap();
    let (log, _, mut stepper) =
        Log::open_stepped(Arc::new(Directory::open(dir.path()).unwrap()), options(), None).unwrap();
    let (told, results) = mpsc::channel();
    let flushed = |told: mpsc::Sender<bool>| -> Flushed {
        Box::new(move |result| told.send(result.is_ok()).unwrap())
    };
    log.append(vec![entry(1, 0, payload(0, 10))], flushed(told.clone())).unwrap();
    log.close();
    log.append(vec![entry(1, 1, payload(1, 10))], flushed(told)).unwrap();
    assert!(!stepper.step());
    assert_eq!(results.iter().collect::<Vec<_>>(), [true, false]);
}

#[test]
fn who_waits_for_a_writer_that_panics_is_told() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let (told, results) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let first = Box::new(move |_| {
        wait.recv().unwrap();
        panic!("as a test");
    });
    log.append(vec![entry(1, 0, payload(0, 10))], first).unwrap();
    let flushed = Box::new(move |result: io::Result<()>| told.send(result.is_ok()).unwrap());
    log.append(vec![entry(1, 1, payload(1, 10))], flushed).unwrap();
    go.send(()).unwrap();
    assert!(!results.recv().unwrap());
    log.close();
    assert!(log.closed().borrow().is_some());
}

#[test]
fn entries_that_were_cut_count_until_the_writer_has_seen_them() {
    let dir = TempDir::new().unwrap();
    let mut few = options();
    few.tail_bytes_max = 5_000;
    let storage = Arc::new(Directory::open(dir.path()).unwrap());
    let (log, _, mut stepper) = Log::open_stepped(storage, few, None).unwrap();
    let append = |term| log.append(vec![entry(term, 0, payload(term, 2_000))], Box::new(|_| {}));
    for term in 1..3 {
        append(term).unwrap();
        log.truncate_after(None).unwrap();
    }
    assert!(stepper.step());
    for term in 3..5 {
        append(term).unwrap();
        log.truncate_after(None).unwrap();
    }
    assert!(append(5).is_err(), "6,000 bytes wait");
}

#[test]
fn zeros_ahead_of_the_writer_never_cover_what_it_wrote() {
    let dir = temp_dir();
    let mut options = options();
    options.segment_bytes = 3 << 20;
    options.prepared_bytes = 8 << 20;
    let (log, _) = Log::open(dir.path(), options.clone(), None).unwrap();
    let sizes = [10, 3_000, 250_000, 70_000];
    let entries: Vec<Entry> =
        (0..200).map(|i| entry(1, i, payload(i, sizes[usize::try_from(i % 4).unwrap()]))).collect();
    for batch in entries.chunks(3) {
        append_synced(&log, batch.to_vec()).unwrap();
    }
    assert_eq!(all(&log), entries);
    log.close();
    let sealed = segment_names(&dir);
    let first = std::fs::metadata(dir.path().join(&sealed[0])).unwrap().len();
    assert!(sealed.len() > 4 && first > 2 << 20);
    let (log, report) = Log::open(dir.path(), options, None).unwrap();
    assert_eq!(report.torn_tail, None);
    assert_eq!(all(&log), entries);
}

#[test]
fn the_next_segments_file_is_made_before_it_is_needed() {
    let dir = temp_dir();
    let mut options = options();
    options.segment_bytes = 1 << 20;
    options.prepared_bytes = 1 << 20;
    let (log, _) = Log::open(dir.path(), options, None).unwrap();
    let prepared = dir.path().join("prepared.tmp");
    until(|| std::fs::metadata(&prepared).is_ok_and(|facts| facts.len() == 1 << 20));
    log.close();
}

/// Three entries of one sync, of which the second never reached the disk.
fn log_with_a_hole(dir: &TempDir) -> Vec<Entry> {
    let (log, _) = open(dir);
    let entries: Vec<Entry> = (0..3).map(|i| entry(1, i, payload(i, 1_000))).collect();
    append_synced(&log, entries.clone()).unwrap();
    drop(log);
    std::fs::remove_file(dir.path().join("local")).unwrap();
    let path = dir.path().join(&segment_names(dir)[0]);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 1080..4096 + 2 * 1080].fill(0);
    std::fs::write(&path, bytes).unwrap();
    entries
}

#[test]
fn entries_behind_a_hole_never_come_back() {
    let dir = TempDir::new().unwrap();
    let entries = log_with_a_hole(&dir);
    let verified = inspect::LogFiles::open(dir.path()).unwrap().verify().unwrap();
    assert!(matches!(verified.verdict, inspect::Verdict::TornTail { bytes: 2160, .. }));
    let (log, report) = open(&dir);
    assert_eq!(report.torn_tail, Some((EntryIndex::new(1), 2 * 1080)));
    assert_eq!(all(&log), entries[..1]);
    let other = entry(1, 1, payload(77, 1_000));
    append_synced(&log, vec![other.clone()]).unwrap();
    log.close();
    let (log, report) = open(&dir);
    assert_eq!(report.torn_tail, None);
    assert_eq!(all(&log), [entries[0].clone(), other]);
}

#[test]
fn a_checkpoint_of_what_the_log_does_not_hold_is_refused() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let entries: Vec<Entry> = (0..20).map(|i| entry(1, i, payload(i, 500))).collect();
    append_synced(&log, entries.clone()).unwrap();
    let end = log.end();
    let before_last = log.position_of(EntryIndex::new(19)).unwrap().unwrap();
    log.close();
    let opened = |applied: EntryId, end: LogOffset| {
        Log::open(dir.path(), options(), Some(CheckpointMark { applied, end })).map(|_| ())
    };
    let last = entries[19].id;
    opened(last, end).unwrap();
    opened(entries[18].id, before_last).unwrap();
    let refused = [
        (last, before_last),
        (last, end.advance(8)),
        (EntryId { term: Term::new(2), ..last }, end),
        (EntryId { index: EntryIndex::new(25), ..last }, end.advance(580)),
    ];
    for (applied, end) in refused {
        let result = opened(applied, end);
        assert!(matches!(result, Err(OpenError::Corrupt { .. })), "{applied} {end}: {result:?}");
    }
}

#[test]
fn the_log_of_a_running_node_can_be_looked_at() {
    let dir = TempDir::new().unwrap();
    let (log, _) = open(&dir);
    let entries: Vec<Entry> = (0..150).map(|i| entry(1, i, payload(i, 1_000))).collect();
    append_synced(&log, entries.clone()).unwrap();
    let files = inspect::LogFiles::open(dir.path()).unwrap();
    assert!(!files.closed_cleanly());
    let segments = files.segments();
    assert!(segments.len() > 2);
    assert_eq!(segments.iter().filter(|segment| !segment.sealed).count(), 1);
    let found: Vec<Entry> =
        files.frames(EntryIndex::new(120)).map(|frame| frame.unwrap().entry).collect();
    assert_eq!(found, entries[120..]);
    let verified = files.verify().unwrap();
    assert!(matches!(verified.verdict, inspect::Verdict::Clean));
    assert_eq!(verified.entries, 150);
    log.close();
    assert!(inspect::LogFiles::open(dir.path()).unwrap().closed_cleanly());
}
