//! All witnesses of one process: opens what lies in its folder, adopts new ones, serves them.
//!
//! A witness exists only where a leader, or the node that founds a group, had it adopted. One that
//! cannot be opened is left out and named in the log; the others go on without it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drumlin_proto::ids::BrokerGroupName;
use drumlin_proto::native as proto;
use openraft::async_runtime::WatchReceiver;
use parking_lot::RwLock;
use tonic::Status;
use tonic::service::Routes;
use uuid::Uuid;

use super::voter::{Pace, Voter};
use super::{WitnessError, directory};
use crate::data_dir::{Bootstrap, Claim, Identity, lock};
use crate::disk::{Disk, RealDisk};
use crate::replica::clock_source::wall_ms;
use crate::replica::membership::Role;
use crate::replica::peer_service::raft_member::{MemberParts, RaftMember, StateProvider};
use crate::replica::peer_service::{Host, MemberIdentity, PeerService};
use crate::replica::raft_types::entry_id;

/// What witnesses are hosted with.
#[derive(Clone, Debug)]
pub struct WitnessOptions {
    pub cluster: String,
    /// Of this process, unique within the cluster; a group's configuration names it.
    pub node: String,
    /// One folder in it for each group, by its UUID.
    pub dir: PathBuf,
    pub pace: Pace,
}

/// The witnesses of this process.
#[derive(Debug)]
pub struct WitnessHost {
    witnesses: Arc<Witnesses>,
    service: PeerService,
}

#[derive(Debug)]
struct Witnesses {
    options: WitnessOptions,
    /// Held while one is adopted, so that there is one at a time.
    adopting: tokio::sync::Mutex<()>,
    running: RwLock<BTreeMap<Uuid, Arc<Hosted>>>,
    /// Those that cannot be opened, by group, and why.
    broken: RwLock<BTreeMap<Uuid, String>>,
    service: RwLock<Option<PeerService>>,
    _lock: File,
}

/// One witness and what tells of it.
#[derive(Debug)]
struct Hosted {
    identity: Identity,
    dir: PathBuf,
    /// `None` once it is shut down.
    voter: tokio::sync::Mutex<Option<Voter>>,
}

impl WitnessHost {
    /// Opens every witness in the folder.
    ///
    /// Errors: the folder cannot be used at all.
    pub async fn open(options: WitnessOptions) -> Result<Self, WitnessError> {
        let dir = options.dir.clone();
        let listing = tokio::task::spawn_blocking(move || list(&dir));
        let raft = |error: tokio::task::JoinError| WitnessError::Raft {
            dir: options.dir.clone(),
            reason: error.to_string(),
        };
        let (lock, dirs) = listing.await.map_err(raft)??;
        let witnesses = Arc::new(Witnesses {
            options,
            adopting: tokio::sync::Mutex::default(),
            running: RwLock::default(),
            broken: RwLock::default(),
            service: RwLock::default(),
            _lock: lock,
        });
        let host = Arc::clone(&witnesses);
        let service = PeerService::new(witnesses.options.cluster.clone(), host);
        *witnesses.service.write() = Some(service.clone());
        for (group_uuid, dir) in dirs {
            if let Err(error) = witnesses.start(&dir).await {
                tracing::error!(%group_uuid, %error, "a witness cannot be opened and stays out");
                witnesses.broken.write().insert(group_uuid, error.to_string());
            }
        }
        Ok(Self { witnesses, service })
    }

    /// The service of all witnesses, for a server of the process.
    pub fn routes(&self) -> Routes {
        Routes::new(self.service.server())
    }

    /// Broker groups with a running witness here.
    pub fn groups(&self) -> Vec<BrokerGroupName> {
        let running = self.witnesses.running.read();
        running.values().map(|hosted| hosted.identity.broker_group.clone()).collect()
    }

