//! Records and runs: the bytes that the SDK builds and the broker stores unchanged.
//!
//! `docs/format.md` describes every byte. A run is read in place: a [`Run`] is a checked view of
//! its bytes, a [`Record`] borrows from it, nothing is copied or allocated. This file owns the
//! single record, `record/run.rs` the run around it; neither knows offsets, which live beside runs.

#![warn(clippy::indexing_slicing)]

use bytes::{BufMut, BytesMut};

mod run;

pub use run::{
    ITEM_ALIGN_BYTES, ITEM_KIND_COMMAND, ITEM_KIND_RUN, Records, Run, RunBuilder, RunError,
    RunHeader,
};

/// Bytes of a run before its records; the same layout on the wire and in an entry's payload.
pub const RUN_HEADER_BYTES: usize = 48;
/// Bytes of a record before its attributes.
pub const RECORD_HEADER_BYTES: usize = 32;
/// Largest body of one record.
pub const BODY_BYTES_MAX: usize = 4 << 20;
/// Largest sum of keys and values of user properties, tag and keys of one record.
pub const PROPERTIES_BYTES_MAX: usize = 16 << 10;
/// Largest message id, message group, trace context or born host.
pub const TEXT_BYTES_MAX: usize = 4 << 10;
/// Largest run, header included.
pub const RUN_BYTES_MAX: usize = 6 << 20;

const MESSAGE_ID: u8 = 1;
const KEYS: u8 = 2;
const TAG: u8 = 3;
const MESSAGE_GROUP: u8 = 4;
const USER_PROPERTIES: u8 = 5;
const TRACE_CONTEXT: u8 = 6;
const BORN_HOST: u8 = 7;
/// Attributes from here on must be understood by whoever stores or delivers the record.
const SPECIAL_FIRST: u8 = 128;

const ATTRIBUTE_HEADER_BYTES: usize = 3;

// Lists stay below the 16 bits of their length: the most overhead is 2 bytes for each 1-byte key.
const _: () = assert!(PROPERTIES_BYTES_MAX * 3 <= u16::MAX as usize);
const _: () = assert!(RUN_BYTES_MAX > BODY_BYTES_MAX + (u16::MAX as usize) * 2);

/// What a record is, derived from its attributes by whoever builds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    Normal = 1,
    Fifo = 2,
    Delay = 3,
    Transaction = 4,
}

impl RecordKind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Normal),
            2 => Some(Self::Fifo),
            3 => Some(Self::Delay),
            4 => Some(Self::Transaction),
            _ => None,
        }
    }
}

/// How the body was encoded by the client; stored and delivered as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BodyEncoding {
    Identity = 1,
    Gzip = 2,
}

impl BodyEncoding {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Identity),
            2 => Some(Self::Gzip),
            _ => None,
        }
    }
}

/// Why a record cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFields {
    #[error("the message id is missing")]
    NoMessageId,
    #[error("user properties are not in ascending order of their keys, each once")]
    PropertyOrder,
    #[error("{field} has {bytes} bytes, {bytes_max} are allowed")]
    TooLarge { field: &'static str, bytes: usize, bytes_max: usize },
}

/// Fields of a record to be built. An empty text counts as absent, an empty key is left out.
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

/// An attribute about to be written.
enum Value<'a> {
    Text(&'a str),
    Keys(&'a [String]),
    Properties(&'a [(String, String)]),
}

impl Value<'_> {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Keys(keys) => keys.iter().filter(|k| !k.is_empty()).map(|k| 2 + k.len()).sum(),
            Self::Properties(pairs) => pairs.iter().map(|(k, v)| 4 + k.len() + v.len()).sum(),
        }
    }

    fn put(&self, out: &mut BytesMut) {
        match self {
            Self::Text(text) => out.put_slice(text.as_bytes()),
            Self::Keys(keys) => {
                keys.iter().filter(|k| !k.is_empty()).for_each(|key| put_counted(out, key));
            }
            Self::Properties(pairs) => {
                for (key, value) in *pairs {
                    put_counted(out, key);
                    put_counted(out, value);
                }
            }
        }
    }
}

