//! Between openraft's types and `peer.proto`: everything that one member says to another about the
//! log. What comes in is checked here; what goes out shares the log's bytes.

#[cfg(test)]
use bytes::Buf;
use bytes::{BufMut, Bytes, BytesMut};
use drumlin_proto::native as proto;
use drumlin_proto::native::append_response::{Matched, Result as Appended};
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use tonic::metadata::{MetadataMap, MetadataValue};
use uuid::Uuid;

use super::membership::{self, MembershipBytesError, Role};
use super::raft_types::{
    LogId, RaftEntry, RaftVote, SnapshotMeta, StoredMembership, TypeConfig, entry_id, log_id,
    log_vote, raft_vote, to_log, to_raft,
};
use crate::entry::{Entry, EntryKind, PAYLOAD_BYTES_MAX};
use crate::log;
use crate::position::{EntryId, EntryIndex, Term};

/// Largest message between members: the largest entry, and room for what stands around it.
pub(crate) const MESSAGE_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + (1 << 20);

const CLUSTER: &str = "drumlin-cluster";
const BROKER_GROUP: &str = "drumlin-broker-group";
const GROUP_UUID: &str = "drumlin-group-uuid";
const FROM: &str = "drumlin-from";
const TO: &str = "drumlin-to";

pub(crate) type StreamAppendResult = Result<Option<LogId>, StreamAppendError<TypeConfig>>;

/// Who calls whom; in the metadata of every call between members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) cluster: String,
    pub(crate) broker_group: String,
    /// `None`: the call is about a group that its target may not belong to yet.
    pub(crate) group_uuid: Option<Uuid>,
    /// Raft's names of both; 0 where it is not known yet.
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// Why metadata names no caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("metadata {key} is missing or invalid")]
pub(crate) struct CallerError {
    key: &'static str,
}

impl Caller {
    /// Errors: a name that metadata cannot carry.
    pub(crate) fn write(&self, metadata: &mut MetadataMap) -> Result<(), CallerError> {
        let mut put = |key: &'static str, value: &str| {
            let value = MetadataValue::try_from(value).map_err(|_| CallerError { key })?;
            metadata.insert(key, value);
            Ok(())
        };
        put(CLUSTER, &self.cluster)?;
        put(BROKER_GROUP, &self.broker_group)?;
        if let Some(uuid) = self.group_uuid {
            put(GROUP_UUID, &uuid.to_string())?;
        }
        put(FROM, &self.from.to_string())?;
        put(TO, &self.to.to_string())
    }

    pub(crate) fn read(metadata: &MetadataMap) -> Result<Self, CallerError> {
        let text = |key: &'static str| {
            let value = metadata.get(key).and_then(|value| value.to_str().ok());
            value.ok_or(CallerError { key })
        };
        let number = |key| match metadata.get(key) {
            None => Ok(0),
            Some(_) => text(key)?.parse().map_err(|_| CallerError { key }),
        };
        let group_uuid = match metadata.get(GROUP_UUID) {
            None => None,
            Some(_) => {
                let uuid = Uuid::parse_str(text(GROUP_UUID)?);
                Some(uuid.map_err(|_| CallerError { key: GROUP_UUID })?)
            }
        };
        Ok(Self {
            cluster: text(CLUSTER)?.to_owned(),
            broker_group: text(BROKER_GROUP)?.to_owned(),
            group_uuid,
            from: number(FROM)?,
            to: number(TO)?,
        })
    }
}

/// Why a message of another member cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("entry {id} is of kind {kind}, which this release does not know")]
    Kind { id: EntryId, kind: u32 },
    #[error("entry {id} arrived with {found} payload bytes of {expected}")]
    PayloadBytes { id: EntryId, found: usize, expected: u32 },
    #[error("entry {id} arrived damaged: checksum {found:08x}, expected {expected:08x}")]
    PayloadChecksum { id: EntryId, found: u32, expected: u32 },
    #[error("entry {id} does not follow {before:?}")]
    Order { id: EntryId, before: Option<EntryId> },
    #[error(transparent)]
    Membership(#[from] MembershipBytesError),
}

/// What a witness keeps of a batch in place of its payload.
///
/// Twelve bytes, little-endian: the payload's bytes, its checksum, its count of items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchStub {
    pub(crate) payload_bytes: u32,
    pub(crate) payload_crc: u32,
    pub(crate) item_count: u32,
}

impl BatchStub {
    const BYTES: usize = 12;

    pub(crate) fn encode(self) -> Bytes {
        let mut out = BytesMut::with_capacity(Self::BYTES);
        out.put_u32_le(self.payload_bytes);
        out.put_u32_le(self.payload_crc);
        out.put_u32_le(self.item_count);
        out.freeze()
    }

