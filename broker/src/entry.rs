//! One log entry as bytes and back; the two checksums. No I/O.

use bytes::Bytes;

use crate::position::EntryId;

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

/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 80;
/// Frames and items begin at multiples of this.
pub const ALIGN_BYTES: usize = 8;

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
