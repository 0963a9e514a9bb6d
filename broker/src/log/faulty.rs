//! A directory that fails on demand and can lose power: the other implementation of the disk seam,
//! for tests. Its files are real, so that maps work; what is durable is kept beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::mapping::Mapping;
use super::storage::{Directory, Space, Storage, StorageFile, read_full_at, write_all_at};

/// What a disk writes as a whole.
const SECTOR_BYTES: u64 = SECTOR as u64;
const SECTOR: usize = 512;

/// How operations fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// One fails with an I/O error. A sync that fails has lost what it should have made durable.
    Error,
    /// So many, one after the other, find no space.
    Full(u32),
    /// The next sync fails for want of space, and has lost what it should have made durable.
    FullSync,
    /// One write is done by half. No error.
    Short,
    /// The machine is gone: this and every later operation fails, and nothing changes any more.
    PowerLoss,
}

/// What a power loss leaves of bytes that were written and not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    Nothing,
    Everything,
    /// Each sector or not, by chance. Names: as many as chance says, in order.
    Some(u64),
}

/// The directory; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct FaultyDisk {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug)]
struct Disk {
    directory: Directory,
    files: Vec<FileState>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Changes of names, in order, that no sync has covered.
    pending: Vec<NameChange>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    powered: bool,
    /// Folders that were made: they come back, empty or not.
    folders: BTreeSet<String>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Made(String, usize),
    Renamed(String, String),
    Removed(String),
}

#[derive(Debug)]
struct FileState {
    real: Arc<dyn StorageFile>,
    durable: Vec<u8>,
    /// Sectors written since the last sync.
    dirty: BTreeSet<u64>,
    /// Sectors whose sync failed: still readable, and gone for good at the next start.
    lost: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Write,
    Sync,
    Name,
    Remove,
}

impl FaultyDisk {
    /// Takes over what is in the directory; all of it counts as durable.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let directory = Directory::on(path);
        let mut disk = Disk {
            directory,
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
            operations: 0,
            fault: None,
            powered: true,
            folders: BTreeSet::new(),
        };
        for folder in folders_of(path)? {
            for (name, _) in disk.directory.list(&folder)? {
                let name = join(&folder, &name);
                let file = disk.directory.open(&name)?;
                let durable = read_whole(file.as_ref())?;
                disk.durable_names.insert(name, disk.files.len());
                disk.files.push(FileState::new(file, durable));
            }
            disk.folders.insert(folder);
        }
        disk.names = disk.durable_names.clone();
        Ok(Self { disk: Arc::new(Mutex::new(disk)) })
    }

    /// Lets the `number`th operation from now on (from 1) fail.
    pub(crate) fn fail_at(&self, number: u64, fault: Fault) {
        let mut disk = self.disk.lock();
        disk.fault = Some((disk.operations + number, fault));
    }

    /// Writes, syncs and changes of names so far.
    pub(crate) fn operations(&self) -> u64 {
        self.disk.lock().operations
    }

    /// Whether the power is still on.
    pub(crate) fn is_powered(&self) -> bool {
        self.disk.lock().powered
    }

    /// The process is started anew after [`Fault::PowerLoss`], which was only its own end: what it
    /// had written is readable, and no more durable than before.
    pub(crate) fn restart_process(&self) {
        let mut disk = self.disk.lock();
        disk.powered = true;
        disk.fault = None;
    }

    /// Writes what a power loss now would leave into another, empty directory.
    pub(crate) fn crash(&self, keep: Keep, into: &Path) -> io::Result<()> {
        let disk = self.disk.lock();
        let mut chance = fastrand::Rng::with_seed(match keep {
            Keep::Some(seed) => seed,
            Keep::Nothing | Keep::Everything => 0,
        });
        let changes = match keep {
            Keep::Nothing => 0,
            Keep::Everything => disk.pending.len(),
            Keep::Some(_) => chance.usize(0..=disk.pending.len()),
        };
        let mut names = disk.durable_names.clone();
        for change in disk.pending.iter().take(changes) {
            change.apply(&mut names);
        }
        let target = Directory::on(into);
        for folder in disk.folders.iter().filter(|folder| !folder.is_empty()) {
            target.create_folder(folder)?;
        }
        // All, none, or by chance, so that whole groups get lost often enough.
        let mut kept_of_file = || match keep {
            Keep::Nothing => 0,
            Keep::Everything => 100,
            Keep::Some(_) => [0, 20, 50, 80, 100][chance.usize(0..5)],
        };
        let shares: Vec<u32> = disk.files.iter().map(|_| kept_of_file()).collect();
        for (name, number) in names {
            let state = &disk.files[number];
            let bytes = state.after_crash(shares[number], &mut chance)?;
            let file = target.create(&name)?;
            write_all_at(file.as_ref(), &bytes, 0)?;
        }
        Ok(())
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Made(name, number) => {
                names.insert(name.clone(), *number);
            }
            Self::Renamed(from, to) => {
                if let Some(number) = names.remove(from) {
                    names.insert(to.clone(), number);
                }
            }
            Self::Removed(name) => {
                names.remove(name);
            }
        }
    }

    fn folder(&self) -> &str {
        match self {
            Self::Made(name, _) | Self::Renamed(_, name) | Self::Removed(name) => folder_of(name),
        }
    }
}

