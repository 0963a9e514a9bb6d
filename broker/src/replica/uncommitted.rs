//! A deliberate fault: runs are shown before they are committed. Nothing is left of it where none can
//! be injected.

use drumlin_proto::ids::QueueKey;

use super::Replica;
use crate::entry::{EntryKind, FRAME_HEADER_BYTES};
use crate::fault::{Fault, injected};
use crate::item::{self, ItemView};
use crate::position::EntryIndex;
use crate::queue::index::Line;

const SHOWN_BYTES_MAX: u64 = 8 << 20;

impl Replica {
    /// Lines of the runs behind the applied end, as they would be if they were committed.
    pub(super) fn uncommitted_lines(&self, queue: QueueKey) -> Vec<Line> {
        if !injected(Fault::ReadUncommitted) {
            return Vec::new();
        }
        let (range, from, clock_ms) = {
            let applying = self.view();
            let applied = applying.state.applied();
            let from = applied.map_or(EntryIndex::ZERO, |id| id.index.next());
            (applying.state.queue_range(queue), from, applying.state.clock_ms())
        };
        let Some(mut next) = range.map(|range| range.end) else { return Vec::new() };
        let end = self.log().last().map_or(EntryIndex::ZERO, |id| id.index.next());
        let Ok(entries) = self.log().entries(from, end, SHOWN_BYTES_MAX) else { return Vec::new() };
        let mut lines = Vec::new();
        for entry in entries.iter().filter(|entry| entry.kind == EntryKind::Batch) {
            let Ok(Some(at)) = self.log().position_of(entry.id.index) else { break };
            for placed in item::items(&entry.payload).flatten() {
                let ItemView::Run(header) = placed.item else { continue };
                let Ok(bytes) = u32::try_from(header.run_bytes()) else { continue };
                if header.queue_key() != queue {
                    continue;
                }
                let skipped = FRAME_HEADER_BYTES as u64 + u64::from(placed.at_bytes);
                lines.push(Line {
                    base_offset: next,
                    position: at.advance(skipped),
                    bytes,
                    count: header.record_count,
                    newest_ms: clock_ms.max(entry.clock_ms),
                });
                next = next.advance(u64::from(header.record_count));
            }
        }
        lines
    }
}
