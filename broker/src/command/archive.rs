//! Commands as bytes: (kind, version) and an rkyv archive of a private struct.
//!
//! A struct that was published never changes, nor does its kind and version: a change is a new
//! struct under the next version, and the old one stays readable for as long as logs may hold it.

use drumlin_proto::ids::{
    BrokerGroupName, GroupName, InvalidName, QueueId, QueueKey, QueueOffset, TopicId, TopicName,
};
use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::Error as ArchiveError;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use super::level::FEATURE_LEVEL_MAX;
use super::{CatalogDelta, ClientKey, Command, GroupId, GroupStart, Lease, LeaseId, TopicType};
use crate::position::{EntryIndex, LogOffset};

mod definitions;

const CREATE_TOPIC: u16 = 1;
const DELETE_TOPIC: u16 = 2;
const CREATE_GROUP: u16 = 3;
const DELETE_GROUP: u16 = 4;
const COMMIT_OFFSET: u16 = 5;
const LEASE: u16 = 6;
const ACK: u16 = 7;
const CHANGE_LEASE: u16 = 8;
const RENEW_LEASES: u16 = 9;
const RELEASE_CLIENT: u16 = 10;
const TRIM: u16 = 11;
const UPDATE_TOPIC: u16 = 12;
const ACTIVATE_TOPIC: u16 = 13;
const WITHDRAW_TOPIC: u16 = 14;
const CONFIRM_COPY: u16 = 15;
const COPY_CATALOG: u16 = 16;
const RAISE_FEATURE_LEVEL: u16 = 17;
#[cfg(test)]
const UNRELEASED: u16 = 0x7fff;

/// Why bytes are not a command.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Written by a newer broker. Apply must stop here: to skip it would fork the state.
    #[error(
        "command kind {kind} version {version} is unknown to this release, which knows feature \
         level {FEATURE_LEVEL_MAX}: a newer release is needed"
    )]
    Unknown { kind: u16, version: u16 },
    #[error("the archive of command kind {kind} is invalid")]
    Archive { kind: u16, source: ArchiveError },
    #[error("a name in command kind {kind} is invalid")]
    Name { kind: u16, source: InvalidName },
    #[error("{field} of command kind {kind} cannot be {value}")]
    Value { kind: u16, field: &'static str, value: u8 },
}

#[derive(Archive, Serialize, Deserialize)]
struct RaiseFeatureLevelV1 {
    level: u32,
    release: String,
}

#[derive(Archive, Serialize, Deserialize)]
struct CreateTopicV1 {
    name: String,
    topic_type: u8,
    shares: Vec<ShareV1>,
}

#[derive(Archive, Serialize, Deserialize)]
struct ShareV1 {
    broker_group: String,
    queue_count: u16,
}