    /// `None` if that is no stub.
    #[cfg(test)]
    fn decode(mut raw: &[u8]) -> Option<Self> {
        (raw.len() == Self::BYTES).then(|| Self {
            payload_bytes: raw.get_u32_le(),
            payload_crc: raw.get_u32_le(),
            item_count: raw.get_u32_le(),
        })
    }
}

pub(crate) fn id_to_wire(id: EntryId) -> proto::PeerEntryId {
    proto::PeerEntryId { term: id.term.get(), index: id.index.get() }
}

pub(crate) fn id_from_wire(id: &proto::PeerEntryId) -> EntryId {
    EntryId { term: Term::new(id.term), index: EntryIndex::new(id.index) }
}

fn log_id_to_wire(id: &LogId) -> proto::PeerEntryId {
    id_to_wire(entry_id(id))
}

fn log_id_from_wire(id: &proto::PeerEntryId) -> LogId {
    log_id(id_from_wire(id))
}

fn vote_to_wire(vote: &RaftVote) -> proto::PeerVote {
    let log::Vote { term, node, committed } = log_vote(vote);
    proto::PeerVote { term: term.get(), node, committed }
}

pub(crate) fn vote_from_wire(vote: Option<proto::PeerVote>) -> Result<RaftVote, WireError> {
    let proto::PeerVote { term, node, committed } = vote.ok_or(WireError::Missing("the vote"))?;
    Ok(raft_vote(log::Vote { term: Term::new(term), node, committed }))
}

/// One entry as it goes to a member of that role. The payload is shared with the log.
pub(crate) fn entry_to_wire(entry: Entry, to: Role) -> proto::PeerEntry {
    let payload_bytes = u32::try_from(entry.payload.len()).expect("entries are bounded well below");
    let stripped = to == Role::Witness && entry.kind == EntryKind::Batch;
    proto::PeerEntry {
        id: Some(id_to_wire(entry.id)),
        kind: u32::from(entry.kind as u8),
        clock_ms: entry.clock_ms,
        item_count: entry.item_count,
        payload_bytes,
        payload_crc: entry.payload_crc,
        payload: if stripped { Bytes::new() } else { entry.payload },
    }
}

/// An entry as a member of that role keeps it: a witness a stub in place of a batch.
pub(crate) fn entry_from_wire(wire: proto::PeerEntry, at: Role) -> Result<Entry, WireError> {
    let id = id_from_wire(&wire.id.ok_or(WireError::Missing("an entry's id"))?);
    let kind = u8::try_from(wire.kind).ok().and_then(EntryKind::parse);
    let kind = kind.ok_or(WireError::Kind { id, kind: wire.kind })?;
    let proto::PeerEntry { clock_ms, item_count, payload_bytes, payload_crc, payload, .. } = wire;
    if at == Role::Witness && kind == EntryKind::Batch {
        let payload = BatchStub { payload_bytes, payload_crc, item_count }.encode();
        let payload_crc = crc32fast::hash(&payload);
        return Ok(Entry { id, kind, clock_ms, item_count: 0, payload_crc, payload });
    }
    if payload.len() != payload_bytes as usize {
        return Err(WireError::PayloadBytes { id, found: payload.len(), expected: payload_bytes });
    }
    let found = crc32fast::hash(&payload);
    if found != payload_crc {
        return Err(WireError::PayloadChecksum { id, found, expected: payload_crc });
    }
    Ok(Entry { id, kind, clock_ms, item_count, payload_crc, payload })
}

/// `trim_upto` is for a witness: what it may forget. `answered_end` is what the member has answered as
/// synced in this term.
pub(crate) fn append_to_wire(
    request: AppendEntriesRequest<TypeConfig>,
    to: Role,
    trim_upto: Option<EntryId>,
    answered_end: EntryIndex,
) -> proto::AppendRequest {
    let entries = request.entries.into_iter().map(|entry| entry_to_wire(to_log(entry).0, to));
    proto::AppendRequest {
        vote: Some(vote_to_wire(&request.vote)),
        previous: request.prev_log_id.as_ref().map(log_id_to_wire),
        committed: request.leader_commit.as_ref().map(log_id_to_wire),
        entries: entries.collect(),
        trim_upto: trim_upto.map(id_to_wire),
        answered_end: answered_end.get(),
    }
}

/// Errors: a message that a correct leader does not send, or that was damaged on its way.
pub(crate) fn append_from_wire(
    wire: proto::AppendRequest,
    at: Role,
) -> Result<AppendEntriesRequest<TypeConfig>, WireError> {
    let mut before = wire.previous.as_ref().map(id_from_wire);
    let mut entries = Vec::with_capacity(wire.entries.len());
    for entry in wire.entries {
        let entry = entry_from_wire(entry, at)?;
        let next = before.map_or(EntryIndex::ZERO, |before| before.index.next());
        if entry.id.index != next || before.is_some_and(|before| entry.id.term < before.term) {
            return Err(WireError::Order { id: entry.id, before });
        }
        before = Some(entry.id);
        entries.push(raft_entry(entry)?);
    }
    Ok(AppendEntriesRequest {
        vote: vote_from_wire(wire.vote)?,
        prev_log_id: wire.previous.as_ref().map(log_id_from_wire),
        entries,
        leader_commit: wire.committed.as_ref().map(log_id_from_wire),
    })
}

