//! Puts a complete re-seed in the place of the node's own log and checkpoints, before they are
//! opened. Every step may be the last one before a crash: the next start goes on from there.
//!
//! The vote, the node-local facts, the identity and the quarantine stay: they are this node's.

use std::io;
use std::path::{Path, PathBuf};

use super::mark::{CLEARED_FILE, COMPLETE_FILE, Mark, SOURCE_FILE};
use super::{CHECKPOINT, FOLDER, LOG, Receiver};
use crate::disk::{Disk, RealDisk, TEMPORARY_SUFFIX, read_file};
use crate::log::{OpenError, staged};
use crate::position::{EntryId, EntryIndex};

const INDEX: &str = "index";
/// Names in `log/` that go with the log that is replaced.
const LOG_SUFFIXES: [&str; 3] = [".log", ".pool", TEMPORARY_SUFFIX];

/// What is at stake when a re-seed is put in place.
#[derive(Clone, Debug)]
pub struct InstallOptions {
    /// The data directory; its lock is held and nothing in it is open.
    pub root: PathBuf,
    pub receiver: Receiver,
    /// File in `root` of how far this node knew the log to be committed.
    pub hint_file: &'static str,
    /// What that file says.
    pub committed: Option<EntryIndex>,
    pub quarantine_bytes_max: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("I/O failed while a re-seed was put in place; the next start goes on with it")]
    Io(#[from] io::Error),
    #[error("a re-seed cannot be put in place")]
    Log(#[from] OpenError),
}

/// Puts a complete re-seed in place, if there is one; returns the last entry of the new log.
///
/// One that became complete before this node recognised another leader is not used: since then the
/// node may have taken entries that it lacks.
pub fn install(options: &InstallOptions) -> Result<Option<EntryId>, InstallError> {
    let disk = RealDisk;
    let folder = options.root.join(FOLDER);
    let mark = match read_mark(&disk, &folder, CLEARED_FILE)? {
        Some(mark) => mark,
        None => match read_mark(&disk, &folder, COMPLETE_FILE)? {
            Some(mark) if permitted(options, &mark)? => {
                prepare(options, &mark)?;
                mark
            }
            Some(_) => {
                disk.remove(&folder.join(COMPLETE_FILE))?;
                disk.sync_dir(&folder)?;
                return Ok(None);
            }
            None => return Ok(None),
        },
    };
    put_in_place(&disk, &options.root, options.hint_file)?;
    let (last, donor) = (mark.staged.last, mark.donor);
    tracing::warn!(%last, donor, "a re-seed took the place of the log");
    Ok(Some(last))
}

/// `None` also for one that was torn: then the files are gathered on.
fn read_mark(disk: &dyn Disk, folder: &Path, name: &str) -> io::Result<Option<Mark>> {
    let Some(bytes) = read_file(disk, &folder.join(name))? else { return Ok(None) };
    match Mark::decode(&bytes) {
        Ok(mark) => Ok(Some(mark)),
        Err(reason) => {
            tracing::error!(name, reason, "the mark of a re-seed cannot be read");
            Ok(None)
        }
    }
}

/// Whether the files still are all that this node may have answered for.
fn permitted(options: &InstallOptions, mark: &Mark) -> Result<bool, InstallError> {
    if mark.receiver != options.receiver {
        tracing::error!("a re-seed was gathered for another data directory and is not used");
        return Ok(false);
    }
    let own_dir = options.root.join(LOG);
    let vote = staged::vote_in(&own_dir, options.receiver.group_uuid)?;
    if vote.is_none_or(|vote| (vote.term, vote.node) != (mark.vote.term, mark.vote.node)) {
        tracing::warn!(?vote, gathered = ?mark.vote, "another leader came: a re-seed is not used");
        return Ok(false);
    }
    // A log that cannot be read any more is one more reason for the re-seed.
    let last = staged::last_in(&own_dir).unwrap_or_default();
    let ahead =
        last.is_some_and(|last| last.term == mark.vote.term && last.index > mark.staged.last.index);
    if ahead {
        tracing::warn!(?last, "the log went past a re-seed, which is not used");
    }
    Ok(!ahead)
}

/// What must be there before anything of the node's own goes. Doing it again changes nothing.
fn prepare(options: &InstallOptions, mark: &Mark) -> Result<(), InstallError> {
    let own_dir = options.root.join(LOG);
    let staged_dir = options.root.join(FOLDER).join(LOG);
    let max = options.quarantine_bytes_max;
    match staged::save_orphans(&own_dir, &staged_dir, options.committed, max) {
        Ok(0) => {}
        Ok(entries) => tracing::warn!(entries, "entries that the group lacks are in quarantine"),
        // The log to be replaced may be damaged.
        Err(error) => tracing::error!(%error, "the replaced log's tail cannot be read"),
    }
    staged::begin_own_segment(&staged_dir, &own_dir, options.receiver.group_uuid, &mark.staged)?;
    Ok(())
}

/// The steps that change what a start would find, in an order in which each may be repeated.
fn put_in_place(disk: &dyn Disk, root: &Path, hint_file: &str) -> io::Result<()> {
    let folder = root.join(FOLDER);
    if disk.list(&folder)?.iter().any(|name| name == COMPLETE_FILE) {
        remove_own(disk, root, hint_file)?;
        disk.rename(&folder.join(COMPLETE_FILE), &folder.join(CLEARED_FILE))?;
        disk.sync_dir(&folder)?;
    }
    for part in [LOG, CHECKPOINT] {
        let (from, to) = (folder.join(part), root.join(part));
        for name in disk.list(&from)? {
            disk.rename(&from.join(&name), &to.join(&name))?;
        }
        disk.sync_dir(&to)?;
        disk.sync_dir(&from)?;
    }
    for name in disk.list(&folder)? {
        if name == SOURCE_FILE {
            disk.remove(&folder.join(name))?;
        }
    }
    disk.remove(&folder.join(CLEARED_FILE))?;
    disk.sync_dir(&folder)
}

/// Removes what is replaced, and all that was derived from it.
fn remove_own(disk: &dyn Disk, root: &Path, hint_file: &str) -> io::Result<()> {
    for part in [CHECKPOINT, INDEX, LOG] {
        let dir = root.join(part);
        disk.create_dir(&dir)?;
        for name in disk.list(&dir)? {
            if part != LOG || LOG_SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
                disk.remove(&dir.join(name))?;
            }
        }
        disk.sync_dir(&dir)?;
    }
    if disk.list(root)?.iter().any(|name| name == hint_file) {
        disk.remove(&root.join(hint_file))?;
        disk.sync_dir(root)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
