//! One page of index lines as bytes and back. No I/O.
//!
//! A page holds whole blocks, of one queue or of several; each block names its owner. Checks are
//! against what the directory says of a block, so a page that was lost, swapped or aged is told.

use bytes::{Buf, BufMut};
use drumlin_proto::ids::{QueueId, QueueKey, QueueOffset, TopicId};

use super::index::{BLOCK_LINES_MAX, Line, Summary};
use crate::position::LogOffset;

pub(super) const PAGE_BYTES: usize = 4096;
/// A line, and each of the headers.
const UNIT_BYTES: usize = 32;
const PAGE_UNITS: usize = PAGE_BYTES / UNIT_BYTES;
const MAGIC: [u8; 4] = *b"DrIx";
const VERSION: u16 = 1;
const CRC_AT: usize = 20;

const _: () = assert!(BLOCK_LINES_MAX + 2 == PAGE_UNITS);

/// Where a block lies: its page, and the unit of its header in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) page: u32,
    pub(super) unit: u8,
}

/// Which page it is, so that one that was written elsewhere is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageId {
    pub(super) era: u64,
    pub(super) page: u32,
}

/// Why a page or a block in it does not count.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PageFault {
    #[error("no page of index lines, or of another version")]
    Magic,
    #[error("the checksum does not match")]
    Checksum,
    #[error("it is page {page} of era {era}")]
    Misplaced { page: u32, era: u64 },
    #[error("unit {unit} holds no block of {queue:?} from offset {first_offset} on")]
    Owner { unit: u8, queue: QueueKey, first_offset: QueueOffset },
    #[error("the block in unit {unit} is not the one of the directory")]
    Block { unit: u8 },
}

/// A page that is being filled.
#[derive(Debug)]
pub(super) struct PageBuilder {
    id: PageId,
    generation: u64,
    block_count: u16,
    bytes: Vec<u8>,
}

impl PageBuilder {
    pub(super) fn new(id: PageId, generation: u64) -> Self {
        let mut bytes = Vec::with_capacity(PAGE_BYTES);
        bytes.resize(UNIT_BYTES, 0);
        Self { id, generation, block_count: 0, bytes }
    }

    pub(super) fn has_room(&self, line_count: usize) -> bool {
        self.bytes.len() + (1 + line_count) * UNIT_BYTES <= PAGE_BYTES
    }

    pub(super) fn page(&self) -> u32 {
        self.id.page
    }

    pub(super) fn filled_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn push(&mut self, queue: QueueKey, lines: &[Line]) -> Slot {
        assert!(self.has_room(lines.len()), "{} lines do not fit the page", lines.len());
        let unit = u8::try_from(self.bytes.len() / UNIT_BYTES).expect("a page has 128 units");
        let line_count = u16::try_from(lines.len()).expect("a page has 128 units");
        let first = lines.first().expect("a block has lines");
        self.bytes.put_u32_le(queue.topic.get());
        self.bytes.put_u16_le(queue.queue.get());
        self.bytes.put_u16_le(line_count);
        self.bytes.put_u64_le(first.base_offset.get());
        self.bytes.put_bytes(0, 16);
        for line in lines {
            put_line(&mut self.bytes, line);
        }
        self.block_count += 1;
        Slot { page: self.id.page, unit }
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(PAGE_BYTES, 0);
        let mut header = &mut self.bytes[..UNIT_BYTES];
        header.put_slice(&MAGIC);
        header.put_u16_le(VERSION);
        header.put_u16_le(self.block_count);
        header.put_u64_le(self.id.era);
        header.put_u32_le(self.id.page);
        header.put_u32_le(0);
        header.put_u64_le(self.generation);
        let crc = checksum(&self.bytes);
        self.bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        self.bytes
    }
}

/// Of all bytes but the checksum itself.
fn checksum(page: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&page[..CRC_AT]);
    hasher.update(&page[CRC_AT + 4..]);
    hasher.finalize()
}

fn put_line(bytes: &mut Vec<u8>, line: &Line) {
    bytes.put_u64_le(line.base_offset.get());
    bytes.put_u64_le(line.position.get());
    bytes.put_u32_le(line.bytes);
    bytes.put_u32_le(line.count);
    bytes.put_u64_le(line.newest_ms);
}

fn get_line(mut unit: &[u8]) -> Line {
    Line {
        base_offset: QueueOffset::new(unit.get_u64_le()),
        position: LogOffset::new(unit.get_u64_le()),
        bytes: unit.get_u32_le(),
        count: unit.get_u32_le(),
        newest_ms: unit.get_u64_le(),
    }
}

/// Whether the bytes are the page they should be.
pub(super) fn check_page(page: &[u8; PAGE_BYTES], id: PageId) -> Result<(), PageFault> {
    let mut header = &page[..UNIT_BYTES];
    let mut magic = [0; 4];
    header.copy_to_slice(&mut magic);
    if magic != MAGIC || header.get_u16_le() != VERSION {
        return Err(PageFault::Magic);
    }
    header.advance(2);
    let found = PageId { era: header.get_u64_le(), page: header.get_u32_le() };
    if header.get_u32_le() != checksum(page) {
        return Err(PageFault::Checksum);
    }
    if found != id {
        return Err(PageFault::Misplaced { page: found.page, era: found.era });
    }
    Ok(())
}