impl FileState {
    fn new(real: Arc<dyn StorageFile>, durable: Vec<u8>) -> Self {
        Self { real, durable, dirty: BTreeSet::new(), lost: BTreeSet::new() }
    }

    fn after_crash(&self, kept_percent: u32, chance: &mut fastrand::Rng) -> io::Result<Vec<u8>> {
        let mut bytes = self.durable.clone();
        for sector in &self.dirty {
            if chance.u32(0..100) < kept_percent {
                copy_sector(self.real.as_ref(), *sector, &mut bytes)?;
            }
        }
        Ok(bytes)
    }
}

impl Disk {
    /// Counts an operation and says how it fails, if it does.
    fn begin(&mut self, operation: Operation) -> io::Result<Option<Fault>> {
        if !self.powered {
            return Err(io::Error::other("the power is off"));
        }
        self.operations += 1;
        let Some((at, fault)) = self.fault else { return Ok(None) };
        if self.operations < at {
            return Ok(None);
        }
        match fault {
            Fault::PowerLoss => {
                self.powered = false;
                Err(io::Error::other("the power is off"))
            }
            // These need no space.
            Fault::Full(_) if matches!(operation, Operation::Sync | Operation::Remove) => Ok(None),
            Fault::Full(times) => {
                self.fault = (times > 1).then(|| (at, Fault::Full(times - 1)));
                Err(io::ErrorKind::StorageFull.into())
            }
            Fault::FullSync if operation != Operation::Sync => Ok(None),
            Fault::Short | Fault::Error | Fault::FullSync => {
                self.fault = None;
                Ok(Some(fault))
            }
        }
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending.push(change);
    }

    fn name_operation(&mut self, operation: Operation) -> io::Result<()> {
        self.begin(operation)?.and_then(error_of).map_or(Ok(()), Err)
    }
}

