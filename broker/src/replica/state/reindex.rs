//! The queue index out of the state and the log, where the index was lost.

use std::collections::BTreeMap;
use std::io;

use super::{ApplyError, State};
use crate::entry::{Entry, EntryKind, FRAME_HEADER_BYTES};
use crate::item::{self, ItemView};
use crate::position::LogOffset;
use crate::queue::index::Index;
use crate::queue::rebuild::{RebuildError, ScannedRun, rebuild};

/// Why the index cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum ReindexError {
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    #[error("an entry of the log cannot be read as it was applied")]
    Entry(#[from] ApplyError),
}

impl State {
    /// The index that applying gave, from the entries of the log, each with where its frame begins.
    ///
    /// They must reach from the trim point (or before it) to the last applied entry, and no
    /// further.
    pub fn reindex(
        &self,
        entries: impl IntoIterator<Item = io::Result<(Entry, LogOffset)>>,
    ) -> Result<Index, ReindexError> {
        let mut runs = Vec::new();
        for scanned in entries {
            let (entry, at) = scanned.map_err(RebuildError::from)?;
            if at >= self.trimmed.position && entry.kind == EntryKind::Batch {
                scan(&entry, at, &mut runs)?;
            }
        }
        let ends: BTreeMap<_, _> =
            self.queue_ranges().map(|(queue, range)| (queue, range.end)).collect();
        let took_offsets = |run: &ScannedRun| !self.is_void(run.position);
        Ok(rebuild(runs.into_iter().map(Ok), &ends, self.trimmed.position, took_offsets)?)
    }
}

fn scan(entry: &Entry, at: LogOffset, runs: &mut Vec<ScannedRun>) -> Result<(), ApplyError> {
    let payload_at = at.advance(FRAME_HEADER_BYTES as u64);
    for placed in item::items(&entry.payload) {
        let placed = placed.map_err(|source| ApplyError::Item { id: entry.id, source })?;
        if let ItemView::Run(header) = placed.item {
            runs.push(ScannedRun {
                queue: header.queue_key(),
                position: payload_at.advance(u64::from(placed.at_bytes)),
                bytes: u32::try_from(header.run_bytes()).expect("runs are far below 4 GiB"),
                count: header.record_count,
                clock_ms: entry.clock_ms,
            });
        }
    }
    Ok(())
}
