//! A log's directory seen from outside, of a stopped or a running node: takes no lock, changes
//! nothing, reads by `pread`. Knows no items.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::files::list;
use super::quarantine;
use super::recovery::{self, Found, ScanFrom, read_header};
use super::scan::{Expected, Scanner};
use super::segment::HEADER_BYTES;
use super::storage::{Storage, read_full_at};
use super::vote::{Local, peek_local, peek_vote};
use super::{Directory, OpenError, SegmentHeader, Vote};
use crate::entry::{Entry, FRAME_HEADER_BYTES, FrameHeader, FrameKey};
use crate::position::EntryIndex;

/// What can be known of a log without opening it.
#[derive(Debug)]
pub struct LogFiles {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    group_uuid: uuid::Uuid,
    chain: Vec<Found>,
    all: Vec<Found>,
    local: Option<Local>,
}

/// One segment that counts, from its header and its file.
#[derive(Clone, Debug)]
pub struct SegmentFacts {
    pub name: String,
    pub header: SegmentHeader,
    pub file_bytes: u64,
    /// A later segment continues it.
    pub sealed: bool,
    /// Index at which a sealed segment ends.
    pub end: Option<EntryIndex>,
}

/// One entry and where it lies.
#[derive(Clone, Debug)]
pub struct Frame {
    pub segment: String,
    /// Byte in the segment's file.
    pub at: u64,
    pub header: FrameHeader,
    pub entry: Entry,
}

/// Where frames end, and why.
#[derive(Clone, Debug)]
pub struct Place {
    pub index: EntryIndex,
    pub segment: String,
    pub at: u64,
    pub reason: String,
}

#[derive(Clone, Debug)]
pub enum Verdict {
    /// The log ends behind its last entry.
    Clean,
    /// Behind the last good entry lie bytes that never were durable; a start moves them away.
    TornTail { place: Place, bytes: u64 },
    /// What had been durable is damaged or missing.
    Corrupt(Place),
}

/// What a check of all frames found.
#[derive(Clone, Debug)]
pub struct Verified {
    pub verdict: Verdict,
    pub entries: u64,
    pub bytes: u64,
}

/// One file in quarantine: what was dropped at one time from one segment.
#[derive(Clone, Debug)]
pub struct CutFile {
    /// Below the log's folder.
    pub name: String,
    /// Of the segment it was in.
    pub incarnation: u64,
    /// Of the entry at its begin, whole or not.
    pub first: EntryIndex,
    pub entries: Vec<(FrameHeader, Entry)>,
    /// Behind the entries, or all of a file that cannot be read.
    pub unreadable_bytes: u64,
}

impl LogFiles {
    /// Lists a log's directory, or that of a data directory around it.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let within = dir.join("log");
        let holds_log = |path: &Path| -> io::Result<bool> {
            match Directory::existing(path) {
                Ok(directory) => Ok(!list(&directory)?.segments.is_empty()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            }
        };
        let path = if !holds_log(dir)? && holds_log(&within)? { within } else { dir.to_owned() };
        let storage = Arc::new(Directory::existing(&path)?);
        Ok(Self { path, ..Self::on(storage)? })
    }

    /// The same on any storage.
    pub fn on(storage: Arc<dyn Storage>) -> Result<Self, OpenError> {
        let listing = list(storage.as_ref())?;
        let Some((name, _)) = listing.segments.first() else {
            return Err(OpenError::Missing { reason: "there is no segment".to_owned() });
        };
        let first = storage.open(name)?;
        let first = read_header(first.as_ref(), name)?;
        let first = first.map_err(|reason| OpenError::Segment { segment: name.clone(), reason })?;
        let group_uuid = first.group_uuid;
        let all = recovery::read_headers(storage.as_ref(), &listing, group_uuid)?;
        let (chain, _) = recovery::chain(all.clone());
        let local = peek_local(storage.as_ref(), group_uuid)?;
        Ok(Self { path: PathBuf::new(), storage, group_uuid, chain, all, local })
    }

