//! An unsafe election: a stopped node is made a group by itself, under a new group UUID, although
//! others may hold entries that were acknowledged and that it lacks. Only an operator may ask for
//! it, after having read what is given up.
//!
//! The new UUID is written first, then the vote: should the process die before the membership is,
//! the node is a member of a group in which nobody answers it, and the command is simply repeated.
//! A membership of a term that the vote does not know would be a log that nobody can go on with.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use drumlin_proto::native::peer_client::PeerClient;
use drumlin_proto::native::{PeerEntryId, PeerVote, StateRequest, VoteRequest};
use futures::future::join_all;
use tonic::Request;
use uuid::Uuid;

use super::gate::Mode;
use super::log_store::LogStore;
use super::membership::{self, BrokerNode, Role};
use super::network::endpoint;
use super::raft_types::Membership;
use super::restore::{RestoreError, Restored, restore};
use super::wire::Caller;
use crate::broker::opening;
use crate::config::Config;
use crate::data_dir::{DataDir, DataDirError, Found};
use crate::entry::{Entry, EntryKind};
use crate::log::{Log, LogMetrics, Vote};
use crate::position::{EntryId, EntryIndex, Term};

/// How long another member may take to say how far it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longer than a voter that heard a leader holds to it.
const LEASE_TIME: Duration = Duration::from_millis(1_500);
/// What membership entries are looked for by.
const SCAN_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ElectError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("the data directory is empty: there is nothing to go on with")]
    Empty,
    #[error(transparent)]
    Checkpoint(#[from] super::checkpoint::CheckpointError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("I/O failed")]
    Io(#[from] io::Error),
    #[error("the membership in the log cannot be read: {0}")]
    Membership(String),
    #[error("this node is its group's only voter: start it")]
    AloneAlready,
    #[error("this node is no voter of its group")]
    NoVoter,
    #[error("the group has a leader, {name}: nothing must be given up")]
    Led { name: String },
    #[error(
        "{name} hears a leader, {leader}, which this node does not reach: the group goes on \
        without it, and nothing must be given up"
    )]
    Heard { name: String, leader: String },
    #[error("the log failed: {0}")]
    Log(String),
}

/// Another member of the group, and what it says.
#[derive(Clone, Debug)]
pub struct Other {
    pub id: u64,
    pub name: String,
    pub address: String,
    pub is_witness: bool,
    /// Errors: why it is not known.
    pub said: Result<Said, String>,
}

/// How far another member is; both ends exclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    pub term: u64,
    pub appended_end: u64,
    pub committed_end: u64,
    pub leader: u64,
    /// It would vote for nobody now, because a leader is there.
    pub hears_leader: bool,
}

/// What an unsafe election of a stopped node would mean. Holds its data directory meanwhile.
#[derive(Debug)]
pub struct Candidate {
    data_dir: DataDir,
    log: Log,
    /// Where others reach it.
    address: String,
    /// Last entry of this node's log.
    pub last: Option<EntryId>,
    /// Whether the last leader that this node heard of had gone on without a second copy, so that
    /// entries may exist that this node never got.
    pub alone: bool,
    pub others: Vec<Other>,
}

impl Candidate {
    /// Opens the data directory of a stopped node, and asks the other members how far they are.
    pub async fn of(config: &Config) -> Result<Self, ElectError> {
        let data_dir = match opening::find_data_dir(config)? {
            Found::Owned(data_dir) => data_dir,
            Found::Empty(_) => return Err(ElectError::Empty),
        };
        let opened = opening::open_checkpoints(&data_dir)?;
        let open_log = opening::log_opener(config, &data_dir, LogMetrics::default());
        let group = config.broker_group.clone();
        let restoring = tokio::task::spawn_blocking(move || restore(opened, open_log, &group));
        let restored = restoring.await.map_err(io::Error::other)??;
        let members = members(&restored)?;
        let me = data_dir.identity().node_id;
        let voters: Vec<u64> = members.voter_ids().collect();
        if !voters.contains(&me) {
            return Err(ElectError::NoVoter);
        }
        if voters == [me] {
            return Err(ElectError::AloneAlready);
        }
        let Restored { log, applying, .. } = restored;
        let said_gate = applying.state.applied().map(|at| (at, applying.state.gate()));
        let store = LogStore::new(log.clone(), &opening::hint_path(&data_dir), said_gate)?;
        let alone = store.facts().borrow().mode != Mode::Paired;
        let others = ask_all(&data_dir, &members, &opening::addresses(config)).await?;
        let address = opening::own_address(config);
        Ok(Self { last: log.last(), data_dir, log, address, alone, others })
    }

