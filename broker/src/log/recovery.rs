//! From files to a known end, after any crash: which segments count, where the log ends, and whether
//! what fails there was durable. Refuses rather than guesses; recovering twice changes nothing.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::fence;
use super::files::{Files, Listing, NewSegment, list};
use super::published::End;
use super::quarantine;
use super::scan::{Behind, Expected, Fault, Scanner};
use super::segment::{
    FRAME_BYTES_MAX, HEADER, HEADER_BYTES, Segment, SegmentError, SegmentHeader, parse_file_name,
};
use super::slots::Slots;
use super::storage::{Storage, StorageFile, read_full_at};
use super::unsynced::UNSYNCED_BYTES_MAX;
use super::vote::{Local, load_local, load_vote, write_local};
use super::writer::{Active, Start};
use super::{CheckpointMark, LogOptions, OpenError, RecoveryReport, Vote};
use crate::entry::FrameKey;
use crate::position::{EntryId, EntryIndex, Term};

/// A segment's file before it is trusted.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) name: String,
    pub(super) file_bytes: u64,
    pub(super) header: SegmentHeader,
}

/// What recovery made of a directory.
pub(super) struct Recovered {
    pub(super) files: Files,
    pub(super) segments: VecDeque<Arc<Segment>>,
    pub(super) purged: Option<EntryId>,
    pub(super) last: Option<EntryId>,
    pub(super) vote: Option<Vote>,
    pub(super) start: Start,
    pub(super) report: RecoveryReport,
}

/// Where the log ends, and why.
#[derive(Debug)]
pub(super) struct Ending {
    /// What would follow the last good entry, in the last segment.
    pub(super) next: Expected,
    pub(super) fault: Fault,
    pub(super) behind: Behind,
    pub(super) scanned_entries: u64,
    pub(super) scanned_bytes: u64,
}

impl Ending {
    /// Behind what must go to quarantine; none if the log just ends.
    pub(super) fn torn_end_at(&self, last: &SegmentHeader) -> Option<u64> {
        // Behind the end of a recycled file lie old frames, which prove nothing.
        let bytes_end_at = if last.recycled { 0 } else { self.behind.bytes_end_at };
        let end_at = self.behind.frames_end_at.max(bytes_end_at);
        (end_at > self.next.at).then_some(end_at)
    }
}

/// Recovers a directory and makes it ready for the writer.
pub(super) fn recover(
    storage: Arc<dyn Storage>,
    options: &LogOptions,
    mark: Option<CheckpointMark>,
) -> Result<Recovered, OpenError> {
    // A name that a killed process made counts from here on, so the power must not undo it later.
    storage.sync_folder("")?;
    let listing = list(storage.as_ref())?;
    let used = !listing.segments.is_empty();
    let (local, mut local_slots) = load_local(storage.as_ref(), options.group_uuid)?;
    let (vote, vote_slots) = load_vote(storage.as_ref(), options.group_uuid, used, local.as_ref())?;
    let found = read_headers(storage.as_ref(), &listing, options.group_uuid)?;
    let newest = found.iter().map(|segment| segment.header.incarnation).max().unwrap_or(0);
    let (chain, overridden) = chain(found.clone());
    check_chain(&chain, newest, local.as_ref(), mark.as_ref())?;
    let files = Files::new(storage, options, &listing);
    // Only now: what is missing above may be found under such a name.
    let dropped = overridden.iter().map(|segment| &segment.name);
    for name in dropped.chain(&listing.temporary) {
        files.remove(name)?;
    }
    quarantine::sweep(files.storage())?;
    if !overridden.is_empty() {
        files.storage().sync_folder("")?;
    }
    let next_incarnation = newest.max(local.map_or(0, |facts| facts.incarnation)) + 1;
    let state = State { files, options, next_incarnation, chain };
    let (opened, last, report) = if state.chain.is_empty() {
        (state.begin_first()?, None, RecoveryReport::default())
    } else {
        let durable = proven(local.as_ref(), mark.as_ref(), &found);
        let resumed = state.resume(mark.as_ref(), durable);
        if let (Err(OpenError::Io(_)), Some(before)) = (&resumed, local) {
            fence_unsynced(before, &mut local_slots)?;
        }
        resumed?
    };
    finish(opened, last, report, vote, vote_slots, local, local_slots, options)
}

