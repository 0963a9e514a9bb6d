//! The seam to the file system for index pages, checkpoints and identity: a real directory, or one
//! that fails and forgets on purpose. The log has a seam of its own, shaped by its writer.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(test)]
pub(crate) mod faulty;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Ends the name of a file that is not complete.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// An open file; all access is by position.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Fills `buffer`, or fails with `UnexpectedEof`.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Makes content and length durable, but not the name.
    fn sync(&self) -> io::Result<()>;
    fn file_bytes(&self) -> io::Result<u64>;
}

pub trait Disk: fmt::Debug + Send + Sync {
    /// Creates a directory (0700) and those above it; one that is there already is fine. Those
    /// above it are durable then.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// Names in a directory, ascending; none if there is no such directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Opens for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Creates an empty file (0600), in place of one of that name.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// All bytes of a file; `None` if there is no such file.
pub fn read_file(disk: &dyn Disk, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let file_bytes = usize::try_from(file.file_bytes()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; file_bytes];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

/// Puts a file of `parts` under `name`: after a crash at any point there is the old file or the
/// whole new one. Durable on return.
///
/// Errors: what was written so far is removed as far as possible; the old file is still there,
/// unless the last step, the sync of the directory, failed: then either may be.
pub fn replace_file(disk: &dyn Disk, dir: &Path, name: &str, parts: &[&[u8]]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}{TEMPORARY_SUFFIX}"));
    let written = write_synced(disk, &temporary, parts)
        .and_then(|()| disk.rename(&temporary, &dir.join(name)));
    if let Err(error) = written {
        if let Err(left) = disk.remove(&temporary) {
            tracing::debug!(file = %temporary.display(), error = %left, "temporary file is left");
        }
        return Err(error);
    }
    disk.sync_dir(dir)
}

fn write_synced(disk: &dyn Disk, path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let file = disk.create(path)?;
    let mut at = 0;
    for part in parts {
        file.write_at(part, at)?;
        at += part.len() as u64;
    }
    file.sync()
}

/// Directories and files of the operating system.
#[derive(Clone, Copy, Debug)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile {
    file: File,
    path: PathBuf,
}

/// Adds the path, which errors of the operating system lack.
fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

impl RealDisk {
    fn open_with(path: &Path, options: &mut OpenOptions) -> io::Result<Arc<dyn DiskFile>> {
        let file = named(path, options.read(true).write(true).mode(FILE_MODE).open(path))?;
        Ok(Arc::new(RealFile { file, path: path.to_owned() }))
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        named(&self.path, self.file.read_exact_at(buffer, at))
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        named(&self.path, self.file.write_all_at(bytes, at))
    }

    fn sync(&self) -> io::Result<()> {
        named(&self.path, self.file.sync_data())
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(named(&self.path, self.file.metadata())?.len())
    }
}

impl Disk for RealDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut missing = Vec::new();
        for above in dir.ancestors() {
            if named(above, above.try_exists())? {
                break;
            }
            missing.push(above);
        }
        named(dir, fs::DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(dir))?;
        for made in missing.iter().rev().filter_map(|made| made.parent()) {
            // Of a relative path the last parent has no name.
            let above = if made.as_os_str().is_empty() { Path::new(".") } else { made };
            self.sync_dir(above)?;
        }
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => named(dir, other)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.push(named(dir, entry)?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Self::open_with(path, &mut OpenOptions::new())
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Self::open_with(path, OpenOptions::new().create(true).truncate(true))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        named(from, fs::rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        named(path, fs::remove_file(path))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        named(dir, File::open(dir).and_then(|dir| dir.sync_all()))
    }
}
