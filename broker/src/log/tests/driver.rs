//! Drives a log on a faulty disk by hand, and knows what it must hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tempfile::TempDir;

use super::super::faulty::{FaultyDisk, Keep};
use super::super::*;
use super::{entry, options, payload, temp_dir};

/// What appends were told.
#[derive(Debug, Default)]
struct Told {
    /// Behind the newest entry that was called durable, counted from the last cut.
    acked: Mutex<u64>,
    pending: AtomicUsize,
}

/// A log and its model.
pub(super) struct Driver {
    pub(super) disk: FaultyDisk,
    pub(super) log: Log,
    stepper: Stepper,
    dir: TempDir,
    /// What the log may hold after a power loss: a prefix of any of these. The last one is what it
    /// holds now; the others are what cuts that may not be durable had dropped.
    versions: Vec<Vec<Entry>>,
    mark: Option<CheckpointMark>,
    term: u64,
    appended: u64,
    told: Arc<Told>,
    vote: Option<Vote>,
    /// Votes that wait for the writer, in order: any of them may be what a power loss leaves.
    votes_asked: Vec<Vote>,
    /// Operations were told to fail.
    pub(super) may_fail: bool,
}

pub(super) fn small_options() -> LogOptions {
    let mut options = options();
    options.segment_bytes = 12 << 10;
    options.prepared_bytes = 4 << 10;
    options
}

impl Driver {
    pub(super) fn new() -> Self {
        let dir = temp_dir();
        let disk = FaultyDisk::open(dir.path()).unwrap();
        Self::on(disk, dir).unwrap()
    }

    /// Opens an empty directory on a disk that may fail.
    pub(super) fn on(disk: FaultyDisk, dir: TempDir) -> Result<Self, OpenError> {
        let storage = Arc::new(disk.clone());
        let (log, _, stepper) = Log::open_stepped(storage, small_options(), None)?;
        Ok(Self {
            disk,
            log,
            stepper,
            dir,
            versions: vec![Vec::new()],
            mark: None,
            term: 1,
            appended: 0,
            told: Arc::default(),
            vote: None,
            votes_asked: Vec::new(),
            may_fail: false,
        })
    }

    fn current(&mut self) -> &mut Vec<Entry> {
        self.versions.last_mut().expect("there is always one")
    }