impl Storage for FaultyDisk {
    fn create_folder(&self, name: &str) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.name_operation(Operation::Name)?;
        disk.folders.insert(name.to_owned());
        disk.directory.create_folder(name)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let mut disk = self.disk.lock();
        disk.name_operation(Operation::Name)?;
        if disk.names.contains_key(name) {
            // Its old content may still come back, so the new one is another file.
            disk.directory.remove(name)?;
        }
        let real = disk.directory.create(name)?;
        let number = disk.files.len();
        disk.files.push(FileState::new(real, Vec::new()));
        disk.change_name(NameChange::Made(name.to_owned(), number));
        Ok(Arc::new(FaultyFile { disk: Arc::clone(&self.disk), number }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let disk = self.disk.lock();
        let number = *disk.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(FaultyFile { disk: Arc::clone(&self.disk), number }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.name_operation(Operation::Name)?;
        disk.directory.rename(from, to)?;
        disk.change_name(NameChange::Renamed(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.name_operation(Operation::Remove)?;
        disk.directory.remove(name)?;
        disk.change_name(NameChange::Removed(name.to_owned()));
        Ok(())
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        self.disk.lock().directory.list(folder)
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        let mut disk = self.disk.lock();
        disk.name_operation(Operation::Sync)?;
        let pending = std::mem::take(&mut disk.pending);
        for change in pending {
            if change.folder() == folder {
                change.apply(&mut disk.durable_names);
            } else {
                disk.pending.push(change);
            }
        }
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let full = matches!(self.disk.lock().fault, Some((_, Fault::Full(_))));
        Ok(Space { total_bytes: 1 << 40, free_bytes: if full { 0 } else { 1 << 40 } })
    }
}

/// An open file of a [`FaultyDisk`].
#[derive(Debug)]
struct FaultyFile {
    disk: Arc<Mutex<Disk>>,
    number: usize,
}

impl StorageFile for FaultyFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut disk = self.disk.lock();
        let bytes = match disk.begin(Operation::Write)? {
            Some(Fault::Error) => return Err(input_output_error()),
            Some(Fault::Short) if bytes.len() > 1 => &bytes[..bytes.len() / 2],
            Some(_) | None => bytes,
        };
        let state = &mut disk.files[self.number];
        write_all_at(state.real.as_ref(), bytes, at)?;
        if let Some(last) = (at + bytes.len() as u64).checked_sub(1) {
            let sectors = at / SECTOR_BYTES..=last / SECTOR_BYTES;
            state.lost.retain(|sector| !sectors.contains(sector));
            state.dirty.extend(sectors);
        }
        Ok(bytes.len())
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        self.disk.lock().files[self.number].real.read_at(buffer, at)
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        let fault = disk.begin(Operation::Sync)?;
        let state = &mut disk.files[self.number];
        let dirty = std::mem::take(&mut state.dirty);
        if let Some(error) = fault.and_then(error_of) {
            // Marked clean without having been written, as Linux does.
            state.lost.extend(dirty);
            return Err(error);
        }
        for sector in dirty {
            if !state.lost.contains(&sector) {
                copy_sector(state.real.as_ref(), sector, &mut state.durable)?;
            }
        }
        Ok(())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        self.disk.lock().files[self.number].real.file_bytes()
    }

    fn allocate(&self, _bytes: u64) -> io::Result<()> {
        self.disk.lock().begin(Operation::Write).map(|_| ())
    }

    fn drop_cache(&self) -> io::Result<()> {
        let mut disk = self.disk.lock();
        let state = &mut disk.files[self.number];
        for sector in std::mem::take(&mut state.lost) {
            let start = usize::try_from(sector * SECTOR_BYTES).map_err(io::Error::other)?;
            let durable = state.durable.get(start..).unwrap_or_default();
            let mut bytes = [0; SECTOR];
            let count = durable.len().min(SECTOR);
            bytes[..count].copy_from_slice(&durable[..count]);
            write_all_at(state.real.as_ref(), &bytes, sector * SECTOR_BYTES)?;
        }
        Ok(())
    }

    fn map(&self, bytes: usize) -> io::Result<Mapping> {
        self.disk.lock().files[self.number].real.map(bytes)
    }
}

fn error_of(fault: Fault) -> Option<io::Error> {
    match fault {
        Fault::Error => Some(input_output_error()),
        Fault::FullSync => Some(io::ErrorKind::StorageFull.into()),
        Fault::Short | Fault::Full(_) | Fault::PowerLoss => None,
    }
}

fn input_output_error() -> io::Error {
    io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())
}

fn copy_sector(from: &dyn StorageFile, sector: u64, into: &mut Vec<u8>) -> io::Result<()> {
    let start = usize::try_from(sector * SECTOR_BYTES).map_err(io::Error::other)?;
    let mut bytes = [0; SECTOR];
    let count = read_full_at(from, &mut bytes, sector * SECTOR_BYTES)?;
    if into.len() < start + count {
        into.resize(start + count, 0);
    }
    into[start..start + count].copy_from_slice(&bytes[..count]);
    Ok(())
}

fn read_whole(file: &dyn StorageFile) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.file_bytes()?).map_err(io::Error::other)?];
    let count = read_full_at(file, &mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

fn folders_of(path: &Path) -> io::Result<Vec<String>> {
    let mut folders = vec![String::new()];
    for found in std::fs::read_dir(path)? {
        let found = found?;
        if found.file_type()?.is_dir()
            && let Ok(name) = found.file_name().into_string()
        {
            folders.push(name);
        }
    }
    Ok(folders)
}

fn folder_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}