    /// Takes the witness of a group out of use that an unsafe election has replaced by another:
    /// together with the former leader it would go on as if nothing had happened.
    pub async fn retire_succeeded(&self, broker_group: &str, group_uuid: &str) {
        let _one = self.witnesses.adopting.lock().await;
        let hosted = self.witnesses.of_group(broker_group);
        let hosted = hosted.filter(|it| it.identity.group_uuid.to_string() == group_uuid);
        let Some(hosted) = hosted else { return };
        if let Err(status) = self.witnesses.retire(&hosted).await {
            let reason = status.message();
            tracing::error!(broker_group, group_uuid, reason, "its files stay where they are");
        }
    }

    /// Ends streams and closes all logs.
    pub async fn shutdown(self) {
        let _adopting = self.witnesses.adopting.lock().await;
        let running = std::mem::take(&mut *self.witnesses.running.write());
        for hosted in running.into_values() {
            hosted.shutdown(&self.service).await;
        }
        // The service holds the witnesses, and they hold it.
        *self.witnesses.service.write() = None;
    }
}

impl Hosted {
    async fn shutdown(&self, service: &PeerService) {
        service.leave(self.identity.group_uuid);
        if let Some(voter) = self.voter.lock().await.take() {
            voter.shutdown().await;
        }
    }
}

/// Locks the folder and lists what lies in it. Blocks.
fn list(dir: &Path) -> Result<(File, Vec<(Uuid, PathBuf)>), WitnessError> {
    let io = |error| WitnessError::Io { dir: dir.to_owned(), error };
    RealDisk.create_dir(dir).map_err(io)?;
    let lock = lock(dir)?;
    let mut dirs = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        // Others are not complete, or were taken out of use.
        if let Some(group_uuid) = name.to_str().and_then(|name| Uuid::parse_str(name).ok()) {
            dirs.push((group_uuid, entry.path()));
        }
    }
    dirs.sort();
    Ok((lock, dirs))
}

impl Witnesses {
    async fn start(&self, dir: &Path) -> Result<(), WitnessError> {
        let voter = Voter::open(dir, self.options.pace).await?;
        let identity = voter.identity().clone();
        if let Err(error) = self.check_owner(dir, &identity) {
            voter.shutdown().await;
            return Err(error);
        }
        let member = MemberIdentity {
            cluster: identity.cluster.clone(),
            broker_group: identity.broker_group.to_string(),
            group_uuid: identity.group_uuid,
            node_id: identity.node_id,
        };
        let mut parts =
            MemberParts::new(member, Role::Witness, state_of(&voter), Arc::clone(voter.doubt()));
        parts.trim_upto = Some(voter.trim_upto().clone());
        let member = Arc::new(RaftMember::new(voter.raft().clone(), parts));
        let dir = voter.dir().to_owned();
        let hosted = Hosted { identity, dir, voter: tokio::sync::Mutex::new(Some(voter)) };
        self.running.write().insert(hosted.identity.group_uuid, Arc::new(hosted));
        if let Some(service) = &*self.service.read() {
            service.join(member);
        }
        Ok(())
    }

    fn check_owner(&self, dir: &Path, identity: &Identity) -> Result<(), WitnessError> {
        let pairs = [
            ("cluster", &identity.cluster, &self.options.cluster),
            ("node", &identity.node, &self.options.node),
        ];
        match pairs.into_iter().find(|(_, found, own)| found != own) {
            None => Ok(()),
            Some((what, found, own)) => Err(WitnessError::OtherOwner {
                dir: dir.to_owned(),
                what,
                found: found.clone(),
                own: own.clone(),
            }),
        }
    }

    /// The running witness of a broker group of that name.
    fn of_group(&self, broker_group: &str) -> Option<Arc<Hosted>> {
        let running = self.running.read();
        running
            .values()
            .find(|hosted| hosted.identity.broker_group.as_str() == broker_group)
            .cloned()
    }

