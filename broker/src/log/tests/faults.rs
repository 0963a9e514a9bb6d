//! Every operation of a fixed piece of work fails in turn, and the power goes at every one.

use std::sync::Arc;

use super::super::faulty::{Fault, FaultyDisk, Keep};
use super::super::*;
use super::driver::{Driver, small_options};
use super::{all, entry, payload, temp_dir};

/// Rolls, cuts within a segment and over several, votes, trims. Ends where the log closes.
fn work(driver: &mut Driver) -> bool {
    for round in 0..4 {
        driver.append(3, 700);
        driver.append(1, 9_000);
        driver.vote();
        driver.append(2, 90);
        if !driver.step() {
            return false;
        }
        driver.check();
        driver.append(4, 2_500);
        driver.cut(if round % 2 == 0 { 2 } else { 7 });
        driver.append(2, 100);
        if !driver.step() {
            return false;
        }
        driver.check();
        if round == 2 {
            driver.checkpoint();
            driver.trim();
        }
    }
    driver.step()
}

/// Nobody but the writer touches the disk.
fn unprepared() -> LogOptions {
    LogOptions { prepared_bytes: 0, ..small_options() }
}

fn operations_of_work() -> (u64, u64) {
    let mut driver = Driver::new();
    let opened = driver.disk.operations();
    assert!(work(&mut driver));
    (opened, driver.disk.operations())
}

fn with_fault(at: u64, fault: Fault) -> Option<Driver> {
    let dir = temp_dir();
    let disk = FaultyDisk::open(dir.path()).unwrap();
    disk.fail_at(at, fault);
    let mut driver = Driver::on(disk, dir).ok()?;
    driver.may_fail = true;
    Some(driver)
}

#[test]
fn a_failed_operation_loses_nothing_that_was_acknowledged() {
    let (opened, total) = operations_of_work();
    for fault in [Fault::Error, Fault::FullSync] {
        let mut refused = 0;
        for at in opened + 1..=total {
            let mut driver = with_fault(at, fault).expect("it opens before the fault");
            if !work(&mut driver) {
                refused += 1;
                assert!(driver.log.append(vec![], Box::new(|_| {})).is_err());
            }
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some(at)] {
                driver = driver.crash(keep, None);
                driver.check();
            }
        }
        let tried = total - opened;
        // Only the caller of a trim is told of its failures.
        assert!(refused * 10 > tried * 9, "{fault:?}: {refused} of {tried} were noticed");
    }
}

/// A log with three entries and a torn tail.
fn torn_log() -> tempfile::TempDir {
    let dir = temp_dir();
    let (log, _) = Log::open(dir.path(), small_options(), None).unwrap();
    super::append_synced(&log, (0..3).map(|i| entry(1, i, payload(i, 100))).collect()).unwrap();
    let end_at = 4096 + log.end().get();
    drop(log);
    let segment = dir.path().join(&super::segment_names(&dir)[0]);
    let file = std::fs::OpenOptions::new().write(true).open(segment).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"torn", end_at + 100).unwrap();
    dir
}

#[test]
fn a_start_that_finds_no_space_uses_what_was_held_back() {
    for at in 1.. {
        let dir = torn_log();
        let disk = FaultyDisk::open(dir.path()).unwrap();
        disk.fail_at(at, Fault::Full(1));
        let (log, report, _) =
            Log::open_stepped(Arc::new(disk.clone()), small_options(), None).unwrap();
        assert!(report.torn_tail.is_some());
        assert_eq!(log.last().unwrap().index, EntryIndex::new(2));
        if disk.operations() < at {
            assert!(at > 8, "a start with a torn tail writes more");
            return;
        }
    }
}

#[test]
fn a_power_loss_at_any_operation_loses_nothing_that_was_acknowledged() {
    let (opened, total) = operations_of_work();
    for at in opened + 1..=total {
        for keep in [Keep::Nothing, Keep::Everything, Keep::Some(at), Keep::Some(at * 7 + 1)] {
            let mut driver = with_fault(at, Fault::PowerLoss).expect("opens before the fault");
            work(&mut driver);
            let mut driver = driver.crash(keep, None);
            driver.check();
            driver.append(3, 50);
            assert!(driver.step());
            driver.check();
        }
    }
}

