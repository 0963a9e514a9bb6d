//! Segments that were copied from another node, in a folder of their own, before they become this
//! node's log. Whether they are wanted is not known here.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::inspect::LogFiles;
use super::quarantine;
use super::recovery::{self, Found};
use super::segment::{HEADER_BYTES, SegmentHeader, parse_file_name};
use super::storage::{Storage, write_all_at};
use super::vote::{peek_local, peek_vote};
use super::{CheckpointMark, Directory, OpenError, Vote};
use crate::entry::FrameKey;
use crate::position::{EntryId, EntryIndex, LogOffset};

const NEW_FILE: &str = "next.tmp";

/// A folder of segments that was checked from its first to its last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagedLog {
    pub first: EntryIndex,
    pub last: EntryId,
    /// Behind the last entry.
    pub end: LogOffset,
    /// Of the newest segment.
    pub incarnation: u64,
}

/// Checks every frame of copied segments: they follow each other, end with their files, and hold
/// the checkpoint's last entry where it says.
pub fn check(
    dir: &Path,
    group_uuid: uuid::Uuid,
    mark: &CheckpointMark,
) -> Result<StagedLog, OpenError> {
    check_on(&Directory::existing(dir)?, group_uuid, mark)
}

fn check_on(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
    mark: &CheckpointMark,
) -> Result<StagedLog, OpenError> {
    let (chain, newest) = read_chain(storage, group_uuid)?;
    recovery::check_chain(&chain, newest, None, Some(mark))?;
    let key = FrameKey::of_group(group_uuid);
    recovery::check_mark(storage, &chain, recovery::scan_start(&chain, Some(mark))?, mark, key)?;
    let ending = recovery::scan(storage, &chain, recovery::scan_start(&chain, None)?, key)?;
    let (Some(first), Some(last)) = (chain.first(), chain.last()) else {
        return Err(OpenError::Missing { reason: "there is no segment".to_owned() });
    };
    let next = ending.next;
    let before = next.index.previous().filter(|before| *before >= mark.applied.index);
    match before {
        Some(index) if next.at == last.file_bytes => Ok(StagedLog {
            first: first.header.base,
            last: EntryId { term: next.term, index },
            end: last.header.base_position.advance(next.at - HEADER_BYTES),
            incarnation: newest,
        }),
        Some(_) | None => Err(OpenError::Corrupt {
            index: next.index,
            segment: last.name.clone(),
            at: next.at,
            reason: ending.fault.to_string(),
        }),
    }
}

fn read_chain(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
) -> Result<(Vec<Found>, u64), OpenError> {
    let listing = super::files::list(storage)?;
    let found = recovery::read_headers(storage, &listing, group_uuid)?;
    let newest = found.iter().map(|segment| segment.header.incarnation).max().unwrap_or(0);
    Ok((recovery::chain(found).0, newest))
}

/// Begins a segment behind the copied ones, of an incarnation that neither the copied log nor this
/// node's own in `own_dir` has had: this node's own mark begins with it. Doing it again changes
/// nothing.
pub fn begin_own_segment(
    dir: &Path,
    own_dir: &Path,
    group_uuid: uuid::Uuid,
    staged: &StagedLog,
) -> Result<(), OpenError> {
    let own = Directory::open(own_dir)?;
    let named = own.list("")?.into_iter().filter_map(|(name, _)| parse_file_name(&name));
    let newest_own = named.map(|(incarnation, _)| incarnation).max().unwrap_or(0);
    let noted = peek_local(&own, group_uuid)?.map_or(0, |local| local.incarnation);
    let header = SegmentHeader {
        group_uuid,
        incarnation: staged.incarnation.max(newest_own).max(noted) + 1,
        base: staged.last.index.next(),
        base_term: staged.last.term,
        base_position: staged.end,
        previous: staged.incarnation,
        anew: false,
        recycled: false,
    };
    let storage = Directory::on(dir);
    let file = storage.create(NEW_FILE)?;
    write_all_at(file.as_ref(), &header.encode(), 0)?;
    file.sync()?;
    storage.rename(NEW_FILE, &header.file_name())?;
    storage.sync_folder("")?;
    Ok(())
}

/// Whether a file of this name is a segment.
pub fn is_segment_name(name: &str) -> bool {
    parse_file_name(name).is_some()
}

/// The last vote of the log in a folder that is not open.
pub fn vote_in(dir: &Path, group_uuid: uuid::Uuid) -> io::Result<Option<Vote>> {
    match Directory::existing(dir) {
        Ok(storage) => peek_vote(&storage, group_uuid),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The last entry of the log in a folder that is not open, as far as it can be read.
pub fn last_in(dir: &Path) -> Result<Option<EntryId>, OpenError> {
    let Some(files) = own_files(dir)? else { return Ok(None) };
    let from = files.segments().last().map(|last| last.header);
    let Some(from) = from else { return Ok(None) };
    let before = from.base.previous().map(|index| EntryId { term: from.base_term, index });
    let frames = files.frames(from.base).map_while(Result::ok);
    Ok(frames.last().map(|frame| frame.entry.id).or(before))
}

fn own_files(dir: &Path) -> Result<Option<LogFiles>, OpenError> {
    let storage = match Directory::existing(dir) {
        Ok(storage) => storage,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if super::files::list(&storage)?.segments.is_empty() {
        return Ok(None);
    }
    LogFiles::on(Arc::new(storage)).map(Some)
}

/// Copies to quarantine what the log in `own_dir` has behind `committed` and the copied one has
/// not; where nothing is known of commits, only what lies in the range of the copied log. Returns
/// how many entries that were. What cannot be read is left out.
pub fn save_orphans(
    own_dir: &Path,
    staged_dir: &Path,
    committed: Option<EntryIndex>,
    quarantine_bytes_max: u64,
) -> Result<u64, OpenError> {
    let Some(own) = own_files(own_dir)? else { return Ok(0) };
    let staged = LogFiles::on(Arc::new(Directory::existing(staged_dir)?))?;
    let first = staged.segments().first().map_or(EntryIndex::ZERO, |first| first.header.base);
    let from = committed.map_or(first, EntryIndex::next);
    let mut theirs = staged.frames(from).map_while(Result::ok).peekable();
    let mut parts: Vec<(String, EntryIndex, std::ops::Range<u64>)> = Vec::new();
    let mut count = 0;
    for frame in own.frames(from).map_while(Result::ok) {
        let id = frame.entry.id;
        while theirs.next_if(|other| other.entry.id.index < id.index).is_some() {}
        if count == 0 && theirs.peek().is_some_and(|other| other.entry.id == id) {
            continue;
        }
        count += 1;
        let end_at = frame.at + frame.header.frame_bytes();
        match parts.last_mut() {
            Some((segment, _, range)) if *segment == frame.segment => range.end = end_at,
            Some(_) | None => parts.push((frame.segment, id.index, frame.at..end_at)),
        }
    }
    let storage = Directory::on(own_dir);
    for (segment, first, range) in parts {
        if let Some(facts) = own.segments().into_iter().find(|facts| facts.name == segment) {
            quarantine::copy(&storage, &facts.header, first, range)?;
        }
    }
    quarantine::bound(&storage, quarantine_bytes_max)?;
    Ok(count)
}
