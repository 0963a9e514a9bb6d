//! One log entry as bytes and back; the two checksums. No I/O.

use bytes::Bytes;

use crate::position::{EntryId, EntryIndex, LogOffset, Term};

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EntryKind {
    /// A new leader's first entry.
    Blank = 0,
    Membership = 1,
    /// Items: runs and commands.
    Batch = 2,
    /// The witness gate closed (design 4.5).
    Paired = 3,
    /// The witness gate opened.
    Alone = 4,
}

impl EntryKind {
    pub(crate) fn parse(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Blank),
            1 => Some(Self::Membership),
            2 => Some(Self::Batch),
            3 => Some(Self::Paired),
            4 => Some(Self::Alone),
            _ => None,
        }
    }
}

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 80;
/// Frames and items begin at multiples of this.
pub const ALIGN_BYTES: usize = 8;
/// Largest payload of an entry: what the largest request on the wire can carry.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// First bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"DrEn";

const FRAME_VERSION: u16 = 1;

const _: () = assert!(FRAME_HEADER_BYTES.is_multiple_of(ALIGN_BYTES));
const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(ALIGN_BYTES));

/// An entry in memory: what replicas agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: EntryId,
    pub kind: EntryKind,
    /// Leader clock, ms since the epoch; 0 for Raft's own entries.
    pub clock_ms: u64,
    pub item_count: u32,
    pub payload_crc: u32,
    pub payload: Bytes,
}

impl Entry {
    /// Bytes of its frame: header, payload, padding.
    pub fn frame_bytes(&self) -> u64 {
        (FRAME_HEADER_BYTES + self.payload.len()).next_multiple_of(ALIGN_BYTES) as u64
    }
}

/// Start value of header checksums: made of the group's UUID, so that frames of another group, or
/// bytes in a payload made to look like a frame by who does not know it, fail their check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameKey(u32);

impl FrameKey {
    pub fn of_group(group_uuid: uuid::Uuid) -> Self {
        Self(crc32fast::hash(group_uuid.as_bytes()))
    }

    fn checksum(self, covered: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new_with_initial(self.0);
        hasher.update(covered);
        hasher.finalize()
    }
}

/// What stands before a payload on disk: the entry's own facts, and those of this copy of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    pub id: EntryId,
    pub kind: EntryKind,
    pub clock_ms: u64,
    pub payload_bytes: u32,
    pub item_count: u32,
    pub payload_crc: u32,
    /// Every entry below it was synced when this frame was written.
    pub durable_end: EntryIndex,
    /// Of the segment that holds the frame.
    pub incarnation: u64,
    /// Where the frame begins in the log.
    pub position: LogOffset,
}

/// Why bytes are not the header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("there is no frame")]
    Magic,
    #[error("the header's checksum does not match")]
    Checksum,
    #[error("frame format version {0} is not known to this release")]
    Version(u16),
    #[error("entry kind {0} is not known to this release")]
    Kind(u8),
    #[error("a payload of {0} bytes is larger than allowed")]
    PayloadBytes(u32),
}

impl FrameHeader {
    /// The header that goes before `entry` on this node.
    ///
    /// Panics if the payload is larger than [`PAYLOAD_BYTES_MAX`], which no entry may be.
    pub fn new(entry: &Entry, at: LogOffset, incarnation: u64, durable_end: EntryIndex) -> Self {
        assert!(
            entry.payload.len() <= PAYLOAD_BYTES_MAX,
            "entry {} has {} payload bytes",
            entry.id,
            entry.payload.len()
        );
        Self {
            id: entry.id,
            kind: entry.kind,
            clock_ms: entry.clock_ms,
            payload_bytes: u32::try_from(entry.payload.len()).expect("checked just above"),
            item_count: entry.item_count,
            payload_crc: entry.payload_crc,
            durable_end,
            incarnation,
            position: at,
        }
    }

    /// Bytes of the frame: header, payload, padding.
    pub fn frame_bytes(&self) -> u64 {
        (FRAME_HEADER_BYTES as u64 + u64::from(self.payload_bytes))
            .next_multiple_of(ALIGN_BYTES as u64)
    }

    /// Joins the header with its payload.
    pub fn into_entry(self, payload: Bytes) -> Entry {
        Entry {
            id: self.id,
            kind: self.kind,
            clock_ms: self.clock_ms,
            item_count: self.item_count,
            payload_crc: self.payload_crc,
            payload,
        }
    }

