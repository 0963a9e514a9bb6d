//! The state as bytes, for checkpoints, and its digest.
//!
//! A header of 16 bytes (kind, version, size), then an rkyv archive of a private struct that never
//! changes once published. The same state gives the same bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::ids::{
    BrokerGroupName, GroupName, InvalidName, QueueId, QueueKey, QueueOffset, TopicId, TopicName,
};
use md5::{Digest, Md5};
use rkyv::rancor::Error as ArchiveError;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use super::{GateMode, QueueRange, State, TrimPoint};
use crate::catalog::{Catalog, CatalogParts, ConsumerGroup, Topic, UNSHARED_STAMP};
use crate::command::level::{FEATURE_LEVEL_MAX, FEATURE_LEVEL_MIN, SHARED_CATALOG_LEVEL};
use crate::command::{ClientKey, Deleted, GroupId, GroupStart, LeaseId, Shares, TopicType};
use crate::group::Groups;
use crate::group::leases::{Flight, QueueLeases};
use crate::group::offsets::Progress;
use crate::position::{EntryId, EntryIndex, LogOffset, Term};

const KIND: u16 = 0x0100;
/// Of groups below [`SHARED_CATALOG_LEVEL`]: they have nothing that it does not hold.
const VERSION_1: u16 = 1;
const VERSION_2: u16 = 2;
const HEADER_BYTES: usize = 16;

