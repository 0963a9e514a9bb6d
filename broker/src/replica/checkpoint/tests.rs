use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset, TopicId};

use super::*;
use crate::disk::RealDisk;
use crate::disk::faulty::FaultyDisk;
use crate::queue::index::Line;

const DIR: &str = "/data/checkpoint";
const INDEX_DIR: &str = "/data/index";
const GROUP: Uuid = Uuid::from_u128(7);

fn open(disk: &FaultyDisk) -> Opened {
    let disk = Arc::new(disk.clone());
    Checkpointer::open(disk, Path::new(DIR), Path::new(INDEX_DIR), GROUP).unwrap()
}

fn meta(applied: u64) -> CheckpointMeta {
    CheckpointMeta {
        group_uuid: GROUP,
        applied: EntryId { term: Term::new(3), index: EntryIndex::new(applied) },
        end: LogOffset::new(applied * 1000),
        gate: GateMode::Alone,
        trimmed: TrimPoint { below: EntryIndex::new(5), position: LogOffset::new(5000) },
        purged: Some(EntryId { term: Term::new(2), index: EntryIndex::new(4) }),
        membership_at: Some(EntryId { term: Term::new(1), index: EntryIndex::new(0) }),
        membership: b"members".to_vec(),
    }
}

fn queue(n: u32) -> QueueKey {
    QueueKey { topic: TopicId::new(n / 4), queue: QueueId::new(u16::try_from(n % 4).unwrap()) }
}

fn line(n: u64) -> Line {
    Line {
        base_offset: QueueOffset::new(n),
        position: LogOffset::new(n * 100),
        bytes: 100,
        count: 1,
        newest_ms: n,
    }
}

fn extend(index: &mut Index, queue: QueueKey, lines: std::ops::Range<u64>) {
    lines.for_each(|n| index.append(queue, line(n)));
}

fn lines(index: &Index, queue: QueueKey) -> Vec<Line> {
    index.lines_from(queue, QueueOffset::ZERO, usize::MAX).unwrap()
}

fn write(checkpointer: &mut Checkpointer, index: &mut Index, applied: u64) -> io::Result<()> {
    let capture = index.capture();
    let state = applied.to_le_bytes();
    let end = EntryIndex::new(applied + 1);
    let written = checkpointer.write(&capture, &meta(applied), &state, end)?;
    drop(capture);
    index.settle(written);
    Ok(())
}

fn ready(opened: IndexFound) -> Index {
    match opened {
        IndexFound::Ready(index) => index,
        IndexFound::Damaged(damage) => panic!("{damage:?}"),
    }
}

/// A disk with checkpoints at 10 and 20; queue 0 has 300 and 600 lines in them.
fn two_generations() -> FaultyDisk {
    let disk = FaultyDisk::default();
    let mut opened = open(&disk);
    let mut index = ready(opened.index);
    extend(&mut index, queue(0), 0..300);
    write(&mut opened.checkpointer, &mut index, 10).unwrap();
    extend(&mut index, queue(0), 300..600);
    write(&mut opened.checkpointer, &mut index, 20).unwrap();
    disk
}

fn checkpoint_path(generation: u64) -> PathBuf {
    Path::new(DIR).join(file_name(generation))
}

#[test]
fn what_was_written_is_loaded() {
    let opened = open(&two_generations());
    let checkpoint = opened.checkpoint.unwrap();
    assert_eq!(checkpoint.meta, meta(20));
    assert_eq!(checkpoint.state, 20_u64.to_le_bytes());
    let index = ready(opened.index);
    assert_eq!(lines(&index, queue(0)), (0..600).map(line).collect::<Vec<_>>());
    let limit = opened.checkpointer.forget_limit().unwrap();
    assert_eq!(limit.applied, meta(10).applied);
    assert!(opened.damaged.is_empty());
}

#[test]
fn an_empty_directory_has_no_checkpoint_and_an_empty_index() {
    let opened = open(&FaultyDisk::default());
    assert!(opened.checkpoint.is_none());
    assert!(opened.checkpointer.forget_limit().is_none());
    assert_eq!(lines(&ready(opened.index), queue(0)), []);
}

#[test]
fn the_very_first_checkpoint_counts_as_both() {
    let disk = FaultyDisk::default();
    let mut opened = open(&disk);
    write(&mut opened.checkpointer, &mut ready(opened.index), 10).unwrap();
    assert_eq!(opened.checkpointer.forget_limit().unwrap().applied, meta(10).applied);
}

