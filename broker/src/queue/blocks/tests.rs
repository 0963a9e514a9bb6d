use drumlin_proto::ids::{QueueId, TopicId};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::*;
use crate::disk::faulty::FaultyDisk;
use crate::position::LogOffset;

const DIR: &str = "/index";

fn dir() -> &'static Path {
    Path::new(DIR)
}

/// The lines as a sorted vector per queue, nothing clever.
#[derive(Clone, Debug, Default)]
struct Model {
    queues: BTreeMap<QueueKey, Vec<Line>>,
    floor: LogOffset,
    log_end: LogOffset,
    clock_ms: u64,
    topics_dropped: u32,
}

impl Model {
    fn kept(&self, queue: QueueKey) -> Vec<Line> {
        let lines = self.queues.get(&queue).into_iter().flatten().copied();
        lines.filter(|line| line.end_position() > self.floor).collect()
    }

    fn key(&self, queue: u16) -> QueueKey {
        QueueKey { topic: TopicId::new(self.topics_dropped), queue: QueueId::new(queue) }
    }

    fn next_line(&mut self, queue: QueueKey, shape: u32) -> Line {
        let lines = self.queues.entry(queue).or_default();
        let line = Line {
            base_offset: lines.last().map_or(QueueOffset::ZERO, Line::end_offset),
            position: self.log_end,
            bytes: 100 + shape * 8,
            count: 1 + shape % 3,
            newest_ms: self.clock_ms,
        };
        lines.push(line);
        self.log_end = line.end_position().advance(u64::from(shape));
        self.clock_ms += u64::from(shape.is_multiple_of(4));
        line
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append {
        queue: u16,
        lines: u32,
    },
    Trim {
        percent: u64,
    },
    DropTopic,
    /// Lines that are added while the capture is written go to the next one.
    Checkpoint {
        meanwhile: u32,
    },
    /// Pages are written, but no checkpoint follows.
    CrashBeforeCheckpoint,
    Restart,
    RestartFromOlder,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..4_u16, 1..300_u32).prop_map(|(queue, lines)| Step::Append { queue, lines }),
        1 => (0..=100_u64).prop_map(|percent| Step::Trim { percent }),
        1 => Just(Step::DropTopic),
        4 => (0..200_u32).prop_map(|meanwhile| Step::Checkpoint { meanwhile }),
        1 => Just(Step::CrashBeforeCheckpoint),
        2 => Just(Step::Restart),
        1 => Just(Step::RestartFromOlder),
    ];
    prop::collection::vec(step, 1..40)
}

struct Run {
    disk: FaultyDisk,
    random: fastrand::Rng,
    writer: BlockWriter,
    index: Index,
    model: Model,
    /// Directory and model of the durable checkpoints, newest first, at most two.
    checkpoints: Vec<(Vec<u8>, Model)>,
    generation: u64,
}

impl Run {
    fn new(seed: u64) -> Self {
        let disk = FaultyDisk::default();
        let writer = BlockWriter::begin(Arc::new(disk.clone()), dir(), 1).unwrap();
        Self {
            disk,
            random: fastrand::Rng::with_seed(seed),
            writer,
            index: Index::default(),
            model: Model::default(),
            checkpoints: Vec::new(),
            generation: 0,
        }
    }

    fn append(&mut self, queue: u16, lines: u32) {
        let key = self.model.key(queue);
        for _ in 0..lines {
            let shape = self.random.u32(0..6);
            let line = self.model.next_line(key, shape);
            self.index.append(key, line);
        }
    }

    fn write(&mut self, meanwhile: u32) -> (Written, Model) {
        let (capture, model) = (self.index.capture(), self.model.clone());
        self.append(1, meanwhile);
        self.generation += 1;
        let written = self.writer.write(&capture, self.generation).unwrap();
        (written, model)
    }