/// What was settled and not synced may be gone with a sync that fails here, and the next start
/// would take the rest for all of it.
fn fence_unsynced(before: Local, local_slots: &mut Slots) -> io::Result<()> {
    if !before.deferred || before.clean {
        return Ok(());
    }
    write_local(local_slots, &Local { fenced: true, ..before })?;
    local_slots.sync()
}

struct State<'a> {
    files: Files,
    options: &'a LogOptions,
    next_incarnation: u64,
    chain: Vec<Found>,
}

/// Files opened, with the end known.
struct Opened {
    files: Files,
    segments: VecDeque<Arc<Segment>>,
    active: Active,
    end: End,
    last_term: Term,
    next_incarnation: u64,
}

impl State<'_> {
    fn begin_first(self) -> Result<Opened, OpenError> {
        let new = NewSegment {
            base: EntryIndex::ZERO,
            base_term: Term::ZERO,
            base_position: crate::position::LogOffset::ZERO,
            previous: 0,
            anew: false,
        };
        let active = self.files.with_reserve(|| self.files.begin(new, self.next_incarnation))?;
        Ok(Opened {
            files: self.files,
            segments: [Arc::clone(&active.segment)].into(),
            active,
            end: End { index: new.base, position: new.base_position },
            last_term: Term::ZERO,
            next_incarnation: self.next_incarnation + 1,
        })
    }

    fn resume(
        mut self,
        mark: Option<&CheckpointMark>,
        durable_end: EntryIndex,
    ) -> Result<(Opened, Option<EntryId>, RecoveryReport), OpenError> {
        let storage = self.files.storage();
        let key = FrameKey::of_group(self.options.group_uuid);
        let from = scan_start(&self.chain, mark)?;
        for segment in &self.chain[from.segment..] {
            // What is read below must be what the disk holds, or count as lost.
            let file = storage.open(&segment.name)?;
            file.sync()?;
            file.drop_cache()?;
        }
        if let Some(mark) = mark {
            check_mark(storage, &self.chain, from, mark, key)?;
        }
        let ending = scan(storage, &self.chain, from, key)?;
        let last_segment = self.chain.len() - 1;
        let last = self.chain[last_segment].clone();
        judge(&ending, &last, durable_end)?;
        let mut report = RecoveryReport {
            scanned_entries: ending.scanned_entries,
            scanned_bytes: ending.scanned_bytes,
            ..RecoveryReport::default()
        };
        let (segments, file) = open_segments(storage, &self.chain, ending.next.at, self.options)?;
        let tail = segments.back().expect("the chain is not empty");
        let next = ending.next;
        let end = End { index: next.index, position: tail.position_at(next.at) };
        let mut active = Active { segment: Arc::clone(tail), file };
        let mut segments = segments;
        if let Some(torn_end_at) = ending.torn_end_at(&last.header) {
            report.torn_tail = Some((next.index, torn_end_at - next.at));
            self.files.with_reserve(|| {
                quarantine::copy(storage, &last.header, next.index, next.at..torn_end_at)
            })?;
            quarantine::bound(storage, self.options.quarantine_bytes_max)?;
            let new = NewSegment {
                base: next.index,
                base_term: next.term,
                base_position: end.position,
                previous: if next.index == last.header.base {
                    last.header.previous
                } else {
                    last.header.incarnation
                },
                anew: next.index == last.header.base && last.header.anew,
            };
            active = self.files.with_reserve(|| self.files.begin(new, self.next_incarnation))?;
            self.next_incarnation += 1;
            if next.index == last.header.base {
                segments.pop_back();
                self.files.remove(&last.name)?;
                storage.sync_folder("")?;
            }
            segments.push_back(Arc::clone(&active.segment));
        } else if from.segment == last_segment {
            active.segment.note(from.expected.index, from.expected.at);
        }
        let last_id = next.index.previous().map(|index| EntryId { term: next.term, index });
        let opened = Opened {
            files: self.files,
            segments,
            active,
            end,
            last_term: next.term,
            next_incarnation: self.next_incarnation,
        };
        Ok((opened, last_id, report))
    }
}

