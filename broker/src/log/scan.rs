//! Frames straight from a file, by `pread`, each one checked. Decides nothing about what it finds.

use std::io;
use std::sync::Arc;

use super::segment::{FRAME_BYTES_MAX, HEADER_BYTES, SegmentHeader};
use super::storage::{StorageFile, read_full_at};
use crate::entry::{
    ALIGN_BYTES, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameError, FrameHeader, FrameKey,
};
use crate::position::{EntryId, EntryIndex, LogOffset, Term};

const BUFFER_BYTES: usize = 1 << 20;
const BACK_BYTES: u64 = 64 << 10;

/// Reads one segment's file.
#[derive(Debug)]
pub(super) struct Scanner {
    file: Arc<dyn StorageFile>,
    key: FrameKey,
    header: SegmentHeader,
    buffer: Vec<u8>,
    /// Byte of the file at which the buffer begins.
    buffer_at: u64,
    filled: usize,
}

/// What the next frame must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) index: EntryIndex,
    /// Of the entry before.
    pub(super) term: Term,
    pub(super) at: u64,
}

/// Why a frame does not follow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("entry {index} of incarnation {incarnation} is there")]
    OtherEntry { index: EntryIndex, incarnation: u64 },
    #[error("its position {0} is not where it lies")]
    Position(LogOffset),
    #[error("its term {0} is below that of the entry before")]
    Term(Term),
    #[error("the file ends within it")]
    FileEnd,
    #[error("the payload's checksum does not match")]
    Payload,
}

impl Fault {
    /// Whether a newer release wrote it: valid, and not ours to judge.
    pub(super) fn is_unknown(&self) -> bool {
        matches!(self, Self::Frame(FrameError::Version(_) | FrameError::Kind(_)))
    }
}

/// What lies behind a frame that failed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Behind {
    /// Highest durable end that a valid header of this segment proves.
    pub(super) durable_end: EntryIndex,
    /// Behind the last frame with a valid header; 0 if there is none.
    pub(super) frames_end_at: u64,
    /// Behind the last byte that is not zero; 0 if there is none.
    pub(super) bytes_end_at: u64,
}

impl Scanner {
    pub(super) fn new(file: Arc<dyn StorageFile>, header: SegmentHeader, key: FrameKey) -> Self {
        Self { file, key, header, buffer: Vec::new(), buffer_at: 0, filled: 0 }
    }

    /// Bytes of the file from `at`, fewer than `count` where it ends.
    pub(super) fn bytes(&mut self, at: u64, count: usize) -> io::Result<&[u8]> {
        let held = at.checked_sub(self.buffer_at).and_then(|start| usize::try_from(start).ok());
        let start = match held {
            Some(start) if start.checked_add(count).is_some_and(|end| end <= self.filled) => start,
            Some(_) | None => {
                let left = self.file.file_bytes()?.saturating_sub(at);
                let wanted = count.max(BUFFER_BYTES);
                self.buffer
                    .resize(usize::try_from(left).map_or(wanted, |left| left.min(wanted)), 0);
                self.buffer_at = at;
                self.filled = read_full_at(self.file.as_ref(), &mut self.buffer, at)?;
                0
            }
        };
        let end = self.filled.min(start + count);
        Ok(self.buffer.get(start..end).unwrap_or_default())
    }

    fn header_at(&mut self, at: u64) -> io::Result<Result<FrameHeader, Fault>> {
        let key = self.key;
        let raw = self.bytes(at, FRAME_HEADER_BYTES)?;
        let Ok(raw) = raw.try_into() else { return Ok(Err(Fault::FileEnd)) };
        Ok(FrameHeader::decode(raw, key).map_err(Fault::from))
    }

