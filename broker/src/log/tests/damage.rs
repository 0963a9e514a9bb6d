//! Damaged files: what is read is what was written, or is refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tempfile::TempDir;

use super::super::inspect::{LogFiles, Verdict};
use super::super::*;
use super::driver::files;
use super::{append_synced, entry, options, payload};

/// Files in memory, for reading.
#[derive(Clone, Debug, Default)]
struct Memory {
    files: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
}

#[derive(Debug)]
struct MemoryFile {
    memory: Memory,
    name: String,
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl Storage for Memory {
    fn create_folder(&self, _name: &str) -> io::Result<()> {
        unsupported()
    }

    fn create(&self, _name: &str) -> io::Result<Arc<dyn StorageFile>> {
        unsupported()
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        if !self.files.lock().contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Arc::new(MemoryFile { memory: self.clone(), name: name.to_owned() }))
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        unsupported()
    }

    fn remove(&self, _name: &str) -> io::Result<()> {
        unsupported()
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        assert_eq!(folder, "");
        let files = self.files.lock();
        Ok(files.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64)).collect())
    }

    fn sync_folder(&self, _folder: &str) -> io::Result<()> {
        unsupported()
    }

    fn space(&self) -> io::Result<super::super::storage::Space> {
        unsupported()
    }
}

impl StorageFile for MemoryFile {
    fn write_at(&self, _bytes: &[u8], _at: u64) -> io::Result<usize> {
        unsupported()
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let files = self.memory.files.lock();
        let rest = files[&self.name].get(usize::try_from(at).unwrap()..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.memory.files.lock()[&self.name].len() as u64)
    }

    fn allocate(&self, _bytes: u64) -> io::Result<()> {
        unsupported()
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, _bytes: usize) -> io::Result<Mapping> {
        unsupported()
    }
}

/// A log of one segment whose frames end at `bytes`, in groups of three entries per sync.
fn log_of(bytes: usize) -> (Memory, String, Vec<Entry>) {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(dir.path(), options(), None).unwrap();
    let mut entries = Vec::new();
    while log.end().get() + 4096 + 3 * 1_000 < bytes as u64 {
        let first = entries.len() as u64;
        let group: Vec<Entry> = (first..first + 3)
            .map(|i| entry(1 + i / 5, i, payload(i, 37 + 91 * usize::try_from(i % 9).unwrap())))
            .collect();
        append_synced(&log, group.clone()).unwrap();
        entries.extend(group);
    }
    let left = bytes as u64 - 4096 - log.end().get();
    let index = entries.len() as u64;
    let last = entry(1 + index / 5, index, payload(index, usize::try_from(left).unwrap() - 80));
    append_synced(&log, vec![last.clone()]).unwrap();
    entries.push(last);
    log.close();
    let mut files = files(dir.path());
    files.retain(|name, _| name.ends_with(".log") || name == "vote" || name == "local");
    let name = files.keys().find(|name| name.ends_with(".log")).unwrap().clone();
    files.get_mut(&name).unwrap().truncate(bytes);
    (Memory { files: Arc::new(Mutex::new(files)) }, name, entries)
}

/// The entries that a start would find, and whether it would refuse.
fn found(memory: &Memory) -> Option<(Vec<Entry>, Verdict)> {
    let files = LogFiles::on(Arc::new(memory.clone())).ok()?;
    let entries = files
        .frames(EntryIndex::ZERO)
        .map_while(|frame| frame.ok().map(|frame| frame.entry))
        .collect();
    match files.verify() {
        Ok(verified) => Some((entries, verified.verdict)),
        Err(_) => None,
    }
}

#[test]
fn no_flipped_bit_gives_a_wrong_entry_and_none_hides_a_durable_one() {
    let (memory, name, entries) = log_of(8 << 10);
    let (whole, verdict) = found(&memory).unwrap();
    assert_eq!(whole, entries);
    assert!(matches!(verdict, Verdict::Clean));
    let last_group = entries.len() - 1;
    let padding = |entry: &Entry| entry.frame_bytes() - 80 - entry.payload.len() as u64;
    let mut checked_bytes = 4096;
    checked_bytes += entries.iter().map(|e| e.frame_bytes() - padding(e)).sum::<u64>();
    let last_bytes = entries[last_group].frame_bytes() - padding(&entries[last_group]);
    for with_mark in [true, false] {
        let local = memory.files.lock().get("local").cloned();
        if !with_mark {
            memory.files.lock().remove("local");
        }
        let mut refused = 0;
        for bit in 0..8 * (8 << 10) {
            let flip = || memory.files.lock().get_mut(&name).unwrap()[bit / 8] ^= 1 << (bit % 8);
            flip();
            match found(&memory) {
                None | Some((_, Verdict::Corrupt(_))) => refused += 1,
                Some((found, Verdict::Clean | Verdict::TornTail { .. })) => {
                    assert_eq!(found, entries[..found.len()], "bit {bit}");
                    let durable = if with_mark { entries.len() } else { last_group };
                    assert!(found.len() >= durable, "bit {bit}: {} came back", found.len());
                }
            }
            flip();
        }
        // Only in padding is a flip without effect, and only the last sync proves nothing of itself.
        let wanted = if with_mark { checked_bytes } else { checked_bytes - last_bytes };
        assert_eq!(refused, 8 * wanted);
        memory.files.lock().insert("local".to_owned(), local.unwrap());
    }
}