#[allow(clippy::too_many_arguments, reason = "joins what the steps before found")]
fn finish(
    opened: Opened,
    last: Option<EntryId>,
    mut report: RecoveryReport,
    vote: Option<Vote>,
    vote_slots: Slots,
    local: Option<Local>,
    mut local_slots: Slots,
    options: &LogOptions,
) -> Result<Recovered, OpenError> {
    let boot_id = *options.boot_id.as_bytes();
    let fenced = fence::is_fenced(fence::Found {
        before: local.as_ref(),
        used: last.is_some() || vote.is_some(),
        boot_id,
        defers: options.defer_syncs,
    });
    let facts = Local {
        incarnation: opened.active.segment.header().incarnation,
        durable_end: opened.end.index,
        vote_sequence: vote_slots.sequence(),
        boot_id,
        clean: false,
        deferred: options.defer_syncs,
        fenced,
    };
    report.fenced = fenced;
    report.clean = local.is_none_or(|before| before.clean);
    report.rebooted = local.is_some_and(|before| before.boot_id != facts.boot_id);
    if local != Some(facts) {
        opened.files.with_reserve(|| write_local(&mut local_slots, &facts))?;
        local_slots.sync()?;
    }
    let purged = opened.segments.front().and_then(|first| {
        let index = first.base().previous()?;
        Some(EntryId { term: first.header().base_term, index })
    });
    let epoch = opened.active.segment.header().incarnation;
    Ok(Recovered {
        files: opened.files,
        segments: opened.segments,
        purged,
        last,
        vote,
        start: Start {
            active: opened.active,
            end: opened.end,
            last_term: opened.last_term,
            next_incarnation: opened.next_incarnation,
            vote_slots,
            local_slots,
            local: facts,
            epoch,
        },
        report,
    })
}

/// Reads the header of every segment. One that fails is corruption: a file gets a segment's name
/// only when its header is durable.
pub(super) fn read_headers(
    storage: &dyn Storage,
    listing: &Listing,
    group_uuid: uuid::Uuid,
) -> Result<Vec<Found>, OpenError> {
    let mut found = Vec::with_capacity(listing.segments.len());
    for (name, file_bytes) in &listing.segments {
        let file = storage.open(name)?;
        let header = read_header(file.as_ref(), name)?
            .map_err(|reason| OpenError::Segment { segment: name.clone(), reason })?;
        if header.group_uuid != group_uuid {
            return Err(OpenError::OtherGroup {
                segment: name.clone(),
                found: header.group_uuid,
                expected: group_uuid,
            });
        }
        found.push(Found { name: name.clone(), file_bytes: *file_bytes, header });
    }
    found.sort_by_key(|segment| segment.header.incarnation);
    Ok(found)
}

/// The header of a segment's file, compared with its name.
pub(super) fn read_header(
    file: &dyn StorageFile,
    name: &str,
) -> io::Result<Result<SegmentHeader, SegmentError>> {
    let mut raw = [0; HEADER];
    let read = read_full_at(file, &mut raw, 0)?;
    Ok(SegmentHeader::decode(raw.get(..read).unwrap_or_default()).and_then(|header| {
        let named = parse_file_name(name);
        if named == Some((header.incarnation, header.base)) {
            Ok(header)
        } else {
            Err(SegmentError::Name)
        }
    }))
}

/// Which segments count, ascending by base, and which a later one overrides wholly.
pub(super) fn chain(found: Vec<Found>) -> (Vec<Found>, Vec<Found>) {
    let mut chain: Vec<Found> = Vec::new();
    let mut overridden = Vec::new();
    for segment in found {
        while let Some(last) = chain.last()
            && (segment.header.anew || last.header.base >= segment.header.base)
        {
            overridden.extend(chain.pop());
        }
        chain.push(segment);
    }
    (chain, overridden)
}

