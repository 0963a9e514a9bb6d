//! Re-seeds as Raft sees them: what a leader sends instead of entries that it no longer has, and
//! what a follower answers until it has taken all of it. The files are [`crate::seed`]'s business.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::peer_client::PeerClient;
use drumlin_proto::native::seed_response::{Pulling, Result as SeedResult};
use drumlin_proto::native::{
    EntriesRequest, EntriesResponse, PullRequest, PullResponse, SeedManifest, SeedRequest,
    SeedResponse,
};
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

use super::checkpoint;
use super::checkpointing::Checkpoints;
use super::membership::Role;
use super::network::Links;
use super::peer_service::{Responses, raft_member};
use super::raft_types::{Raft, SnapshotMeta, TypeConfig, entry_id, log_vote};
use super::start::{Ended, Options};
use super::state_machine::Manifest;
use super::wire;
use crate::log::Log;
use crate::position::{EntryId, EntryIndex};
use crate::seed::donor::{Donor, Sending};
use crate::seed::puller::Puller;
use crate::seed::{Chunks, Peers, Receiver, SeedProgress};

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
    pub(crate) fn new(giving: Arc<Giving>, options: &Options, raft: Raft, links: Links) -> Self {
        let receiver = Receiver {
            group_uuid: options.identity.log_uuid(),
            directory_uuid: options.identity.directory_uuid,
        };
        let peers = Arc::new(DataPeers { links, raft: raft.clone() });
        Self { giving, puller: Puller::new(&options.data_dir, receiver, peers), raft }
    }

    pub(crate) fn giving(&self) -> &Giving {
        &self.giving
    }

    /// Answers a leader that has no entries for this node any more.
    async fn answer(&self, request: SeedRequest) -> Result<SeedResponse, Status> {
        let missing = |what: &str| Status::invalid_argument(format!("the request has no {what}"));
        let asked = wire::vote_from_wire(request.vote).map_err(|e| missing(&e.to_string()))?;
        let last = wire::id_from_wire(request.last.as_ref().ok_or_else(|| missing("last entry"))?);
        // Raft itself installs nothing, it only accepts the leader, durably, or knows a higher one.
        let snapshot = openraft::alias::SnapshotOf::<TypeConfig, Manifest> {
            meta: SnapshotMeta::default(),
            snapshot: Manifest,
        };
        let vote = self.raft.install_full_snapshot(asked, snapshot).await;
        let vote = vote.map_err(|fatal| Status::unavailable(fatal.to_string()))?.vote;
        if vote.leader_id != asked.leader_id
            || self.covers(last).map_err(|error| Status::internal(error.to_string()))?
        {
            return Ok(wire::seeded_to_wire(&vote));
        }
        // The leader asks once more, with its files.
        let Some(manifest) = request.manifest else {
            let result = Some(SeedResult::Pulling(Pulling::default()));
            return Ok(SeedResponse { result });
        };
        let SeedProgress { done_bytes, all_bytes, .. } = {
            let vote = log_vote(&vote);
            self.puller.offer(vote.node, vote, &manifest)
        };
        Ok(SeedResponse { result: Some(SeedResult::Pulling(Pulling { done_bytes, all_bytes })) })
    }

    /// Whether this node keeps this entry of the leader's.
    fn covers(&self, last: EntryId) -> io::Result<bool> {
        if self.giving.log.settled_end().borrow().index <= last.index {
            return Ok(false);
        }
        let purged = self.giving.log.purged().is_some_and(|purged| purged.index > last.index);
        Ok(purged || self.giving.log.id_of(last.index)? == Some(last))
    }

    /// Entries that this node has applied, for another one's repair.
    async fn read_entries(&self, request: EntriesRequest) -> Result<EntriesResponse, Status> {
        let log = self.giving.log.clone();
        // Only what is committed is sure to be what the other had.
        let applied = self.raft.metrics().borrow_watched().last_applied;
        let committed_end = applied.map_or(EntryIndex::ZERO, |id| entry_id(&id).index.next());
        let from = EntryIndex::new(request.from_index);
        let end = EntryIndex::new(request.end_index).min(committed_end);
        if from >= end || from < log.oldest_index() {
            return Err(Status::not_found(format!("entries {from}..{end} are not there")));
        }
        let reading = move || log.entries(from, end, ENTRIES_BYTES_MAX);
        let entries = tokio::task::spawn_blocking(reading)
            .await
            .map_err(io::Error::other)
            .and_then(|read| read)
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(EntriesResponse {
            entries: entries
                .into_iter()
                .map(|entry| wire::entry_to_wire(entry, Role::Data))
                .collect(),
        })
    }

    /// What this node takes.
    pub(crate) fn receiving(&self) -> watch::Receiver<Option<SeedProgress>> {
        self.puller.progress()
    }

    /// Reports what goes on, lets go of what nobody takes, and has the node begin anew once it has
    /// taken all it needs. Until `stop`.
    pub(crate) async fn run(
        self: Arc<Self>,
        ended: watch::Sender<Option<Ended>>,
        stop: CancellationToken,
    ) {
        let mut complete = self.puller.complete();
        let mut reports = tokio::time::interval(REPORT_INTERVAL);
        let mut told = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = reports.tick() => told = self.report(told),
                changed = complete.changed() => if changed.is_err() { break },
            }
            if *complete.borrow_and_update() {
                let reason = "it was re-seeded and opens the log that it got".to_owned();
                ended.send_if_modified(|ended| {
                    let first = ended.is_none();
                    ended.get_or_insert(Ended::Restart(reason));
                    first
                });
                break;
            }
        }
        stop.cancelled().await;
        self.puller.stop().await;
    }

    fn report(&self, told: Option<SeedProgress>) -> Option<SeedProgress> {
        self.giving.donor.expire(Instant::now());
        for (receiver, progress) in &*self.giving.donor.sending().borrow() {
            let SeedProgress { done_bytes, all_bytes, .. } = progress;
            tracing::info!(receiver, done_bytes, all_bytes, "a member is being re-seeded");
        }
        let receiving = *self.puller.progress().borrow();
        if let Some(SeedProgress { done_bytes, all_bytes, .. }) = receiving
            && told != receiving
        {
            tracing::info!(done_bytes, all_bytes, "this node is being re-seeded");
        }
        receiving
    }
}

