//! Re-seeds as Raft sees them: what a leader sends instead of entries that it no longer has, and
//! what a follower answers until it has taken all of it. The files are [`crate::seed`]'s business.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use drumlin_proto::native::seed_response::{Pulling, Result as SeedResult};
use drumlin_proto::native::{
    EntriesRequest, EntriesResponse, PeerEntry, PeerEntryId, PeerVote, PullRequest, SeedManifest,
    SeedRequest, SeedResponse,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::checkpoint;
use super::checkpointing::Checkpoints;
use super::membership;
use super::raft_types::{Raft, RaftVote, SnapshotMeta, TypeConfig, entry_id, log_vote, raft_vote};
use super::state_machine::Manifest;
use crate::entry::Entry;
use crate::log::{Log, Vote};
use crate::position::{EntryId, EntryIndex, Term};
use crate::seed::donor::{Donor, Sending};
use crate::seed::puller::Puller;
use crate::seed::{Chunks, SeedProgress};

/// Entries of one answer.
const ENTRIES_BYTES_MAX: u64 = 8 << 20;
/// How often a re-seed is reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// Retention may drop a file while it is being held.
const OPEN_TRIES: u32 = 3;

/// Both sides of re-seeds on this node.
#[derive(Debug)]
pub(crate) struct Seeding {
    pub(crate) donor: Donor,
    pub(crate) puller: Puller,
    pub(crate) log: Log,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) checkpoint_dir: PathBuf,
    /// One set of files is made at a time.
    pub(crate) opening: tokio::sync::Mutex<()>,
}

impl Seeding {
    /// What a leader sends to a data node that lacks what was purged, or that lost what it had:
    /// `meta.last_log_id` is what the node must have for replication to go on.
    pub(crate) async fn request(
        &self,
        vote: &RaftVote,
        meta: &SnapshotMeta,
    ) -> io::Result<SeedRequest> {
        let manifest = self.manifest().await?;
        let membership_at = meta.last_membership.log_id().as_ref().map(entry_id);
        Ok(SeedRequest {
            vote: Some(wire_vote(log_vote(vote))),
            last: meta.last_log_id.as_ref().map(entry_id).map(wire_id),
            membership_at: membership_at.map(wire_id),
            membership: membership::encode(meta.last_membership.membership()),
            manifest: Some(manifest),
        })
    }

    /// The files that are given now, or those of the newest checkpoint.
    async fn manifest(&self) -> io::Result<SeedManifest> {
        let _one = self.opening.lock().await;
        self.donor.expire();
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
                donor.open(&path, export)
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

    /// What a node answered to [`Seeding::request`]; its vote once it has all of it.
    pub(crate) fn answered(&self, target: u64, response: SeedResponse) -> Option<RaftVote> {
        match response.result? {
            SeedResult::Installed(vote) => {
                self.donor.done(target);
                Some(raft_vote(vote_of(vote)))
            }
            SeedResult::Pulling(Pulling { done_bytes, all_bytes }) => {
                self.donor.note(target, done_bytes, all_bytes);
                None
            }
        }
    }

    /// Answers a leader's [`Seeding::request`].
    pub(crate) async fn answer(
        &self,
        raft: &Raft,
        from: u64,
        request: SeedRequest,
    ) -> Result<SeedResponse, Status> {
        let missing = |what: &str| Status::invalid_argument(format!("the request has no {what}"));
        let asked = vote_of(request.vote.ok_or_else(|| missing("vote"))?);
        let last = id_of(request.last.ok_or_else(|| missing("last entry"))?);
        // Raft itself installs nothing, it only accepts the leader, durably, or knows a higher one.
        let snapshot = openraft::alias::SnapshotOf::<TypeConfig, Manifest> {
            meta: SnapshotMeta::default(),
            snapshot: Manifest,
        };
        let vote = raft.install_full_snapshot(raft_vote(asked), snapshot).await;
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
        let SeedProgress { done_bytes, all_bytes, .. } = self.puller.offer(from, vote, &manifest);
        Ok(SeedResponse { result: Some(SeedResult::Pulling(Pulling { done_bytes, all_bytes })) })
    }

    /// Whether the log durably holds this entry of the leader's.
    fn covers(&self, last: EntryId) -> io::Result<bool> {
        if self.log.durable_end().borrow().index <= last.index {
            return Ok(false);
        }
        let purged = self.log.purged().is_some_and(|purged| purged.index > last.index);
        Ok(purged || self.log.id_of(last.index)? == Some(last))
    }

    pub(crate) fn pull(&self, request: &PullRequest) -> Result<Chunks, Status> {
        self.donor.pull(request)
    }

    /// Entries of this log, synced ones, for another node's repair.
    pub(crate) async fn entries(&self, request: EntriesRequest) -> Result<EntriesResponse, Status> {
        let log = self.log.clone();
        let durable_end = self.log.durable_end().borrow().index;
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

    /// What others take from this node, by their Raft ids.
    pub(crate) fn sending(&self) -> watch::Receiver<Sending> {
        self.donor.sending()
    }

    /// What this node takes.
    pub(crate) fn receiving(&self) -> watch::Receiver<Option<SeedProgress>> {
        self.puller.progress()
    }

    /// See [`Donor::allows_trims`].
    pub(crate) fn allows_trims(&self, fullest_disk_percent: u8) -> bool {
        self.donor.allows_trims(fullest_disk_percent)
    }

    /// Reports what goes on, and lets go of what nobody takes, until `stop`.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut reported = None;
        while stop.run_until_cancelled(tokio::time::sleep(REPORT_INTERVAL)).await.is_some() {
            self.donor.expire();
            for (receiver, progress) in &*self.donor.sending().borrow() {
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