#[test]
fn what_is_acknowledged_after_a_kill_at_any_operation_outlives_a_power_loss() {
    let (opened, total) = operations_of_work();
    for at in opened + 1..=total {
        for keep in [Keep::Nothing, Keep::Some(at)] {
            let mut driver = with_fault(at, Fault::PowerLoss).expect("opens before the fault");
            work(&mut driver);
            let mut driver = driver.kill();
            driver.check();
            driver.append(2, 50);
            assert!(driver.step());
            let mut driver = driver.crash(keep, None);
            driver.check();
        }
    }
}

#[test]
fn short_writes_and_a_moment_without_space_are_not_noticed() {
    let (_, total) = operations_of_work();
    for at in 1..=total {
        for fault in [Fault::Short, Fault::Full(1)] {
            let Some(mut driver) = with_fault(at, fault) else {
                assert_eq!(fault, Fault::Full(1), "a short write is no error");
                continue;
            };
            assert!(work(&mut driver), "operation {at}, {fault:?}");
            let mut driver = driver.crash(Keep::Nothing, None);
            driver.check();
        }
    }
}

#[test]
fn opening_fails_cleanly_at_any_operation_and_succeeds_afterwards() {
    let (opened, _) = operations_of_work();
    for at in 1..=opened {
        for fault in [Fault::Error, Fault::PowerLoss] {
            let dir = temp_dir();
            let disk = FaultyDisk::open(dir.path()).unwrap();
            disk.fail_at(at, fault);
            let storage = Arc::new(disk.clone());
            Log::open_stepped(storage, small_options(), None).map(|_| ()).ok();
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some(at)] {
                let after = temp_dir();
                disk.crash(keep, after.path()).unwrap();
                let disk = Arc::new(FaultyDisk::open(after.path()).unwrap());
                let (log, ..) = Log::open_stepped(disk, small_options(), None)
                    .unwrap_or_else(|error| panic!("operation {at}, {fault:?}: {error}"));
                assert_eq!(log.last(), None);
            }
        }
    }
}

#[test]
fn writes_wait_on_a_full_disk_and_go_on_by_themselves() {
    let dir = temp_dir();
    let disk = FaultyDisk::open(dir.path()).unwrap();
    let storage = Arc::new(disk.clone());
    let (log, _) = Log::open_with(storage, unprepared(), None).unwrap();
    let mut full = log.disk_full();
    assert!(!*full.borrow_and_update());
    disk.fail_at(1, Fault::Full(6));
    let written = entry(1, 0, payload(0, 500));
    super::append_synced(&log, vec![written.clone()]).unwrap();
    assert_eq!(all(&log), vec![written]);
    assert!(full.has_changed().unwrap(), "nobody was told that the disk was full");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(full.wait_for(|full| !full)).unwrap();
    log.close();
}

#[test]
fn the_last_handle_does_not_wait_for_space() {
    let dir = temp_dir();
    let disk = FaultyDisk::open(dir.path()).unwrap();
    let (log, _) = Log::open_with(Arc::new(disk.clone()), unprepared(), None).unwrap();
    let full = log.disk_full();
    disk.fail_at(1, Fault::Full(u32::MAX));
    let (told, result) = std::sync::mpsc::channel();
    let flushed = Box::new(move |result: io::Result<()>| told.send(result.is_ok()).unwrap());
    log.append(vec![entry(1, 0, payload(0, 500))], flushed).unwrap();
    super::until(|| *full.borrow());
    std::thread::spawn(move || drop(log));
    assert!(!result.recv_timeout(std::time::Duration::from_secs(60)).unwrap());
}

#[test]
fn closing_on_a_full_disk_ends_without_completing_anyone() {
    let dir = temp_dir();
    let disk = FaultyDisk::open(dir.path()).unwrap();
    let storage = Arc::new(disk.clone());
    let (log, _) = Log::open_with(storage, unprepared(), None).unwrap();
    disk.fail_at(1, Fault::Full(u32::MAX));
    let (told, result) = std::sync::mpsc::channel();
    let flushed = Box::new(move |result: io::Result<()>| told.send(result.is_ok()).unwrap());
    log.append(vec![entry(1, 0, payload(0, 500))], flushed).unwrap();
    log.close();
    assert!(!result.recv().unwrap());
}
