//! Runs: consecutive records of one queue behind one header, the unit of producing, storing,
//! indexing and fetching.

use bytes::{Bytes, BytesMut};
use crc32fast::Hasher;

use super::{
    RUN_BYTES_MAX, RUN_HEADER_BYTES, Record, RecordFields, array_at, i64_at, limit, u16_at, u32_at,
};
use crate::ids::{QueueId, QueueKey, TopicId};

/// Items of an entry begin at multiples of this.
pub const ITEM_ALIGN_BYTES: usize = 8;
/// Item kind of a run; runs carry it on the wire, too.
pub const ITEM_KIND_RUN: u8 = 1;
/// Item kind of a command.
pub const ITEM_KIND_COMMAND: u8 = 2;

/// Records as this module lays them out; 2 is kept for Kafka batches.
const ENCODING_RECORDS: u8 = 1;
/// [`RUN_HEADER_BYTES`] in the width of the fields.
const HEADER_BYTES: u32 = 48;
const _: () = assert!(HEADER_BYTES as usize == RUN_HEADER_BYTES);
const PADDING: [u8; ITEM_ALIGN_BYTES] = [0; ITEM_ALIGN_BYTES];

/// Why bytes are not a valid run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    #[error("run is cut short: {bytes} bytes")]
    Short { bytes: usize },
    #[error("{field} is invalid in the run header")]
    Header { field: &'static str },
    #[error("records CRC is {computed:#010x}, the header says {stored:#010x}")]
    Crc { stored: u32, computed: u32 },
    #[error("record {record} is invalid: {field}")]
    Record { record: u32, field: &'static str },
    #[error("record {record} has attribute kind {kind}, which this broker does not support")]
    Unsupported { record: u32, kind: u8 },
    #[error("{bytes} bytes are more than the {bytes_max} allowed")]
    TooLarge { bytes: usize, bytes_max: usize },
}

/// The 48 bytes before the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunHeader {
    /// 0: none; else 1 + ordinal of the command of the same entry that the run depends on.
    pub guard: u16,
    pub topic: TopicId,
    pub queue: QueueId,
    pub record_count: u32,
    pub records_bytes: u32,
    /// Born time of the first record.
    pub first_born_ms: i64,
    /// Born time of the last record.
    pub last_born_ms: i64,
    pub records_crc: u32,
}

impl RunHeader {
    /// Header and records, without padding.
    pub fn run_bytes(&self) -> usize {
        let records_bytes = usize::try_from(self.records_bytes).unwrap_or(usize::MAX);
        records_bytes.saturating_add(RUN_HEADER_BYTES)
    }

    /// Zero bytes behind the records that align the next item of an entry.
    pub fn padding_bytes(&self) -> usize {
        self.run_bytes().next_multiple_of(ITEM_ALIGN_BYTES) - self.run_bytes()
    }

    pub fn queue_key(&self) -> QueueKey {
        QueueKey { topic: self.topic, queue: self.queue }
    }

    /// The same records at their place in an entry.
    pub fn placed(self, queue: QueueKey, guard: u16) -> Self {
        Self { topic: queue.topic, queue: queue.queue, guard, ..self }
    }

    pub fn encode(&self) -> [u8; RUN_HEADER_BYTES] {
        let run_bytes = self.records_bytes + HEADER_BYTES;
        let mut out = [0; RUN_HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            let field = out.get_mut(at..at + bytes.len()).expect("all fields lie in the header");
            field.copy_from_slice(bytes);
        };
        put(0, &run_bytes.to_le_bytes());
        put(4, &[ITEM_KIND_RUN, ENCODING_RECORDS]);
        put(6, &self.guard.to_le_bytes());
        put(8, &self.topic.get().to_le_bytes());
        put(12, &self.queue.get().to_le_bytes());
        put(16, &self.record_count.to_le_bytes());
        put(20, &self.records_bytes.to_le_bytes());
        put(24, &self.first_born_ms.to_le_bytes());
        put(32, &self.last_born_ms.to_le_bytes());
        put(40, &self.records_crc.to_le_bytes());
        out
    }

