//! Deferred syncs: what is settled before it is synced, what never is, and what a loss of power
//! leaves of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use super::super::faulty::{Fault, FaultyDisk, Keep};
use super::super::*;
use super::driver::small_options;
use super::{all, entry, payload, temp_dir};
use crate::entry::EntryKind;

fn deferring(boot: u128) -> LogOptions {
    let boot_id = uuid::Uuid::from_u128(boot);
    LogOptions { defer_syncs: true, boot_id, prepared_bytes: 0, ..small_options() }
}

/// A log whose writer is driven by hand, on a disk that may lose its power.
struct Node {
    disk: FaultyDisk,
    dir: TempDir,
    log: Log,
    stepper: Stepper,
    report: RecoveryReport,
    /// How many appends were told that their entries are settled.
    told: Arc<AtomicU64>,
}

impl Node {
    fn new() -> Self {
        let dir = temp_dir();
        Self::on(FaultyDisk::open(dir.path()).unwrap(), dir, deferring(1))
    }

    fn on(disk: FaultyDisk, dir: TempDir, options: LogOptions) -> Self {
        let opened = Log::open_stepped(Arc::new(disk.clone()), options, None);
        let (log, report, stepper) = opened.unwrap();
        Self { disk, dir, log, stepper, report, told: Arc::default() }
    }

    fn append(&mut self, entries: Vec<Entry>) -> bool {
        let told = Arc::clone(&self.told);
        let flushed = Box::new(move |result: io::Result<()>| {
            told.fetch_add(u64::from(result.is_ok()), Ordering::Relaxed);
        });
        self.log.append(entries, flushed).unwrap();
        self.stepper.step()
    }

    fn ends(&self) -> (u64, u64) {
        let end = |end: DurableEnd| end.index.get();
        (end(*self.log.settled_end().borrow()), end(*self.log.durable_end().borrow()))
    }

    /// The machine is started anew.
    fn lose_power(self, keep: Keep, options: LogOptions) -> Self {
        let dir = temp_dir();
        self.disk.crash(keep, dir.path()).unwrap();
        drop((self.log, self.stepper));
        Self::on(FaultyDisk::open(dir.path()).unwrap(), dir, options)
    }

    fn kill(self) -> Self {
        let disk = self.disk.clone();
        disk.restart_process();
        drop((self.log, self.stepper));
        Self::on(disk, self.dir, deferring(1))
    }
}

fn batch(from: u64, count: u64) -> Vec<Entry> {
    (from..from + count).map(|index| entry(1, index, payload(index, 200))).collect()
}

#[test]
fn entries_are_settled_and_read_before_they_are_synced() {
    let mut node = Node::new();
    assert!(!node.report.fenced, "a new log");
    assert!(node.append(batch(0, 3)));
    assert_eq!(node.ends(), (3, 0));
    assert_eq!(node.told.load(Ordering::Relaxed), 1);
    assert_eq!(all(&node.log), batch(0, 3));
}

#[test]
fn votes_membership_and_gate_entries_are_synced_with_all_before_them() {
    for kind in [EntryKind::Membership, EntryKind::Paired, EntryKind::Alone] {
        let mut node = Node::new();
        assert!(node.append(batch(0, 2)));
        assert!(node.append(vec![Entry { kind, ..entry(1, 2, []) }]));
        assert_eq!(node.ends(), (3, 3), "{kind:?}");
    }
    let mut node = Node::new();
    assert!(node.append(batch(0, 2)));
    let vote = Vote { term: Term::new(2), node: 1, committed: false };
    let mut synced = node.log.save_vote(vote).unwrap();
    assert!(node.stepper.step());
    assert!(synced.try_recv().unwrap().is_ok());
    assert_eq!(node.ends(), (2, 2));
}

#[test]
fn so_many_bytes_are_never_left_unsynced() {
    let mut node = Node::new();
    let mut left_max = 0;
    for index in 0..40 {
        assert!(node.append(vec![entry(1, index, payload(index, 1 << 20))]));
        let settled = node.log.settled_end().borrow().position;
        let durable = node.log.durable_end().borrow().position;
        left_max = left_max.max(settled.bytes_since(durable).unwrap());
    }
    assert!((1..=9 << 20).contains(&left_max), "{left_max} bytes were left");
}