    pub(super) fn append(&mut self, count: u64, bytes: usize) {
        let term = self.term;
        let next = self.current().len() as u64;
        let mut entries = Vec::new();
        for index in next..next + count {
            self.appended += 1;
            entries.push(entry(term, index, payload(self.appended, bytes)));
        }
        let told = Arc::clone(&self.told);
        let end = next + count;
        let flushed = Box::new(move |result: io::Result<()>| {
            told.pending.fetch_sub(1, Ordering::Relaxed);
            if result.is_ok() {
                let mut acked = told.acked.lock();
                assert!(end > *acked, "told of {end} after {acked}");
                *acked = end;
            }
        });
        self.told.pending.fetch_add(1, Ordering::Relaxed);
        if self.log.append(entries.clone(), flushed).is_ok() {
            self.current().extend(entries);
        } else {
            self.told.pending.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Cuts up to `count` entries, but nothing that a checkpoint holds.
    pub(super) fn cut(&mut self, count: usize) {
        let kept = self.mark.map_or(0, |mark| mark.applied.index.get() + 1);
        let entries = self.current().len() as u64;
        let left = entries.saturating_sub(count as u64).max(kept);
        self.term += 1;
        if left == entries {
            return;
        }
        if self.log.truncate_after(EntryIndex::new(left).previous()).is_ok() {
            let mut cut = self.current().clone();
            cut.truncate(usize::try_from(left).unwrap());
            self.versions.push(cut);
            // Callbacks of what was cut may still come; they say nothing about what follows.
            self.told = Arc::new(Told { acked: Mutex::new(0), pending: AtomicUsize::new(0) });
        }
    }

    pub(super) fn vote(&mut self) {
        self.term += 1;
        let vote = Vote { term: Term::new(self.term), node: self.term % 3, committed: false };
        if self.log.save_vote(vote).is_ok() {
            self.votes_asked.push(vote);
        }
    }

    /// Lets the writer commit what waits; false once the log is closed.
    pub(super) fn step(&mut self) -> bool {
        let open = self.stepper.step();
        if open {
            self.versions = vec![self.current().clone()];
            assert_eq!(self.told.pending.load(Ordering::Relaxed), 0, "someone was not told");
            assert_eq!(self.durable(), self.current().len() as u64);
            assert_eq!(self.log.vote(), self.votes_asked.pop().or(self.vote));
            self.votes_asked.clear();
        } else {
            assert!(self.log.closed().borrow().is_some(), "closed, and does not say so");
            assert_eq!(self.told.pending.load(Ordering::Relaxed), 0, "someone was not told");
        }
        self.vote = self.log.vote();
        open
    }

    pub(super) fn checkpoint(&mut self) {
        let durable = self.durable();
        let purged = self.log.purged().map_or(0, |purged| purged.index.get() + 1);
        let Some(last) = durable.checked_sub(1).filter(|last| *last >= purged) else { return };
        let applied = self.log.id_of(EntryIndex::new(last)).unwrap().unwrap();
        let end = match self.log.position_of(EntryIndex::new(durable)).unwrap() {
            Some(end) => end,
            None => self.log.end(),
        };
        self.mark = Some(CheckpointMark { applied, end });
    }

    /// Forgets what lies a few entries below the checkpoint.
    pub(super) fn trim(&mut self) {
        let Some(mark) = self.mark else { return };
        let Some(upto) = mark.applied.index.get().checked_sub(3).map(EntryIndex::new) else {
            return;
        };
        let Some(id) = self.log.id_of(upto).unwrap() else { return };
        let position = self.log.position_of(upto.next()).unwrap().unwrap();
        if self.log.purge(id, position).is_ok() && self.log.retain_from(upto.next()).is_err() {
            assert!(self.may_fail || !self.disk.is_powered());
        }
    }

    pub(super) fn durable(&self) -> u64 {
        self.log.durable_end().borrow().index.get()
    }

    /// What is readable is what was appended.
    pub(super) fn check(&mut self) {
        let first = first_index(&self.log);
        let found = super::all(&self.log);
        let end = self.log.last().map_or(0, |last| last.index.get() + 1);
        let expected = self.current();
        assert_eq!(end, expected.len() as u64);
        assert_eq!(found, expected[usize::try_from(first).unwrap()..]);
        assert!(*self.told.acked.lock() <= self.durable(), "told of what is not durable");
    }

    /// Loses power, starts again twice, and goes on from there.
    pub(super) fn crash(self, keep: Keep, during_start: Option<u64>) -> Self {
        let mut dir = temp_dir();
        self.disk.crash(keep, dir.path()).unwrap();
        if let Some(operations) = during_start {
            let disk = FaultyDisk::open(dir.path()).unwrap();
            disk.fail_at(operations + 1, super::super::faulty::Fault::PowerLoss);
            let opened = Log::open_stepped(Arc::new(disk.clone()), small_options(), self.mark);
            assert!(opened.is_ok() || !disk.is_powered(), "{:?}", opened.err());
            drop(opened);
            let after = temp_dir();
            disk.crash(keep, after.path()).unwrap();
            dir = after;
        }
        let disk = FaultyDisk::open(dir.path()).unwrap();
        self.restart(disk, Some(dir))
    }

    /// The process is killed, and starts again twice on what it had left. The machine goes on.
    pub(super) fn kill(self) -> Self {
        let disk = self.disk.clone();
        disk.restart_process();
        self.restart(disk, None)
    }

    /// Compares what comes back with what was known.
    fn restart(mut self, disk: FaultyDisk, moved_to: Option<TempDir>) -> Self {
        let durable = self.durable().max(*self.told.acked.lock());
        let versions = self.versions.clone();
        drop((self.log, self.stepper));
        let dir = moved_to.unwrap_or(self.dir);
        drop(reopen(&disk, self.mark));
        let once = files(dir.path());
        let (log, stepper) = reopen(&disk, self.mark);
        assert_eq!(files(dir.path()), once, "recovering again changed bytes");

        let first = usize::try_from(first_index(&log)).unwrap();
        let found = super::all(&log);
        let end = first + found.len();
        assert!(end as u64 >= durable, "{durable} entries were durable, {end} came back");
        let version = versions
            .iter()
            .rev()
            .find(|version| version.get(first..end) == Some(&found[..]))
            .expect("what came back was never the log");
        let found = log.vote();
        let asked = found.is_some_and(|found| self.votes_asked.contains(&found));
        assert!(asked || found == self.vote, "{:?} became {found:?}", self.vote);
        self.versions = vec![version[..end].to_vec()];
        self.vote = log.vote();
        self.votes_asked.clear();
        let told = Arc::default();
        Self { disk, log, stepper, dir, told, ..self }
    }

    /// Ends in order and starts again.
    pub(super) fn reopen(mut self) -> Self {
        self.log.close();
        assert!(!self.stepper.step());
        let dir = self.dir;
        drop((self.log, self.stepper));
        let disk = FaultyDisk::open(dir.path()).unwrap();
        let (log, stepper) = reopen(&disk, self.mark);
        let last = self.versions.pop().unwrap();
        self.versions = vec![last];
        self.vote = log.vote();
        self.votes_asked.clear();
        Self { disk, log, stepper, dir, told: Arc::default(), ..self }
    }
}

fn reopen(disk: &FaultyDisk, mark: Option<CheckpointMark>) -> (Log, Stepper) {
    let opened = Log::open_stepped(Arc::new(disk.clone()), small_options(), mark);
    let (log, _, stepper) =
        opened.unwrap_or_else(|error| panic!("{error}: {:?}", disk.list("").unwrap()));
    (log, stepper)
}

fn first_index(log: &Log) -> u64 {
    log.purged().map_or(0, |purged| purged.index.get() + 1)
}

/// Every file below a directory.
pub(super) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for folder in [dir.to_owned(), dir.join("quarantine")] {
        let Ok(listing) = std::fs::read_dir(&folder) else { continue };
        for file in listing.map(|file| file.unwrap().path()).filter(|path| path.is_file()) {
            let name = file.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            found.insert(name, std::fs::read(&file).unwrap());
        }
    }
    found
}