#[test]
fn a_damaged_newest_falls_back_to_the_older_with_its_lines() {
    let sizes = open(&two_generations()).checkpoint.unwrap();
    let file_bytes =
        HEADER_BYTES + sizes.meta.membership.len() + sizes.state.len() + sizes.directory.len();
    for at in (0..file_bytes).step_by(7) {
        let disk = two_generations();
        disk.damage(&checkpoint_path(2), |bytes| bytes[at] ^= 0x10);
        let opened = open(&disk);
        assert_eq!(opened.damaged.len(), 1, "byte {at}");
        assert_eq!(opened.damaged[0].path, checkpoint_path(2));
        assert_eq!(opened.checkpoint.unwrap().meta, meta(10));
        assert_eq!(lines(&ready(opened.index), queue(0)).len(), 300);
        assert!(opened.checkpointer.older.is_none(), "only one is left");
    }
}

#[test]
fn every_length_of_a_cut_newest_falls_back() {
    let disk = two_generations();
    let mut left = usize::MAX;
    while left > 0 {
        disk.damage(&checkpoint_path(2), |bytes| {
            bytes.pop();
            left = bytes.len();
        });
        let opened = open(&disk);
        assert_eq!(opened.checkpoint.unwrap().generation, 1, "{left} bytes left");
    }
}

#[test]
fn a_generation_is_never_written_twice_and_the_damaged_file_goes() {
    let disk = two_generations();
    disk.damage(&checkpoint_path(2), Vec::clear);
    let mut opened = open(&disk);
    write(&mut opened.checkpointer, &mut ready(opened.index), 30).unwrap();
    let names = disk.list(Path::new(DIR)).unwrap();
    assert_eq!(names, [file_name(1), file_name(3)]);
}

#[test]
fn missing_and_damaged_index_files_ask_for_a_rebuild() {
    let damages: [fn(&mut Vec<u8>); 3] =
        [Vec::clear, |bytes| bytes[5000] ^= 1, |bytes| bytes.copy_within(4096..8192, 0)];
    for damage in damages {
        let disk = two_generations();
        let index_file = disk.files().into_iter().find(|p| p.starts_with(INDEX_DIR)).unwrap();
        disk.damage(&index_file, damage);
        assert!(matches!(open(&disk).index, IndexFound::Damaged(_)));
    }
    let disk = two_generations();
    for file in disk.files().iter().filter(|p| p.starts_with(INDEX_DIR)) {
        disk.remove(file).unwrap();
    }
    let mut opened = open(&disk);
    assert!(matches!(opened.index, IndexFound::Damaged(_)));

    // What is rebuilt goes to files of a new era with the next checkpoint.
    let mut index = Index::default();
    extend(&mut index, queue(0), 0..600);
    write(&mut opened.checkpointer, &mut index, 30).unwrap();
    assert_eq!(lines(&ready(open(&disk).index), queue(0)).len(), 600);
}

#[test]
fn a_page_found_bad_while_running_is_rebuilt_at_the_next_start() {
    let disk = two_generations();
    let index = ready(open(&disk).index);
    let index_file = disk.files().into_iter().find(|p| p.starts_with(INDEX_DIR)).unwrap();
    let good = disk.open(&index_file).unwrap();
    let mut before = vec![0; usize::try_from(good.file_bytes().unwrap()).unwrap()];
    good.read_at(&mut before, 0).unwrap();
    disk.damage(&index_file, |bytes| bytes.fill(0));
    assert!(index.locate(queue(0), QueueOffset::ZERO).is_err());
    disk.damage(&index_file, |bytes| *bytes = before);
    assert!(matches!(open(&disk).index, IndexFound::Damaged(IndexDamage::Marked)));
}

#[test]
fn another_groups_checkpoint_is_refused() {
    let disk = Arc::new(two_generations());
    let other = Uuid::from_u128(8);
    let error = Checkpointer::open(disk, Path::new(DIR), Path::new(INDEX_DIR), other).unwrap_err();
    assert!(matches!(error, CheckpointError::OtherGroup { .. }), "{error}");
}

#[test]
#[should_panic(expected = "ahead of the durable end")]
fn a_checkpoint_ahead_of_the_durable_log_is_refused() {
    let mut opened = open(&FaultyDisk::default());
    let capture = ready(opened.index).capture();
    drop(opened.checkpointer.write(&capture, &meta(10), b"", EntryIndex::new(10)));
}

/// Writes checkpoints at 30 and 40 on top of two; false if one failed.
fn write_until_failure(disk: &FaultyDisk) -> bool {
    let mut opened = open(disk);
    let mut index = ready(opened.index);
    [(30, 600..700), (40, 700..1000)].into_iter().all(|(applied, range)| {
        extend(&mut index, queue(0), range);
        extend(&mut index, queue(1), applied / 10 - 3..applied / 10 - 2);
        write(&mut opened.checkpointer, &mut index, applied).is_ok()
    })
}