fn put_counted(out: &mut BytesMut, text: &str) {
    out.put_u16_le(u16::try_from(text.len()).expect("checked against PROPERTIES_BYTES_MAX"));
    out.put_slice(text.as_bytes());
}

impl RecordFields<'_> {
    /// Whether a record can be built of them.
    pub fn check(&self) -> Result<(), InvalidFields> {
        let limit = |field, bytes, bytes_max| match bytes > bytes_max {
            true => Err(InvalidFields::TooLarge { field, bytes, bytes_max }),
            false => Ok(()),
        };
        if self.message_id.is_empty() {
            return Err(InvalidFields::NoMessageId);
        }
        if !self.user_properties.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(InvalidFields::PropertyOrder);
        }
        let text_bytes = |text: Option<&str>| text.map_or(0, str::len);
        limit("message id", self.message_id.len(), TEXT_BYTES_MAX)?;
        limit("message group", text_bytes(self.message_group), TEXT_BYTES_MAX)?;
        limit("trace context", text_bytes(self.trace_context), TEXT_BYTES_MAX)?;
        limit("born host", text_bytes(self.born_host), TEXT_BYTES_MAX)?;
        let properties_bytes = self.keys.iter().map(String::len).sum::<usize>()
            + self.user_properties.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
            + text_bytes(self.tag);
        limit("properties", properties_bytes, PROPERTIES_BYTES_MAX)?;
        limit("body", self.body.len(), BODY_BYTES_MAX)
    }

    /// What the record will be.
    pub fn kind(&self) -> RecordKind {
        match self.message_group {
            Some(group) if !group.is_empty() => RecordKind::Fifo,
            _ => RecordKind::Normal,
        }
    }

    /// Bytes of the record in a run.
    pub fn record_bytes(&self) -> usize {
        let attributes = self.attributes().map(|(_, value)| ATTRIBUTE_HEADER_BYTES + value.bytes());
        RECORD_HEADER_BYTES + attributes.sum::<usize>() + self.body.len()
    }

    /// Those present, in ascending order of their kinds.
    fn attributes(&self) -> impl Iterator<Item = (u8, Value<'_>)> {
        [
            (MESSAGE_ID, Value::Text(self.message_id)),
            (KEYS, Value::Keys(self.keys)),
            (TAG, Value::Text(self.tag.unwrap_or_default())),
            (MESSAGE_GROUP, Value::Text(self.message_group.unwrap_or_default())),
            (USER_PROPERTIES, Value::Properties(self.user_properties)),
            (TRACE_CONTEXT, Value::Text(self.trace_context.unwrap_or_default())),
            (BORN_HOST, Value::Text(self.born_host.unwrap_or_default())),
        ]
        .into_iter()
        .filter(|(_, value)| value.bytes() > 0)
    }

    /// Appends the record; the fields were checked.
    fn encode(&self, out: &mut BytesMut) {
        let size = |bytes: usize| u32::try_from(bytes).expect("checked against the limits");
        let record_bytes = self.record_bytes();
        let attributes_bytes = record_bytes - RECORD_HEADER_BYTES - self.body.len();
        let attribute_count = u16::try_from(self.attributes().count()).expect("at most seven");
        let tag_hash = self.tag.map_or(0, |tag| crc32fast::hash(tag.as_bytes()));
        out.reserve(record_bytes);
        out.put_u32_le(size(record_bytes));
        out.put_u32_le(size(self.body.len()));
        out.put_u32_le(size(attributes_bytes));
        out.put_u8(self.kind() as u8);
        out.put_u8(self.body_encoding.unwrap_or(BodyEncoding::Identity) as u8);
        out.put_u16_le(attribute_count);
        out.put_u32_le(tag_hash);
        out.put_u32_le(0);
        out.put_i64_le(self.born_ms);
        for (kind, value) in self.attributes() {
            out.put_u8(kind);
            out.put_u16_le(u16::try_from(value.bytes()).expect("checked against the limits"));
            value.put(out);
        }
        out.put_slice(self.body);
    }
}

/// One record, read in place.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    kind: RecordKind,
    body_encoding: BodyEncoding,
    attribute_count: u16,
    tag_hash: u32,
    special_kinds: u32,
    born_ms: i64,
    attributes: &'a [u8],
    body: &'a [u8],
}

