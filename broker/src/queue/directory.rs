//! Which blocks each queue has and where they lie: the index's part of a checkpoint, as bytes and
//! back. No I/O; the checkpoint holds the checksum.

use bytes::{Buf, BufMut, TryGetError};
use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset, TopicId};

use super::index::{BLOCK_LINES_MAX, Summary};
use super::page::Slot;
use crate::position::LogOffset;

const VERSION: u16 = 1;
const QUEUE_BYTES: usize = 16;
const BLOCK_BYTES: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StoredBlock {
    pub(super) summary: Summary,
    pub(super) slot: Slot,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredQueue {
    pub(super) key: QueueKey,
    /// Ascending; the last one is the tail if `has_tail`.
    pub(super) blocks: Vec<StoredBlock>,
    pub(super) has_tail: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Directory {
    /// Names the set of index files; a rebuild begins a new one.
    pub(super) era: u64,
    pub(super) floor: LogOffset,
    /// Ascending by key.
    pub(super) queues: Vec<StoredQueue>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryFault {
    #[error("the index directory has version {0}")]
    Version(u16),
    #[error("the index directory ends too early")]
    Short(#[from] TryGetError),
    #[error("the index directory holds a block of {line_count} lines")]
    Lines { line_count: u8 },
    #[error("{bytes} bytes follow the index directory")]
    Long { bytes: usize },
}

impl Directory {
    pub(super) fn encode(&self) -> Vec<u8> {
        let block_count: usize = self.queues.iter().map(|q| q.blocks.len()).sum();
        let bytes_max = 24 + self.queues.len() * QUEUE_BYTES + block_count * BLOCK_BYTES;
        let mut bytes = Vec::with_capacity(bytes_max);
        bytes.put_u16_le(VERSION);
        bytes.put_u16_le(0);
        bytes.put_u32_le(u32::try_from(self.queues.len()).expect("topics and queues are bounded"));
        bytes.put_u64_le(self.era);
        bytes.put_u64_le(self.floor.get());
        for queue in &self.queues {
            bytes.put_u32_le(queue.key.topic.get());
            bytes.put_u16_le(queue.key.queue.get());
            bytes.put_u16_le(u16::from(queue.has_tail));
            bytes.put_u32_le(u32::try_from(queue.blocks.len()).expect("pages are numbered by u32"));
            bytes.put_u32_le(0);
            for block in &queue.blocks {
                bytes.put_u64_le(block.summary.first_offset.get());
                bytes.put_u64_le(block.summary.end_offset.get());
                bytes.put_u64_le(block.summary.end_position.get());
                bytes.put_u64_le(block.summary.newest_ms);
                bytes.put_u32_le(block.slot.page);
                bytes.put_u8(block.slot.unit);
                bytes.put_u8(block.summary.line_count);
                bytes.put_u16_le(0);
            }
        }
        bytes
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Result<Self, DirectoryFault> {
        let version = bytes.try_get_u16_le()?;
        if version != VERSION {
            return Err(DirectoryFault::Version(version));
        }
        bytes.try_get_u16_le()?;
        let queue_count = bytes.try_get_u32_le()?;
        let era = bytes.try_get_u64_le()?;
        let floor = LogOffset::new(bytes.try_get_u64_le()?);
        let mut queues = Vec::new();
        for _ in 0..queue_count {
            queues.push(decode_queue(&mut bytes)?);
        }
        if !bytes.is_empty() {
            return Err(DirectoryFault::Long { bytes: bytes.len() });
        }
        Ok(Self { era, floor, queues })
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = (QueueKey, &StoredBlock)> {
        self.queues.iter().flat_map(|queue| queue.blocks.iter().map(|block| (queue.key, block)))
    }
}

fn decode_queue(bytes: &mut &[u8]) -> Result<StoredQueue, DirectoryFault> {
    let topic = TopicId::new(bytes.try_get_u32_le()?);
    let queue = QueueId::new(bytes.try_get_u16_le()?);
    let has_tail = bytes.try_get_u16_le()? != 0;
    let block_count = bytes.try_get_u32_le()?;
    bytes.try_get_u32_le()?;
    let mut blocks = Vec::new();
    for _ in 0..block_count {
        blocks.push(decode_block(bytes)?);
    }
    if let Some(tail) = blocks.last().filter(|_| has_tail)
        && usize::from(tail.summary.line_count) >= BLOCK_LINES_MAX
    {
        return Err(DirectoryFault::Lines { line_count: tail.summary.line_count });
    }
    Ok(StoredQueue { key: QueueKey { topic, queue }, blocks, has_tail })
}

fn decode_block(bytes: &mut &[u8]) -> Result<StoredBlock, DirectoryFault> {
    let first_offset = QueueOffset::new(bytes.try_get_u64_le()?);
    let end_offset = QueueOffset::new(bytes.try_get_u64_le()?);
    let end_position = LogOffset::new(bytes.try_get_u64_le()?);
    let newest_ms = bytes.try_get_u64_le()?;
    let page = bytes.try_get_u32_le()?;
    let unit = bytes.try_get_u8()?;
    let line_count = bytes.try_get_u8()?;
    bytes.try_get_u16_le()?;
    if line_count == 0 || usize::from(line_count) > BLOCK_LINES_MAX {
        return Err(DirectoryFault::Lines { line_count });
    }
    let summary = Summary { first_offset, end_offset, end_position, newest_ms, line_count };
    Ok(StoredBlock { summary, slot: Slot { page, unit } })
}
