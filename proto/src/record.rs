//! Records and runs: the bytes that the SDK builds and the broker stores unchanged.
//!
//! `docs/format.md` describes every byte. A run is read in place: a [`Run`] is a checked view of
//! its bytes, a [`Record`] borrows from it, nothing is copied or allocated.

use bytes::Bytes;

use crate::ids::{QueueKey, TopicId};

/// Bytes of a run before its records; the same layout on the wire and in an entry's payload.
pub const RUN_HEADER_BYTES: usize = 48;
/// Largest body of one record.
pub const BODY_BYTES_MAX: usize = 4 << 20;
/// Largest sum of keys and values of user properties, tag and keys of one record.
pub const PROPERTIES_BYTES_MAX: usize = 16 << 10;
/// Largest run, header included.
pub const RUN_BYTES_MAX: usize = 6 << 20;

/// What a record is, derived from its attributes by whoever builds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    Normal = 1,
    Fifo = 2,
    Delay = 3,
    Transaction = 4,
}

/// How the body was encoded by the client; stored and delivered as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BodyEncoding {
    Identity = 1,
    Gzip = 2,
}

/// Fields of a record to be built.
#[derive(Clone, Debug, Default)]
pub struct RecordFields<'a> {
    pub message_id: &'a str,
    pub keys: &'a [String],
    pub tag: Option<&'a str>,
    pub message_group: Option<&'a str>,
    /// Pairs in ascending order of the key.
    pub user_properties: &'a [(String, String)],
    pub trace_context: Option<&'a str>,
    pub born_host: Option<&'a str>,
    pub body_encoding: Option<BodyEncoding>,
    /// Ms since the epoch.
    pub born_ms: i64,
    pub body: &'a [u8],
}

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

/// Collects records of one queue.
#[derive(Debug, Default)]
pub struct RunBuilder {}

impl RunBuilder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one record; the fields must respect the limits above.
    pub fn push(&mut self, _fields: &RecordFields<'_>) {
        unimplemented!()
    }

    pub fn record_count(&self) -> u32 {
        unimplemented!()
    }

    /// Bytes of the run so far, header included.
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }

    /// The finished run, topic id and queue id 0.
    pub fn finish(self) -> Bytes {
        unimplemented!()
    }
}

/// A run whose header, CRC and records were checked.
#[derive(Clone, Debug)]
pub struct Run {
    bytes: Bytes,
}

impl Run {
    /// Checks everything: for runs that come from a client.
    pub fn parse(_bytes: Bytes) -> Result<Self, RunError> {
        unimplemented!()
    }

    /// Checks the header only: for runs out of the log, whose CRC the log has verified.
    pub fn from_log(_bytes: Bytes) -> Result<Self, RunError> {
        unimplemented!()
    }

    /// Header and records, as they came.
    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn topic(&self) -> TopicId {
        unimplemented!()
    }

    pub fn queue_key(&self) -> QueueKey {
        unimplemented!()
    }

    pub fn record_count(&self) -> u32 {
        unimplemented!()
    }

    pub fn records_crc(&self) -> u32 {
        unimplemented!()
    }

    /// Records in order.
    pub fn records(&self) -> Records<'_> {
        unimplemented!()
    }
}

/// Iterator over the records of a run.
#[derive(Debug)]
pub struct Records<'a> {
    _rest: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        unimplemented!()
    }
}

/// One record, read in place.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    _bytes: &'a [u8],
}

impl<'a> Record<'a> {
    pub fn kind(&self) -> RecordKind {
        unimplemented!()
    }
    pub fn body(&self) -> &'a [u8] {
        unimplemented!()
    }
    pub fn body_encoding(&self) -> BodyEncoding {
        unimplemented!()
    }
    pub fn born_ms(&self) -> i64 {
        unimplemented!()
    }
    /// CRC-32 of the UTF-8 tag; 0 without one.
    pub fn tag_hash(&self) -> u32 {
        unimplemented!()
    }
    pub fn message_id(&self) -> &'a str {
        unimplemented!()
    }
    pub fn tag(&self) -> Option<&'a str> {
        unimplemented!()
    }
    pub fn message_group(&self) -> Option<&'a str> {
        unimplemented!()
    }
    pub fn trace_context(&self) -> Option<&'a str> {
        unimplemented!()
    }
    pub fn born_host(&self) -> Option<&'a str> {
        unimplemented!()
    }
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        std::iter::empty()
    }
    pub fn user_properties(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        std::iter::empty()
    }
}