fn raft_entry(entry: Entry) -> Result<RaftEntry, WireError> {
    if entry.kind == EntryKind::Membership {
        // Said here with its reason, which the crossing itself only has as an I/O error.
        membership::decode(&entry.payload)?;
    }
    to_raft(entry).map_err(|_| WireError::Missing("a readable membership"))
}

pub(crate) fn appended_to_wire(result: &StreamAppendResult) -> proto::AppendResponse {
    let result = match result {
        Ok(id) => Appended::Matched(Matched { id: id.as_ref().map(log_id_to_wire) }),
        Err(StreamAppendError::Conflict(id)) => Appended::Conflict(log_id_to_wire(id)),
        Err(StreamAppendError::HigherVote(vote)) => Appended::HigherVote(vote_to_wire(vote)),
    };
    proto::AppendResponse { result: Some(result) }
}

pub(crate) fn appended_from_wire(
    wire: proto::AppendResponse,
) -> Result<StreamAppendResult, WireError> {
    Ok(match wire.result.ok_or(WireError::Missing("the result"))? {
        Appended::Matched(matched) => Ok(matched.id.as_ref().map(log_id_from_wire)),
        Appended::Conflict(id) => Err(StreamAppendError::Conflict(log_id_from_wire(&id))),
        Appended::HigherVote(vote) => {
            Err(StreamAppendError::HigherVote(vote_from_wire(Some(vote))?))
        }
    })
}