#[derive(Archive, Serialize, Deserialize)]
struct DeleteTopicV1 {
    topic: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct CreateGroupV1 {
    name: String,
    start: u8,
}

#[derive(Archive, Serialize, Deserialize)]
struct DeleteGroupV1 {
    group: u32,
}

/// A consumer group and a queue: what most commands are about.
#[derive(Archive, Serialize, Deserialize)]
struct PlaceV1 {
    group: u32,
    topic: u32,
    queue: u16,
}

#[derive(Archive, Serialize, Deserialize)]
struct LeasedV1 {
    offset: u64,
    lease: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct CommitOffsetV1 {
    place: PlaceV1,
    offset: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct LeaseV1 {
    place: PlaceV1,
    client: u64,
    auto_renew: bool,
    invisible_ms: u64,
    from: u64,
    skip_to: u64,
    fresh: Vec<u64>,
    again: Vec<u64>,
    unwanted: Vec<u64>,
}

#[derive(Archive, Serialize, Deserialize)]
struct AckV1 {
    place: PlaceV1,
    records: Vec<LeasedV1>,
}

#[derive(Archive, Serialize, Deserialize)]
struct ChangeLeaseV1 {
    place: PlaceV1,
    record: LeasedV1,
    invisible_ms: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct RenewLeasesV1 {
    place: PlaceV1,
    records: Vec<LeasedV1>,
    invisible_ms: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct ReleaseClientV1 {
    group: u32,
    client: u64,
    invisible_ms: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct TrimV1 {
    below: u64,
    position: u64,
}

/// The kind, version and archive of a command.
pub fn encode(command: &Command) -> (u16, u16, Vec<u8>) {
    let (kind, archive) = match command {
        Command::CreateTopic { name, kind, shares } => {
            (CREATE_TOPIC, pack(&create_topic(name, *kind, shares)))
        }
        Command::DeleteTopic { topic } => {
            (DELETE_TOPIC, pack(&DeleteTopicV1 { topic: topic.get() }))
        }
        Command::CreateGroup { name, start } => (
            CREATE_GROUP,
            pack(&CreateGroupV1 { name: name.as_str().to_owned(), start: *start as u8 }),
        ),
        Command::DeleteGroup { group } => (DELETE_GROUP, pack(&DeleteGroupV1 { group: group.0 })),
        Command::CommitOffset { group, queue, offset } => {
            let place = place(*group, *queue);
            (COMMIT_OFFSET, pack(&CommitOffsetV1 { place, offset: offset.get() }))
        }
        Command::Lease(lease) => (LEASE, pack(&lease_v1(lease))),
        Command::Ack { group, queue, records } => {
            let place = place(*group, *queue);
            (ACK, pack(&AckV1 { place, records: leased(records) }))
        }
        Command::ChangeLease { group, queue, offset, lease, invisible_ms } => {
            let place = place(*group, *queue);
            let record = LeasedV1 { offset: offset.get(), lease: lease.0 };
            let invisible_ms = *invisible_ms;
            (CHANGE_LEASE, pack(&ChangeLeaseV1 { place, record, invisible_ms }))
        }
        Command::RenewLeases { group, queue, records, invisible_ms } => {
            let place = place(*group, *queue);
            let records = leased(records);
            let invisible_ms = *invisible_ms;
            (RENEW_LEASES, pack(&RenewLeasesV1 { place, records, invisible_ms }))
        }
        Command::ReleaseClient { group, client, invisible_ms } => {
            let (group, client, invisible_ms) = (group.0, client.0, *invisible_ms);
            (RELEASE_CLIENT, pack(&ReleaseClientV1 { group, client, invisible_ms }))
        }
        Command::Trim { below, position } => {
            (TRIM, pack(&TrimV1 { below: below.get(), position: position.get() }))
        }
        Command::Catalog(change) => return definitions::encode(change),
        Command::RaiseFeatureLevel { level, release } => {
            let (level, release) = (*level, release.clone());
            (RAISE_FEATURE_LEVEL, pack(&RaiseFeatureLevelV1 { level, release }))
        }
        #[cfg(test)]
        Command::Unreleased => (UNRELEASED, Vec::new()),
    };
    (kind, 1, archive)
}

/// The version and archive of [`super::CatalogChange::Copy`], for those it is pushed to.
pub fn encode_copy(delta: &CatalogDelta) -> (u16, Vec<u8>) {
    definitions::encode_copy(delta)
}

/// A delta out of [`encode_copy`], which may lie at any address.
pub fn decode_copy(version: u16, archive: &[u8]) -> Result<CatalogDelta, CommandError> {
    definitions::decode_copy(version, archive)
}

/// The command of an archive, which may lie at any address.
pub fn decode(kind: u16, version: u16, archive: &[u8]) -> Result<Command, CommandError> {
    if let Some(change) = definitions::decode(kind, version, archive)? {
        return Ok(Command::Catalog(change));
    }
    if version != 1 {
        return Err(CommandError::Unknown { kind, version });
    }
    Ok(match kind {
        CREATE_TOPIC => decode_create_topic(unpack(kind, archive)?)?,
        DELETE_TOPIC => {
            let DeleteTopicV1 { topic } = unpack(kind, archive)?;
            Command::DeleteTopic { topic: TopicId::new(topic) }
        }
        CREATE_GROUP => decode_create_group(unpack(kind, archive)?)?,
        DELETE_GROUP => {
            let DeleteGroupV1 { group } = unpack(kind, archive)?;
            Command::DeleteGroup { group: GroupId(group) }
        }
        COMMIT_OFFSET => {
            let CommitOffsetV1 { place, offset } = unpack(kind, archive)?;
            let (group, queue) = place.ids();
            Command::CommitOffset { group, queue, offset: QueueOffset::new(offset) }
        }
        LEASE => decode_lease(unpack(kind, archive)?),
        ACK => {
            let AckV1 { place, records } = unpack(kind, archive)?;
            let (group, queue) = place.ids();
            Command::Ack { group, queue, records: records.iter().map(LeasedV1::ids).collect() }
        }
        CHANGE_LEASE => {
            let ChangeLeaseV1 { place, record, invisible_ms } = unpack(kind, archive)?;
            let (group, queue) = place.ids();
            let (offset, lease) = record.ids();
            Command::ChangeLease { group, queue, offset, lease, invisible_ms }
        }
        RENEW_LEASES => {
            let RenewLeasesV1 { place, records, invisible_ms } = unpack(kind, archive)?;
            let (group, queue) = place.ids();
            let records = records.iter().map(LeasedV1::ids).collect();
            Command::RenewLeases { group, queue, records, invisible_ms }
        }
        RELEASE_CLIENT => {
            let ReleaseClientV1 { group, client, invisible_ms } = unpack(kind, archive)?;
            let (group, client) = (GroupId(group), ClientKey(client));
            Command::ReleaseClient { group, client, invisible_ms }
        }
        TRIM => {
            let TrimV1 { below, position } = unpack(kind, archive)?;
            let (below, position) = (EntryIndex::new(below), LogOffset::new(position));
            Command::Trim { below, position }
        }
        RAISE_FEATURE_LEVEL => {
            let RaiseFeatureLevelV1 { level, release } = unpack(kind, archive)?;
            Command::RaiseFeatureLevel { level, release }
        }
        #[cfg(test)]
        UNRELEASED => Command::Unreleased,
        kind => return Err(CommandError::Unknown { kind, version }),
    })
}

fn create_topic(
    name: &TopicName,
    topic_type: TopicType,
    shares: &[(BrokerGroupName, u16)],
) -> CreateTopicV1 {
    let shares = shares.iter().map(|(broker_group, queue_count)| ShareV1 {
        broker_group: broker_group.as_str().to_owned(),
        queue_count: *queue_count,
    });
    CreateTopicV1 {
        name: name.as_str().to_owned(),
        topic_type: topic_type as u8,
        shares: shares.collect(),
    }
}

fn decode_create_topic(archived: CreateTopicV1) -> Result<Command, CommandError> {
    let kind = CREATE_TOPIC;
    let invalid = |source| CommandError::Name { kind, source };
    let name = TopicName::parse(&archived.name).map_err(invalid)?;
    let value = archived.topic_type;
    let topic_type = TopicType::from_code(value).ok_or(CommandError::Value {
        kind,
        field: "topic type",
        value,
    })?;
    let mut shares = Vec::with_capacity(archived.shares.len());
    for share in archived.shares {
        let broker_group = BrokerGroupName::parse(&share.broker_group).map_err(invalid)?;
        shares.push((broker_group, share.queue_count));
    }
    Ok(Command::CreateTopic { name, kind: topic_type, shares })
}

fn decode_create_group(archived: CreateGroupV1) -> Result<Command, CommandError> {
    let kind = CREATE_GROUP;
    let name =
        GroupName::parse(&archived.name).map_err(|source| CommandError::Name { kind, source })?;
    let value = archived.start;
    let start =
        GroupStart::from_code(value).ok_or(CommandError::Value { kind, field: "start", value })?;
    Ok(Command::CreateGroup { name, start })
}

fn lease_v1(lease: &Lease) -> LeaseV1 {
    let raw = |offsets: &[QueueOffset]| offsets.iter().map(|offset| offset.get()).collect();
    LeaseV1 {
        place: place(lease.group, lease.queue),
        client: lease.client.0,
        auto_renew: lease.auto_renew,
        invisible_ms: lease.invisible_ms,
        from: lease.from.get(),
        skip_to: lease.skip_to.get(),
        fresh: raw(&lease.fresh),
        again: raw(&lease.again),
        unwanted: raw(&lease.unwanted),
    }
}

fn decode_lease(archived: LeaseV1) -> Command {
    let (group, queue) = archived.place.ids();
    let offsets = |raw: Vec<u64>| raw.into_iter().map(QueueOffset::new).collect();
    Command::Lease(Lease {
        group,
        queue,
        client: ClientKey(archived.client),
        auto_renew: archived.auto_renew,
        invisible_ms: archived.invisible_ms,
        from: QueueOffset::new(archived.from),
        skip_to: QueueOffset::new(archived.skip_to),
        fresh: offsets(archived.fresh),
        again: offsets(archived.again),
        unwanted: offsets(archived.unwanted),
    })
}

fn place(group: GroupId, queue: QueueKey) -> PlaceV1 {
    PlaceV1 { group: group.0, topic: queue.topic.get(), queue: queue.queue.get() }
}

fn leased(records: &[(QueueOffset, LeaseId)]) -> Vec<LeasedV1> {
    let archived = records.iter();
    archived.map(|(offset, lease)| LeasedV1 { offset: offset.get(), lease: lease.0 }).collect()
}

impl PlaceV1 {
    fn ids(&self) -> (GroupId, QueueKey) {
        let (topic, queue) = (TopicId::new(self.topic), QueueId::new(self.queue));
        (GroupId(self.group), QueueKey { topic, queue })
    }
}

impl LeasedV1 {
    fn ids(&self) -> (QueueOffset, LeaseId) {
        (QueueOffset::new(self.offset), LeaseId(self.lease))
    }
}

fn pack<T>(value: &T) -> Vec<u8>
where
    T: for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, ArchiveError>>,
{
    let archive = rkyv::to_bytes::<ArchiveError>(value);
    archive.expect("a command in memory is far below the 2 GiB an archive can hold").into_vec()
}

fn unpack<T>(kind: u16, archive: &[u8]) -> Result<T, CommandError>
where
    T: Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, ArchiveError>>
        + Deserialize<T, HighDeserializer<ArchiveError>>,
{
    let mut aligned = AlignedVec::<16>::with_capacity(archive.len());
    aligned.extend_from_slice(archive);
    rkyv::from_bytes::<T, ArchiveError>(&aligned)
        .map_err(|source| CommandError::Archive { kind, source })
}

#[cfg(test)]
mod tests;
