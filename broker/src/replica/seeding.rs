//! Re-seeds as Raft sees them: what a leader sends instead of entries that it no longer has, and
//! what a follower answers until it has taken all of it. The files are [`crate::seed`]'s business.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::seed_response::{Pulling, Result as SeedResult};
use drumlin_proto::native::{
    EntriesRequest, EntriesResponse, PeerEntry, PeerEntryId, PeerVote, SeedManifest, SeedRequest,
    SeedResponse,
};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::checkpoint;
use super::checkpointing::Checkpoints;
use super::raft_types::{Raft, SnapshotMeta, TypeConfig, log_vote, raft_vote};
use super::state_machine::Manifest;
use crate::entry::Entry;
use crate::log::{Log, Vote};
use crate::position::{EntryId, EntryIndex, Term};
use crate::seed::SeedProgress;
use crate::seed::donor::{Donor, Sending};
use crate::seed::puller::Puller;

/// Entries of one answer.
const ENTRIES_BYTES_MAX: u64 = 8 << 20;
/// How often a re-seed is reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// Retention may drop a file while it is being held.
const OPEN_TRIES: u32 = 3;

/// The giving side: what a leader has for members that lack what was purged.
#[derive(Debug)]
pub(crate) struct Giving {
    donor: Donor,
    log: Log,
    checkpoints: Checkpoints,
    checkpoint_dir: PathBuf,
    /// One set of files is made at a time.
    opening: tokio::sync::Mutex<()>,
}

/// Both sides of re-seeds, with Raft behind them.
#[derive(Debug)]
pub(crate) struct Seeding {
    giving: Arc<Giving>,
    puller: Puller,
    raft: Raft,
}

impl Giving {
    pub(crate) fn new(
        log: Log,
        checkpoints: Checkpoints,
        checkpoint_dir: PathBuf,
        bytes_per_second_max: Option<u64>,
    ) -> Self {
        let (donor, opening) = (Donor::new(bytes_per_second_max), tokio::sync::Mutex::default());
        Self { donor, log, checkpoints, checkpoint_dir, opening }
    }

