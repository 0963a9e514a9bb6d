//! A disk in memory that fails the n-th change on request and, at a crash, keeps any part of what
//! was not synced: names up to some change, contents page by page.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Disk, DiskFile};

const TEAR_BYTES: usize = 512;

#[derive(Debug, Default)]
struct Content {
    seen: Vec<u8>,
    synced: Vec<u8>,
}

type Names = BTreeMap<PathBuf, Arc<Mutex<Content>>>;

#[derive(Debug, Default)]
struct Faults {
    /// Writes, syncs and changes of names so far.
    changes: u64,
    fail_at: Option<(u64, io::ErrorKind)>,
}

impl Faults {
    fn step(&mut self) -> io::Result<()> {
        self.changes += 1;
        match self.fail_at {
            Some((at, kind)) if at == self.changes => Err(kind.into()),
            Some(_) | None => Ok(()),
        }
    }
}

#[derive(Debug, Default)]
struct Tree {
    names: Names,
    /// States of the names since the last sync of a directory, oldest first.
    history: Vec<Names>,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct FaultyDisk {
    tree: Arc<Mutex<Tree>>,
    faults: Arc<Mutex<Faults>>,
}

#[derive(Debug)]
struct FaultyFile {
    content: Arc<Mutex<Content>>,
    faults: Arc<Mutex<Faults>>,
}

impl FaultyDisk {
    pub(crate) fn changes(&self) -> u64 {
        self.faults.lock().changes
    }

    /// Makes the change after the next `after` ones fail.
    pub(crate) fn fail_after(&self, after: u64, kind: io::ErrorKind) {
        let mut faults = self.faults.lock();
        faults.fail_at = Some((faults.changes + after + 1, kind));
    }

    /// What a power loss at this moment could leave.
    pub(crate) fn crash(&self, random: &mut fastrand::Rng) -> Self {
        let tree = self.tree.lock();
        let states: Vec<&Names> = tree.history.iter().chain([&tree.names]).collect();
        let survived = states[random.usize(..states.len())];
        let names = survived
            .iter()
            .map(|(path, content)| {
                let left = torn(&content.lock(), random);
                let content = Content { synced: left.clone(), seen: left };
                (path.clone(), Arc::new(Mutex::new(content)))
            })
            .collect();
        let tree = Tree { names, history: Vec::new() };
        Self { tree: Arc::new(Mutex::new(tree)), faults: Arc::default() }
    }

    /// Changes a file behind everyone's back.
    pub(crate) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let content = Arc::clone(&self.tree.lock().names[path]);
        let mut content = content.lock();
        change(&mut content.seen);
        content.synced = content.seen.clone();
    }

    pub(crate) fn files(&self) -> Vec<PathBuf> {
        self.tree.lock().names.keys().cloned().collect()
    }

    fn change_names(&self, change: impl FnOnce(&mut Names) -> io::Result<()>) -> io::Result<()> {
        self.faults.lock().step()?;
        let mut tree = self.tree.lock();
        let before = tree.names.clone();
        tree.history.push(before);
        change(&mut tree.names)
    }

    fn file(&self, content: Arc<Mutex<Content>>) -> Arc<dyn DiskFile> {
        Arc::new(FaultyFile { content, faults: Arc::clone(&self.faults) })
    }
}

fn torn(content: &Content, random: &mut fastrand::Rng) -> Vec<u8> {
    let mut left = content.synced.clone();
    if content.seen.len() > left.len() && random.bool() {
        left.resize(content.seen.len(), 0);
    }
    for (old, new) in left.chunks_mut(TEAR_BYTES).zip(content.seen.chunks(TEAR_BYTES)) {
        if random.bool() {
            let count = old.len().min(new.len());
            old[..count].copy_from_slice(&new[..count]);
        }
    }
    left
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl DiskFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let content = self.content.lock();
        let at = usize::try_from(at).unwrap();
        let bytes = content.seen.get(at..at + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut content = self.content.lock();
        let at = usize::try_from(at).unwrap();
        let failed = self.faults.lock().step();
        let bytes = if failed.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        if content.seen.len() < at + bytes.len() {
            content.seen.resize(at + bytes.len(), 0);
        }
        content.seen[at..at + bytes.len()].copy_from_slice(bytes);
        failed
    }

    fn sync(&self) -> io::Result<()> {
        self.faults.lock().step()?;
        let mut content = self.content.lock();
        content.synced = content.seen.clone();
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.content.lock().seen.len() as u64)
    }
}

impl Disk for FaultyDisk {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let tree = self.tree.lock();
        let inside = tree.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect())
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let content = self.tree.lock().names.get(path).cloned().ok_or_else(missing)?;
        Ok(self.file(content))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let content = Arc::<Mutex<Content>>::default();
        let added = Arc::clone(&content);
        self.change_names(|names| {
            names.insert(path.to_owned(), added);
            Ok(())
        })?;
        Ok(self.file(content))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change_names(|names| {
            let content = names.remove(from).ok_or_else(missing)?;
            names.insert(to.to_owned(), content);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change_names(|names| names.remove(path).map(drop).ok_or_else(missing))
    }

    /// Of the whole tree: directories that are synced apart are more than the tests need.
    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        self.faults.lock().step()?;
        self.tree.lock().history.clear();
        Ok(())
    }
}