/// The lines of a block in a page that was checked.
pub(super) fn read_block(
    page: &[u8; PAGE_BYTES],
    unit: u8,
    queue: QueueKey,
    summary: &Summary,
) -> Result<Vec<Line>, PageFault> {
    let units = page.chunks_exact(UNIT_BYTES).skip(usize::from(unit));
    let mut units = units.take(1 + usize::from(summary.line_count));
    let owner = PageFault::Owner { unit, queue, first_offset: summary.first_offset };
    let Some(mut header) = units.next() else { return Err(owner) };
    let topic = TopicId::new(header.get_u32_le());
    let found = QueueKey { topic, queue: QueueId::new(header.get_u16_le()) };
    let line_count = header.get_u16_le();
    if found != queue || header.get_u64_le() != summary.first_offset.get() {
        return Err(owner);
    }
    let lines: Vec<Line> = units.map(get_line).collect();
    if usize::from(line_count) != lines.len() || Summary::of(&lines) != Some(*summary) {
        return Err(PageFault::Block { unit });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: PageId = PageId { era: 3, page: 77 };

    fn queue(n: u16) -> QueueKey {
        QueueKey { topic: TopicId::new(0x0102_0304), queue: QueueId::new(n) }
    }

    fn lines(first: u64, count: u64) -> Vec<Line> {
        let line = |n: u64| Line {
            base_offset: QueueOffset::new(first + n * 2),
            position: LogOffset::new(0x10_0000 + n * 256),
            bytes: 200,
            count: 2,
            newest_ms: 1_700_000_000_000 + n,
        };
        (0..count).map(line).collect()
    }

    fn page() -> ([u8; PAGE_BYTES], [Slot; 2]) {
        let mut page = PageBuilder::new(ID, 9);
        let slots = [page.push(queue(5), &lines(10, 3)), page.push(queue(6), &lines(0, 1))];
        (page.finish().try_into().unwrap(), slots)
    }

    fn summary(first: u64, count: u64) -> Summary {
        Summary::of(&lines(first, count)).unwrap()
    }

    #[test]
    fn blocks_are_read_as_they_were_written() {
        let (page, [first, second]) = page();
        check_page(&page, ID).unwrap();
        let block = read_block(&page, first.unit, queue(5), &summary(10, 3)).unwrap();
        assert_eq!(block, lines(10, 3));
        let block = read_block(&page, second.unit, queue(6), &summary(0, 1)).unwrap();
        assert_eq!(block, lines(0, 1));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (page, _) = page();
        for bit in 0..PAGE_BYTES * 8 {
            let mut bad = page;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(check_page(&bad, ID).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_page_of_zeros_is_no_page() {
        assert_eq!(check_page(&[0; PAGE_BYTES], ID), Err(PageFault::Magic));
    }

    #[test]
    fn a_page_from_elsewhere_is_refused() {
        let (page, _) = page();
        for other in [PageId { page: 78, ..ID }, PageId { era: 4, ..ID }] {
            assert_eq!(check_page(&page, other), Err(PageFault::Misplaced { page: 77, era: 3 }));
        }
    }

    #[test]
    fn a_block_of_another_queue_or_another_age_is_refused() {
        let (page, [first, second]) = page();
        let wanted = summary(10, 3);
        for (unit, key) in [(second.unit, queue(5)), (first.unit, queue(6)), (200, queue(5))] {
            let read = read_block(&page, unit, key, &wanted);
            assert!(matches!(read, Err(PageFault::Owner { .. })), "{read:?}");
        }
        for wanted in [summary(10, 2), summary(10, 4), Summary { newest_ms: 1, ..wanted }] {
            let read = read_block(&page, first.unit, queue(5), &wanted);
            assert_eq!(read, Err(PageFault::Block { unit: first.unit }));
        }
    }

    #[test]
    fn a_full_block_fills_a_page() {
        let mut page = PageBuilder::new(ID, 1);
        page.push(queue(0), &lines(0, BLOCK_LINES_MAX as u64));
        assert!(!page.has_room(1));
        assert_eq!(page.finish().len(), PAGE_BYTES);
    }

    #[test]
    fn published_page_bytes_do_not_change() {
        let (page, _) = page();
        let units: Vec<String> = page
            .chunks_exact(UNIT_BYTES)
            .take(7)
            .map(|unit| unit.iter().map(|byte| format!("{byte:02x}")).collect())
            .collect();
        let golden: Vec<&str> = include_str!("page/golden_v1.txt").lines().collect();
        assert_eq!(units, golden, "add a version instead");
        assert!(page[7 * UNIT_BYTES..].iter().all(|byte| *byte == 0));
    }
}
