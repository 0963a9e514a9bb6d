//! One segment file: its header, its map and where its entries lie. Knows no other segment.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::mapping::Mapping;
use super::storage::StorageFile;
use crate::entry::{FRAME_HEADER_BYTES, FrameHeader, FrameKey, PAYLOAD_BYTES_MAX};
use crate::position::{EntryIndex, LogOffset, Term};

/// Bytes of a segment before its first frame.
pub(super) const HEADER_BYTES: u64 = HEADER as u64;
/// The same, for buffers.
pub(super) const HEADER: usize = 4096;
/// Largest frame there can be.
pub(super) const FRAME_BYTES_MAX: u64 = (FRAME_HEADER_BYTES + PAYLOAD_BYTES_MAX) as u64;

const MAGIC: [u8; 8] = *b"DrumSegm";
const VERSION: u32 = 1;
const FLAG_ANEW: u32 = 1;
const FLAG_RECYCLED: u32 = 2;
/// Distance of two lines of an entry table.
const LINE_BYTES: u64 = 4096;

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub group_uuid: uuid::Uuid,
    /// Rises with every segment that is begun; the higher one is right where two hold an index.
    pub incarnation: u64,
    /// Index of its first entry.
    pub base: EntryIndex,
    /// Term of the entry before the first; 0 if there is none.
    pub base_term: Term,
    /// Where its first frame begins in the log.
    pub base_position: LogOffset,
    /// Incarnation of the segment that holds the entry before the first; 0 if there is none.
    pub previous: u64,
    /// The log begins anew here: nothing precedes it.
    pub anew: bool,
    /// The file was used before: behind its last frame are other segments' bytes, not zeros.
    pub recycled: bool,
}

/// Why bytes are not the header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("the file does not begin as a segment")]
    Magic,
    #[error("the segment header's checksum does not match")]
    Checksum,
    #[error("segment format version {0} is not known to this release")]
    Version(u32),
    #[error("the segment header has flags {0:#x} that are not known to this release")]
    Flags(u32),
    #[error("the segment header does not belong to the file's name")]
    Name,
}

impl SegmentHeader {
    pub(super) fn file_name(&self) -> String {
        format!("{:010}-{:020}.log", self.incarnation, self.base.get())
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..32].copy_from_slice(self.group_uuid.as_bytes());
        out[32..40].copy_from_slice(&self.incarnation.to_le_bytes());
        out[40..48].copy_from_slice(&self.base.get().to_le_bytes());
        out[48..56].copy_from_slice(&self.base_term.get().to_le_bytes());
        out[56..64].copy_from_slice(&self.base_position.get().to_le_bytes());
        out[64..72].copy_from_slice(&self.previous.to_le_bytes());
        let flags = u32::from(self.anew) * FLAG_ANEW + u32::from(self.recycled) * FLAG_RECYCLED;
        out[72..76].copy_from_slice(&flags.to_le_bytes());
        let checksum = crc32fast::hash(&out);
        out[12..16].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    pub(super) fn decode(raw: &[u8]) -> Result<Self, SegmentError> {
        if raw.len() != HEADER || raw[0..8] != MAGIC {
            return Err(SegmentError::Magic);
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&raw[..12]);
        hasher.update(&[0; 4]);
        hasher.update(&raw[16..]);
        if hasher.finalize() != u32_at(raw, 12) {
            return Err(SegmentError::Checksum);
        }
        if u32_at(raw, 8) != VERSION {
            return Err(SegmentError::Version(u32_at(raw, 8)));
        }
        let flags = u32_at(raw, 72);
        if flags & !(FLAG_ANEW | FLAG_RECYCLED) != 0 {
            return Err(SegmentError::Flags(flags));
        }
        let mut group_uuid = [0; 16];
        group_uuid.copy_from_slice(&raw[16..32]);
        Ok(Self {
            group_uuid: uuid::Uuid::from_bytes(group_uuid),
            incarnation: u64_at(raw, 32),
            base: EntryIndex::new(u64_at(raw, 40)),
            base_term: Term::new(u64_at(raw, 48)),
            base_position: LogOffset::new(u64_at(raw, 56)),
            previous: u64_at(raw, 64),
            anew: flags & FLAG_ANEW != 0,
            recycled: flags & FLAG_RECYCLED != 0,
        })
    }
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from(u32_at(raw, at)) | u64::from(u32_at(raw, at + 4)) << 32
}

/// Incarnation and base from a segment's file name.
pub(super) fn parse_file_name(name: &str) -> Option<(u64, EntryIndex)> {
    let (incarnation, base) = name.strip_suffix(".log")?.split_once('-')?;
    let digits = |text: &str, count: usize| {
        (text.len() == count && text.bytes().all(|b| b.is_ascii_digit())).then_some(())
    };
    digits(incarnation, 10)?;
    digits(base, 20)?;
    Some((incarnation.parse().ok()?, EntryIndex::new(base.parse().ok()?)))
}

/// Where an entry was found.
#[derive(Clone, Copy, Debug)]
struct Line {
    index: EntryIndex,
    at: u64,
}

/// A segment as readers see it. The writer alone holds its file.
#[derive(Debug)]
pub(super) struct Segment {
    header: SegmentHeader,
    name: String,
    map: Arc<Mapping>,
    key: FrameKey,
    /// Slices end here (byte in the file). Frames below it are written and do not change.
    end_at: AtomicU64,
    /// Every few KiB the place of an entry, ascending, with gaps where nobody looked yet.
    lines: Mutex<Vec<Line>>,
}