    /// Makes room for the witness that is asked for, or answers that it is there already.
    async fn settle(&self, asked: &Asked) -> Result<Option<Identity>, Status> {
        let group_uuid = asked.bootstrap.group_uuid;
        let broken = self.broken.read().get(&group_uuid).cloned();
        if let Some(reason) = broken {
            // A group that exists gives an id that nobody ever had: what is broken is not asked to
            // go on.
            if asked.member_ids.is_empty() {
                return Err(Status::failed_precondition(reason));
            }
            let (dir, id) =
                (self.options.dir.join(group_uuid.to_string()), asked.bootstrap.node_id);
            blocking(move || directory::retire(&dir, id)).await?;
            tracing::warn!(%group_uuid, reason, "a witness that cannot be opened gives way");
            self.broken.write().remove(&group_uuid);
        }
        let Some(hosted) = self.of_group(asked.claim.broker_group.as_str()) else {
            return Ok(None);
        };
        let identity = &hosted.identity;
        if identity.group_uuid == group_uuid && identity.node_id == asked.bootstrap.node_id {
            return Ok(Some(identity.clone()));
        }
        let votes = match &*hosted.voter.lock().await {
            Some(voter) => voter.doubt().reason().is_none() && voter.votes().await,
            None => true,
        };
        let succeeded = asked.bootstrap.succeeds.contains(&identity.group_uuid);
        let same_group = identity.group_uuid == group_uuid;
        // A member that was taken out does not always hear of it: what the group says counts.
        let is_out = !asked.member_ids.is_empty() && !asked.member_ids.contains(&identity.node_id);
        let replaced =
            same_group && identity.node_id < asked.bootstrap.node_id && (is_out || !votes);
        if !succeeded && !replaced {
            return Err(Status::failed_precondition(format!(
                "{} hosts member {} of broker group {} ({}) already",
                self.options.node, identity.node_id, identity.broker_group, identity.group_uuid,
            )));
        }
        self.retire(&hosted).await?;
        Ok(None)
    }

