//! What of the log another node may copy as files: settled bytes of whole segments, held as they
//! are for as long as the copy takes. Knows no peers.

use std::io;
use std::sync::Arc;

use super::segment::{HEADER_BYTES, Segment};
use super::storage::{StorageFile, read_full_at};
use super::{Log, SegmentHeader};
use crate::position::EntryId;

/// Every settled entry of a log, in its segments.
#[derive(Debug)]
pub struct Export {
    /// Ascending.
    pub segments: Vec<ExportedSegment>,
    /// The last entry in them.
    pub last: EntryId,
}

/// A segment's file up to where its part of the log ends. While it is held, retention unlinks the
/// file instead of using it again, so the bytes stay what they are.
#[derive(Debug)]
pub struct ExportedSegment {
    segment: Arc<Segment>,
    file: Arc<dyn StorageFile>,
    file_bytes: u64,
}

impl ExportedSegment {
    pub fn name(&self) -> &str {
        self.segment.name()
    }

    pub fn header(&self) -> &SegmentHeader {
        self.segment.header()
    }

    /// To be copied, header included.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Bytes of the file, by `pread`; fewer only at its end.
    pub fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.file_bytes.saturating_sub(at);
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        read_full_at(self.file.as_ref(), &mut buffer[..count], at)
    }
}

impl Log {
    /// Holds all settled entries as they lie; `None` if there is none. What is appended later is
    /// not in it.
    ///
    /// Errors: also where retention has just dropped a segment; then it may be tried again.
    pub fn export(&self) -> io::Result<Option<Export>> {
        let (held, last) = {
            let view = self.view();
            let mut held = Vec::with_capacity(view.segments.len());
            for (number, segment) in view.segments.iter().enumerate() {
                let next = view.segments.get(number + 1);
                let end = next.map_or(view.settled, |next| next.header().base_position);
                let file_bytes = segment.file_at(end).unwrap_or(HEADER_BYTES);
                held.push((Arc::clone(segment), file_bytes));
            }
            (held, view.tail.base().previous())
        };
        let Some(last) = last else { return Ok(None) };
        let Some(last) = self.id_of(last)? else { return Ok(None) };
        let storage = self.inner.files.storage();
        let mut segments = Vec::with_capacity(held.len());
        for (segment, file_bytes) in held {
            let file = storage.open(segment.name())?;
            segments.push(ExportedSegment { segment, file, file_bytes });
        }
        if segments.is_empty() {
            return Ok(None);
        }
        Ok(Some(Export { segments, last }))
    }
}