impl Segment {
    /// `end_at`: behind the last frame that is known to be good.
    pub(super) fn new(
        header: SegmentHeader,
        name: String,
        file: &dyn StorageFile,
        segment_bytes: u64,
        end_at: u64,
        key: FrameKey,
    ) -> io::Result<Self> {
        // An entry that is larger than a segment gets one of its own, so any segment may grow to it.
        let map_bytes = segment_bytes.max(HEADER_BYTES + FRAME_BYTES_MAX).max(file.file_bytes()?);
        let map_bytes = usize::try_from(map_bytes).map_err(io::Error::other)?;
        Ok(Self {
            header,
            name,
            map: Arc::new(file.map(map_bytes)?),
            key,
            end_at: AtomicU64::new(end_at),
            lines: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn header(&self) -> &SegmentHeader {
        &self.header
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn base(&self) -> EntryIndex {
        self.header.base
    }

    /// Byte in the file of a position at or behind the segment's base.
    pub(super) fn file_at(&self, position: LogOffset) -> Option<u64> {
        position.bytes_since(self.header.base_position)?.checked_add(HEADER_BYTES)
    }

    pub(super) fn position_at(&self, at: u64) -> LogOffset {
        assert!(at >= HEADER_BYTES, "byte {at} of {} lies in its header", self.name);
        self.header.base_position.advance(at - HEADER_BYTES)
    }

    pub(super) fn end_at(&self) -> u64 {
        self.end_at.load(Ordering::Acquire)
    }

    /// Lets readers see what was written up to `at`; never taken back.
    pub(super) fn set_end_at(&self, at: u64) {
        self.end_at.store(at, Ordering::Release);
    }

    /// Whether nobody reads it: the caller holds the only handle and no slice is left.
    pub(super) fn is_unread(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1 && Arc::strong_count(&self.map) == 1
    }

    /// A view of bytes below the published end.
    pub(super) fn view(&self, range: Range<u64>) -> Option<Bytes> {
        if range.end > self.end_at() || range.start > range.end {
            return None;
        }
        let start = usize::try_from(range.start).ok()?;
        let end = usize::try_from(range.end).ok()?;
        Some(self.map.view(start..end))
    }

    /// The frame at a byte of the file, checked; the payload's checksum is not compared.
    pub(super) fn frame_at(&self, at: u64, index: EntryIndex) -> io::Result<FrameHeader> {
        let damaged = |reason: String| {
            let place = format!("entry {index} in {} at byte {at}: {reason}", self.name);
            io::Error::new(io::ErrorKind::InvalidData, place)
        };
        let end_at = self.end_at();
        if at + FRAME_HEADER_BYTES as u64 > end_at {
            return Err(damaged(format!("the segment ends at byte {end_at}")));
        }
        let start = usize::try_from(at).map_err(io::Error::other)?;
        let raw = self.map.bytes(start..start + FRAME_HEADER_BYTES);
        let raw = raw.try_into().map_err(io::Error::other)?;
        let header =
            FrameHeader::decode(raw, self.key).map_err(|error| damaged(error.to_string()))?;
        if header.id.index != index || header.incarnation != self.header.incarnation {
            let found = header.id.index;
            return Err(damaged(format!("entry {found} of {} is there", header.incarnation)));
        }
        if at + header.frame_bytes() > end_at {
            return Err(damaged(format!("it leaves the segment's end {end_at}")));
        }
        Ok(header)
    }

    /// Remembers where an entry lies. Cheap: most entries need no line.
    pub(super) fn note(&self, index: EntryIndex, at: u64) {
        let mut lines = self.lines.lock();
        match lines.last() {
            Some(last) if at < last.at + LINE_BYTES => {}
            Some(_) | None => lines.push(Line { index, at }),
        }
    }

    /// Forgets all lines; the next look-up finds them again.
    pub(super) fn forget_lines(&self) {
        *self.lines.lock() = Vec::new();
    }

    /// Byte in the file where an entry begins, which must be in this segment. Follows frames from
    /// the nearest line and keeps what it passes.
    pub(super) fn locate(&self, index: EntryIndex) -> io::Result<u64> {
        let start = {
            let lines = self.lines.lock();
            let behind = lines.partition_point(|line| line.index <= index);
            match behind.checked_sub(1).and_then(|last| lines.get(last)) {
                Some(line) => *line,
                None => Line { index: self.header.base, at: HEADER_BYTES },
            }
        };
        let mut passed = Vec::new();
        let mut at = start.at;
        let mut last_line = start.at;
        let mut next = start.index;
        while next < index {
            at += self.frame_at(at, next)?.frame_bytes();
            next = next.next();
            if at >= last_line + LINE_BYTES {
                passed.push(Line { index: next, at });
                last_line = at;
            }
        }
        if !passed.is_empty() {
            let mut lines = self.lines.lock();
            lines.extend(passed);
            lines.sort_unstable_by_key(|line| line.index);
            lines.dedup_by_key(|line| line.index);
        }
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_with_an_unknown_flag_is_refused() {
        let header = SegmentHeader {
            group_uuid: uuid::Uuid::from_u128(7),
            incarnation: 3,
            base: EntryIndex::new(5),
            base_term: Term::new(1),
            base_position: LogOffset::new(64),
            previous: 2,
            anew: true,
            recycled: true,
        };
        let mut raw = header.encode();
        assert_eq!(SegmentHeader::decode(&raw), Ok(header));
        raw[72] |= 4;
        raw[12..16].fill(0);
        let checksum = crc32fast::hash(&raw);
        raw[12..16].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&raw), Err(SegmentError::Flags(7)));
    }
}