#[test]
fn each_failing_change_and_crash_leaves_a_loadable_checkpoint() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut failed_count = 0;
    for after in 0.. {
        let disk = two_generations();
        disk.fail_after(after, io::ErrorKind::Other);
        let all_written = write_until_failure(&disk);
        failed_count += u32::from(!all_written);
        for _ in 0..20 {
            let crashed = disk.crash(&mut random);
            let opened = open(&crashed);
            let checkpoint = opened.checkpoint.unwrap();
            let applied = checkpoint.meta.applied.index.get();
            let expected = match applied {
                10 => 300,
                20 => 600,
                30 => 700,
                40 => 1000,
                other => panic!("no checkpoint at {other} was written"),
            };
            assert!(!all_written || applied == 40, "a written checkpoint was lost");
            let index = ready(opened.index);
            assert_eq!(lines(&index, queue(0)), (0..expected).map(line).collect::<Vec<_>>());
            assert!(applied >= 20, "the newest durable checkpoint was lost");
        }
        if disk.changes() < after {
            break;
        }
    }
    assert!(failed_count > 10, "only {failed_count} changes failed");
}

#[test]
fn after_a_full_disk_the_next_checkpoint_succeeds() {
    for after in 0..11 {
        let disk = two_generations();
        let mut opened = open(&disk);
        let mut index = ready(opened.index);
        extend(&mut index, queue(0), 600..900);
        disk.fail_after(after, io::ErrorKind::StorageFull);
        write(&mut opened.checkpointer, &mut index, 30).unwrap_err();
        extend(&mut index, queue(0), 900..1000);
        write(&mut opened.checkpointer, &mut index, 40).unwrap();
        let again = open(&disk);
        assert_eq!(again.checkpoint.unwrap().meta, meta(40));
        assert_eq!(lines(&ready(again.index), queue(0)).len(), 1000);
    }
}

#[test]
fn after_a_failed_sync_no_checkpoint_is_written() {
    let disk = two_generations();
    let mut opened = open(&disk);
    let mut index = ready(opened.index);
    extend(&mut index, queue(0), 600..900);
    disk.fail_after(1, io::ErrorKind::Other);
    write(&mut opened.checkpointer, &mut index, 30).unwrap_err();
    let error = write(&mut opened.checkpointer, &mut index, 30).unwrap_err();
    assert!(error.to_string().contains("an earlier checkpoint failed"), "{error}");
}

#[test]
fn forty_thousand_queues_share_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoints, index_dir) = (dir.path().join("checkpoint"), dir.path().join("index"));
    let opened = Checkpointer::open(Arc::new(RealDisk), &checkpoints, &index_dir, GROUP).unwrap();
    let (mut checkpointer, mut index) = (opened.checkpointer, ready(opened.index));
    for round in 0..3 {
        for n in 0..40_000 {
            extend(&mut index, queue(n), round..round + 1);
        }
        write(&mut checkpointer, &mut index, 10 + round).unwrap();
    }
    let files = RealDisk.list(&index_dir).unwrap();
    assert_eq!(files.len(), 1);
    // 40,000 blocks of 1 to 3 lines, in three generations.
    let index_bytes = std::fs::metadata(index_dir.join(&files[0])).unwrap().len();
    assert!(index_bytes < 15 << 20, "{index_bytes} bytes");
    let open_files = std::fs::read_dir("/proc/self/fd").unwrap().filter(|fd| {
        let target = std::fs::read_link(fd.as_ref().unwrap().path());
        target.is_ok_and(|target| target.starts_with(dir.path()))
    });
    assert_eq!(open_files.count(), 1);
    let again = Checkpointer::open(Arc::new(RealDisk), &checkpoints, &index_dir, GROUP).unwrap();
    let index = ready(again.index);
    for n in (0..40_000).step_by(997) {
        assert_eq!(lines(&index, queue(n)), (0..3).map(line).collect::<Vec<_>>());
    }
}

#[test]
fn published_checkpoint_bytes_do_not_change() {
    let disk = FaultyDisk::default();
    let mut opened = open(&disk);
    let mut index = ready(opened.index);
    extend(&mut index, queue(5), 0..2);
    write(&mut opened.checkpointer, &mut index, 10).unwrap();
    let bytes = read_file(&disk, &checkpoint_path(1)).unwrap().unwrap();
    let rows: Vec<String> = bytes
        .chunks(32)
        .map(|row| row.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    let golden: Vec<&str> = include_str!("golden_v1.txt").lines().collect();
    assert_eq!(rows, golden, "add a version instead");
}