    /// Takes a witness that counts no more out of use; its files stay.
    async fn retire(&self, hosted: &Hosted) -> Result<(), Status> {
        let identity = &hosted.identity;
        tracing::info!(group = %identity.broker_group, group_uuid = %identity.group_uuid,
            node_id = identity.node_id, "a witness counts no more and is taken out of use");
        self.running.write().remove(&identity.group_uuid);
        let service = self.service.read().clone();
        if let Some(service) = service {
            hosted.shutdown(&service).await;
        }
        let (dir, node_id) = (hosted.dir.clone(), identity.node_id);
        blocking(move || directory::retire(&dir, node_id)).await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WitnessError> + Send + 'static,
) -> Result<T, Status> {
    let worked = tokio::task::spawn_blocking(work).await;
    let worked = worked.map_err(|error| Status::internal(error.to_string()))?;
    worked.map_err(|error| Status::internal(told(&error)))
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A valid request.
struct Asked {
    claim: Claim,
    bootstrap: Bootstrap,
    /// Of the group, by a committed membership; empty where it has none yet.
    member_ids: Vec<u64>,
}

impl Asked {
    fn parse(request: &proto::AdoptRequest, options: &WitnessOptions) -> Result<Self, Status> {
        let refused = |reason: String| Err(Status::failed_precondition(reason));
        let WitnessOptions { cluster, node, .. } = options;
        if request.cluster != *cluster {
            return refused(format!("this cluster is called {cluster}"));
        }
        if request.node != *node {
            return refused(format!("this nameserver is called {node}"));
        }
        if !request.witness {
            return refused("a nameserver hosts witnesses only".to_owned());
        }
        if request.node_id == 0 {
            return Err(Status::invalid_argument("the id of the member is missing"));
        }
        let uuid = |text: &String| {
            Uuid::parse_str(text).map_err(|_| Status::invalid_argument("a UUID is invalid"))
        };
        let broker_group = BrokerGroupName::parse(&request.broker_group)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let claim = Claim { cluster: cluster.clone(), broker_group, node: node.clone() };
        let bootstrap = Bootstrap {
            group_uuid: uuid(&request.group_uuid)?,
            succeeds: request.succeeds.iter().map(uuid).collect::<Result<_, _>>()?,
            directory_uuid: Uuid::new_v4(),
            node_id: request.node_id,
        };
        Ok(Self { claim, bootstrap, member_ids: request.member_ids.clone() })
    }
}

#[tonic::async_trait]
impl Host for Witnesses {
    /// As the group that asks is concerned: a nameserver has witnesses of several.
    async fn probe(&self, broker_group: &str) -> Result<proto::ProbeResponse, Status> {
        let hosted = self.of_group(broker_group);
        let identity = hosted.as_ref().map(|hosted| &hosted.identity);
        let initialised = match &hosted {
            None => false,
            Some(hosted) => match &*hosted.voter.lock().await {
                Some(voter) => voter.raft().is_initialized().await.unwrap_or(true),
                None => true,
            },
        };
        Ok(proto::ProbeResponse {
            cluster: self.options.cluster.clone(),
            broker_group: broker_group.to_owned(),
            node: self.options.node.clone(),
            directory_uuid: identity.map(|it| it.directory_uuid.to_string()).unwrap_or_default(),
            group_uuid: identity.map(|it| it.group_uuid.to_string()).unwrap_or_default(),
            node_id: identity.map_or(0, |it| it.node_id),
            initialised,
        })
    }

    async fn adopt(&self, request: proto::AdoptRequest) -> Result<proto::AdoptResponse, Status> {
        let asked = Asked::parse(&request, &self.options)?;
        let _one = self.adopting.lock().await;
        if self.service.read().is_none() {
            return Err(Status::unavailable("this nameserver is stopping"));
        }
        if let Some(identity) = self.settle(&asked).await? {
            let directory_uuid = identity.directory_uuid.to_string();
            return Ok(proto::AdoptResponse { directory_uuid });
        }
        let Asked { claim, bootstrap, .. } = asked;
        let directory_uuid = bootstrap.directory_uuid.to_string();
        tracing::info!(group = %claim.broker_group, group_uuid = %bootstrap.group_uuid,
            node_id = bootstrap.node_id, "adopting a witness");
        let parent = self.options.dir.clone();
        let dir = blocking(move || directory::create(&parent, &claim, bootstrap)).await?;
        self.start(&dir).await.map_err(|error| Status::internal(told(&error)))?;
        Ok(proto::AdoptResponse { directory_uuid })
    }
}

/// What a witness says of itself.
fn state_of(voter: &Voter) -> StateProvider {
    let (raft, log) = (voter.raft().clone(), voter.log().clone());
    let doubt = Arc::clone(voter.doubt());
    let (node, node_id) = (voter.identity().node.clone(), voter.identity().node_id);
    Arc::new(move || {
        let metrics = raft.metrics().borrow_watched().clone();
        let end = |id: Option<crate::position::EntryId>| id.map_or(0, |id| id.index.next().get());
        let durable = *log.durable_end().borrow();
        proto::StateResponse {
            node: node.clone(),
            node_id,
            witness: true,
            term: metrics.current_term,
            leader: metrics.current_leader.unwrap_or(0),
            appended_end: end(log.last()),
            durable_end: durable.index.get(),
            durable_end_bytes: durable.position.get(),
            committed_end: end(metrics.local_committed.as_ref().map(entry_id)),
            applied_end: end(metrics.last_applied.as_ref().map(entry_id)),
            trimmed_below: log.oldest_index().get(),
            disk_full: *log.disk_full().borrow(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            wall_ms: wall_ms(),
            fenced: doubt.reason().is_some(),
            ..proto::StateResponse::default()
        }
    })
}

#[cfg(test)]
mod tests;