/// Why a state cannot be written as bytes, or bytes are no state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("state archive is cut short: {bytes} bytes")]
    Short { bytes: usize },
    /// Written by a newer broker.
    #[error("state kind {kind} version {version} is unknown to this broker")]
    Unknown { kind: u16, version: u16 },
    #[error("the state archive is invalid")]
    Archive(#[from] ArchiveError),
    #[error("a name in the state archive is invalid")]
    Name(#[from] InvalidName),
    #[error("{field} in the state archive is invalid")]
    Field { field: &'static str },
}

#[derive(Archive, Serialize, Deserialize)]
struct StateV1 {
    broker_group: String,
    clock_ms: u64,
    /// Term and index, or nothing.
    applied: Vec<(u64, u64)>,
    end: u64,
    trimmed_below: u64,
    trimmed_position: u64,
    gate: u8,
    catalog_version: u64,
    next_topic: u32,
    next_group: u32,
    topics: Vec<TopicV1>,
    groups: Vec<GroupV1>,
    leases: Vec<LeasesV1>,
    void_runs: Vec<u64>,
}

/// What broker groups that share definitions have besides.
#[derive(Archive, Serialize, Deserialize)]
struct StateV2 {
    first: StateV1,
    feature_level: u32,
    /// One per topic.
    topics: Vec<TopicV2>,
    /// One per consumer group: the catalog's version that changed it last.
    groups_changed: Vec<u64>,
    deleted: Vec<DeletedV2>,
    confirmed: Vec<ConfirmedV2>,
}

/// What a topic has besides.
#[derive(Archive, Serialize, Deserialize)]
struct TopicV2 {
    /// One list, or none.
    next: Vec<Vec<ShareV1>>,
    min_copies: u8,
    changed: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct DeletedV2 {
    version: u64,
    is_topic: bool,
    id: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct ConfirmedV2 {
    broker_group: String,
    upto: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct TopicV1 {
    id: u32,
    name: String,
    topic_type: u8,
    version: u32,
    created_ms: u64,
    shares: Vec<ShareV1>,
    /// Of the broker group that the state is of.
    queues: Vec<SpanV1>,
}

#[derive(Archive, Serialize, Deserialize)]
struct ShareV1 {
    broker_group: String,
    queue_count: u16,
}

/// Offsets of a queue, `end` exclusive.
#[derive(Archive, Serialize, Deserialize)]
struct SpanV1 {
    start: u64,
    end: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct GroupV1 {
    id: u32,
    name: String,
    start: u8,
    created_ms: u64,
    created_at: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct LeasesV1 {
    group: u32,
    topic: u32,
    queue: u16,
    floor: u64,
    next: u64,
    consumed: Vec<SpanV1>,
    flights: Vec<FlightV1>,
    acked: Vec<AckedV1>,
}

#[derive(Archive, Serialize, Deserialize)]
struct FlightV1 {
    offset: u64,
    lease: u64,
    expires_ms: u64,
    client: u64,
    first_delivered_ms: u64,
    delivered_ms: u64,
    attempt: u16,
    auto_renew: bool,
    given_back: bool,
}

#[derive(Archive, Serialize, Deserialize)]
struct AckedV1 {
    offset: u64,
    lease: u64,
}

impl State {
    /// The state as bytes, the same for the same state.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        let catalog = self.catalog.to_parts();
        let (version, archive) = if self.feature_level < SHARED_CATALOG_LEVEL {
            (VERSION_1, rkyv::to_bytes::<ArchiveError>(&self.to_first(&catalog))?)
        } else {
            (VERSION_2, rkyv::to_bytes::<ArchiveError>(&self.to_second(&catalog))?)
        };
        let archive_bytes = u64::try_from(archive.len()).unwrap_or(u64::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + archive.len());
        bytes.extend_from_slice(&KIND.to_le_bytes());
        bytes.extend_from_slice(&version.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&archive_bytes.to_le_bytes());
        bytes.extend_from_slice(&archive);
        Ok(bytes)
    }

    /// A state out of [`State::encode`], which may lie at any address.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let short = || StateError::Short { bytes: bytes.len() };
        let (header, archive) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(short)?;
        let [k0, k1, v0, v1, reserved @ .., s0, s1, s2, s3, s4, s5, s6, s7] = *header;
        let (kind, version) = (u16::from_le_bytes([k0, k1]), u16::from_le_bytes([v0, v1]));
        let archive_bytes = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        if kind != KIND || ![VERSION_1, VERSION_2].contains(&version) {
            return Err(StateError::Unknown { kind, version });
        }
        if reserved != [0; 4] {
            return Err(StateError::Field { field: "reserved field" });
        }
        if u64::try_from(archive.len()) != Ok(archive_bytes) {
            return Err(short());
        }
        let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
        aligned.extend_from_slice(archive);
        if version == VERSION_1 {
            return Self::from_first(rkyv::from_bytes::<StateV1, ArchiveError>(&aligned)?, None);
        }
        let StateV2 { first, feature_level, topics, groups_changed, deleted, confirmed } =
            rkyv::from_bytes::<StateV2, ArchiveError>(&aligned)?;
        let shared = Shared { feature_level, topics, groups_changed, deleted, confirmed };
        Self::from_first(first, Some(shared))
    }

    /// MD5 of the state's bytes, in hex: equal states have equal digests.
    pub fn digest(&self) -> Result<String, StateError> {
        let digest = Md5::digest(self.encode()?);
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn to_second(&self, catalog: &CatalogParts) -> StateV2 {
        let topic = |topic: &Topic| TopicV2 {
            next: topic.next.iter().map(archive_shares).collect(),
            min_copies: topic.min_copies,
            changed: topic.changed,
        };
        let deleted = |(version, deleted): &(u64, Deleted)| {
            let (is_topic, id) = match deleted {
                Deleted::Topic(id) => (true, id.get()),
                Deleted::Group(id) => (false, id.0),
            };
            DeletedV2 { version: *version, is_topic, id }
        };
        let confirmed = |(name, upto): &(BrokerGroupName, u64)| ConfirmedV2 {
            broker_group: name.as_str().to_owned(),
            upto: *upto,
        };
        StateV2 {
            first: self.to_first(catalog),
            feature_level: self.feature_level,
            topics: catalog.topics.iter().map(topic).collect(),
            groups_changed: catalog.groups.iter().map(|group| group.changed).collect(),
            deleted: catalog.deleted.iter().map(deleted).collect(),
            confirmed: catalog.confirmed.iter().map(confirmed).collect(),
        }
    }

    fn to_first(&self, catalog: &CatalogParts) -> StateV1 {
        let applied = self.applied.iter().map(|id| (id.term.get(), id.index.get()));
        StateV1 {
            broker_group: self.broker_group.as_str().to_owned(),
            clock_ms: self.clock_ms,
            applied: applied.collect(),
            end: self.end.get(),
            trimmed_below: self.trimmed.below.get(),
            trimmed_position: self.trimmed.position.get(),
            gate: self.gate as u8,
            catalog_version: catalog.version,
            next_topic: catalog.next_topic,
            next_group: catalog.next_group,
            topics: catalog.topics.iter().map(|topic| self.archive_topic(topic)).collect(),
            groups: catalog.groups.iter().map(archive_group).collect(),
            leases: self
                .groups
                .iter()
                .map(|(group, queue, leases)| archive_leases(group, queue, leases))
                .collect(),
            void_runs: self.void_runs.iter().map(|position| position.get()).collect(),
        }
    }

    fn archive_topic(&self, topic: &Topic) -> TopicV1 {
        let ranges = self.queues.get(&topic.id).into_iter().flat_map(|ranges| ranges.iter());
        TopicV1 {
            id: topic.id.get(),
            name: topic.name.as_str().to_owned(),
            topic_type: topic.kind as u8,
            version: topic.version,
            created_ms: topic.created_ms,
            shares: archive_shares(&topic.shares),
            queues: ranges
                .map(|range| SpanV1 { start: range.min.get(), end: range.end.get() })
                .collect(),
        }
    }

    fn from_first(archived: StateV1, shared: Option<Shared>) -> Result<Self, StateError> {
        let field = |field| StateError::Field { field };
        let mut gate = [GateMode::Paired, GateMode::Alone].into_iter();
        let broker_group = BrokerGroupName::parse(&archived.broker_group)?;
        let applied = match archived.applied.as_slice() {
            [] => None,
            [(term, index)] => {
                Some(EntryId { term: Term::new(*term), index: EntryIndex::new(*index) })
            }
            _ => return Err(field("applied")),
        };
        let mut queues = BTreeMap::new();
        let mut topics = Vec::with_capacity(archived.topics.len());
        for topic in archived.topics {
            let (topic, ranges) = topic_of(topic)?;
            queues.insert(topic.id, Arc::new(ranges));
            topics.push(topic);
        }
        let groups: Result<Vec<_>, _> = archived.groups.into_iter().map(group_of).collect();
        let mut catalog = CatalogParts {
            topics,
            groups: groups?,
            next_topic: archived.next_topic,
            next_group: archived.next_group,
            version: archived.catalog_version,
            shared: shared.is_some(),
            deleted: Vec::new(),
            confirmed: Vec::new(),
        };
        let feature_level = match shared {
            Some(shared) => shared.complete(&mut catalog)?,
            None => FEATURE_LEVEL_MIN,
        };
        for (topic, ranges) in catalog.topics.iter().zip(queues.values()) {
            let prepared = topic.prepared_queue_count(&broker_group);
            // A change of the queue list that was withdrawn leaves its queues behind.
            if ranges.len() < usize::from(prepared) {
                return Err(field("queues"));
            }
        }
        let leases: Option<Vec<_>> = archived.leases.into_iter().map(leases_of).collect();
        Ok(Self {
            broker_group,
            clock_ms: archived.clock_ms,
            applied,
            end: LogOffset::new(archived.end),
            trimmed: TrimPoint {
                below: EntryIndex::new(archived.trimmed_below),
                position: LogOffset::new(archived.trimmed_position),
            },
            gate: gate.find(|g| *g as u8 == archived.gate).ok_or(field("gate"))?,
            feature_level,
            catalog: Catalog::from_parts(catalog).ok_or(field("catalog"))?,
            groups: leases.and_then(Groups::from_parts).ok_or(field("leases"))?,
            queues,
            void_runs: Arc::new(archived.void_runs.into_iter().map(LogOffset::new).collect()),
        })
    }
}

/// What the second version has besides the first.
struct Shared {
    feature_level: u32,
    topics: Vec<TopicV2>,
    groups_changed: Vec<u64>,
    deleted: Vec<DeletedV2>,
    confirmed: Vec<ConfirmedV2>,
}

impl Shared {
    /// Completes what the first version told of the catalog; returns the feature level.
    fn complete(self, catalog: &mut CatalogParts) -> Result<u32, StateError> {
        let field = |field| StateError::Field { field };
        let level = self.feature_level;
        if !(SHARED_CATALOG_LEVEL..=FEATURE_LEVEL_MAX).contains(&level) {
            return Err(field("feature level"));
        }
        if self.topics.len() != catalog.topics.len()
            || self.groups_changed.len() != catalog.groups.len()
        {
            return Err(field("catalog"));
        }
        for (topic, more) in catalog.topics.iter_mut().zip(self.topics) {
            let next = more.next.first().map(|next| shares_of(next));
            topic.next = next.transpose()?;
            topic.min_copies = more.min_copies;
            topic.changed = more.changed;
        }
        for (group, changed) in catalog.groups.iter_mut().zip(self.groups_changed) {
            group.changed = changed;
        }
        for archived in self.deleted {
            let deleted = match archived.is_topic {
                true => Deleted::Topic(TopicId::new(archived.id)),
                false => Deleted::Group(GroupId(archived.id)),
            };
            catalog.deleted.push((archived.version, deleted));
        }
        for archived in self.confirmed {
            let name = BrokerGroupName::parse(&archived.broker_group)?;
            catalog.confirmed.push((name, archived.upto));
        }
        Ok(level)
    }
}

fn archive_shares(shares: &Shares) -> Vec<ShareV1> {
    let share = |(broker_group, queue_count): &(BrokerGroupName, u16)| ShareV1 {
        broker_group: broker_group.as_str().to_owned(),
        queue_count: *queue_count,
    };
    shares.iter().map(share).collect()
}

fn shares_of(archived: &[ShareV1]) -> Result<Shares, StateError> {
    let mut shares = Vec::with_capacity(archived.len());
    for share in archived {
        shares.push((BrokerGroupName::parse(&share.broker_group)?, share.queue_count));
    }
    Ok(shares)
}

fn archive_group(group: &ConsumerGroup) -> GroupV1 {
    GroupV1 {
        id: group.id.0,
        name: group.name.as_str().to_owned(),
        start: group.start as u8,
        created_ms: group.created_ms,
        created_at: group.created_at.get(),
    }
}

fn archive_leases(group: GroupId, queue: QueueKey, leases: &QueueLeases) -> LeasesV1 {
    let progress = leases.progress();
    let span =
        |(start, end): (QueueOffset, QueueOffset)| SpanV1 { start: start.get(), end: end.get() };
    let flights = leases.flights().map(|(offset, flight)| FlightV1 {
        offset: offset.get(),
        lease: flight.lease.0,
        expires_ms: flight.expires_ms,
        client: flight.client.0,
        first_delivered_ms: flight.first_delivered_ms,
        delivered_ms: flight.delivered_ms,
        attempt: flight.attempt,
        auto_renew: flight.auto_renew,
        given_back: flight.given_back,
    });
    let acked = leases.acked();
    LeasesV1 {
        group: group.0,
        topic: queue.topic.get(),
        queue: queue.queue.get(),
        floor: progress.floor().get(),
        next: progress.next().get(),
        consumed: progress.consumed().map(span).collect(),
        flights: flights.collect(),
        acked: acked
            .map(|(offset, lease)| AckedV1 { offset: offset.get(), lease: lease.0 })
            .collect(),
    }
}

fn topic_of(archived: TopicV1) -> Result<(Topic, Vec<QueueRange>), StateError> {
    let field = |field| StateError::Field { field };
    let queues = archived.queues.iter();
    let ranges = queues.map(|span| QueueRange {
        min: QueueOffset::new(span.start),
        end: QueueOffset::new(span.end),
    });
    let ranges: Vec<QueueRange> = ranges.collect();
    if ranges.iter().any(|range| range.min > range.end) {
        return Err(field("queue range"));
    }
    let topic = Topic {
        id: TopicId::new(archived.id),
        name: TopicName::parse(&archived.name)?,
        kind: TopicType::from_code(archived.topic_type).ok_or(field("topic type"))?,
        shares: shares_of(&archived.shares)?,
        next: None,
        min_copies: 1,
        version: archived.version,
        created_ms: archived.created_ms,
        changed: UNSHARED_STAMP,
    };
    Ok((topic, ranges))
}

fn group_of(archived: GroupV1) -> Result<ConsumerGroup, StateError> {
    let field = |field| StateError::Field { field };
    Ok(ConsumerGroup {
        id: GroupId(archived.id),
        name: GroupName::parse(&archived.name)?,
        start: GroupStart::from_code(archived.start).ok_or(field("group start"))?,
        created_ms: archived.created_ms,
        created_at: LogOffset::new(archived.created_at),
        changed: UNSHARED_STAMP,
    })
}

/// `None` if the parts contradict each other.
fn leases_of(archived: LeasesV1) -> Option<(GroupId, QueueKey, QueueLeases)> {
    let consumed = archived.consumed.iter();
    let consumed = consumed.map(|s| (QueueOffset::new(s.start), QueueOffset::new(s.end)));
    let (floor, next) = (QueueOffset::new(archived.floor), QueueOffset::new(archived.next));
    let progress = Progress::from_parts(floor, next, consumed)?;
    let flights = archived.flights.iter().map(|archived| {
        let flight = Flight {
            lease: LeaseId(archived.lease),
            expires_ms: archived.expires_ms,
            attempt: archived.attempt,
            client: ClientKey(archived.client),
            auto_renew: archived.auto_renew,
            given_back: archived.given_back,
            first_delivered_ms: archived.first_delivered_ms,
            delivered_ms: archived.delivered_ms,
        };
        (QueueOffset::new(archived.offset), flight)
    });
    let acked = archived.acked.iter();
    let acked = acked.map(|acked| (QueueOffset::new(acked.offset), LeaseId(acked.lease)));
    let leases = QueueLeases::from_parts(progress, flights, acked)?;
    let (topic, queue) = (TopicId::new(archived.topic), QueueId::new(archived.queue));
    Some((GroupId(archived.group), QueueKey { topic, queue }, leases))
}