#[tonic::async_trait]
impl raft_member::Seeding for Seeding {
    async fn seed(&self, request: SeedRequest) -> Result<SeedResponse, Status> {
        self.answer(request).await
    }

    async fn pull(&self, request: PullRequest) -> Result<Responses<PullResponse>, Status> {
        let chunks = self.giving.donor.pull(&request)?;
        Ok(Box::pin(chunks.map_ok(|chunk| PullResponse { chunk })))
    }

    async fn entries(&self, request: EntriesRequest) -> Result<EntriesResponse, Status> {
        self.read_entries(request).await
    }
}

/// The other data nodes, found in the membership.
#[derive(Debug)]
struct DataPeers {
    links: Links,
    raft: Raft,
}

impl DataPeers {
    fn client(&self, id: u64) -> Result<PeerClient<Channel>, Status> {
        let metrics = self.raft.metrics();
        let node = metrics.borrow_watched().membership_config.membership().get_node(&id).cloned();
        let node = node.ok_or_else(|| Status::not_found(format!("there is no member {id}")))?;
        self.links.bulk_client(&node).map_err(|error| Status::unavailable(error.to_string()))
    }
}

impl Peers for DataPeers {
    fn pull(&self, donor: u64, request: PullRequest) -> BoxFuture<'_, Result<Chunks, Status>> {
        Box::pin(async move {
            let request = self.links.request(donor, request);
            let chunks = self.client(donor)?.pull(request).await?.into_inner();
            Ok(chunks.map_ok(|response| response.chunk).boxed())
        })
    }
}
