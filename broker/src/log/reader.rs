//! Reading: the tail, then the maps. Takes the view's lock only to look things up.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::segment::Segment;
use super::{Log, ReadError};
use crate::entry::{Entry, FRAME_HEADER_BYTES};
use crate::position::{EntryId, EntryIndex, LogOffset};

impl Log {
    /// Entries of `from..end` as far as they exist, at most `bytes_max` of payload but at least one.
    pub fn entries(
        &self,
        from: EntryIndex,
        end: EntryIndex,
        bytes_max: u64,
    ) -> io::Result<Vec<Entry>> {
        loop {
            let epoch = self.view().epoch;
            if let Some(found) = self.entries_of(epoch, from, end, bytes_max)? {
                return Ok(found);
            }
        }
    }

    /// `None` if a cut came in between: what was found before it does not go with what follows.
    fn entries_of(
        &self,
        epoch: u64,
        from: EntryIndex,
        end: EntryIndex,
        bytes_max: u64,
    ) -> io::Result<Option<Vec<Entry>>> {
        let mut found = Vec::new();
        let mut next = from;
        let mut bytes_left = bytes_max;
        let mut room = |entry: &Entry, first: bool| {
            let bytes = entry.payload.len() as u64;
            let fits = first || bytes <= bytes_left;
            bytes_left = bytes_left.saturating_sub(bytes);
            fits
        };
        while next < end {
            let (segment, part_end) = {
                let view = self.view();
                if view.epoch != epoch {
                    return Ok(None);
                }
                if view.purged.is_some_and(|purged| next <= purged.index) {
                    return Ok(Some(found));
                }
                let Some(part) = view.segment_of(next) else {
                    while next < end
                        && let Some((_, entry)) = view.tail.get(next)
                        && room(entry, found.is_empty())
                    {
                        found.push(entry.clone());
                        next = next.next();
                    }
                    return Ok(Some(found));
                };
                part
            };
            let mut at = self.locate(&segment, next)?;
            while next < end.min(part_end) {
                let (entry, frame_end_at) = entry_at(&segment, at, next)?;
                if !room(&entry, found.is_empty()) {
                    return Ok(Some(found));
                }
                found.push(entry);
                next = next.next();
                at = frame_end_at;
            }
        }
        Ok(Some(found))
    }

    /// The id of an entry, or of the last purged one.
    pub fn id_of(&self, index: EntryIndex) -> io::Result<Option<EntryId>> {
        let segment = {
            let view = self.view();
            if view.purged.is_some_and(|purged| index <= purged.index) {
                return Ok(view.purged.filter(|purged| purged.index == index));
            }
            match view.segment_of(index) {
                Some((segment, _)) => segment,
                None => return Ok(view.tail.get(index).map(|(_, entry)| entry.id)),
            }
        };
        let at = self.locate(&segment, index)?;
        Ok(Some(segment.frame_at(at, index)?.id))
    }

    /// Where the entry's frame begins. Answers for entries that Raft has purged too, as long as
    /// their segment is there.
    pub fn position_of(&self, index: EntryIndex) -> io::Result<Option<LogOffset>> {
        let segment = {
            let view = self.view();
            match view.segment_of(index) {
                Some((segment, _)) => segment,
                None => return Ok(view.tail.get(index).map(|(position, _)| *position)),
            }
        };
        let at = self.locate(&segment, index)?;
        Ok(Some(segment.position_at(at)))
    }

    /// Bytes at a position, within one entry's payload: a view of the tail or of a map.
    pub fn read(&self, at: LogOffset, bytes: u32) -> Result<Bytes, ReadError> {
        let (segment, part_end) = {
            let view = self.view();
            let oldest = view.oldest().position;
            if at < oldest {
                return Err(ReadError::Trimmed { asked: at, oldest });
            }
            match view.segment_at(at) {
                Some(part) => part,
                None => {
                    let end = view.tail.end();
                    let found = view.tail.read(at, bytes);
                    return found.ok_or(ReadError::BeyondEnd { asked: at, end });
                }
            }
        };
        let beyond = ReadError::BeyondEnd { asked: at, end: part_end };
        let Some(start) = segment.file_at(at) else { return Err(beyond) };
        if at.advance(u64::from(bytes)) > part_end {
            return Err(beyond);
        }
        segment.view(start..start + u64::from(bytes)).ok_or(beyond)
    }

    fn locate(&self, segment: &Arc<Segment>, index: EntryIndex) -> io::Result<u64> {
        let at = segment.locate(index)?;
        self.view().keep_table_of_sealed(segment);
        Ok(at)
    }
}

/// The entry at a byte of a segment, and where the next one begins.
fn entry_at(segment: &Segment, at: u64, index: EntryIndex) -> io::Result<(Entry, u64)> {
    let header = segment.frame_at(at, index)?;
    let payload_at = at + FRAME_HEADER_BYTES as u64;
    let payload = segment.view(payload_at..payload_at + u64::from(header.payload_bytes));
    let payload = payload.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("entry {index} leaves its segment"))
    })?;
    Ok((header.into_entry(payload), at + header.frame_bytes()))
}