    /// The folder that holds the segments.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn group_uuid(&self) -> uuid::Uuid {
        self.group_uuid
    }

    pub fn vote(&self) -> io::Result<Option<Vote>> {
        peek_vote(self.storage.as_ref(), self.group_uuid)
    }

    /// The log was closed behind its last entry, and nobody opened it since.
    pub fn closed_cleanly(&self) -> bool {
        self.local.is_some_and(|local| local.clean)
    }

    /// Every entry below it had been synced when the node last wrote it down.
    pub fn durable_mark(&self) -> Option<EntryIndex> {
        self.local.map(|local| local.durable_end)
    }

    /// Segments that count, ascending.
    pub fn segments(&self) -> Vec<SegmentFacts> {
        let ends = self.chain.iter().skip(1).map(|later| Some(later.header.base)).chain([None]);
        self.chain
            .iter()
            .zip(ends)
            .map(|(found, end)| SegmentFacts {
                name: found.name.clone(),
                header: found.header,
                file_bytes: found.file_bytes,
                sealed: end.is_some(),
                end,
            })
            .collect()
    }

    /// All entries from `from` on, or from the oldest there is. The last item is an error unless
    /// the log just ends.
    pub fn frames(&self, from: EntryIndex) -> Frames<'_> {
        let behind = self.chain.partition_point(|found| found.header.base <= from);
        Frames { files: self, from, segment: behind.saturating_sub(1), at: None }
    }

    /// What lies in quarantine, oldest first.
    pub fn cut_files(&self) -> io::Result<Vec<CutFile>> {
        let headers = quarantine::headers(self.storage.as_ref())?;
        headers.into_iter().map(|(name, header)| self.cut_file(name, header)).collect()
    }

    fn cut_file(&self, name: String, header: Option<quarantine::CutHeader>) -> io::Result<CutFile> {
        let file = self.storage.open(&name)?;
        let Some(header) = header else {
            let (first, unreadable_bytes) = (EntryIndex::ZERO, file.file_bytes()?);
            return Ok(CutFile {
                name,
                incarnation: 0,
                first,
                entries: Vec::new(),
                unreadable_bytes,
            });
        };
        let key = FrameKey::of_group(self.group_uuid);
        let mut entries = Vec::new();
        let (mut at, mut next) = (0, header.first);
        while at < header.bytes {
            let mut raw = [0; FRAME_HEADER_BYTES];
            let frame_at = quarantine::CUT_HEADER_BYTES + at;
            let read = read_full_at(file.as_ref(), &mut raw, frame_at)?;
            let Ok(frame) = FrameHeader::decode(&raw, key) else { break };
            let mut payload = vec![0; frame.payload_bytes as usize];
            let payload_at = frame_at + FRAME_HEADER_BYTES as u64;
            let payload_read = read_full_at(file.as_ref(), &mut payload, payload_at)?;
            let whole = read == raw.len()
                && payload_read == payload.len()
                && frame.id.index == next
                && crc32fast::hash(&payload) == frame.payload_crc;
            if !whole {
                break;
            }
            entries.push((frame, frame.into_entry(payload.into())));
            at += frame.frame_bytes();
            next = next.next();
        }
        let (incarnation, first) = (header.incarnation, header.first);
        let unreadable_bytes = header.bytes.saturating_sub(at);
        Ok(CutFile { name, incarnation, first, entries, unreadable_bytes })
    }

    /// Checks every frame, and judges what does not follow as a start would.
    pub fn verify(&self) -> Result<Verified, OpenError> {
        let (entries, bytes, verdict) = match self.check() {
            Ok(found) => found,
            Err(OpenError::Corrupt { index, segment, at, reason }) => {
                (0, 0, Verdict::Corrupt(Place { index, segment, at, reason }))
            }
            Err(error) => return Err(error),
        };
        Ok(Verified { verdict, entries, bytes })
    }

    fn check(&self) -> Result<(u64, u64, Verdict), OpenError> {
        let newest = self.all.iter().map(|found| found.header.incarnation).max().unwrap_or(0);
        recovery::check_chain(&self.chain, newest, self.local.as_ref(), None)?;
        let from = recovery::scan_start(&self.chain, None)?;
        let key = FrameKey::of_group(self.group_uuid);
        let ending = recovery::scan(self.storage.as_ref(), &self.chain, from, key)?;
        let Some(last) = self.chain.last() else {
            return Err(OpenError::Missing { reason: "there is no segment".to_owned() });
        };
        recovery::judge(&ending, last, recovery::proven(self.local.as_ref(), None, &self.all))?;
        let verdict = match ending.torn_end_at(&last.header) {
            None => Verdict::Clean,
            Some(end_at) => Verdict::TornTail {
                place: Place {
                    index: ending.next.index,
                    segment: last.name.clone(),
                    at: ending.next.at,
                    reason: ending.fault.to_string(),
                },
                bytes: end_at - ending.next.at,
            },
        };
        Ok((ending.scanned_entries, ending.scanned_bytes, verdict))
    }
}

/// Entries in order, each one checked.
#[derive(Debug)]
pub struct Frames<'a> {
    files: &'a LogFiles,
    from: EntryIndex,
    /// Being read, in the chain.
    segment: usize,
    at: Option<(Scanner, Expected)>,
}

impl Frames<'_> {
    fn next_frame(&mut self) -> Result<Option<Frame>, OpenError> {
        loop {
            let Some(found) = self.files.chain.get(self.segment) else { return Ok(None) };
            let later = self.files.chain.get(self.segment + 1);
            let (scanner, expected) = match &mut self.at {
                Some(at) => at,
                None => {
                    let begin = ScanFrom {
                        segment: self.segment,
                        expected: Expected {
                            index: found.header.base,
                            term: found.header.base_term,
                            at: HEADER_BYTES,
                        },
                    };
                    let key = FrameKey::of_group(self.files.group_uuid);
                    let file = self.files.storage.open(&found.name)?;
                    self.at.insert((Scanner::new(file, found.header, key), begin.expected))
                }
            };
            if later.is_some_and(|later| later.header.base == expected.index) {
                self.segment += 1;
                self.at = None;
                continue;
            }
            let (index, at) = (expected.index, expected.at);
            let header = match scanner.frame(*expected)? {
                Ok(header) => header,
                Err(fault) => {
                    let end = at + FRAME_HEADER_BYTES as u64;
                    let bare = later.is_none() && scanner.behind(at, end)?.bytes_end_at == 0;
                    self.segment = self.files.chain.len();
                    if bare || (later.is_none() && found.header.recycled) {
                        return Ok(None);
                    }
                    let (segment, reason) = (found.name.clone(), fault.to_string());
                    return Err(OpenError::Corrupt { index, segment, at, reason });
                }
            };
            let payload_at = at + FRAME_HEADER_BYTES as u64;
            let payload_bytes = header.payload_bytes as usize;
            let payload = Bytes::copy_from_slice(scanner.bytes(payload_at, payload_bytes)?);
            expected.index = index.next();
            expected.term = header.id.term;
            expected.at += header.frame_bytes();
            if index >= self.from {
                let segment = found.name.clone();
                return Ok(Some(Frame { segment, at, header, entry: header.into_entry(payload) }));
            }
        }
    }
}

impl Iterator for Frames<'_> {
    type Item = Result<Frame, OpenError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_frame();
        if next.is_err() {
            self.segment = self.files.chain.len();
        }
        next.transpose()
    }
}