#[test]
fn a_file_that_ends_anywhere_gives_no_wrong_entry_and_hides_no_durable_one() {
    let (memory, name, entries) = log_of(16 << 10);
    let whole = memory.files.lock()[&name].clone();
    for with_mark in [true, false] {
        if !with_mark {
            memory.files.lock().remove("local");
        }
        for bytes in 0..whole.len() {
            memory.files.lock().insert(name.clone(), whole[..bytes].to_vec());
            match found(&memory) {
                None | Some((_, Verdict::Corrupt(_))) => {}
                Some((found, Verdict::Clean | Verdict::TornTail { .. })) => {
                    assert!(!with_mark, "{bytes} bytes of a durable log were taken as all");
                    assert_eq!(found, entries[..found.len()], "{bytes} bytes");
                }
            }
        }
    }
}

#[test]
fn no_flipped_bit_brings_an_older_vote_back() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(dir.path(), options(), None).unwrap();
    let vote = |term| Vote { term: Term::new(term), node: 1, committed: false };
    for term in [4, 9] {
        log.save_vote(vote(term)).unwrap().blocking_recv().unwrap().unwrap();
    }
    drop(log);
    let group_uuid = options().group_uuid;
    let memory = Memory { files: Arc::new(Mutex::new(files(dir.path()))) };
    let (local, _) = super::super::vote::load_local(&memory, group_uuid).unwrap();
    for bit in 0..8 * 1024 {
        let flip = || memory.files.lock().get_mut("vote").unwrap()[bit / 8] ^= 1 << (bit % 8);
        flip();
        match super::super::vote::load_vote(&memory, group_uuid, true, local.as_ref()) {
            Ok((found, _)) => assert_eq!(found, Some(vote(9)), "bit {bit}"),
            Err(error) => assert!(matches!(error, OpenError::State { file: "vote", .. })),
        }
        flip();
    }
}

#[test]
fn a_missing_segment_is_refused() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(dir.path(), options(), None).unwrap();
    for i in 0..300 {
        append_synced(&log, vec![entry(1, i, payload(i, 900))]).unwrap();
    }
    log.close();
    let whole = files(dir.path());
    let segments: Vec<&String> = whole.keys().filter(|name| name.ends_with(".log")).collect();
    assert!(segments.len() > 3);
    for name in &segments[1..] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
        let opened = Log::open(dir.path(), options(), None);
        assert!(matches!(opened, Err(OpenError::Missing { .. })), "without {name}: {opened:?}");
        std::fs::write(dir.path().join(name), &whole[*name]).unwrap();
    }
    Log::open(dir.path(), options(), None).unwrap();
}

#[test]
fn a_used_log_without_its_only_segment_is_refused() {
    let dir = TempDir::new().unwrap();
    let (log, _) = Log::open(dir.path(), options(), None).unwrap();
    append_synced(&log, vec![entry(1, 0, payload(0, 100))]).unwrap();
    drop(log);
    let whole = files(dir.path());
    let segment = whole.keys().find(|name| name.ends_with(".log")).unwrap();
    std::fs::remove_file(dir.path().join(segment)).unwrap();
    let opened = Log::open(dir.path(), options(), None);
    assert!(matches!(opened, Err(OpenError::Missing { .. })), "{opened:?}");
}

#[test]
fn another_groups_segments_are_refused() {
    let dir = TempDir::new().unwrap();
    drop(Log::open(dir.path(), options(), None).unwrap());
    std::fs::remove_file(dir.path().join("vote")).unwrap();
    std::fs::remove_file(dir.path().join("local")).unwrap();
    let mut other = options();
    other.group_uuid = uuid::Uuid::from_u128(8);
    let opened = Log::open(dir.path(), other, None);
    assert!(matches!(opened, Err(OpenError::State { file: "vote", .. })), "{opened:?}");
}