/// Refuses a log of which a part is missing.
pub(super) fn check_chain(
    chain: &[Found],
    newest: u64,
    local: Option<&Local>,
    mark: Option<&CheckpointMark>,
) -> Result<(), OpenError> {
    let missing = |reason: String| Err(OpenError::Missing { reason });
    if let Some(local) = local
        && local.incarnation > newest
    {
        let wanted = local.incarnation;
        return missing(format!("segment {wanted} was begun, the newest there is is {newest}"));
    }
    for pair in chain.windows(2) {
        let [earlier, later] = pair else { continue };
        if later.header.previous != earlier.header.incarnation {
            let wanted = later.header.previous;
            return missing(format!("segment {wanted} before {} is not there", later.name));
        }
        let wanted = HEADER_BYTES
            + later
                .header
                .base_position
                .bytes_since(earlier.header.base_position)
                .unwrap_or(u64::MAX - HEADER_BYTES);
        if earlier.file_bytes < wanted {
            let found = earlier.file_bytes;
            return missing(format!("{} has {found} bytes, {wanted} are needed", earlier.name));
        }
    }
    let Some(mark) = mark else { return Ok(()) };
    match chain.first() {
        None => missing("the checkpoint refers to a log, and there is none".to_owned()),
        Some(first) if first.header.base > mark.applied.index.next() => {
            let (name, applied) = (&first.name, mark.applied.index);
            missing(format!("the log begins with {name}, the checkpoint ends with entry {applied}"))
        }
        Some(_) => Ok(()),
    }
}

/// The index below which everything was durable, as far as it can be known without the frames.
pub(super) fn proven(
    local: Option<&Local>,
    mark: Option<&CheckpointMark>,
    found: &[Found],
) -> EntryIndex {
    let own = local.map_or(EntryIndex::ZERO, |local| {
        // What a later segment overrode proves nothing from its base on.
        found
            .iter()
            .filter(|segment| segment.header.incarnation > local.incarnation)
            .map(|segment| segment.header.base)
            .fold(local.durable_end, EntryIndex::min)
    });
    own.max(mark.map_or(EntryIndex::ZERO, |mark| mark.applied.index.next()))
}

/// Where scanning begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScanFrom {
    /// In the chain.
    pub(super) segment: usize,
    pub(super) expected: Expected,
}

/// Behind the checkpoint, or at the beginning if there is none.
pub(super) fn scan_start(
    chain: &[Found],
    mark: Option<&CheckpointMark>,
) -> Result<ScanFrom, OpenError> {
    let begin = |segment: usize, header: &SegmentHeader| ScanFrom {
        segment,
        expected: Expected { index: header.base, term: header.base_term, at: HEADER_BYTES },
    };
    let Some(mark) = mark else {
        let first = chain.first().map(|first| begin(0, &first.header));
        return first.ok_or_else(|| OpenError::Missing { reason: "there is no segment".into() });
    };
    let next = mark.applied.index.next();
    let behind = chain.partition_point(|segment| segment.header.base <= next);
    let at = behind.checked_sub(1).and_then(|at| Some((at, chain.get(at)?)));
    let Some((segment, found)) = at else {
        return Err(OpenError::Missing { reason: "the checkpoint lies before the log".into() });
    };
    let within = mark.end.bytes_since(found.header.base_position);
    match within.map(|bytes| bytes + HEADER_BYTES) {
        Some(at) if at <= found.file_bytes && (at > HEADER_BYTES) == (next > found.header.base) => {
            let expected = Expected { index: next, term: mark.applied.term, at };
            Ok(ScanFrom { segment, expected })
        }
        Some(_) | None => Err(OpenError::Corrupt {
            index: mark.applied.index,
            segment: found.name.clone(),
            at: found.file_bytes,
            reason: format!("the checkpoint ends at position {}", mark.end),
        }),
    }
}

/// The checkpoint's entry must end where it says, or the log is not the one it was made of.
pub(super) fn check_mark(
    storage: &dyn Storage,
    chain: &[Found],
    from: ScanFrom,
    mark: &CheckpointMark,
    key: FrameKey,
) -> Result<(), OpenError> {
    let Some(found) = chain.get(from.segment) else { return Ok(()) };
    let fits = if from.expected.at == HEADER_BYTES {
        found.header.base_term == mark.applied.term
    } else {
        let file = storage.open(&found.name)?;
        Scanner::new(file, found.header, key).ends_with(mark.applied, from.expected.at)?
    };
    if fits {
        return Ok(());
    }
    Err(OpenError::Corrupt {
        index: mark.applied.index,
        segment: found.name.clone(),
        at: from.expected.at,
        reason: "the checkpoint's last entry does not end there".to_owned(),
    })
}