    /// Behind the last entry of this node's log: from here on its group goes ways of its own.
    pub fn own_end(&self) -> u64 {
        self.last.map_or(0, |last| last.index.get() + 1)
    }

    /// Entries that others say they have and this node has not; `None` if nobody says.
    ///
    /// A witness that answers knows of every acknowledged entry that this node may lack.
    pub fn lacking_count(&self) -> Option<u64> {
        let own_end = self.own_end();
        let ends = self.others.iter().filter_map(|other| other.said.as_ref().ok());
        ends.map(|said| said.appended_end.saturating_sub(own_end)).max()
    }

    /// Makes this node a group by itself; returns the new group UUID. It can then be started.
    pub async fn elect(self) -> Result<Uuid, ElectError> {
        let identity = self.data_dir.identity().clone();
        let group_uuid = Uuid::now_v7();
        let data_dir = self.data_dir.succeed(group_uuid)?;
        let said = self.others.iter().filter_map(|other| other.said.as_ref().ok());
        let terms = said.map(|said| said.term).chain([
            self.log.vote().map_or(0, |vote| vote.term.get()),
            self.last.map_or(0, |last| last.term.get()),
        ]);
        let term = Term::new(terms.max().unwrap_or_default().saturating_add(1));
        let node =
            BrokerNode { name: identity.node.clone(), address: self.address, role: Role::Data };
        let nodes = BTreeMap::from([(identity.node_id, node)]);
        let voters = vec![[identity.node_id].into()];
        let alone = Membership::new(voters, nodes)
            .map_err(|error| ElectError::Membership(error.to_string()))?;
        let payload = membership::encode(&alone);
        let index = self.last.map_or(EntryIndex::ZERO, |last| last.index.next());
        let entry = Entry {
            id: EntryId { term, index },
            kind: EntryKind::Membership,
            clock_ms: 0,
            item_count: 0,
            payload_crc: crc32fast::hash(&payload),
            payload,
        };
        let vote = Vote { term, node: identity.node_id, committed: true };
        let closed = |error: crate::log::LogClosed| ElectError::Log(error.to_string());
        let (done, synced) = tokio::sync::oneshot::channel();
        let flushed = Box::new(move |result: io::Result<()>| {
            // Whoever waited has gone if nobody takes it.
            done.send(result).ok();
        });
        let gone = |_| ElectError::Log("it closed before the election was synced".to_owned());
        self.log.save_vote(vote).map_err(closed)?.await.map_err(gone)??;
        self.log.append(vec![entry], flushed).map_err(closed)?;
        synced.await.map_err(gone)??;
        let log = self.log;
        tokio::task::spawn_blocking(move || log.close()).await.map_err(io::Error::other)?;
        drop(data_dir);
        Ok(group_uuid)
    }
}

/// The last membership in the log, committed or not.
fn members(restored: &Restored) -> Result<Membership, ElectError> {
    let log = &restored.log;
    let invalid =
        |error: membership::MembershipBytesError| ElectError::Membership(error.to_string());
    let kept = restored.newest.as_ref();
    let mut found = kept.map(|kept| kept.membership.membership().clone()).unwrap_or_default();
    let mut from = kept.map_or(log.oldest_index(), |kept| kept.applied.index.next());
    let end = log.last().map_or(EntryIndex::ZERO, |last| last.index.next());
    while from < end {
        let entries = log.entries(from, end, SCAN_BYTES_MAX)?;
        let Some(last) = entries.last() else { break };
        from = last.id.index.next();
        for entry in entries.iter().filter(|entry| entry.kind == EntryKind::Membership) {
            found = membership::decode(&entry.payload).map_err(invalid)?;
        }
    }
    Ok(found)
}

