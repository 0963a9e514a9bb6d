//! The items of an entry's payload as bytes and back: runs and commands, each 8-byte aligned.
//!
//! Knows the frame of an item, not what its records or its archive hold. `docs/format.md` describes
//! every byte.

use bytes::{BufMut, Bytes, BytesMut};
use crc32fast::Hasher;
use drumlin_proto::ids::QueueKey;
use drumlin_proto::record::{RUN_HEADER_BYTES, Run, RunError, RunHeader};

use crate::command::{self, Command, CommandError};
use crate::entry::ALIGN_BYTES;

/// Bytes of a command item before its archive.
pub const COMMAND_HEADER_BYTES: usize = 16;

const RUN: u8 = 1;
const COMMAND: u8 = 2;
static ZEROS: [u8; ALIGN_BYTES] = [0; ALIGN_BYTES];

const _: () = assert!(RUN_HEADER_BYTES.is_multiple_of(ALIGN_BYTES));
const _: () = assert!(COMMAND_HEADER_BYTES.is_multiple_of(ALIGN_BYTES));

/// Why a payload is not a sequence of items.
#[derive(Debug, thiserror::Error)]
pub enum ItemError {
    #[error("the item at byte {at} is cut short")]
    Short { at: usize },
    #[error("the item at byte {at} has the unknown kind {kind}")]
    Kind { at: usize, kind: u8 },
    #[error("{field} of the item at byte {at} is invalid")]
    Field { at: usize, field: &'static str },
    #[error("the run at byte {at} has an invalid header")]
    Run { at: usize, source: RunError },
    #[error("the payload holds {found} items, its entry says {declared}")]
    Count { found: u32, declared: u32 },
}

/// One item of a payload and where it begins there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedItem<'a> {
    /// Bytes from the start of the payload.
    pub at_bytes: u32,
    pub item: ItemView<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemView<'a> {
    Run(RunHeader),
    Command(CommandItem<'a>),
}

/// A command inside an entry, not yet decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandItem<'a> {
    pub kind: u16,
    pub version: u16,
    pub archive: &'a [u8],
}

impl CommandItem<'_> {
    pub fn decode(&self) -> Result<Command, CommandError> {
        command::decode(self.kind, self.version, self.archive)
    }
}

/// The items of a payload in order; ends behind the first error.
pub fn items(payload: &[u8]) -> Items<'_> {
    Items { payload, at: 0 }
}

/// Iterator over the items of a payload.
#[derive(Clone, Debug)]
pub struct Items<'a> {
    payload: &'a [u8],
    at: usize,
}

impl<'a> Iterator for Items<'a> {
    type Item = Result<PlacedItem<'a>, ItemError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.payload.len() {
            return None;
        }
        let at = self.at;
        let parsed = self.parse();
        if parsed.is_err() {
            self.at = self.payload.len();
        }
        Some(parsed.and_then(|item| {
            let at_bytes = u32::try_from(at).map_err(|_| ItemError::Short { at })?;
            Ok(PlacedItem { at_bytes, item })
        }))
    }
}

impl<'a> Items<'a> {
    fn parse(&mut self) -> Result<ItemView<'a>, ItemError> {
        let at = self.at;
        let rest = self.payload.get(at..).unwrap_or_default();
        let fields = Fields { bytes: rest, at };
        let item_bytes = fields.u32(0)?;
        let item_end = usize::try_from(item_bytes).map_err(|_| ItemError::Short { at })?;
        let padded_end = item_end.checked_next_multiple_of(ALIGN_BYTES);
        let padded_end = padded_end.ok_or(ItemError::Short { at })?;
        let padding = rest.get(item_end..padded_end).ok_or(ItemError::Short { at })?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(ItemError::Field { at, field: "padding" });
        }
        let fields = Fields { bytes: rest.get(..item_end).unwrap_or_default(), at };
        let item = match fields.u8(4)? {
            RUN => ItemView::Run(fields.run()?),
            COMMAND => ItemView::Command(fields.command()?),
            kind => return Err(ItemError::Kind { at, kind }),
        };
        self.at += padded_end;
        Ok(item)
    }
}

/// The bytes of one item, read by position.
struct Fields<'a> {
    bytes: &'a [u8],
    /// Where the item begins, for errors.
    at: usize,
}

impl<'a> Fields<'a> {
    fn array<const N: usize>(&self, from: usize) -> Result<[u8; N], ItemError> {
        let found = self.bytes.get(from..).and_then(|rest| rest.first_chunk());
        found.copied().ok_or(ItemError::Short { at: self.at })
    }

    fn u8(&self, from: usize) -> Result<u8, ItemError> {
        self.array::<1>(from).map(|[byte]| byte)
    }