/// Follows the frames to where they end. Nothing but the last segment may end early.
pub(super) fn scan(
    storage: &dyn Storage,
    chain: &[Found],
    from: ScanFrom,
    key: FrameKey,
) -> Result<Ending, OpenError> {
    let mut next = from.expected;
    let (mut entries, mut bytes) = (0, 0);
    for (number, found) in chain.iter().enumerate().skip(from.segment) {
        let file = storage.open(&found.name)?;
        let mut scanner = Scanner::new(file, found.header, key);
        let later = chain.get(number + 1);
        if number > from.segment {
            next.at = HEADER_BYTES;
        }
        let corrupt = |next: Expected, reason: String| OpenError::Corrupt {
            index: next.index,
            segment: found.name.clone(),
            at: next.at,
            reason,
        };
        let fault = loop {
            if later.is_some_and(|later| later.header.base == next.index) {
                break None;
            }
            match scanner.frame(next)? {
                Ok(header) => {
                    entries += 1;
                    bytes += header.frame_bytes();
                    next.index = next.index.next();
                    next.term = header.id.term;
                    next.at += header.frame_bytes();
                }
                Err(fault) => break Some(fault),
            }
        };
        match (fault, later) {
            // The segment was synced before the later one was begun.
            (Some(fault), Some(_)) => return Err(corrupt(next, fault.to_string())),
            (Some(fault), None) => {
                let end = next.at + UNSYNCED_BYTES_MAX + FRAME_BYTES_MAX;
                let behind = scanner.behind(next.at, end)?;
                let (scanned_entries, scanned_bytes) = (entries, bytes);
                return Ok(Ending { next, fault, behind, scanned_entries, scanned_bytes });
            }
            (None, Some(later)) => {
                let position = found.header.base_position.advance(next.at - HEADER_BYTES);
                if position != later.header.base_position || next.term != later.header.base_term {
                    let reason = format!("{} does not continue it", later.name);
                    return Err(corrupt(next, reason));
                }
            }
            (None, None) => {}
        }
    }
    Err(OpenError::Missing { reason: "there is no segment".into() })
}

/// A torn tail is fine; what was durable must not fail.
pub(super) fn judge(
    ending: &Ending,
    last: &Found,
    durable_end: EntryIndex,
) -> Result<(), OpenError> {
    let durable_end = durable_end.max(ending.behind.durable_end);
    if ending.next.index >= durable_end && !ending.fault.is_unknown() {
        return Ok(());
    }
    Err(OpenError::Corrupt {
        index: ending.next.index,
        segment: last.name.clone(),
        at: ending.next.at,
        reason: ending.fault.to_string(),
    })
}

type OpenSegments = (VecDeque<Arc<Segment>>, Arc<dyn StorageFile>);

/// Opens the segments for reading and the last one for writing.
fn open_segments(
    storage: &dyn Storage,
    chain: &[Found],
    last_end_at: u64,
    options: &LogOptions,
) -> Result<OpenSegments, OpenError> {
    let key = FrameKey::of_group(options.group_uuid);
    let mut segments = VecDeque::with_capacity(chain.len());
    let mut last = None;
    for (number, found) in chain.iter().enumerate() {
        let file = storage.open(&found.name)?;
        let end_at = match chain.get(number + 1) {
            Some(later) => {
                let bytes = later.header.base_position.bytes_since(found.header.base_position);
                HEADER_BYTES + bytes.unwrap_or(0)
            }
            None => last_end_at,
        };
        segments.push_back(Arc::new(Segment::new(
            found.header,
            found.name.clone(),
            file.as_ref(),
            options.segment_bytes,
            end_at,
            key,
        )?));
        last = Some(file);
    }
    let last = last.ok_or_else(|| OpenError::Missing { reason: "there is no segment".into() })?;
    Ok((segments, last))
}