impl<'a> Record<'a> {
    /// Takes the first record off `bytes`, or names the field that makes no sense.
    fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), &'static str> {
        let (header, rest) = bytes.split_at_checked(RECORD_HEADER_BYTES).ok_or("record header")?;
        let u32_at = |at| u32_at(header, at).ok_or("record header");
        let size_at = |at| u32_at(at).and_then(|raw| usize::try_from(raw).map_err(|_| "bytes"));
        let byte_at = |at: usize| header.get(at).copied().ok_or("record header");
        let (record_bytes, body_bytes, attributes_bytes) = (size_at(0)?, size_at(4)?, size_at(8)?);
        let content_bytes = body_bytes.checked_add(attributes_bytes).ok_or("body bytes")?;
        if content_bytes.checked_add(RECORD_HEADER_BYTES) != Some(record_bytes) {
            return Err("record bytes");
        }
        let (attributes, rest) =
            rest.split_at_checked(attributes_bytes).ok_or("attributes bytes")?;
        let (body, rest) = rest.split_at_checked(body_bytes).ok_or("body bytes")?;
        let record = Self {
            kind: RecordKind::from_byte(byte_at(12)?).ok_or("kind")?,
            body_encoding: BodyEncoding::from_byte(byte_at(13)?).ok_or("body encoding")?,
            attribute_count: u16_at(header, 14).ok_or("attribute count")?,
            tag_hash: u32_at(16)?,
            special_kinds: u32_at(20)?,
            born_ms: i64_at(header, 24).ok_or("born time")?,
            attributes,
            body,
        };
        Ok((record, rest))
    }

    /// Checks the attributes and that the header agrees with them.
    fn check(&self, record: u32) -> Result<(), RunError> {
        let invalid = |field| RunError::Record { record, field };
        let mut rest = self.attributes;
        let (mut last_kind, mut count, mut properties_bytes) = (0, 0_u16, 0);
        let (mut has_id, mut has_message_group, mut tag_hash) = (false, false, 0);
        while !rest.is_empty() {
            let (kind, value, behind) = split_attribute(rest).ok_or(invalid("attributes"))?;
            if kind <= last_kind {
                return Err(invalid("attribute order"));
            }
            match kind {
                MESSAGE_ID => has_id = checked_text(value, TEXT_BYTES_MAX).is_some(),
                KEYS => properties_bytes += checked_keys(value).ok_or(invalid("keys"))?,
                TAG => {
                    properties_bytes +=
                        checked_text(value, PROPERTIES_BYTES_MAX).ok_or(invalid("tag"))?;
                    tag_hash = crc32fast::hash(value);
                }
                MESSAGE_GROUP => {
                    checked_text(value, TEXT_BYTES_MAX).ok_or(invalid("message group"))?;
                    has_message_group = true;
                }
                USER_PROPERTIES => {
                    properties_bytes +=
                        checked_properties(value).ok_or(invalid("user properties"))?;
                }
                TRACE_CONTEXT => {
                    checked_text(value, TEXT_BYTES_MAX).ok_or(invalid("trace context"))?;
                }
                BORN_HOST => {
                    checked_text(value, TEXT_BYTES_MAX).ok_or(invalid("born host"))?;
                }
                SPECIAL_FIRST.. => return Err(RunError::Unsupported { record, kind }),
                _ => {}
            }
            (last_kind, rest) = (kind, behind);
            count += 1;
        }
        let kind_expected = match has_message_group {
            true => RecordKind::Fifo,
            false => RecordKind::Normal,
        };
        let agreements = [
            (has_id, "message id"),
            (self.attribute_count == count, "attribute count"),
            (self.tag_hash == tag_hash, "tag hash"),
            (self.special_kinds == 0, "special kinds"),
            (self.kind == kind_expected, "kind"),
        ];
        if let Some((_, field)) = agreements.into_iter().find(|(agrees, _)| !agrees) {
            return Err(invalid(field));
        }
        limit(properties_bytes, PROPERTIES_BYTES_MAX)?;
        limit(self.body.len(), BODY_BYTES_MAX)
    }

    pub fn kind(&self) -> RecordKind {
        self.kind
    }

    pub fn body(&self) -> &'a [u8] {
        self.body
    }

    pub fn body_encoding(&self) -> BodyEncoding {
        self.body_encoding
    }

    pub fn born_ms(&self) -> i64 {
        self.born_ms
    }

    /// CRC-32 of the UTF-8 tag; 0 without one.
    pub fn tag_hash(&self) -> u32 {
        self.tag_hash
    }

    pub fn message_id(&self) -> &'a str {
        self.text(MESSAGE_ID).unwrap_or_default()
    }

    pub fn tag(&self) -> Option<&'a str> {
        self.text(TAG)
    }

    pub fn message_group(&self) -> Option<&'a str> {
        self.text(MESSAGE_GROUP)
    }

    pub fn trace_context(&self) -> Option<&'a str> {
        self.text(TRACE_CONTEXT)
    }

    pub fn born_host(&self) -> Option<&'a str> {
        self.text(BORN_HOST)
    }

    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        Counted { rest: self.attribute(KEYS).unwrap_or_default() }
    }

    /// In ascending order of the keys.
    pub fn user_properties(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let mut texts = Counted { rest: self.attribute(USER_PROPERTIES).unwrap_or_default() };
        std::iter::from_fn(move || Some((texts.next()?, texts.next()?)))
    }

    /// Bytes of the record in its run.
    pub fn record_bytes(&self) -> usize {
        RECORD_HEADER_BYTES + self.attributes.len() + self.body.len()
    }

    fn text(&self, kind: u8) -> Option<&'a str> {
        std::str::from_utf8(self.attribute(kind)?).ok()
    }

    fn attribute(&self, wanted: u8) -> Option<&'a [u8]> {
        let mut rest = self.attributes;
        loop {
            let (kind, value, behind) = split_attribute(rest)?;
            if kind >= wanted {
                return (kind == wanted).then_some(value);
            }
            rest = behind;
        }
    }
}

