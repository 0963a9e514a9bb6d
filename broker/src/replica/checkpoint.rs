//! State and index directory at one applied index, in two generations of files.
//!
//! Owns the checkpoint folder and the order of its writes: dirty index pages first, synced, then
//! the checkpoint under a temporary name, synced, renamed, the folder synced, and only then the
//! third-newest removed. What the state and the membership consist of is not looked at.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, BufMut, TryGetError};
use uuid::Uuid;

use super::state::{GateMode, TrimPoint};
use crate::disk::{Disk, TEMPORARY_SUFFIX, read_file, replace_file};
use crate::log::CheckpointMark;
use crate::position::{EntryId, EntryIndex, LogOffset, Term};
use crate::queue::blocks::{BlockWriter, IndexDamage, Written};
use crate::queue::index::{Capture, Index};

const MAGIC: [u8; 8] = *b"DrumCkpt";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 160;
const FILE_PREFIX: &str = "checkpoint-";
/// Of the first checkpoint in a directory.
const FIRST_GENERATION: u64 = 1;

/// What a checkpoint says besides state and index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointMeta {
    /// Of the broker group, made at bootstrap.
    pub group_uuid: Uuid,
    /// The last entry that the state has seen.
    pub applied: EntryId,
    /// Behind the applied entry's frame.
    pub end: LogOffset,
    pub gate: GateMode,
    pub trimmed: TrimPoint,
    /// The last entry that Raft has given up.
    pub purged: Option<EntryId>,
    /// The entry that brought the membership; none if it is the initial, empty one.
    pub membership_at: Option<EntryId>,
    /// Opaque here.
    pub membership: Vec<u8>,
}

impl CheckpointMeta {
    pub fn mark(&self) -> CheckpointMark {
        CheckpointMark { applied: self.applied, end: self.end }
    }
}

/// A checkpoint as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub generation: u64,
    pub meta: CheckpointMeta,
    /// Opaque here.
    pub state: Vec<u8>,
    directory: Vec<u8>,
}

/// Why a checkpoint file does not count.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointFault {
    #[error("it is no checkpoint")]
    Magic,
    #[error("version {0} is not known")]
    Version(u16),
    #[error("the checksum of its {0} does not match")]
    Checksum(&'static str),
    #[error("it has {found} bytes, not {expected}")]
    Length { found: u64, expected: u64 },
    #[error("it ends too early")]
    Short(#[from] TryGetError),
    #[error("it is of generation {0}")]
    Generation(u64),
    #[error("gate mode {0} is not known")]
    Gate(u8),
}

/// A checkpoint that was passed over.
#[derive(Debug)]
pub struct DamagedFile {
    pub path: PathBuf,
    pub fault: CheckpointFault,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("checkpoint I/O failed")]
    Io(#[from] io::Error),
    #[error("checkpoint {path} belongs to broker group {found}, this is {own}")]
    OtherGroup { path: PathBuf, found: Uuid, own: Uuid },
    #[error("checkpoint {path} cannot be used")]
    Damaged { path: PathBuf, source: CheckpointFault },
}

/// The lines at the checkpoint.
#[derive(Debug)]
pub enum IndexFound {
    Ready(Index),
    /// To be rebuilt from a scan of the log, see [`crate::queue::rebuild`].
    Damaged(IndexDamage),
}

/// What a start finds.
#[derive(Debug)]
pub struct Opened {
    pub checkpointer: Checkpointer,
    /// The newest readable one.
    pub checkpoint: Option<Checkpoint>,
    pub index: IndexFound,
    /// Newer or older ones that cannot be read.
    pub damaged: Vec<DamagedFile>,
}

/// A durable checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    pub generation: u64,
    pub mark: CheckpointMark,
}

/// Writes checkpoints, one after another; its owner runs it on a thread of its own.
#[derive(Debug)]
pub struct Checkpointer {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    blocks: BlockWriter,
    newest: Option<Kept>,
    older: Option<Kept>,
    next_generation: u64,
    /// Why no further checkpoint is written: a sync failed, so what is on disk is not known.
    failed: Option<String>,
}

