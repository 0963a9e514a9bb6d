//! How far the log was committed when last heard of: a file of 24 bytes, never synced, only a hint.
//!
//! A thread of its own writes it. Raft tells of every commit, and must not wait for a disk there:
//! one that stalls would stop it, and nobody would see that entries wait for the disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::position::{EntryId, EntryIndex, Term};

const HINT_BYTES: usize = 24;
const HINT_VERSION: u32 = 1;

/// The file, and the thread that writes it; it ends when this is dropped, once the disk lets it.
#[derive(Debug)]
pub(super) struct CommittedHint {
    file: Arc<File>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    /// Since this was opened.
    newest: Option<EntryId>,
    is_written: bool,
    is_closed: bool,
}

/// The committed index that a file of this kind names, if it names one.
pub(crate) fn committed_hint(path: &Path) -> io::Result<Option<EntryIndex>> {
    match File::open(path) {
        Ok(file) => Ok(read(&file)?.map(|id| id.index)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl CommittedHint {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let (file, shared) = (Arc::new(file), Arc::<Shared>::default());
        let writing = Writing { file: Arc::clone(&file), shared: Arc::clone(&shared) };
        // Nobody joins it: it holds nothing but the file, and the disk may never answer.
        std::thread::Builder::new().name("committed".into()).spawn(move || writing.run())?;
        Ok(Self { file, shared })
    }

    /// Never waits for the disk.
    pub(super) fn write(&self, committed: EntryId) {
        let mut told = self.shared.told.lock();
        (told.newest, told.is_written) = (Some(committed), false);
        self.shared.changed.notify_one();
    }

    /// `None` if there is none or it is torn.
    pub(super) fn read(&self) -> io::Result<Option<EntryId>> {
        let newest = self.shared.told.lock().newest;
        match newest {
            Some(newest) => Ok(Some(newest)),
            None => read(&self.file),
        }
    }
}

impl Drop for CommittedHint {
    fn drop(&mut self) {
        self.shared.told.lock().is_closed = true;
        self.shared.changed.notify_one();
    }
}

/// The thread.
struct Writing {
    file: Arc<File>,
    shared: Arc<Shared>,
}

impl Writing {
    fn run(self) {
        let mut has_failed = false;
        while let Some(newest) = self.next() {
            match self.file.write_all_at(&encode(newest), 0) {
                Ok(()) => has_failed = false,
                // Only a hint: a full disk is for the log to tell.
                Err(error) if error.kind() == io::ErrorKind::StorageFull || has_failed => {}
                Err(error) => {
                    tracing::warn!(%error, "the committed index cannot be written");
                    has_failed = true;
                }
            }
        }
    }

    /// Waits for one that is not written; what came before it is left out.
    fn next(&self) -> Option<EntryId> {
        let mut told = self.shared.told.lock();
        loop {
            if let Some(newest) = told.newest.filter(|_| !told.is_written) {
                told.is_written = true;
                return Some(newest);
            }
            if told.is_closed {
                return None;
            }
            self.shared.changed.wait(&mut told);
        }
    }
}

fn encode(id: EntryId) -> [u8; HINT_BYTES] {
    let mut bytes = [0; HINT_BYTES];
    bytes[..8].copy_from_slice(&id.index.get().to_le_bytes());
    bytes[8..16].copy_from_slice(&id.term.get().to_le_bytes());
    bytes[16..20].copy_from_slice(&HINT_VERSION.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..20]);
    bytes[20..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// `None` if there is none or it is torn.
fn read(file: &File) -> io::Result<Option<EntryId>> {
    let mut bytes = [0; HINT_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let word = |at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes of twenty-four"))
    };
    let half = |at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes of twenty-four"))
    };
    if half(16) != HINT_VERSION || half(20) != crc32fast::hash(&bytes[..20]) {
        return Ok(None);
    }
    Ok(Some(EntryId { term: Term::new(word(8)), index: EntryIndex::new(word(0)) }))
}
