//! Damage inside a segment that had been durable: where exactly it is, and a whole copy of the
//! segment once the entries that were there are known. Where they come from is not known here.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::files::list;
use super::quarantine;
use super::recovery::{self, Found};
use super::scan::{Expected, Scanner};
use super::segment::{HEADER_BYTES, SegmentHeader};
use super::storage::{Storage, StorageFile, write_all_at};
use super::vote::peek_local;
use super::{CheckpointMark, Directory, OpenError};
use crate::entry::{ALIGN_BYTES, Entry, FRAME_HEADER_BYTES, FrameHeader, FrameKey};
use crate::position::{EntryIndex, Term};

const REPAIR_FILE: &str = "repair.tmp";
const COPY_BYTES: u64 = 1 << 20;

/// What cannot be read, between good frames of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub segment: String,
    /// Byte in the file at which it begins.
    pub at: u64,
    /// Of the first entry that is missing.
    pub from: EntryIndex,
    /// Exclusive.
    pub end: EntryIndex,
    /// Of the entry before.
    term: Term,
    /// Where the next good frame begins, and its term; none behind the damage.
    next: Option<(u64, Term)>,
    /// Headers in it that can be read.
    headers: Vec<FrameHeader>,
    header: SegmentHeader,
}

/// Why entries do not fit where something is damaged.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    #[error("log I/O failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("entry {0} was given out of order")]
    Order(EntryIndex),
    #[error("entry {index} of term {found} cannot lie between terms {before} and {behind}")]
    Term { index: EntryIndex, found: Term, before: Term, behind: Term },
    #[error("the damage has {expected} bytes, the entries given need {found}")]
    Length { expected: u64, found: u64 },
    #[error("entry {0} is not the one whose header is there")]
    Header(EntryIndex),
}

/// Finds the first damage in the segment of that name; `None` if there is none.
pub fn find(
    dir: &Path,
    group_uuid: uuid::Uuid,
    segment: &str,
    mark: Option<&CheckpointMark>,
) -> Result<Option<Damage>, OpenError> {
    find_on(&Directory::existing(dir)?, group_uuid, segment, mark)
}

fn find_on(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
    segment: &str,
    mark: Option<&CheckpointMark>,
) -> Result<Option<Damage>, OpenError> {
    let found = recovery::read_headers(storage, &list(storage)?, group_uuid)?;
    let local = peek_local(storage, group_uuid)?;
    let durable_end = recovery::proven(local.as_ref(), mark, &found);
    let (chain, _) = recovery::chain(found);
    let number = chain.iter().position(|found| found.name == segment);
    let Some((number, found)) = number.and_then(|number| Some((number, chain.get(number)?))) else {
        let reason = format!("segment {segment} does not count");
        return Err(OpenError::Missing { reason });
    };
    let key = FrameKey::of_group(group_uuid);
    let mut scanner = Scanner::new(storage.open(segment)?, found.header, key);
    let later = chain.get(number + 1);
    let mut next =
        Expected { index: found.header.base, term: found.header.base_term, at: HEADER_BYTES };
    while later.is_none_or(|later| next.index < later.header.base) {
        let Ok(header) = scanner.frame(next)? else {
            let end = later.map_or(durable_end, |later| later.header.base);
            let damage = damage(&mut scanner, found, later, next, end)?;
            return Ok((damage.end > damage.from).then_some(damage));
        };
        next.index = next.index.next();
        next.term = header.id.term;
        next.at += header.frame_bytes();
    }
    Ok(None)
}

/// Searches behind the first frame that fails for one that does not.
fn damage(
    scanner: &mut Scanner,
    found: &Found,
    later: Option<&Found>,
    first: Expected,
    end: EntryIndex,
) -> Result<Damage, OpenError> {
    let part_end = later.and_then(|later| {
        let bytes = later.header.base_position.bytes_since(found.header.base_position)?;
        Some(HEADER_BYTES + bytes)
    });
    let file_end = part_end.unwrap_or(found.file_bytes);
    let mut damage = Damage {
        segment: found.name.clone(),
        at: first.at,
        from: first.index,
        end,
        term: first.term,
        next: later.zip(part_end).map(|(later, at)| (at, later.header.base_term)),
        headers: Vec::new(),
        header: found.header,
    };
    let mut at = first.at;
    while at + (FRAME_HEADER_BYTES as u64) <= file_end {
        if let Some(header) = scanner.own_header_at(at)?
            && header.id.index >= first.index
        {
            let expected = Expected { index: header.id.index, term: first.term, at };
            if header.id.index > first.index && scanner.frame(expected)?.is_ok() {
                damage.end = header.id.index;
                damage.next = Some((at, header.id.term));
                break;
            }
            damage.headers.push(header);
        }
        at += ALIGN_BYTES as u64;
    }
    Ok(damage)
}