impl Checkpointer {
    /// Loads the newest readable checkpoint of `dir` and the index it refers to in `index_dir`.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        index_dir: &Path,
        group_uuid: Uuid,
    ) -> Result<Opened, CheckpointError> {
        disk.create_dir(dir)?;
        let mut found = find(&*disk, dir)?;
        for (path, checkpoint) in &found.valid {
            let (path, other) = (path.clone(), checkpoint.meta.group_uuid);
            if other != group_uuid {
                return Err(CheckpointError::OtherGroup { path, found: other, own: group_uuid });
            }
        }
        let mut valid = found.valid.drain(..).map(|(_, checkpoint)| checkpoint);
        let (newest, older) = (valid.next(), valid.next());
        drop(valid);
        let older_directory = older.as_ref().map(|c| c.directory.as_slice());
        let loaded = newest.as_ref().map(|c| {
            BlockWriter::load(Arc::clone(&disk), index_dir, &c.directory, older_directory)
        });
        let begin = || BlockWriter::begin(Arc::clone(&disk), index_dir, found.next_generation);
        let (blocks, index) = match loaded {
            Some(Ok((blocks, index))) => (blocks, IndexFound::Ready(index)),
            Some(Err(damage)) => (begin()?, IndexFound::Damaged(damage)),
            None => (begin()?, IndexFound::Ready(Index::default())),
        };
        let kept = |c: &Checkpoint| Kept { generation: c.generation, mark: c.meta.mark() };
        let checkpointer = Self {
            disk,
            dir: dir.to_owned(),
            blocks,
            newest: newest.as_ref().map(kept),
            older: older.as_ref().map(kept),
            next_generation: found.next_generation,
            failed: None,
        };
        Ok(Opened { checkpointer, checkpoint: newest, index, damaged: found.damaged })
    }

    /// Makes a checkpoint of `capture`, `meta` and `state`, all of one applied index, durable.
    /// Settle the index with what comes back, after the capture is dropped.
    ///
    /// `durable_end` (exclusive) is how far the local log is synced: the caller waits until it
    /// covers the applied index, or a crash would leave a state that is ahead of its log.
    ///
    /// Errors leave the two kept checkpoints readable. After a full disk it may be tried again; any
    /// other error is final.
    pub fn write(
        &mut self,
        capture: &Capture,
        meta: &CheckpointMeta,
        state: &[u8],
        durable_end: EntryIndex,
    ) -> io::Result<Written> {
        let applied = meta.applied.index;
        assert!(
            durable_end > applied,
            "a checkpoint at {applied} is ahead of the durable end {durable_end}"
        );
        if let Some(newest) = self.newest {
            let before = newest.mark.applied.index;
            assert!(applied >= before, "checkpoints may not go back: {applied} after {before}");
        }
        if let Some(reason) = &self.failed {
            return Err(io::Error::other(format!("an earlier checkpoint failed: {reason}")));
        }
        let written = self.write_files(capture, meta, state);
        if let Err(error) = &written
            && error.kind() != io::ErrorKind::StorageFull
        {
            self.failed = Some(error.to_string());
        }
        written
    }

    /// Whether [`Self::write`] has failed for good.
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    fn write_files(
        &mut self,
        capture: &Capture,
        meta: &CheckpointMeta,
        state: &[u8],
    ) -> io::Result<Written> {
        let generation = self.next_generation;
        // Counted up first: a name that may have reached the disk is not used again.
        self.next_generation += 1;
        let written = self.blocks.write(capture, generation)?;
        let sections = [meta.membership.as_slice(), state, written.directory.as_slice()];
        let header = encode_header(generation, meta, sections);
        let parts = [header.as_slice(), sections[0], sections[1], sections[2]];
        replace_file(&*self.disk, &self.dir, &file_name(generation), &parts)?;
        self.blocks.keep(&written);
        self.older = self.newest.replace(Kept { generation, mark: meta.mark() });
        self.remove_others();
        Ok(written)
    }

    /// A file that stays takes space, and goes with the next checkpoint.
    fn remove_others(&self) {
        let kept = [self.newest, self.older].map(|kept| kept.map(|k| file_name(k.generation)));
        let removed = self.disk.list(&self.dir).and_then(|names| {
            for name in names.iter().filter(|name| name.starts_with(FILE_PREFIX)) {
                if !kept.iter().flatten().any(|kept| kept == name) {
                    self.disk.remove(&self.dir.join(name))?;
                }
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "an old checkpoint could not be removed");
        }
    }

    pub fn newest(&self) -> Option<Kept> {
        self.newest
    }

    /// How far purging and trimming may go: to the older of the two durable checkpoints. The very
    /// first one counts as both.
    pub fn forget_limit(&self) -> Option<CheckpointMark> {
        let first = self.newest.filter(|newest| newest.generation == FIRST_GENERATION);
        self.older.or(first).map(|kept| kept.mark)
    }
}

