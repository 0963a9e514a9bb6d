//! openraft's types as this broker fills them, and the crossings to our own. Nothing of openraft
//! goes to disk or over the wire.

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use openraft::impls::leader_id_std;
use openraft::{EntryPayload, alias};

use super::membership::{self, BrokerNode};
use super::proposer::Ticket;
use super::state_machine::StateMachine;
use crate::command::Refusal;
use crate::entry::{self, EntryKind};
use crate::log;
use crate::position::{EntryId, EntryIndex, Term};
use crate::replica::Applied;

openraft::declare_raft_types!(
    pub(crate) TypeConfig:
        D = Payload,
        R = Outcomes,
        NodeId = u64,
        Node = BrokerNode,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub(crate) type LogId = alias::LogIdOf<TypeConfig>;
pub(crate) type RaftVote = alias::VoteOf<TypeConfig>;
pub(crate) type RaftEntry = alias::EntryOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, BrokerNode>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<TypeConfig>;

/// What is proposed: all of an entry but its place.
#[derive(Clone, Debug)]
pub(crate) struct Payload {
    pub(crate) kind: EntryKind,
    pub(crate) clock_ms: u64,
    pub(crate) item_count: u32,
    pub(crate) payload_crc: u32,
    pub(crate) payload: Bytes,
    /// The proposer's, held until the entry is durable here. Never leaves the process.
    pub(crate) ticket: Option<Arc<Ticket>>,
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.clock_ms == other.clock_ms
            && self.item_count == other.item_count
            && self.payload_crc == other.payload_crc
            && self.payload == other.payload
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} items, {} bytes", self.kind, self.item_count, self.payload.len())
    }
}

/// What became of the items of an entry, in their order; told by the state machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcomes(pub(crate) Vec<Result<Applied, Refusal>>);

pub(crate) fn log_id(id: EntryId) -> LogId {
    LogId::new_term_index(id.term.get(), id.index.get())
}

pub(crate) fn entry_id(id: &LogId) -> EntryId {
    EntryId { term: Term::new(id.leader_id.term), index: EntryIndex::new(id.index) }
}

pub(crate) fn raft_vote(vote: log::Vote) -> RaftVote {
    if vote.committed {
        RaftVote::new_committed(vote.term.get(), vote.node)
    } else {
        RaftVote::new(vote.term.get(), vote.node)
    }
}

pub(crate) fn log_vote(vote: &RaftVote) -> log::Vote {
    log::Vote {
        term: Term::new(vote.leader_id.term),
        node: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

/// The entry as the log keeps it, and the ticket it carried.
pub(crate) fn to_log(entry: RaftEntry) -> (entry::Entry, Option<Arc<Ticket>>) {
    let id = entry_id(&entry.log_id);
    let own = |kind, payload: Bytes| entry::Entry {
        id,
        kind,
        clock_ms: 0,
        item_count: 0,
        payload_crc: crc32fast::hash(&payload),
        payload,
    };
    match entry.payload {
        EntryPayload::Blank => (own(EntryKind::Blank, Bytes::new()), None),
        EntryPayload::Membership(members) => {
            (own(EntryKind::Membership, membership::encode(&members)), None)
        }
        EntryPayload::Normal(payload) => {
            let entry = entry::Entry {
                id,
                kind: payload.kind,
                clock_ms: payload.clock_ms,
                item_count: payload.item_count,
                payload_crc: payload.payload_crc,
                payload: payload.payload,
            };
            (entry, payload.ticket)
        }
    }
}

/// The entry as openraft takes it.
///
/// Errors: a membership entry that cannot be read.
pub(crate) fn to_raft(entry: entry::Entry) -> io::Result<RaftEntry> {
    let payload = match entry.kind {
        EntryKind::Blank => EntryPayload::Blank,
        EntryKind::Membership => EntryPayload::Membership(
            membership::decode(&entry.payload)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?,
        ),
        EntryKind::Batch | EntryKind::Paired | EntryKind::Alone => EntryPayload::Normal(Payload {
            kind: entry.kind,
            clock_ms: entry.clock_ms,
            item_count: entry.item_count,
            payload_crc: entry.payload_crc,
            payload: entry.payload,
            ticket: None,
        }),
    };
    Ok(RaftEntry { log_id: log_id(entry.id), payload })
}