    fn restart(&mut self) {
        self.disk = self.disk.crash(&mut self.random);
        let disk = Arc::new(self.disk.clone());
        let older = self.checkpoints.get(1).map(|(directory, _)| directory.as_slice());
        let Some((directory, model)) = self.checkpoints.first() else {
            self.writer = BlockWriter::begin(disk, dir(), 1).unwrap();
            self.index = Index::default();
            self.model = Model::default();
            return;
        };
        (self.writer, self.index) = BlockWriter::load(disk, dir(), directory, older).unwrap();
        self.model = model.clone();
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Append { queue, lines } => self.append(queue, lines),
            Step::Trim { percent } => {
                let (floor, end) = (self.model.floor.get(), self.model.log_end.get());
                let below = LogOffset::new(floor + (end - floor) * percent / 100);
                self.model.floor = below;
                self.index.trim(below).unwrap();
            }
            Step::DropTopic => {
                let topic = self.model.key(0).topic;
                self.index.drop_topic(topic);
                self.model.queues.retain(|key, _| key.topic != topic);
                self.model.topics_dropped += 1;
            }
            Step::Checkpoint { meanwhile } => {
                let (written, model) = self.write(meanwhile);
                self.checkpoints.insert(0, (written.directory.clone(), model));
                self.checkpoints.truncate(2);
                self.writer.keep(&written);
                self.index.settle(written);
            }
            Step::CrashBeforeCheckpoint => {
                drop(self.write(0));
                self.restart();
            }
            Step::Restart => self.restart(),
            Step::RestartFromOlder => {
                if self.checkpoints.len() == 2 {
                    self.checkpoints.remove(0);
                }
                self.restart();
            }
        }
    }

    fn check(&mut self) {
        for queue in 0..4 {
            self.check_queue(self.model.key(queue));
        }
        let gone = QueueKey { topic: TopicId::new(u32::MAX), queue: QueueId::new(0) };
        self.check_queue(gone);
    }

    fn check_queue(&mut self, queue: QueueKey) {
        let lines = self.model.kept(queue);
        let index = &self.index;
        let all = index.lines_from(queue, QueueOffset::ZERO, usize::MAX).unwrap();
        assert_eq!(all, lines, "lines of {queue:?}");
        let end = lines.last().map_or(QueueOffset::new(50), Line::end_offset);
        let log_end = self.model.log_end.get();
        for _ in 0..8 {
            let offset = QueueOffset::new(self.random.u64(0..=end.get()));
            let expected = lines.iter().position(|line| line.end_offset() > offset);
            let holds = |line: &&Line| line.base_offset <= offset && offset < line.end_offset();
            let found = index.locate(queue, offset).unwrap();
            assert_eq!(found, lines.iter().find(holds).copied(), "line of offset {offset}");
            let some = index.lines_from(queue, offset, 3).unwrap();
            let rest = &lines[expected.unwrap_or(lines.len())..];
            assert_eq!(some, rest[..rest.len().min(3)], "lines from {offset}");

            let time_ms = self.random.u64(0..=self.model.clock_ms + 1);
            let found = index.locate_time(queue, time_ms).unwrap();
            let expected = lines.iter().find(|line| line.newest_ms >= time_ms).copied();
            assert_eq!(found, expected, "line of time {time_ms}");

            let position = LogOffset::new(self.random.u64(0..=log_end));
            let found = index.first_from(queue, position).unwrap();
            let expected = lines.iter().find(|line| line.position >= position).copied();
            assert_eq!(found, expected, "line from {position}");
        }
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 200,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn index_and_files_agree_with_the_model(steps in steps(), seed in any::<u64>()) {
        let mut run = Run::new(seed);
        for step in steps {
            run.take(step);
            run.check();
        }
    }
}

#[test]
fn freed_pages_are_used_again() {
    let mut run = Run::new(1);
    let mut sizes = Vec::new();
    for _ in 0..50 {
        run.append(0, 500);
        run.take(Step::Checkpoint { meanwhile: 0 });
        run.take(Step::Trim { percent: 60 });
        let file = run.disk.open(&run.disk.files()[0]).unwrap();
        sizes.push(file.file_bytes().unwrap());
    }
    assert_eq!(sizes[20], sizes[49], "{sizes:?}");
    assert_eq!(run.disk.files().len(), 1);
}

#[test]
fn unchanged_blocks_are_not_written_again() {
    let mut run = Run::new(1);
    run.append(0, 10_000);
    run.append(1, 5);
    run.take(Step::Checkpoint { meanwhile: 0 });
    let before = run.disk.changes();
    let (written, _) = run.write(0);
    assert!(written.placed.is_empty());
    assert_eq!(run.disk.changes(), before, "nothing was written");
}

#[test]
fn settled_blocks_leave_memory_and_are_read_back() {
    let mut run = Run::new(1);
    run.append(0, 10_000);
    run.take(Step::Checkpoint { meanwhile: 0 });
    let capture = run.index.capture();
    let lines = &capture.queues[&run.model.key(0)];
    assert_eq!(lines.blocks.len(), 79);
    assert!(lines.blocks.iter().all(|block| matches!(block.place, Place::Disk(_))));
    run.check();
}

#[test]
fn the_cache_keeps_a_bounded_number_of_blocks() {
    let mut cache = Cache::default();
    let lines = Arc::new(Vec::new());
    let key = |n: u64| (Model::default().key(0), QueueOffset::new(n));
    for n in 0..20_000 {
        cache.insert(key(n), Arc::clone(&lines));
        assert!(cache.get(key(0)).is_some(), "what is used stays");
        assert!(cache.young.len() + cache.old.len() <= CACHED_BLOCKS_MAX);
    }
    assert!(cache.get(key(100)).is_none());
    assert!(cache.get(key(19_000)).is_some());
}

#[test]
fn small_blocks_of_many_queues_share_pages() {
    let mut run = Run::new(1);
    for queue in 0..1000 {
        run.append(queue, 4);
    }
    let (written, _) = run.write(0);
    assert!(written.pages.page_count <= 1000 / 25 + 1, "{} pages", written.pages.page_count);
}