    /// Checks all that the header says about itself; `bytes` may go on behind it.
    pub fn decode(bytes: &[u8]) -> Result<Self, RunError> {
        let header: [u8; RUN_HEADER_BYTES] =
            array_at(bytes, 0).ok_or(RunError::Short { bytes: bytes.len() })?;
        let short = || RunError::Short { bytes: RUN_HEADER_BYTES };
        let u16_at = |at| u16_at(&header, at).ok_or_else(short);
        let u32_at = |at| u32_at(&header, at).ok_or_else(short);
        let i64_at = |at| i64_at(&header, at).ok_or_else(short);
        let decoded = Self {
            guard: u16_at(6)?,
            topic: TopicId::new(u32_at(8)?),
            queue: QueueId::new(u16_at(12)?),
            record_count: u32_at(16)?,
            records_bytes: u32_at(20)?,
            first_born_ms: i64_at(24)?,
            last_born_ms: i64_at(32)?,
            records_crc: u32_at(40)?,
        };
        let fields = [
            (header.get(4) == Some(&ITEM_KIND_RUN), "item kind"),
            (header.get(5) == Some(&ENCODING_RECORDS), "encoding"),
            (Some(u32_at(0)?) == decoded.records_bytes.checked_add(HEADER_BYTES), "run bytes"),
            (u16_at(14)? == 0 && u32_at(44)? == 0, "reserved"),
            (decoded.record_count > 0, "record count"),
        ];
        if let Some((_, field)) = fields.into_iter().find(|(valid, _)| !valid) {
            return Err(RunError::Header { field });
        }
        limit(decoded.run_bytes(), RUN_BYTES_MAX)?;
        Ok(decoded)
    }

    /// Takes the records of `next` behind these, both without or with the same guard and queue.
    ///
    /// False, and nothing changed, where the run would become larger than `run_bytes_max`.
    pub fn extend(&mut self, next: &Self, run_bytes_max: usize) -> bool {
        let place = |header: &Self| (header.queue_key(), header.guard);
        assert_eq!(place(self), place(next), "only runs of one place can become one");
        let records_bytes = self.records_bytes.checked_add(next.records_bytes);
        let record_count = self.record_count.checked_add(next.record_count);
        let (Some(records_bytes), Some(record_count)) = (records_bytes, record_count) else {
            return false;
        };
        let extended = Self { records_bytes, record_count, ..*self };
        if extended.run_bytes() > run_bytes_max.min(RUN_BYTES_MAX) {
            return false;
        }
        let mut hasher = self.records_hasher();
        hasher.combine(&next.records_hasher());
        *self =
            Self { records_crc: hasher.finalize(), last_born_ms: next.last_born_ms, ..extended };
        true
    }

    /// CRC state over the item as it lies in an entry: this header, the records, the padding. The
    /// records are not read again, since CRCs combine.
    pub fn item_hasher(&self) -> Hasher {
        let mut hasher = Hasher::new();
        hasher.update(&self.encode());
        hasher.combine(&self.records_hasher());
        hasher.update(PADDING.get(..self.padding_bytes()).unwrap_or_default());
        hasher
    }

    fn records_hasher(&self) -> Hasher {
        Hasher::new_with_initial_len(self.records_crc, u64::from(self.records_bytes))
    }
}

/// Collects records of one queue.
#[derive(Debug)]
pub struct RunBuilder {
    bytes: BytesMut,
    record_count: u32,
    first_born_ms: i64,
    last_born_ms: i64,
}

impl Default for RunBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl RunBuilder {
    pub fn new() -> Self {
        Self::with_capacity(RUN_HEADER_BYTES)
    }

    /// With room for a run of `run_bytes`, header included.
    pub fn with_capacity(run_bytes: usize) -> Self {
        let mut bytes = BytesMut::with_capacity(run_bytes.max(RUN_HEADER_BYTES));
        bytes.resize(RUN_HEADER_BYTES, 0);
        Self { bytes, record_count: 0, first_born_ms: 0, last_born_ms: 0 }
    }

    /// Adds one record.
    ///
    /// Panics if [`RecordFields::check`] fails or the run would exceed [`RUN_BYTES_MAX`]: whoever
    /// takes the fields from outside checks them there.
    pub fn push(&mut self, fields: &RecordFields<'_>) {
        if let Err(error) = fields.check() {
            panic!("a record must be checked before it is added: {error}");
        }
        fields.encode(&mut self.bytes);
        assert!(self.bytes.len() <= RUN_BYTES_MAX, "a run has at most {RUN_BYTES_MAX} bytes");
        if self.record_count == 0 {
            self.first_born_ms = fields.born_ms;
        }
        self.last_born_ms = fields.born_ms;
        self.record_count += 1;
    }