#[test]
fn deferred_sync_comes_by_itself() {
    let dir = temp_dir();
    let (log, _) = Log::open(dir.path(), deferring(1), None).unwrap();
    super::append_synced(&log, batch(0, 1)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut durable = log.durable_end();
    runtime.block_on(durable.wait_for(|end| end.index == EntryIndex::new(1))).unwrap();
}

#[test]
fn kill_keeps_what_was_settled_and_fences_nobody() {
    let mut node = Node::new();
    assert!(node.append(batch(0, 30)));
    let node = node.kill();
    assert_eq!(all(&node.log), batch(0, 30));
    assert!(!node.report.fenced && !node.log.is_fenced());
}

#[test]
fn loss_of_power_leaves_a_prefix_behind_the_last_sync_and_fences() {
    let mut lost_some = false;
    for keep in [Keep::Nothing, Keep::Everything, Keep::Some(3), Keep::Some(8), Keep::Some(21)] {
        let mut node = Node::new();
        assert!(node.append(batch(0, 10)));
        assert!(node.append(vec![Entry { kind: EntryKind::Alone, ..entry(1, 10, []) }]));
        let durable = node.ends().1;
        assert!(node.append(batch(11, 20)));
        let before = all(&node.log);
        let node = node.lose_power(keep, deferring(2));
        let after = all(&node.log);
        assert!(after.len() as u64 >= durable, "{keep:?}: {} came back", after.len());
        assert_eq!(before[..after.len()], after[..], "{keep:?}");
        assert!(node.report.fenced && node.log.is_fenced(), "{keep:?}");
        lost_some |= after.len() < before.len();
    }
    assert!(lost_some, "the disk kept all of it: nothing is shown");
}

#[test]
fn fence_stays_over_restarts_until_it_is_lifted() {
    let mut node = Node::new();
    assert!(node.append(batch(0, 5)));
    let mut node = node.lose_power(Keep::Nothing, deferring(2));
    node.log.close();
    assert!(!node.stepper.step());
    drop((node.log, node.stepper));
    // In order, on the same boot, and with syncs that are not deferred any more.
    let options = LogOptions { defer_syncs: false, ..deferring(2) };
    let mut node = Node::on(node.disk, node.dir, options.clone());
    assert!(node.log.is_fenced());
    let mut lifted = node.log.lift_fence().unwrap();
    assert!(node.stepper.step());
    assert!(lifted.try_recv().unwrap().is_ok());
    assert!(!node.log.is_fenced());
    let node = node.lose_power(Keep::Nothing, options);
    assert!(!node.log.is_fenced(), "it was lifted for good");
}

#[test]
fn deferred_sync_that_fails_closes_the_log_and_fences_the_next_start() {
    let mut node = Node::new();
    assert!(node.append(batch(0, 5)));
    // The vote has all before it synced first.
    node.disk.fail_at(1, Fault::Error);
    node.log.save_vote(Vote { term: Term::new(2), node: 1, committed: false }).unwrap();
    assert!(!node.stepper.step());
    assert!(node.log.closed().borrow().is_some());
    let node = node.kill();
    assert!(node.log.is_fenced());
}

#[test]
fn start_that_fails_to_sync_what_was_settled_fences_the_next() {
    let mut lost_some = false;
    let mut number = 0;
    loop {
        number += 1;
        let mut node = Node::new();
        assert!(node.append(batch(0, 30)));
        let Node { disk, dir, log, stepper, .. } = node;
        drop((log, stepper));
        let before = disk.operations();
        disk.fail_at(number, Fault::Error);
        let opened = Log::open_stepped(Arc::new(disk.clone()), deferring(1), None).is_ok();
        if disk.operations() < before + number {
            break;
        }
        disk.restart_process();
        let node = Node::on(disk, dir, deferring(1));
        let is_whole = all(&node.log).len() == 30;
        assert!(is_whole || node.log.is_fenced(), "operation {number}, opened: {opened}");
        lost_some |= !is_whole;
    }
    assert!(lost_some, "no sync took anything with it: nothing is shown");
}

#[test]
fn cut_of_what_is_not_synced_lowers_both_ends() {
    let mut node = Node::new();
    assert!(node.append(batch(0, 4)));
    assert!(node.append(vec![Entry { kind: EntryKind::Paired, ..entry(1, 4, []) }]));
    assert!(node.append(batch(5, 5)));
    assert_eq!(node.ends(), (10, 5));
    node.log.truncate_after(Some(EntryIndex::new(7))).unwrap();
    assert_eq!(node.ends(), (8, 5));
    assert!(node.stepper.step());
    assert_eq!(node.ends(), (8, 8));
    assert_eq!(all(&node.log).len(), 8);
    node.log.truncate_after(Some(EntryIndex::new(1))).unwrap();
    assert_eq!(node.ends(), (2, 2));
}