pub(crate) fn vote_request_to_wire(request: &VoteRequest<TypeConfig>) -> proto::VoteRequest {
    proto::VoteRequest {
        vote: Some(vote_to_wire(&request.vote)),
        last: request.last_log_id.as_ref().map(log_id_to_wire),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(crate) fn vote_request_from_wire(
    wire: proto::VoteRequest,
) -> Result<VoteRequest<TypeConfig>, WireError> {
    let last = wire.last.as_ref().map(log_id_from_wire);
    let mut request = VoteRequest::new(vote_from_wire(wire.vote)?, last);
    request.leadership_transfer = wire.leadership_transfer;
    Ok(request)
}

pub(crate) fn vote_response_to_wire(response: &VoteResponse<TypeConfig>) -> proto::VoteResponse {
    proto::VoteResponse {
        vote: Some(vote_to_wire(&response.vote)),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(log_id_to_wire),
    }
}

pub(crate) fn vote_response_from_wire(
    wire: proto::VoteResponse,
) -> Result<VoteResponse<TypeConfig>, WireError> {
    let last = wire.last.as_ref().map(log_id_from_wire);
    Ok(VoteResponse::new(vote_from_wire(wire.vote)?, last, wire.granted))
}

pub(crate) fn transfer_to_wire(
    request: &TransferLeaderRequest<TypeConfig>,
) -> proto::TransferLeadershipRequest {
    proto::TransferLeadershipRequest {
        from: Some(vote_to_wire(request.from_leader())),
        to: *request.to_node_id(),
        last: request.last_log_id().map(log_id_to_wire),
    }
}

pub(crate) fn transfer_from_wire(
    wire: proto::TransferLeadershipRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, WireError> {
    let last = wire.last.as_ref().map(log_id_from_wire);
    Ok(TransferLeaderRequest::new(vote_from_wire(wire.from)?, wire.to, last))
}

/// What a snapshot says but for its files.
pub(crate) fn seed_to_wire(vote: &RaftVote, meta: &SnapshotMeta) -> proto::SeedRequest {
    let membership = &meta.last_membership;
    proto::SeedRequest {
        vote: Some(vote_to_wire(vote)),
        last: meta.last_log_id.as_ref().map(log_id_to_wire),
        membership_at: membership.log_id().as_ref().map(log_id_to_wire),
        membership: membership::encode(membership.membership()),
        manifest: None,
    }
}

/// The leader's vote and what its snapshot says but for the files.
pub(crate) fn seed_from_wire(
    wire: &proto::SeedRequest,
) -> Result<(RaftVote, SnapshotMeta), WireError> {
    let vote = vote_from_wire(wire.vote)?;
    let members = membership::decode(&wire.membership)?;
    let at = wire.membership_at.as_ref().map(log_id_from_wire);
    let meta = SnapshotMeta {
        last_log_id: wire.last.as_ref().map(log_id_from_wire),
        last_membership: StoredMembership::new(at, members),
    };
    Ok((vote, meta))
}

pub(crate) fn seeded_to_wire(vote: &RaftVote) -> proto::SeedResponse {
    let installed = proto::seed_response::Result::Installed(vote_to_wire(vote));
    proto::SeedResponse { result: Some(installed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(term: u64, index: u64) -> EntryId {
        EntryId { term: Term::new(term), index: EntryIndex::new(index) }
    }

    fn batch(term: u64, index: u64) -> Entry {
        let payload = Bytes::from_static(b"items");
        Entry {
            id: id(term, index),
            kind: EntryKind::Batch,
            clock_ms: 7,
            item_count: 2,
            payload_crc: crc32fast::hash(&payload),
            payload,
        }
    }

    fn request(entries: Vec<Entry>) -> AppendEntriesRequest<TypeConfig> {
        AppendEntriesRequest {
            vote: RaftVote::new_committed(3, 1),
            prev_log_id: Some(log_id(id(2, 4))),
            entries: entries.into_iter().map(|entry| to_raft(entry).unwrap()).collect(),
            leader_commit: Some(log_id(id(2, 3))),
        }
    }

    #[test]
    fn data_members_get_entries_whole() {
        let sent = request(vec![batch(2, 5), batch(3, 6)]);
        let wire = append_to_wire(sent.clone(), Role::Data, None, EntryIndex::ZERO);
        let received = append_from_wire(wire, Role::Data).unwrap();
        assert_eq!(received.entries, sent.entries);
        assert_eq!(received.vote, sent.vote);
        assert_eq!(received.prev_log_id, sent.prev_log_id);
        assert_eq!(received.leader_commit, sent.leader_commit);
    }

    #[test]
    fn witnesses_get_what_stands_for_a_batch_and_gate_entries_whole() {
        let alone = Entry {
            id: id(3, 6),
            kind: EntryKind::Alone,
            clock_ms: 8,
            item_count: 0,
            payload_crc: 0,
            payload: Bytes::new(),
        };
        let sent = request(vec![batch(2, 5), alone.clone()]);
        let wire = append_to_wire(sent, Role::Witness, Some(id(1, 1)), EntryIndex::new(3));
        assert!(wire.entries[0].payload.is_empty());
        assert_eq!(wire.trim_upto.as_ref().map(id_from_wire), Some(id(1, 1)));
        assert_eq!(wire.answered_end, 3);
        let received = append_from_wire(wire, Role::Witness).unwrap();
        let entries: Vec<_> = received.entries.into_iter().map(|e| to_log(e).0).collect();
        let whole = batch(2, 5);
        let stub = BatchStub { payload_bytes: 5, payload_crc: whole.payload_crc, item_count: 2 };
        assert_eq!(BatchStub::decode(&entries[0].payload), Some(stub));
        assert_eq!(entries[0].payload_crc, crc32fast::hash(&entries[0].payload));
        assert_eq!(entries[1], alone);
    }

    #[test]
    fn damaged_and_disordered_entries_are_refused() {
        let wire = append_to_wire(request(vec![batch(2, 5)]), Role::Data, None, EntryIndex::ZERO);
        let changed = |change: fn(&mut proto::PeerEntry)| {
            let mut wire = wire.clone();
            change(&mut wire.entries[0]);
            append_from_wire(wire, Role::Data).unwrap_err()
        };
        let damaged = changed(|entry| entry.payload = Bytes::from_static(b"itemz"));
        assert!(matches!(damaged, WireError::PayloadChecksum { .. }), "{damaged}");
        let cut = changed(|entry| entry.payload = Bytes::from_static(b"item"));
        assert!(matches!(cut, WireError::PayloadBytes { found: 4, expected: 5, .. }), "{cut}");
        let unknown = changed(|entry| entry.kind = 300);
        assert_eq!(unknown, WireError::Kind { id: id(2, 5), kind: 300 });
        let gap = changed(|entry| entry.id = Some(id_to_wire(id(2, 6))));
        assert!(matches!(gap, WireError::Order { .. }), "{gap}");
    }

    #[test]
    fn callers_come_back_as_they_were() {
        let caller = Caller {
            cluster: "c".into(),
            broker_group: "a".into(),
            group_uuid: Some(Uuid::from_u128(5)),
            from: 1,
            to: 2,
        };
        let mut metadata = MetadataMap::new();
        caller.write(&mut metadata).unwrap();
        assert_eq!(Caller::read(&metadata), Ok(caller.clone()));
        metadata.insert(GROUP_UUID, MetadataValue::from_static("x"));
        assert_eq!(Caller::read(&metadata), Err(CallerError { key: GROUP_UUID }));
        metadata.remove(GROUP_UUID);
        assert_eq!(Caller::read(&metadata), Ok(Caller { group_uuid: None, ..caller }));
    }
}