    fn u16(&self, from: usize) -> Result<u16, ItemError> {
        self.array(from).map(u16::from_le_bytes)
    }

    fn u32(&self, from: usize) -> Result<u32, ItemError> {
        self.array(from).map(u32::from_le_bytes)
    }

    fn require(&self, holds: bool, field: &'static str) -> Result<(), ItemError> {
        if holds { Ok(()) } else { Err(ItemError::Field { at: self.at, field }) }
    }

    fn run(&self) -> Result<RunHeader, ItemError> {
        let invalid = |source| ItemError::Run { at: self.at, source };
        let header = RunHeader::decode(self.bytes).map_err(invalid)?;
        self.require(header.run_bytes() == self.bytes.len(), "run size")?;
        Ok(header)
    }

    fn command(&self) -> Result<CommandItem<'a>, ItemError> {
        self.require(self.u8(5)? == 0 && self.u16(6)? == 0, "reserved field")?;
        let (kind, version) = (self.u16(8)?, self.u16(10)?);
        let archive_bytes = self.u32(12)?;
        let archive = self.bytes.get(COMMAND_HEADER_BYTES..);
        let archive = archive.ok_or(ItemError::Short { at: self.at })?;
        self.require(u32::try_from(archive.len()) == Ok(archive_bytes), "archive size")?;
        Ok(CommandItem { kind, version, archive })
    }
}

/// Collects the items of one entry.
///
/// Records are referred to until [`PayloadBuilder::finish`] and copied once; the CRC of the payload
/// is combined from those of the runs.
#[derive(Debug, Default)]
pub struct PayloadBuilder {
    parts: Vec<Bytes>,
    bytes: usize,
    crc: Hasher,
    item_count: u32,
}

impl PayloadBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn item_count(&self) -> u32 {
        self.item_count
    }

    /// Bytes of the payload so far, padding included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a run for a queue; `guard` is 0 or 1 + the ordinal of the item that it depends on.
    pub fn push_run(&mut self, queue: QueueKey, run: &Run, guard: u16) {
        self.push_records(&run.header().placed(queue, guard), [run.records_bytes()]);
    }

    /// Adds a run whose header is at its place already and whose records come in parts.
    pub fn push_records(&mut self, header: &RunHeader, parts: impl IntoIterator<Item = Bytes>) {
        let start = self.bytes;
        self.add(Bytes::copy_from_slice(&header.encode()));
        for part in parts {
            self.add(part);
        }
        assert!(self.bytes - start == header.run_bytes(), "the parts must be the header's records");
        self.crc.combine(&header.item_hasher());
        self.end_item();
    }

    pub fn push_command(&mut self, command: &Command) {
        self.push_encoded(command_item(command));
    }

    /// Adds what [`command_item`] made.
    pub(crate) fn push_encoded(&mut self, item: Bytes) {
        self.crc.update(&item);
        self.crc.update(self.padding_behind(item.len()));
        self.add(item);
        self.end_item();
    }

    /// The payload, its CRC and the number of its items.
    pub fn finish(self) -> (Bytes, u32, u32) {
        let mut payload = BytesMut::with_capacity(self.bytes);
        for part in &self.parts {
            payload.put_slice(part);
        }
        assert!(payload.len() == self.bytes, "the parts must make up the payload");
        (payload.freeze(), self.crc.finalize(), self.item_count)
    }

    fn add(&mut self, part: Bytes) {
        self.bytes += part.len();
        self.parts.push(part);
    }

    fn padding_behind(&self, item_bytes: usize) -> &'static [u8] {
        let end = self.bytes + item_bytes;
        &ZEROS[..end.next_multiple_of(ALIGN_BYTES) - end]
    }

    /// Pads to the alignment.
    fn end_item(&mut self) {
        let padding = self.padding_behind(0);
        if !padding.is_empty() {
            self.add(Bytes::from_static(padding));
        }
        self.item_count += 1;
    }
}

/// A command as an item, without the padding behind it.
pub(crate) fn command_item(command: &Command) -> Bytes {
    let (kind, version, archive) = command::encode(command);
    let mut item = BytesMut::with_capacity(COMMAND_HEADER_BYTES + archive.len());
    item.put_u32_le(item_size(COMMAND_HEADER_BYTES + archive.len()));
    item.put_slice(&[COMMAND, 0, 0, 0]);
    item.put_u16_le(kind);
    item.put_u16_le(version);
    item.put_u32_le(item_size(archive.len()));
    item.put_slice(&archive);
    item.freeze()
}

fn item_size(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("an item is far below 4 GiB")
}

#[cfg(test)]
mod tests;
