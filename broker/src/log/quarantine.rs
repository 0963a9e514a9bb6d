//! Copies of what the log drops, kept for an operator. Bounded; the oldest go first.

use std::io;
use std::ops::Range;

use super::segment::SegmentHeader;
use super::storage::{Storage, read_full_at, sync_result, write_all_at};
use crate::position::EntryIndex;

pub(super) const FOLDER: &str = "quarantine";
const SUFFIX: &str = ".cut";
const MAGIC: [u8; 8] = *b"DrumQuar";
const VERSION: u32 = 1;
/// Bytes before the copied ones.
const HEADER_BYTES: usize = 128;
const COPY_BYTES: usize = 256 << 10;

/// Copies a range of a segment's file, durably, before it is dropped. `first` is the index of the
/// entry at the range's start. Doing it again gives the same file.
pub(super) fn copy(
    storage: &dyn Storage,
    segment: &SegmentHeader,
    first: EntryIndex,
    range: Range<u64>,
) -> io::Result<()> {
    storage.create_folder(FOLDER)?;
    let stem = format!("{FOLDER}/{:010}-{:020}", segment.incarnation, first.get());
    let temporary = format!("{stem}.tmp");
    let from = storage.open(&segment.file_name())?;
    let into = storage.create(&temporary)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut hasher = crc32fast::Hasher::new();
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
        let read = read_full_at(from.as_ref(), &mut buffer[..left], at)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        let offset = HEADER_BYTES as u64 + (at - range.start);
        write_all_at(into.as_ref(), &buffer[..read], offset)?;
        at += read as u64;
    }
    let header = encode(segment, first, range.start, at - range.start, hasher.finalize());
    write_all_at(into.as_ref(), &header, 0)?;
    sync_result(into.sync())?;
    storage.rename(&temporary, &format!("{stem}{SUFFIX}"))?;
    sync_result(storage.sync_folder(FOLDER))?;
    sync_result(storage.sync_folder(""))
}

/// What a copy says of itself, and where its bytes begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct CutHeader {
    /// Of the segment it was in.
    pub(super) incarnation: u64,
    /// Of the entry that begins at the first byte copied.
    pub(super) first: EntryIndex,
    pub(super) bytes: u64,
}

/// Bytes before the copied ones.
pub(super) const CUT_HEADER_BYTES: u64 = HEADER_BYTES as u64;

/// The headers of all copies, oldest first; `None` where one cannot be read.
pub(super) fn headers(storage: &dyn Storage) -> io::Result<Vec<(String, Option<CutHeader>)>> {
    let mut copies = list(storage)?;
    copies.retain(|(name, _)| name.ends_with(SUFFIX));
    let read = |(name, _): (String, u64)| {
        let name = format!("{FOLDER}/{name}");
        let mut raw = [0; HEADER_BYTES];
        let read = read_full_at(storage.open(&name)?.as_ref(), &mut raw, 0)?;
        Ok((name, Some(raw).filter(|_| read == HEADER_BYTES).and_then(|raw| decode(&raw))))
    };
    copies.into_iter().map(read).collect()
}

fn decode(raw: &[u8; HEADER_BYTES]) -> Option<CutHeader> {
    let mut unsummed = *raw;
    unsummed[12..16].fill(0);
    let checksum = u32::from_le_bytes(raw[12..16].try_into().ok()?);
    let version = u32::from_le_bytes(raw[8..12].try_into().ok()?);
    if raw[0..8] != MAGIC || version != VERSION || crc32fast::hash(&unsummed) != checksum {
        return None;
    }
    let word = |at: usize| Some(u64::from_le_bytes(raw[at..at + 8].try_into().ok()?));
    let first = EntryIndex::new(word(56)?);
    Some(CutHeader { incarnation: word(32)?, first, bytes: word(72)? })
}

fn encode(
    segment: &SegmentHeader,
    first: EntryIndex,
    at: u64,
    bytes: u64,
    bytes_crc: u32,
) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[0..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[16..32].copy_from_slice(segment.group_uuid.as_bytes());
    out[32..40].copy_from_slice(&segment.incarnation.to_le_bytes());
    out[40..48].copy_from_slice(&segment.base.get().to_le_bytes());
    out[48..56].copy_from_slice(&segment.base_position.get().to_le_bytes());
    out[56..64].copy_from_slice(&first.get().to_le_bytes());
    out[64..72].copy_from_slice(&at.to_le_bytes());
    out[72..80].copy_from_slice(&bytes.to_le_bytes());
    out[80..84].copy_from_slice(&bytes_crc.to_le_bytes());
    let checksum = crc32fast::hash(&out);
    out[12..16].copy_from_slice(&checksum.to_le_bytes());
    out
}

fn list(storage: &dyn Storage) -> io::Result<Vec<(String, u64)>> {
    match storage.list(FOLDER) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result,
    }
}

/// Removes copies whose making was cut short: what they were of is still in its segment.
pub(super) fn sweep(storage: &dyn Storage) -> io::Result<()> {
    let unfinished = |(name, _): &(String, u64)| name.ends_with(".tmp");
    for (name, _) in list(storage)?.into_iter().filter(unfinished) {
        storage.remove(&format!("{FOLDER}/{name}"))?;
    }
    Ok(())
}

/// Removes the oldest copies until the rest fits into `bytes_max`. The newest one always stays.
pub(super) fn bound(storage: &dyn Storage, bytes_max: u64) -> io::Result<()> {
    let mut copies = list(storage)?;
    copies.retain(|(name, _)| name.ends_with(SUFFIX));
    let mut total: u64 = copies.iter().map(|(_, bytes)| bytes).sum();
    let newest = copies.len().saturating_sub(1);
    for (name, bytes) in copies.into_iter().take(newest) {
        if total <= bytes_max {
            break;
        }
        tracing::warn!(name, bytes, "the quarantine is full, its oldest copy goes");
        storage.remove(&format!("{FOLDER}/{name}"))?;
        total -= bytes;
    }
    Ok(())
}