/// What the other members say.
///
/// Errors: that one of them leads, or is led.
async fn ask_all(
    data_dir: &DataDir,
    members: &Membership,
    addresses: &BTreeMap<String, String>,
) -> Result<Vec<Other>, ElectError> {
    let me = data_dir.identity().node_id;
    let mut is_again = false;
    loop {
        let nodes = members.nodes().filter(|(id, _)| **id != me);
        let asked = nodes.map(|(id, node)| ask(data_dir, *id, node, addresses));
        let others = join_all(asked).await;
        if let Some(name) = led_by(&others) {
            return Err(ElectError::Led { name });
        }
        let hears = |other: &&Other| other.said.as_ref().is_ok_and(|said| said.hears_leader);
        match others.iter().find(hears) {
            None => return Ok(others),
            Some(other) if is_again => {
                let leader = other.said.as_ref().map_or(0, |said| said.leader);
                let leader = members.get_node(&leader).map(|node| node.name.clone());
                let leader = leader.unwrap_or_else(|| "whoever it is".to_owned());
                return Err(ElectError::Heard { name: other.name.clone(), leader });
            }
            // Perhaps the leader was there a moment ago.
            Some(_) => tokio::time::sleep(LEASE_TIME).await,
        }
        is_again = true;
    }
}

async fn ask(
    data_dir: &DataDir,
    id: u64,
    node: &BrokerNode,
    addresses: &BTreeMap<String, String>,
) -> Other {
    let address = addresses.get(&node.name).unwrap_or(&node.address).clone();
    let said = tokio::time::timeout(ASK_TIMEOUT, said_by(data_dir, id, &address)).await;
    Other {
        id,
        name: node.name.clone(),
        is_witness: node.role == Role::Witness,
        said: said.unwrap_or_else(|_| Err("it does not answer in time".to_owned())),
        address,
    }
}

async fn said_by(data_dir: &DataDir, id: u64, address: &str) -> Result<Said, String> {
    let identity = data_dir.identity();
    let channel = endpoint(address).map_err(|error| error.to_string())?;
    let channel = channel.connect().await.map_err(|error| error.to_string())?;
    let caller = Caller {
        cluster: identity.cluster.clone(),
        broker_group: identity.broker_group.to_string(),
        group_uuid: Some(identity.group_uuid),
        from: identity.node_id,
        to: id,
    };
    let mut client = PeerClient::new(channel);
    let answer = client.state(called(&caller, StateRequest {})?).await;
    let state = answer.map_err(|status| status.message().to_owned())?.into_inner();
    // Only a leader that is heard keeps a member from granting this, and it changes nothing there.
    let (term, node) = (state.term.saturating_add(1), identity.node_id);
    let wish = VoteRequest {
        vote: Some(PeerVote { term, node, committed: false }),
        last: Some(PeerEntryId { term, index: state.appended_end }),
        leadership_transfer: false,
    };
    let granted = client.pre_vote(called(&caller, wish)?).await;
    Ok(Said {
        term: state.term,
        appended_end: state.appended_end,
        committed_end: state.committed_end,
        leader: state.leader,
        hears_leader: granted.is_ok_and(|answer| !answer.into_inner().granted),
    })
}

fn called<T>(caller: &Caller, message: T) -> Result<Request<T>, String> {
    let mut request = Request::new(message);
    caller.write(request.metadata_mut()).map_err(|error| error.to_string())?;
    Ok(request)
}

/// A data node that says that it leads.
fn led_by(others: &[Other]) -> Option<String> {
    let leads = |other: &&Other| other.said.as_ref().is_ok_and(|said| said.leader == other.id);
    others.iter().find(leads).map(|other| other.name.clone())
}