pub(super) fn file_name(generation: u64) -> String {
    format!("{FILE_PREFIX}{generation:020}")
}

/// Whether a file of this name is a checkpoint.
pub fn is_file_name(name: &str) -> bool {
    generation_of(name).is_some_and(|generation| file_name(generation) == name)
}

fn generation_of(name: &str) -> Option<u64> {
    name.strip_prefix(FILE_PREFIX)?.parse().ok()
}

/// What a checkpoint's file says besides state and index; all of it is checked.
pub fn read_meta(path: &Path, bytes: &[u8]) -> Result<CheckpointMeta, CheckpointError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let generation = generation_of(name).unwrap_or_default();
    let damaged = |fault| CheckpointError::Damaged { path: path.to_owned(), source: fault };
    Ok(decode(bytes, generation).map_err(damaged)?.meta)
}

#[derive(Debug)]
struct Found {
    /// Newest first.
    valid: Vec<(PathBuf, Checkpoint)>,
    damaged: Vec<DamagedFile>,
    next_generation: u64,
}

/// Reads all checkpoints and removes what was never finished.
fn find(disk: &dyn Disk, dir: &Path) -> io::Result<Found> {
    let mut found =
        Found { valid: Vec::new(), damaged: Vec::new(), next_generation: FIRST_GENERATION };
    for name in disk.list(dir)?.into_iter().rev() {
        let path = dir.join(&name);
        if name.ends_with(TEMPORARY_SUFFIX) {
            disk.remove(&path)?;
            continue;
        }
        let Some(generation) = generation_of(&name) else { continue };
        found.next_generation = found.next_generation.max(generation.saturating_add(1));
        let Some(bytes) = read_file(disk, &path)? else { continue };
        match decode(&bytes, generation) {
            Ok(checkpoint) => found.valid.push((path, checkpoint)),
            Err(fault) => found.damaged.push(DamagedFile { path, fault }),
        }
    }
    Ok(found)
}

/// `sections`: membership, state, index directory.
fn encode_header(generation: u64, meta: &CheckpointMeta, sections: [&[u8]; 3]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.put_slice(&MAGIC);
    bytes.put_u16_le(VERSION);
    bytes.put_u8(meta.gate as u8);
    bytes.put_u8(u8::from(meta.purged.is_some()));
    bytes.put_u8(u8::from(meta.membership_at.is_some()));
    bytes.put_bytes(0, 3);
    bytes.put_u64_le(generation);
    bytes.put_slice(meta.group_uuid.as_bytes());
    put_id(&mut bytes, Some(meta.applied));
    bytes.put_u64_le(meta.end.get());
    bytes.put_u64_le(meta.trimmed.below.get());
    bytes.put_u64_le(meta.trimmed.position.get());
    put_id(&mut bytes, meta.purged);
    put_id(&mut bytes, meta.membership_at);
    for section in sections {
        bytes.put_u64_le(section.len() as u64);
    }
    for section in sections {
        bytes.put_u32_le(crc32fast::hash(section));
    }
    bytes.put_u64_le(0);
    let crc = crc32fast::hash(&bytes);
    bytes.put_u32_le(crc);
    assert!(bytes.len() == HEADER_BYTES, "a checkpoint's header has {} bytes", bytes.len());
    bytes
}

