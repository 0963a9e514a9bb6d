//! Files of published versions, which must be read for ever.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::super::*;
use super::driver::files;
use super::{all, append_synced, entry, options, payload};
use crate::entry::EntryKind;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/log-1")
}

fn entries() -> Vec<Entry> {
    let kinds = [
        EntryKind::Blank,
        EntryKind::Membership,
        EntryKind::Batch,
        EntryKind::Paired,
        EntryKind::Alone,
    ];
    (0u64..)
        .zip(kinds)
        .map(|(index, kind)| {
            let bytes = usize::try_from(index * 13).unwrap();
            Entry { kind, ..entry(2 + index / 2, index, payload(index, bytes)) }
        })
        .collect()
}

fn vote() -> Vote {
    Vote { term: Term::new(4), node: 17, committed: true }
}

fn golden_options() -> LogOptions {
    let mut options = options();
    options.prepared_bytes = 0;
    options.reserve_bytes = 0;
    options
}

/// Writes the log that the golden files hold, and drops its last entry.
fn write(dir: &Path, options: LogOptions) {
    let (log, _) = Log::open(dir, options, None).unwrap();
    for entry in entries() {
        append_synced(&log, vec![entry]).unwrap();
    }
    log.save_vote(vote()).unwrap().blocking_recv().unwrap().unwrap();
    log.truncate_after(Some(EntryIndex::new(3))).unwrap();
    append_synced(&log, vec![Entry { id: entry(9, 4, []).id, ..entries()[4].clone() }]).unwrap();
    log.close();
}

#[test]
fn version_1_is_read() {
    let dir = TempDir::new().unwrap();
    for (name, bytes) in files(&folder()) {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let (log, report) = Log::open(dir.path(), golden_options(), None).unwrap();
    assert_eq!(report.scanned_entries, 5);
    assert_eq!(report.torn_tail, None);
    assert!(report.clean);
    assert_eq!(log.vote(), Some(vote()));
    let found = all(&log);
    assert_eq!(found[..4], entries()[..4]);
    assert_eq!(found[4].id, EntryId { term: Term::new(9), index: EntryIndex::new(4) });
    assert_eq!(found[4].payload, entries()[4].payload);
}

#[test]
fn version_1_is_what_is_written() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), golden_options());
    if std::env::var_os("DRUMLIN_BLESS").is_some() {
        for (name, bytes) in files(dir.path()) {
            let path = folder().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    }
    let (written, golden) = (files(dir.path()), files(&folder()));
    assert_eq!(written.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>());
    for (name, bytes) in golden {
        assert!(written[&name] == bytes, "{name} differs from the golden file");
    }
}

/// Only the node-local file has a version of its own where syncs are deferred.
#[test]
fn version_2_of_the_local_file_is_what_is_written_and_read() {
    let dir = TempDir::new().unwrap();
    let options = LogOptions { defer_syncs: true, ..golden_options() };
    write(dir.path(), options.clone());
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/log-2-local");
    let written = std::fs::read(dir.path().join("local")).unwrap();
    if std::env::var_os("DRUMLIN_BLESS").is_some() {
        std::fs::write(&golden, &written).unwrap();
    }
    assert!(written == std::fs::read(golden).unwrap(), "it differs from the golden file");
    let (log, report) = Log::open(dir.path(), options, None).unwrap();
    assert!(report.clean && !report.fenced);
    drop(log);
}
