//! Read-only maps of segment files: the one place of `unsafe`.
//!
//! A map covers the whole segment, also what is not written yet; slices are made only of bytes that
//! were written before and never change again (I2).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw};

/// A read-only map of a file from its start.
#[derive(Debug)]
pub struct Mapping {
    map: MmapRaw,
}

impl Mapping {
    pub(super) fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(bytes).map_raw_read_only(file)?;
        // A dump of the process must not contain users' data, nor read the whole log.
        map.advise(Advice::DontDump)?;
        Ok(Self { map })
    }

    /// The bytes of a range.
    ///
    /// The caller must have learnt from the segment's published end that the range is written.
    #[allow(unsafe_code)]
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end, "range {range:?} is reversed");
        assert!(range.end <= self.map.len(), "{range:?} leaves the map of {}", self.map.len());
        // SAFETY: the range lies within the map (just asserted), which lives as long as `self`. Its
        // bytes are present and unchanged while it lives: `Segment` slices below its published end
        // only, bytes below it are never overwritten and no segment is shortened (I2), and the
        // directory lock keeps other writers out.
        unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().add(range.start), range.end - range.start)
        }
    }

    /// The same as a view that keeps the map alive.
    pub(super) fn view(self: &Arc<Self>, range: Range<usize>) -> Bytes {
        if range.is_empty() {
            return Bytes::new();
        }
        Bytes::from_owner(View { map: Arc::clone(self), range })
    }
}

struct View {
    map: Arc<Mapping>,
    range: Range<usize>,
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        self.map.bytes(self.range.clone())
    }
}
