//! A damaged copy of a log becomes whole again with the entries of another.

use tempfile::TempDir;

use super::super::inspect::LogFiles;
use super::super::tests::{all, append_synced, entry, options, payload};
use super::super::{Log, LogOptions};
use super::*;

fn log_options() -> LogOptions {
    LogOptions { segment_bytes: 16 << 10, prepared_bytes: 0, reserve_bytes: 0, ..options() }
}

/// Two segments and a part of a third, all of them durable.
fn durable_log() -> (TempDir, Vec<Entry>) {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(dir.path(), log_options(), None).unwrap();
    let mut entries = Vec::new();
    for index in 0..70 {
        let bytes = 200 + usize::try_from(index * 37 % 300).unwrap();
        entries.push(entry(1 + index / 20, index, payload(index, bytes)));
        append_synced(&log, entries[entries.len() - 1..].to_vec()).unwrap();
    }
    log.close();
    (dir, entries)
}

/// Where an entry's frame is.
fn place(dir: &TempDir, index: u64) -> (String, usize, usize) {
    let files = LogFiles::open(dir.path()).unwrap();
    let frame = files.frames(EntryIndex::new(index)).next().unwrap().unwrap();
    let bytes = usize::try_from(frame.header.frame_bytes()).unwrap();
    (frame.segment, usize::try_from(frame.at).unwrap(), bytes)
}

fn flip(dir: &TempDir, segment: &str, at: usize) {
    let path = dir.path().join(segment);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

/// Opens, mends what is found with what the other replica has, and opens again.
fn open_mended(dir: &TempDir, entries: &[Entry]) -> Result<Log, RepairError> {
    let group_uuid = log_options().group_uuid;
    loop {
        match Log::open(dir.path(), log_options(), None) {
            Ok((log, _)) => return Ok(log),
            Err(OpenError::Corrupt { segment, .. }) => {
                let damage = find(dir.path(), group_uuid, &segment, None)?.unwrap();
                let range = [damage.from, damage.end].map(|i| usize::try_from(i.get()).unwrap());
                mend(dir.path(), group_uuid, &damage, &entries[range[0]..range[1]], 1 << 20)?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_frame_is_mended() {
    // Magic, checksum, kind, term, index, clock, length, payload checksum, position, body.
    let offsets = [0, 5, 10, 17, 25, 33, 41, 45, 49, 57, 65, 80, 150];
    for index in [0, 13, 35, 69] {
        for offset in offsets {
            let (dir, entries) = durable_log();
            let (segment, at, _) = place(&dir, index);
            flip(&dir, &segment, at + offset);
            let log = open_mended(&dir, &entries).unwrap();
            assert!(all(&log) == entries, "entry {index} at {offset}");
            log.close();
        }
    }
}

#[test]
fn several_frames_in_a_row_and_in_two_segments_are_mended() {
    let (dir, entries) = durable_log();
    for index in [10, 11, 12, 30, 60, 68, 69] {
        let (segment, at, bytes) = place(&durable_log().0, index);
        flip(&dir, &segment, at + 4);
        flip(&dir, &segment, at + bytes - 60);
    }
    let log = open_mended(&dir, &entries).unwrap();
    assert!(all(&log) == entries);
    append_synced(&log, vec![entry(9, 70, payload(70, 100))]).unwrap();
    log.close();
    let (log, _) = Log::open(dir.path(), log_options(), None).unwrap();
    assert_eq!(all(&log).len(), 71);
    assert!(std::fs::read_dir(dir.path().join("quarantine")).unwrap().count() > 0);
}

#[test]
fn entries_that_were_not_there_are_refused() {
    let (dir, mut entries) = durable_log();
    let (segment, at, _) = place(&dir, 13);
    flip(&dir, &segment, at + 100);
    let other = entry(1, 13, payload(99, entries[13].payload.len()));
    let good = std::mem::replace(&mut entries[13], other);
    assert!(matches!(open_mended(&dir, &entries), Err(RepairError::Header(_))));
    entries[13] = entry(1, 13, payload(13, 20));
    assert!(open_mended(&dir, &entries).is_err());
    entries[13] = good;
    flip(&dir, &segment, at + 4);
    let shorter = std::mem::replace(&mut entries[13], entry(1, 13, payload(13, 20)));
    assert!(matches!(open_mended(&dir, &entries), Err(RepairError::Length { .. })));
    entries[13] = entry(3, 13, shorter.payload.to_vec());
    assert!(matches!(open_mended(&dir, &entries), Err(RepairError::Term { .. })));
    entries[13] = shorter;
    let log = open_mended(&dir, &entries).unwrap();
    assert!(all(&log) == entries);
}
