//! From the data directory to a state that apply can go on from: the newest readable checkpoint,
//! its index, or what can be rebuilt of it from the log.

use std::collections::BTreeMap;
use std::io;

use drumlin_proto::ids::BrokerGroupName;

use super::Applying;
use super::checkpoint::{Checkpoint, CheckpointError, Checkpointer, IndexFound, Opened};
use super::checkpointing::{self, KeptCheckpoint};
use super::membership::MembershipBytesError;
use super::state::{State, StateError};
use crate::entry::FRAME_HEADER_BYTES;
use crate::item::{self, ItemView};
use crate::log::{CheckpointMark, Log, OpenError};
use crate::position::EntryIndex;
use crate::queue::index::Index;
use crate::queue::rebuild::{RebuildError, ScannedRun, rebuild};

/// What the log is read by when the index is rebuilt.
const SCAN_BYTES_MAX: u64 = 16 << 20;

/// Where apply goes on.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) log: Log,
    pub(crate) applying: Applying,
    pub(crate) newest: Option<KeptCheckpoint>,
    pub(crate) checkpointer: Checkpointer,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Log(#[from] OpenError),
    #[error("the log begins at entry {oldest}, but no checkpoint can be read that reaches it")]
    CheckpointMissing { oldest: EntryIndex },
    #[error("the newest checkpoint's state cannot be read")]
    State(#[from] StateError),
    #[error("the newest checkpoint's membership cannot be read")]
    Membership(#[from] MembershipBytesError),
    #[error("the queue index cannot be rebuilt")]
    Rebuild(#[from] RebuildError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Opens the log behind a checkpoint and restores what the checkpoint held.
pub(crate) fn restore(
    opened: Opened,
    open_log: impl FnOnce(Option<CheckpointMark>) -> Result<Log, OpenError>,
    broker_group: &BrokerGroupName,
) -> Result<Restored, RestoreError> {
    let Opened { checkpointer, checkpoint, index, damaged } = opened;
    for file in &damaged {
        tracing::error!(path = %file.path.display(), fault = %file.fault, "a checkpoint is damaged");
    }
    let log = open_log(checkpoint.as_ref().map(|checkpoint| checkpoint.meta.mark()))?;
    let Some(checkpoint) = checkpoint else {
        let oldest = log.oldest_index();
        if oldest != EntryIndex::ZERO {
            return Err(RestoreError::CheckpointMissing { oldest });
        }
        let state = State::new(broker_group.clone());
        let applying = Applying { state, index: Index::default() };
        return Ok(Restored { log, applying, newest: None, checkpointer });
    };
    let state = State::decode(&checkpoint.state)?;
    let newest = checkpointing::kept(checkpoint.generation, &checkpoint.meta)?;
    let index = match index {
        IndexFound::Ready(index) => index,
        IndexFound::Damaged(damage) => {
            tracing::warn!(%damage, "the queue index is rebuilt from the log");
            rebuild_index(&log, &checkpoint, &state)?
        }
    };
    let applying = Applying { state, index };
    Ok(Restored { log, applying, newest: Some(newest), checkpointer })
}

fn rebuild_index(log: &Log, checkpoint: &Checkpoint, state: &State) -> Result<Index, RebuildError> {
    let ends: BTreeMap<_, _> =
        state.queue_ranges().map(|(queue, range)| (queue, range.end)).collect();
    let trimmed = checkpoint.meta.trimmed;
    let from = trimmed.below.max(log.oldest_index());
    let runs =
        Scan { log, next: from, end: checkpoint.meta.applied.index.next(), runs: Vec::new() };
    rebuild(runs, &ends, trimmed.position, |run| !state.is_void(run.position))
}

/// The runs of a range of entries, in log order.
struct Scan<'a> {
    log: &'a Log,
    next: EntryIndex,
    end: EntryIndex,
    /// Of the entries read last, in reverse.
    runs: Vec<ScannedRun>,
}

impl Iterator for Scan<'_> {
    type Item = io::Result<ScannedRun>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.runs.is_empty() && self.next < self.end {
            if let Err(error) = self.read() {
                self.next = self.end;
                return Some(Err(error));
            }
        }
        self.runs.pop().map(Ok)
    }
}

impl Scan<'_> {
    fn read(&mut self) -> io::Result<()> {
        let missing = || io::Error::other("an entry before the checkpoint is not in the log");
        let entries = self.log.entries(self.next, self.end, SCAN_BYTES_MAX)?;
        self.next = entries.last().ok_or_else(missing)?.id.index.next();
        for entry in entries.iter().filter(|entry| entry.item_count > 0) {
            let frame = self.log.position_of(entry.id.index)?.ok_or_else(missing)?;
            for placed in item::items(&entry.payload) {
                let placed = placed.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                let ItemView::Run(run) = placed.item else { continue };
                let header_bytes = FRAME_HEADER_BYTES as u64;
                self.runs.push(ScannedRun {
                    queue: run.queue_key(),
                    position: frame.advance(header_bytes + u64::from(placed.at_bytes)),
                    bytes: u32::try_from(run.run_bytes()).map_err(io::Error::other)?,
                    count: run.record_count,
                    clock_ms: entry.clock_ms,
                });
            }
        }
        self.runs.reverse();
        Ok(())
    }
}
