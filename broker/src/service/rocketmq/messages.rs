//! Stored records as messages on the wire.

use std::collections::HashMap;

use drumlin_proto::ids::{QueueKey, QueueOffset};
use drumlin_proto::record::{BodyEncoding, Record, RecordKind, Run};
use drumlin_proto::rocketmq::{
    Digest, DigestType, Encoding, Message, MessageType, Resource, SystemProperties,
};

use super::validate;
use crate::log::ReadError;
use crate::queue::index::Line;
use crate::replica::Replica;

const LINES_AHEAD: usize = 32;

/// Reads records of one queue, in ascending order at best.
#[derive(Debug)]
pub(super) struct QueueReader {
    replica: Replica,
    queue: QueueKey,
    lines: Vec<Line>,
    run: Option<(QueueOffset, Run)>,
}

impl QueueReader {
    pub(super) fn new(replica: &Replica, queue: QueueKey) -> Self {
        Self { replica: replica.clone(), queue, lines: Vec::new(), run: None }
    }

    pub(super) fn queue(&self) -> QueueKey {
        self.queue
    }

    /// The line that holds `offset`; `None` if it was trimmed or is not readable yet.
    fn line(&mut self, offset: QueueOffset) -> Result<Option<Line>, ReadError> {
        let holds = |line: &&Line| line.base_offset <= offset && offset < line.end_offset();
        if let Some(line) = self.lines.iter().find(holds) {
            return Ok(Some(*line));
        }
        self.lines = self.replica.lines_from(self.queue, offset, LINES_AHEAD)?;
        Ok(self.lines.iter().find(holds).copied())
    }

    fn run(&mut self, line: &Line) -> Result<Run, ReadError> {
        if let Some((base_offset, run)) = &self.run
            && *base_offset == line.base_offset
        {
            return Ok(run.clone());
        }
        let bytes = self.replica.read_run(line)?;
        let run = Run::from_log(bytes).map_err(|invalid| {
            ReadError::Io(std::io::Error::new(std::io::ErrorKind::InvalidData, invalid))
        })?;
        self.run = Some((line.base_offset, run.clone()));
        Ok(run)
    }

    /// Looks at one record; `None` if it was trimmed.
    pub(super) fn read<T>(
        &mut self,
        offset: QueueOffset,
        look: impl FnOnce(&Line, &Run, Record<'_>) -> T,
    ) -> Result<Option<T>, ReadError> {
        let Some(line) = self.line(offset)? else { return Ok(None) };
        let run = self.run(&line)?;
        let within = usize::try_from(line.base_offset.count_to(offset)).unwrap_or(usize::MAX);
        Ok(run.records().nth(within).map(|record| look(&line, &run, record)))
    }

    /// Shows the records of `start..end` to `look` until it answers false. What was trimmed is
    /// passed over.
    pub(super) fn scan(
        &mut self,
        start: QueueOffset,
        end: QueueOffset,
        mut look: impl FnMut(QueueOffset, Record<'_>) -> bool,
    ) -> Result<(), ReadError> {
        let mut from = start;
        while from < end {
            let lines = self.replica.lines_from(self.queue, from, LINES_AHEAD)?;
            let Some(last) = lines.last().map(Line::end_offset) else { return Ok(()) };
            for line in &lines {
                let run = self.run(line)?;
                for (within, record) in (0..).zip(run.records()) {
                    let offset = line.base_offset.advance(within);
                    if offset >= end {
                        return Ok(());
                    }
                    if offset >= from && !look(offset, record) {
                        return Ok(());
                    }
                }
            }
            if last <= from {
                return Ok(());
            }
            from = last;
        }
        Ok(())
    }
}

/// What a delivery adds to a stored record.
#[derive(Clone, Debug)]
pub(super) struct Delivered<'a> {
    pub(super) topic: &'a Resource,
    pub(super) queue: QueueKey,
    pub(super) offset: QueueOffset,
    pub(super) attempt: u16,
    pub(super) invisible_ms: u64,
    pub(super) receipt_handle: String,
    pub(super) store_host: &'a str,
}

fn message_type(kind: RecordKind) -> MessageType {
    match kind {
        RecordKind::Normal => MessageType::Normal,
        RecordKind::Fifo => MessageType::Fifo,
        RecordKind::Delay => MessageType::Delay,
        RecordKind::Transaction => MessageType::Transaction,
    }
}

fn encoding(encoding: BodyEncoding) -> Encoding {
    match encoding {
        BodyEncoding::Identity => Encoding::Identity,
        BodyEncoding::Gzip => Encoding::Gzip,
    }
}

/// The message that a consumer gets.
pub(super) fn message(
    delivered: Delivered<'_>,
    line: &Line,
    run: &Run,
    record: Record<'_>,
) -> Message {
    let owned = |text: &str| text.to_owned();
    let properties = record.user_properties();
    let mut user_properties: HashMap<String, String> =
        properties.map(|(key, value)| (owned(key), owned(value))).collect();
    // Programs read the message group from here, too.
    if let Some(group) = record.message_group() {
        user_properties.insert("__SHARDINGKEY".into(), owned(group));
    }
    let body = run.as_bytes().slice_ref(record.body());
    let invisible_ms = i64::try_from(delivered.invisible_ms).unwrap_or(i64::MAX);
    let system = SystemProperties {
        tag: record.tag().map(owned),
        keys: record.keys().map(owned).collect(),
        message_id: owned(record.message_id()),
        body_digest: Some(Digest {
            r#type: DigestType::Md5.into(),
            checksum: validate::body_md5(&body),
        }),
        body_encoding: encoding(record.body_encoding()).into(),
        message_type: message_type(record.kind()).into(),
        born_timestamp: Some(validate::timestamp(record.born_ms())),
        born_host: record.born_host().map(owned).unwrap_or_default(),
        store_timestamp: Some(validate::timestamp(
            i64::try_from(line.newest_ms).unwrap_or(i64::MAX),
        )),
        store_host: owned(delivered.store_host),
        receipt_handle: Some(delivered.receipt_handle),
        queue_id: i32::from(delivered.queue.queue.get()),
        queue_offset: i64::try_from(delivered.offset.get()).ok(),
        invisible_duration: Some(prost_types::Duration {
            seconds: invisible_ms / 1000,
            nanos: i32::try_from(invisible_ms % 1000).unwrap_or(0) * 1_000_000,
        }),
        delivery_attempt: Some(i32::from(delivered.attempt)),
        message_group: record.message_group().map(owned),
        trace_context: record.trace_context().map(owned),
        ..SystemProperties::default()
    };
    Message {
        topic: Some(delivered.topic.clone()),
        user_properties,
        system_properties: Some(system),
        body,
    }
}
