//! What lies in the directory of one witness: `identity` as in a data directory, `log/`,
//! `committed`, `applied` once something was trimmed, and `lost` if it is not to be used any more. It
//! is made as a whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::WitnessError;
use crate::data_dir::{Bootstrap, Claim, Identity, read_identity, write_identity};
use crate::disk::{Disk, RealDisk, replace_file};
use crate::log::{Log, LogOptions};
use crate::position::{EntryIndex, Term};

const LOG: &str = "log";
const VOTE: &str = "vote";
const HINT: &str = "committed";
/// There once a leader has found that entries are missing which it had been answered as synced.
const LOST: &str = "lost";
/// Ends the name of a directory that is not complete.
const NEW_SUFFIX: &str = ".new";

/// A witness's log grows by about a hundred bytes an entry.
const SEGMENT_BYTES: u64 = 4 << 20;
const RESERVE_BYTES: u64 = 1 << 20;
const TAIL_BYTES_MAX: u64 = 256 << 20;
const QUARANTINE_BYTES_MAX: u64 = 64 << 20;

pub(super) fn log_options(group_uuid: uuid::Uuid) -> LogOptions {
    LogOptions {
        segment_bytes: SEGMENT_BYTES,
        prepared_bytes: SEGMENT_BYTES,
        reserve_bytes: RESERVE_BYTES,
        tail_bytes_max: TAIL_BYTES_MAX,
        quarantine_bytes_max: QUARANTINE_BYTES_MAX,
        ..LogOptions::new(group_uuid)
    }
}

pub(super) fn log_dir(dir: &Path) -> PathBuf {
    dir.join(LOG)
}

pub(super) fn hint_path(dir: &Path) -> PathBuf {
    dir.join(HINT)
}

/// Whose it is. Blocks.
///
/// Errors: also if its votes are gone: without them it is no witness any more.
pub(super) fn check(dir: &Path) -> Result<Identity, WitnessError> {
    let forgot = |what| WitnessError::Forgot { dir: dir.to_owned(), what };
    let io = |error| WitnessError::Io { dir: dir.to_owned(), error };
    let identity = read_identity(&RealDisk, dir)?.ok_or(forgot("its identity and its log"))?;
    if dir.join(LOST).try_exists().map_err(io)? {
        return Err(forgot("entries that it had answered as synced"));
    }
    let vote = log_dir(dir).join(VOTE);
    if !vote.try_exists().map_err(io)? {
        return Err(forgot("the file of its votes"));
    }
    Ok(identity)
}

/// Makes the directory of a new witness in `parent`, named by its group's UUID; durable on return.
/// Blocks.
pub(super) fn create(
    parent: &Path,
    claim: &Claim,
    bootstrap: Bootstrap,
) -> Result<PathBuf, WitnessError> {
    let group_uuid = bootstrap.group_uuid;
    let dir = parent.join(group_uuid.to_string());
    let new = parent.join(format!("{group_uuid}{NEW_SUFFIX}"));
    let io = |error| WitnessError::Io { dir: dir.clone(), error };
    remove_incomplete(&new).map_err(io)?;
    let disk = RealDisk;
    disk.create_dir(&log_dir(&new)).map_err(io)?;
    // The file of votes must be there before the identity says that this is a voter.
    let opened = Log::open(&log_dir(&new), log_options(group_uuid), None);
    let (log, _) = opened.map_err(|error| WitnessError::Log { dir: dir.clone(), error })?;
    log.close();
    disk.sync_dir(&log_dir(&new)).map_err(io)?;
    write_identity(&disk, &new, claim, bootstrap).map_err(io)?;
    disk.rename(&new, &dir).map_err(io)?;
    disk.sync_dir(parent).map_err(io)?;
    Ok(dir)
}

fn remove_incomplete(new: &Path) -> io::Result<()> {
    match fs::remove_dir_all(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Notes that this witness lost what it had answered; durable on return. Blocks.
pub(super) fn mark_lost(dir: &Path, term: Term, end: EntryIndex) -> Result<(), WitnessError> {
    let text = format!("term {term}: answered entries below {end}, and does not have them\n");
    replace_file(&RealDisk, dir, LOST, &[text.as_bytes()])
        .map_err(|error| WitnessError::Io { dir: dir.to_owned(), error })
}

/// Takes a directory out of use under another name, which ends with `node_id`: of the witness that it
/// held, or of the one that takes its place; durable on return. Blocks.
pub(super) fn retire(dir: &Path, node_id: u64) -> Result<(), WitnessError> {
    let io = |error| WitnessError::Io { dir: dir.to_owned(), error };
    let mut name = dir.as_os_str().to_owned();
    name.push(format!(".retired-{node_id}"));
    let disk = RealDisk;
    disk.rename(dir, Path::new(&name)).map_err(io)?;
    disk.sync_dir(dir.parent().unwrap_or(dir)).map_err(io)
}