    pub fn record_count(&self) -> u32 {
        self.record_count
    }

    /// Bytes of the run so far, header included.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The finished run, topic id and queue id 0. Panics if no record was added.
    pub fn finish(mut self) -> Bytes {
        assert!(self.record_count > 0, "a run has at least one record");
        let (header, records) = self.bytes.split_at_mut(RUN_HEADER_BYTES);
        let filled = RunHeader {
            guard: 0,
            topic: TopicId::new(0),
            queue: QueueId::new(0),
            record_count: self.record_count,
            records_bytes: u32::try_from(records.len()).expect("push keeps to RUN_BYTES_MAX"),
            first_born_ms: self.first_born_ms,
            last_born_ms: self.last_born_ms,
            records_crc: crc32fast::hash(records),
        };
        header.copy_from_slice(&filled.encode());
        self.bytes.freeze()
    }
}

/// A run whose header, CRC and records were checked.
#[derive(Clone, Debug)]
pub struct Run {
    header: RunHeader,
    bytes: Bytes,
}

impl Run {
    /// Checks everything: for runs that come from a client.
    pub fn parse(bytes: Bytes) -> Result<Self, RunError> {
        let run_bytes = bytes.len();
        let run = Self::from_log(bytes)?;
        if run.bytes.len() != run_bytes {
            return Err(RunError::Header { field: "run bytes" });
        }
        if run.topic().get() != 0 || run.header.queue.get() != 0 || run.header.guard != 0 {
            return Err(RunError::Header { field: "place" });
        }
        run.verify()?;
        Ok(run)
    }

    /// Checks the header only: for runs out of the log, whose CRC the log has verified. What lies
    /// behind the run, such as padding, is left off.
    pub fn from_log(bytes: Bytes) -> Result<Self, RunError> {
        let header = RunHeader::decode(&bytes)?;
        if bytes.len() < header.run_bytes() {
            return Err(RunError::Short { bytes: bytes.len() });
        }
        Ok(Self { header, bytes: bytes.slice(..header.run_bytes()) })
    }

    /// Checks CRC and records: for those who fetched a run from a broker.
    pub fn verify(&self) -> Result<(), RunError> {
        let records = self.records_slice();
        let computed = crc32fast::hash(records);
        if computed != self.header.records_crc {
            return Err(RunError::Crc { stored: self.header.records_crc, computed });
        }
        let (mut rest, mut count, mut first_born_ms, mut last_born_ms) = (records, 0_u32, None, 0);
        while !rest.is_empty() {
            let (record, behind) =
                Record::split(rest).map_err(|field| RunError::Record { record: count, field })?;
            record.check(count)?;
            first_born_ms.get_or_insert(record.born_ms());
            last_born_ms = record.born_ms();
            count += 1;
            rest = behind;
        }
        if count != self.header.record_count {
            return Err(RunError::Header { field: "record count" });
        }
        let born_times = (Some(self.header.first_born_ms), self.header.last_born_ms);
        match born_times == (first_born_ms, last_born_ms) {
            true => Ok(()),
            false => Err(RunError::Header { field: "born times" }),
        }
    }

    pub fn header(&self) -> &RunHeader {
        &self.header
    }

    /// Header and records, as they came.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes behind the header, which stay as they are wherever the run goes.
    pub fn records_bytes(&self) -> Bytes {
        self.bytes.slice(RUN_HEADER_BYTES..)
    }

    pub fn topic(&self) -> TopicId {
        self.header.topic
    }

    pub fn queue_key(&self) -> QueueKey {
        self.header.queue_key()
    }

    pub fn record_count(&self) -> u32 {
        self.header.record_count
    }

    pub fn records_crc(&self) -> u32 {
        self.header.records_crc
    }

    /// Records in order.
    pub fn records(&self) -> Records<'_> {
        Records { rest: self.records_slice() }
    }

    fn records_slice(&self) -> &[u8] {
        self.bytes.get(RUN_HEADER_BYTES..).unwrap_or_default()
    }
}

/// Iterator over the records of a run; ends early at bytes that are no record.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let (record, rest) = Record::split(self.rest).ok()?;
        self.rest = rest;
        Some(record)
    }
}
