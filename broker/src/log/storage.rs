//! The disk seam: everything that the log asks of a directory. Knows no frames and no segments.

use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mapping::Mapping;

/// One directory. Names are relative to it, with at most one folder in front.
pub trait Storage: Debug + Send + Sync {
    /// Makes a folder if it is not there; it is durable after `sync_folder("")`.
    fn create_folder(&self, name: &str) -> io::Result<()>;

    /// Makes an empty file, or empties what has the name.
    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;

    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;

    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    fn remove(&self, name: &str) -> io::Result<()>;

    /// Names and sizes of the files in a folder (`""`: the directory itself), ascending by name.
    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>>;

    /// Makes creations, renames and removals in a folder durable.
    fn sync_folder(&self, folder: &str) -> io::Result<()>;

    fn space(&self) -> io::Result<Space>;
}

/// How large a file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub total_bytes: u64,
    /// Left for data.
    pub free_bytes: u64,
}

/// An open file of a [`Storage`].
pub trait StorageFile: Debug + Send + Sync {
    /// May write less than asked.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize>;

    /// May read less than asked; 0 at the end of the file.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    /// Makes what was written durable. After an error nothing may be assumed about any of it.
    fn sync(&self) -> io::Result<()>;

    fn file_bytes(&self) -> io::Result<u64>;

    /// Takes space for the first `bytes` of the file, so that writing there needs no more.
    fn allocate(&self, bytes: u64) -> io::Result<()>;

    /// Lets the next reads come from the disk, as far as pages are clean.
    fn drop_cache(&self) -> io::Result<()>;

    /// Maps `bytes` from the start for reading; the file may still be shorter.
    fn map(&self, bytes: usize) -> io::Result<Mapping>;
}

/// Writes all of `bytes`.
pub(super) fn write_all_at(
    file: &dyn StorageFile,
    mut bytes: &[u8],
    mut at: u64,
) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads until `buffer` is full or the file ends; returns how much was read.
pub(super) fn read_full_at(
    file: &dyn StorageFile,
    buffer: &mut [u8],
    at: u64,
) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Whether an error means that there is no space, which passes, unlike every other one.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Tells a sync that found no space from a write that did: trying again would hide what is lost.
pub(super) fn sync_result(result: io::Result<()>) -> io::Result<()> {
    result.map_err(|error| {
        if is_full(&error) { io::Error::other(format!("a sync failed: {error}")) } else { error }
    })
}

/// An `io::Error` cannot be cloned, and many may wait for one write.
pub(super) fn copy_error(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(
        || io::Error::new(error.kind(), error.to_string()),
        io::Error::from_raw_os_error,
    )
}

/// A real directory.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    /// Files are opened for writing too.
    writable: bool,
}

impl Directory {
    /// Makes the directory if it is not there.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self::on(path))
    }

    /// A directory that is there and durable already.
    pub(super) fn on(path: &Path) -> Self {
        Self { path: path.to_owned(), writable: true }
    }

    /// A directory that must be there already, for reading.
    pub fn existing(path: &Path) -> io::Result<Self> {
        if !fs::metadata(path)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { path: path.to_owned(), writable: false })
    }

    fn path_of(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.path.clone() } else { self.path.join(name) }
    }
}

impl Storage for Directory {
    fn create_folder(&self, name: &str) -> io::Result<()> {
        fs::create_dir_all(self.path_of(name))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        Ok(Arc::new(DirectoryFile(options.open(self.path_of(name))?)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let file = OpenOptions::new().read(true).write(self.writable).open(self.path_of(name))?;
        Ok(Arc::new(DirectoryFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path_of(from), self.path_of(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path_of(name))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let mut names = Vec::new();
        for found in fs::read_dir(self.path_of(folder))? {
            let found = found?;
            let Ok(name) = found.file_name().into_string() else { continue };
            match found.metadata() {
                Ok(facts) if facts.is_file() => names.push((name, facts.len())),
                Ok(_) => {}
                // Unlinked by the running writer since the directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        names.sort();
        Ok(names)
    }

    fn sync_folder(&self, folder: &str) -> io::Result<()> {
        File::open(self.path_of(folder))?.sync_all()
    }

    fn space(&self) -> io::Result<Space> {
        let facts = rustix::fs::statvfs(&self.path)?;
        Ok(Space {
            total_bytes: facts.f_blocks.saturating_mul(facts.f_frsize),
            free_bytes: facts.f_bavail.saturating_mul(facts.f_frsize),
        })
    }
}

#[derive(Debug)]
struct DirectoryFile(File);

impl StorageFile for DirectoryFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        FileExt::write_at(&self.0, bytes, at)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        FileExt::read_at(&self.0, buffer, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.0, keep, 0, bytes) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => fill_zeros(self, 0, bytes),
            Err(error) => Err(error.into()),
        }
    }

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed)?)
    }

    fn map(&self, bytes: usize) -> io::Result<Mapping> {
        Mapping::new(&self.0, bytes)
    }
}

/// Writes zeros over `from..end`.
pub(super) fn fill_zeros(file: &dyn StorageFile, from: u64, end: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = from;
    while at < end {
        let count = usize::try_from(end - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        write_all_at(file, &ZEROS[..count], at)?;
        at += count as u64;
    }
    Ok(())
}