/// Writes a whole copy of the segment, with these entries where the damage is, and puts it in its
/// place. What was there before is kept in quarantine.
pub fn mend(
    dir: &Path,
    group_uuid: uuid::Uuid,
    damage: &Damage,
    entries: &[Entry],
    quarantine_bytes_max: u64,
) -> Result<(), RepairError> {
    mend_on(&Directory::open(dir)?, group_uuid, damage, entries, quarantine_bytes_max)
}

fn mend_on(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
    damage: &Damage,
    entries: &[Entry],
    quarantine_bytes_max: u64,
) -> Result<(), RepairError> {
    check(damage, entries)?;
    let from = storage.open(&damage.segment)?;
    let file_bytes = from.file_bytes()?;
    let next_at = damage.next.map(|(at, _)| at);
    let damaged = damage.at..next_at.unwrap_or(file_bytes).min(file_bytes);
    quarantine::copy(storage, &damage.header, damage.from, damaged)?;
    quarantine::bound(storage, quarantine_bytes_max)?;
    let into = storage.create(REPAIR_FILE)?;
    copy(&from, &into, 0..damage.at)?;
    let key = FrameKey::of_group(group_uuid);
    let mut at = damage.at;
    for entry in entries {
        let position = damage.header.base_position.advance(at - HEADER_BYTES);
        // It proves nothing of its own: what was synced when it was first written is not known.
        let header = FrameHeader::new(entry, position, damage.header.incarnation, EntryIndex::ZERO);
        write_all_at(into.as_ref(), &header.encode(key), at)?;
        write_all_at(into.as_ref(), &entry.payload, at + FRAME_HEADER_BYTES as u64)?;
        at += entry.frame_bytes();
    }
    if let Some(next_at) = next_at {
        copy(&from, &into, next_at..file_bytes)?;
    }
    // The last payload's padding.
    let short = at.saturating_sub(into.file_bytes()?);
    if short > 0 {
        let zeros = [0; ALIGN_BYTES];
        let count = usize::try_from(short).map_or(ALIGN_BYTES, |short| short.min(ALIGN_BYTES));
        write_all_at(into.as_ref(), &zeros[..count], at - short)?;
    }
    into.sync()?;
    storage.rename(REPAIR_FILE, &damage.segment)?;
    storage.sync_folder("")?;
    Ok(())
}

/// Whether the entries are what can have been there.
fn check(damage: &Damage, entries: &[Entry]) -> Result<(), RepairError> {
    let mut index = damage.from;
    let mut term = damage.term;
    let behind = damage.next.map_or(Term::new(u64::MAX), |(_, term)| term);
    for entry in entries {
        if entry.id.index != index {
            return Err(RepairError::Order(entry.id.index));
        }
        if entry.id.term < term || entry.id.term > behind {
            let (found, before) = (entry.id.term, term);
            return Err(RepairError::Term { index, found, before, behind });
        }
        let readable = damage.headers.iter().find(|header| header.id.index == index);
        let fits = readable.is_none_or(|header| {
            (header.id, header.clock_ms, header.payload_crc)
                == (entry.id, entry.clock_ms, entry.payload_crc)
        });
        if !fits {
            return Err(RepairError::Header(index));
        }
        term = entry.id.term;
        index = index.next();
    }
    if index != damage.end {
        return Err(RepairError::Order(index));
    }
    let found = entries.iter().map(Entry::frame_bytes).sum();
    match damage.next.map(|(at, _)| at - damage.at) {
        Some(expected) if expected != found => Err(RepairError::Length { expected, found }),
        Some(_) | None => Ok(()),
    }
}

fn copy(
    from: &Arc<dyn StorageFile>,
    into: &Arc<dyn StorageFile>,
    range: std::ops::Range<u64>,
) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(COPY_BYTES).map_err(io::Error::other)?];
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).map_or(buffer.len(), |l| l.min(buffer.len()));
        let read = super::storage::read_full_at(from.as_ref(), &mut buffer[..left], at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        write_all_at(into.as_ref(), &buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