    pub fn encode(&self, key: FrameKey) -> [u8; FRAME_HEADER_BYTES] {
        let mut out = [0; FRAME_HEADER_BYTES];
        out[0..4].copy_from_slice(&FRAME_MAGIC);
        out[8..10].copy_from_slice(&FRAME_VERSION.to_le_bytes());
        out[10] = self.kind as u8;
        out[12..16].copy_from_slice(&self.item_count.to_le_bytes());
        out[16..24].copy_from_slice(&self.id.term.get().to_le_bytes());
        out[24..32].copy_from_slice(&self.id.index.get().to_le_bytes());
        out[32..40].copy_from_slice(&self.clock_ms.to_le_bytes());
        out[40..44].copy_from_slice(&self.payload_bytes.to_le_bytes());
        out[44..48].copy_from_slice(&self.payload_crc.to_le_bytes());
        out[48..56].copy_from_slice(&self.durable_end.get().to_le_bytes());
        out[56..64].copy_from_slice(&self.incarnation.to_le_bytes());
        out[64..72].copy_from_slice(&self.position.get().to_le_bytes());
        let checksum = key.checksum(&out[8..]);
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a header; the payload's checksum is the caller's to compare.
    pub fn decode(raw: &[u8; FRAME_HEADER_BYTES], key: FrameKey) -> Result<Self, FrameError> {
        if raw[0..4] != FRAME_MAGIC {
            return Err(FrameError::Magic);
        }
        if u32_at(raw, 4) != key.checksum(&raw[8..]) {
            return Err(FrameError::Checksum);
        }
        let version = u16::from_le_bytes([raw[8], raw[9]]);
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = EntryKind::parse(raw[10]).ok_or(FrameError::Kind(raw[10]))?;
        let payload_bytes = u32_at(raw, 40);
        if payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(FrameError::PayloadBytes(payload_bytes));
        }
        Ok(Self {
            id: EntryId {
                term: Term::new(u64_at(raw, 16)),
                index: EntryIndex::new(u64_at(raw, 24)),
            },
            kind,
            clock_ms: u64_at(raw, 32),
            payload_bytes,
            item_count: u32_at(raw, 12),
            payload_crc: u32_at(raw, 44),
            durable_end: EntryIndex::new(u64_at(raw, 48)),
            incarnation: u64_at(raw, 56),
            position: LogOffset::new(u64_at(raw, 64)),
        })
    }
}

fn u32_at(raw: &[u8; FRAME_HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn u64_at(raw: &[u8; FRAME_HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(raw, at)) | u64::from(u32_at(raw, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> impl Strategy<Value = FrameHeader> {
        let kind = (0u8..5).prop_map(|raw| EntryKind::parse(raw).unwrap());
        let payload_bytes = 0..=u32::try_from(PAYLOAD_BYTES_MAX).unwrap();
        let own = (any::<u64>(), any::<u64>(), any::<u64>());
        (any::<[u64; 3]>(), kind, payload_bytes, any::<[u32; 2]>(), own).prop_map(
            |([term, index, clock_ms], kind, payload_bytes, [item_count, payload_crc], own)| {
                FrameHeader {
                    id: EntryId { term: Term::new(term), index: EntryIndex::new(index) },
                    kind,
                    clock_ms,
                    payload_bytes,
                    item_count,
                    payload_crc,
                    durable_end: EntryIndex::new(own.0),
                    incarnation: own.1,
                    position: LogOffset::new(own.2),
                }
            },
        )
    }

    fn key() -> FrameKey {
        FrameKey::of_group(uuid::Uuid::from_u128(5))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn headers_come_back_as_they_were(header in header()) {
            let decoded = FrameHeader::decode(&header.encode(key()), key());
            prop_assert_eq!(decoded, Ok(header));
        }

        #[test]
        fn a_flipped_bit_is_noticed(header in header(), bit in 0..8 * FRAME_HEADER_BYTES) {
            let mut raw = header.encode(key());
            raw[bit / 8] ^= 1 << (bit % 8);
            let wanted = if bit < 32 { FrameError::Magic } else { FrameError::Checksum };
            prop_assert_eq!(FrameHeader::decode(&raw, key()), Err(wanted));
        }

        #[test]
        fn any_bytes_are_read_without_panic(raw: [[u8; 16]; 5]) {
            let mut bytes = [0; FRAME_HEADER_BYTES];
            bytes.copy_from_slice(raw.as_flattened());
            bytes[..4].copy_from_slice(&FRAME_MAGIC);
            let checksum = key().checksum(&bytes[8..]);
            bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
            if let Ok(header) = FrameHeader::decode(&bytes, key()) {
                prop_assert!(header.payload_bytes as usize <= PAYLOAD_BYTES_MAX);
            }
        }

        #[test]
        fn another_groups_frames_are_refused(header in header()) {
            let other = FrameKey::of_group(uuid::Uuid::from_u128(6));
            let raw = header.encode(other);
            prop_assert_eq!(FrameHeader::decode(&raw, key()), Err(FrameError::Checksum));
        }
    }

    #[test]
    fn versions_and_kinds_of_newer_releases_are_named() {
        let entry = Entry {
            id: EntryId { term: Term::new(1), index: EntryIndex::new(2) },
            kind: EntryKind::Blank,
            clock_ms: 0,
            item_count: 0,
            payload_crc: 0,
            payload: Bytes::new(),
        };
        let header = FrameHeader::new(&entry, LogOffset::ZERO, 1, EntryIndex::ZERO);
        let changed = |at: usize, value: u8| {
            let mut raw = header.encode(key());
            raw[at] = value;
            let checksum = key().checksum(&raw[8..]);
            raw[4..8].copy_from_slice(&checksum.to_le_bytes());
            FrameHeader::decode(&raw, key())
        };
        assert_eq!(changed(8, 2), Err(FrameError::Version(2)));
        assert_eq!(changed(10, 5), Err(FrameError::Kind(5)));
        assert_eq!(changed(43, 2), Err(FrameError::PayloadBytes(2 << 24)));
    }
}