    /// The files that are given now, or those of the newest checkpoint.
    pub(crate) async fn manifest(&self) -> io::Result<SeedManifest> {
        let _one = self.opening.lock().await;
        self.donor.expire(Instant::now());
        if let Some(manifest) = self.donor.manifest() {
            return Ok(manifest);
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let newest = self.checkpoints.newest();
            let newest = newest.ok_or_else(|| io::Error::other("there is no checkpoint yet"))?;
            let path = self.checkpoint_dir.join(checkpoint::file_name(newest.generation));
            let (donor, log) = (self.donor.clone(), self.log.clone());
            let opening = move || {
                let export = log.export()?;
                let export = export.ok_or_else(|| io::Error::other("the log is empty"))?;
                donor.open(&path, export, Instant::now())
            };
            let opened = tokio::task::spawn_blocking(opening).await.map_err(io::Error::other)?;
            match opened {
                Ok(manifest) => {
                    self.checkpoints.pin(newest, self.donor.clone());
                    return Ok(manifest);
                }
                Err(error) if tries < OPEN_TRIES => {
                    tracing::debug!(%error, "the files of a re-seed changed, once more");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A member answered how far it has come.
    pub(crate) fn note(&self, member: u64, pulling: &Pulling) {
        self.donor.note(member, pulling.done_bytes, pulling.all_bytes, Instant::now());
    }

    /// A member has all of it.
    pub(crate) fn done(&self, member: u64) {
        self.donor.done(member);
    }

    /// What others take from this node, by their Raft ids.
    pub(crate) fn sending(&self) -> watch::Receiver<Sending> {
        self.donor.sending()
    }

    /// See [`Donor::allows_trims`].
    pub(crate) fn allows_trims(&self, fullest_disk_percent: u8) -> bool {
        self.donor.allows_trims(fullest_disk_percent, Instant::now())
    }
}

impl Seeding {
    pub(crate) fn new(giving: Arc<Giving>, puller: Puller, raft: Raft) -> Self {
        Self { giving, puller, raft }
    }

    /// Answers a leader that has no entries for this node any more.
    async fn answer(&self, request: SeedRequest) -> Result<SeedResponse, Status> {
        let missing = |what: &str| Status::invalid_argument(format!("the request has no {what}"));
        let asked = vote_of(request.vote.ok_or_else(|| missing("vote"))?);
        let last = id_of(request.last.ok_or_else(|| missing("last entry"))?);
        // Raft itself installs nothing, it only accepts the leader, durably, or knows a higher one.
        let snapshot = openraft::alias::SnapshotOf::<TypeConfig, Manifest> {
            meta: SnapshotMeta::default(),
            snapshot: Manifest,
        };
        let vote = self.raft.install_full_snapshot(raft_vote(asked), snapshot).await;
        let vote = vote.map_err(|fatal| Status::unavailable(fatal.to_string()))?.vote;
        let vote = log_vote(&vote);
        let installed =
            || Ok(SeedResponse { result: Some(SeedResult::Installed(wire_vote(vote))) });
        if (vote.term, vote.node) != (asked.term, asked.node) {
            return installed();
        }
        if self.covers(last).map_err(|error| Status::internal(error.to_string()))? {
            return installed();
        }
        let manifest = request.manifest.ok_or_else(|| missing("list of files"))?;
        let SeedProgress { done_bytes, all_bytes, .. } =
            self.puller.offer(vote.node, vote, &manifest);
        Ok(SeedResponse { result: Some(SeedResult::Pulling(Pulling { done_bytes, all_bytes })) })
    }

    /// Whether the log durably holds this entry of the leader's.
    fn covers(&self, last: EntryId) -> io::Result<bool> {
        if self.giving.log.durable_end().borrow().index <= last.index {
            return Ok(false);
        }
        let purged = self.giving.log.purged().is_some_and(|purged| purged.index > last.index);
        Ok(purged || self.giving.log.id_of(last.index)? == Some(last))
    }

    /// Entries of this log, synced ones, for another node's repair.
    async fn read_entries(&self, request: EntriesRequest) -> Result<EntriesResponse, Status> {
        let log = self.giving.log.clone();
        let durable_end = self.giving.log.durable_end().borrow().index;
        let from = EntryIndex::new(request.from_index);
        let end = EntryIndex::new(request.end_index).min(durable_end);
        if from >= end || from < log.oldest_index() {
            return Err(Status::not_found(format!("entries {from}..{end} are not there")));
        }
        let reading = move || log.entries(from, end, ENTRIES_BYTES_MAX);
        let entries = tokio::task::spawn_blocking(reading)
            .await
            .map_err(io::Error::other)
            .and_then(|read| read)
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(EntriesResponse { entries: entries.into_iter().map(wire_entry).collect() })
    }

    /// True once this node must begin anew to use what it has taken.
    pub(crate) fn complete(&self) -> watch::Receiver<bool> {
        self.puller.complete()
    }

    /// What this node takes.
    pub(crate) fn receiving(&self) -> watch::Receiver<Option<SeedProgress>> {
        self.puller.progress()
    }

    /// Reports what goes on, and lets go of what nobody takes, until `stop`.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut reported = None;
        while stop.run_until_cancelled(tokio::time::sleep(REPORT_INTERVAL)).await.is_some() {
            self.giving.donor.expire(Instant::now());
            for (receiver, progress) in &*self.giving.donor.sending().borrow() {
                let SeedProgress { done_bytes, all_bytes, .. } = progress;
                tracing::info!(receiver, done_bytes, all_bytes, "a member is being re-seeded");
            }
            let receiving = *self.puller.progress().borrow();
            if let Some(SeedProgress { done_bytes, all_bytes, .. }) = receiving
                && reported != receiving
            {
                tracing::info!(done_bytes, all_bytes, "this node is being re-seeded");
            }
            reported = receiving;
        }
        self.puller.stop().await;
    }
}

fn wire_vote(vote: Vote) -> PeerVote {
    PeerVote { term: vote.term.get(), node: vote.node, committed: vote.committed }
}

fn vote_of(vote: PeerVote) -> Vote {
    Vote { term: Term::new(vote.term), node: vote.node, committed: vote.committed }
}

fn wire_id(id: EntryId) -> PeerEntryId {
    PeerEntryId { term: id.term.get(), index: id.index.get() }
}

fn id_of(id: PeerEntryId) -> EntryId {
    EntryId { term: Term::new(id.term), index: EntryIndex::new(id.index) }
}

fn wire_entry(entry: Entry) -> PeerEntry {
    PeerEntry {
        id: Some(wire_id(entry.id)),
        kind: entry.kind as u32,
        clock_ms: entry.clock_ms,
        item_count: entry.item_count,
        payload_bytes: u32::try_from(entry.payload.len()).unwrap_or(u32::MAX),
        payload_crc: entry.payload_crc,
        payload: entry.payload,
    }
}