    /// The frame that must follow, its payload's checksum compared.
    pub(super) fn frame(&mut self, expected: Expected) -> io::Result<Result<FrameHeader, Fault>> {
        let header = match self.header_at(expected.at)? {
            Ok(header) => header,
            Err(fault) => return Ok(Err(fault)),
        };
        let (index, incarnation) = (header.id.index, header.incarnation);
        if index != expected.index || incarnation != self.header.incarnation {
            return Ok(Err(Fault::OtherEntry { index, incarnation }));
        }
        if header.position != self.position_at(expected.at) {
            return Ok(Err(Fault::Position(header.position)));
        }
        if header.id.term < expected.term {
            return Ok(Err(Fault::Term(header.id.term)));
        }
        let payload_at = expected.at + FRAME_HEADER_BYTES as u64;
        let payload_bytes = header.payload_bytes as usize;
        let payload = self.bytes(payload_at, payload_bytes)?;
        if payload.len() < payload_bytes {
            return Ok(Err(Fault::FileEnd));
        }
        if crc32fast::hash(payload) != header.payload_crc {
            return Ok(Err(Fault::Payload));
        }
        Ok(Ok(header))
    }

    /// Whether the entry's frame ends just before `end_at`, whole. Searches backwards, since only
    /// its end is known.
    pub(super) fn ends_with(&mut self, id: EntryId, end_at: u64) -> io::Result<bool> {
        let lowest = end_at.saturating_sub(FRAME_BYTES_MAX).max(HEADER_BYTES);
        let mut block_end = end_at;
        while block_end > lowest {
            let block_at = block_end.saturating_sub(BACK_BYTES).max(lowest);
            let count = usize::try_from(block_end - block_at).map_err(io::Error::other)?;
            let block = self.bytes(block_at, count)?.to_vec();
            for (step, word) in block.chunks(ALIGN_BYTES).enumerate().rev() {
                if !word.starts_with(&FRAME_MAGIC) {
                    continue;
                }
                let at = block_at + (step * ALIGN_BYTES) as u64;
                let expected = Expected { index: id.index, term: id.term, at };
                if let Ok(header) = self.frame(expected)?
                    && header.id == id
                {
                    return Ok(at + header.frame_bytes() == end_at);
                }
            }
            block_end = block_at;
        }
        Ok(false)
    }

    /// Searches `from..end` for frames of this segment and for anything but zeros.
    pub(super) fn behind(&mut self, from: u64, end: u64) -> io::Result<Behind> {
        let mut found = Behind::default();
        let mut at = from;
        while at < end {
            let count =
                usize::try_from(end - at).map_or(BUFFER_BYTES, |left| left.min(BUFFER_BYTES));
            let block = self.bytes(at, count)?.to_vec();
            if block.is_empty() {
                break;
            }
            if let Some(last) = block.iter().rposition(|byte| *byte != 0) {
                found.bytes_end_at = at + last as u64 + 1;
            }
            // Frames begin at multiples of the alignment, as `from` does.
            for (step, word) in block.chunks_exact(ALIGN_BYTES).enumerate() {
                if word.starts_with(&FRAME_MAGIC) {
                    self.note_header(at + (step * ALIGN_BYTES) as u64, &mut found)?;
                }
            }
            at += block.len() as u64;
        }
        Ok(found)
    }

    /// The header at a place, if it is one of this segment that belongs there.
    pub(super) fn own_header_at(&mut self, at: u64) -> io::Result<Option<FrameHeader>> {
        let header = self.header_at(at)?.ok();
        let position = self.position_at(at);
        let incarnation = self.header.incarnation;
        Ok(header.filter(|h| h.incarnation == incarnation && h.position == position))
    }

    fn note_header(&mut self, at: u64, found: &mut Behind) -> io::Result<()> {
        if let Some(header) = self.own_header_at(at)? {
            found.durable_end = found.durable_end.max(header.durable_end);
            found.frames_end_at = found.frames_end_at.max(at + header.frame_bytes());
        }
        Ok(())
    }

    fn position_at(&self, at: u64) -> LogOffset {
        self.header.base_position.advance(at.saturating_sub(HEADER_BYTES))
    }
}