/// Texts with a 16-bit length in front of each.
#[derive(Debug)]
struct Counted<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Counted<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let (text, rest) = split_counted(self.rest)?;
        self.rest = rest;
        Some(text)
    }
}

fn split_counted(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (text, rest) = bytes.get(2..)?.split_at_checked(usize::from(u16_at(bytes, 0)?))?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

fn split_attribute(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (value, rest) = rest.get(2..)?.split_at_checked(usize::from(u16_at(rest, 0)?))?;
    Some((*kind, value, rest))
}

/// Bytes of a text that is neither empty nor too long.
fn checked_text(value: &[u8], bytes_max: usize) -> Option<usize> {
    let fits = !value.is_empty() && value.len() <= bytes_max;
    (fits && std::str::from_utf8(value).is_ok()).then_some(value.len())
}

/// Bytes of all keys.
fn checked_keys(value: &[u8]) -> Option<usize> {
    let (mut rest, mut bytes) = (value, 0);
    while !rest.is_empty() {
        let (key, behind) = split_counted(rest)?;
        if key.is_empty() {
            return None;
        }
        bytes += key.len();
        rest = behind;
    }
    (!value.is_empty()).then_some(bytes)
}

/// Bytes of all keys and values, which must be in ascending order of the keys, each once.
fn checked_properties(value: &[u8]) -> Option<usize> {
    let (mut rest, mut bytes, mut last_key) = (value, 0, None);
    while !rest.is_empty() {
        let (key, behind) = split_counted(rest)?;
        let (value, behind) = split_counted(behind)?;
        if last_key.is_some_and(|last| key <= last) {
            return None;
        }
        bytes += key.len() + value.len();
        (last_key, rest) = (Some(key), behind);
    }
    (!value.is_empty()).then_some(bytes)
}

fn limit(bytes: usize, bytes_max: usize) -> Result<(), RunError> {
    match bytes > bytes_max {
        true => Err(RunError::TooLarge { bytes, bytes_max }),
        false => Ok(()),
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn i64_at(bytes: &[u8], at: usize) -> Option<i64> {
    array_at(bytes, at).map(i64::from_le_bytes)
}

#[cfg(test)]
mod tests;