fn decode(bytes: &[u8], generation: u64) -> Result<Checkpoint, CheckpointFault> {
    let length = |expected: u64| CheckpointFault::Length { found: bytes.len() as u64, expected };
    let (header, mut rest) =
        bytes.split_at_checked(HEADER_BYTES).ok_or(length(HEADER_BYTES as u64))?;
    let mut fields = header.strip_prefix(&MAGIC).ok_or(CheckpointFault::Magic)?;
    let version = fields.try_get_u16_le()?;
    if version != VERSION {
        return Err(CheckpointFault::Version(version));
    }
    let (checked, mut crc) = header.split_at(HEADER_BYTES - 4);
    if crc.try_get_u32_le()? != crc32fast::hash(checked) {
        return Err(CheckpointFault::Checksum("header"));
    }
    let gate = match fields.try_get_u8()? {
        1 => GateMode::Paired,
        2 => GateMode::Alone,
        other => return Err(CheckpointFault::Gate(other)),
    };
    let has_purged = fields.try_get_u8()? != 0;
    let has_membership_at = fields.try_get_u8()? != 0;
    fields.try_get_uint_le(3)?;
    let found = fields.try_get_u64_le()?;
    if found != generation {
        return Err(CheckpointFault::Generation(found));
    }
    let group_uuid = Uuid::from_u128(fields.try_get_u128()?);
    let applied = decode_id(&mut fields)?;
    let end = LogOffset::new(fields.try_get_u64_le()?);
    let below = EntryIndex::new(fields.try_get_u64_le()?);
    let trimmed = TrimPoint { below, position: LogOffset::new(fields.try_get_u64_le()?) };
    let purged = Some(decode_id(&mut fields)?).filter(|_| has_purged);
    let membership_at = Some(decode_id(&mut fields)?).filter(|_| has_membership_at);
    let mut sizes = [0; 3];
    for size in &mut sizes {
        *size = fields.try_get_u64_le()?;
    }
    let expected = sizes.iter().fold(HEADER_BYTES as u64, |sum, size| sum.saturating_add(*size));
    if expected != bytes.len() as u64 {
        return Err(length(expected));
    }
    let mut section = |at: usize, name| {
        let size = usize::try_from(sizes[at]).map_err(|_| length(expected))?;
        let (section, behind) = rest.split_at_checked(size).ok_or(length(expected))?;
        rest = behind;
        if fields.try_get_u32_le()? != crc32fast::hash(section) {
            return Err(CheckpointFault::Checksum(name));
        }
        Ok(section.to_vec())
    };
    let membership = section(0, "membership")?;
    let state = section(1, "state")?;
    let directory = section(2, "index directory")?;
    let meta = CheckpointMeta {
        group_uuid,
        applied,
        end,
        gate,
        trimmed,
        purged,
        membership_at,
        membership,
    };
    Ok(Checkpoint { generation, meta, state, directory })
}

fn put_id(bytes: &mut Vec<u8>, id: Option<EntryId>) {
    bytes.put_u64_le(id.map_or(0, |id| id.term.get()));
    bytes.put_u64_le(id.map_or(0, |id| id.index.get()));
}

fn decode_id(fields: &mut &[u8]) -> Result<EntryId, TryGetError> {
    let term = Term::new(fields.try_get_u64_le()?);
    Ok(EntryId { term, index: EntryIndex::new(fields.try_get_u64_le()?) })
}

#[cfg(test)]
mod tests;
