//! The archives of [`CatalogChange`].

use drumlin_proto::ids::{BrokerGroupName, GroupName, TopicId, TopicName};
use rkyv::{Archive, Deserialize, Serialize};

use super::{
    ACTIVATE_TOPIC, CONFIRM_COPY, COPY_CATALOG, CREATE_GROUP, CREATE_TOPIC, CommandError, ShareV1,
    UPDATE_TOPIC, WITHDRAW_TOPIC, pack, unpack,
};
use crate::command::{
    CatalogChange, CatalogDelta, Deleted, GroupDefinition, GroupId, GroupStart, Shares, Topic,
    TopicType,
};

#[derive(Archive, Serialize, Deserialize)]
struct CreateTopicV2 {
    name: String,
    topic_type: u8,
    shares: Vec<ShareV1>,
    min_copies: u8,
    topics_max: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct CreateGroupV2 {
    name: String,
    start: u8,
    groups_max: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct UpdateTopicV1 {
    topic: u32,
    version: u32,
    shares: Vec<ShareV1>,
    min_copies: u8,
}

/// A definition of one version.
#[derive(Archive, Serialize, Deserialize)]
struct TopicVersionV1 {
    topic: u32,
    version: u32,
}

#[derive(Archive, Serialize, Deserialize)]
struct ConfirmCopyV1 {
    broker_group: String,
    upto: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct CopyCatalogV1 {
    from: u64,
    to: u64,
    topics: Vec<DefinedTopicV1>,
    groups: Vec<DefinedGroupV1>,
    deleted_topics: Vec<u32>,
    deleted_groups: Vec<u32>,
}

#[derive(Archive, Serialize, Deserialize)]
struct DefinedTopicV1 {
    id: u32,
    name: String,
    topic_type: u8,
    shares: Vec<ShareV1>,
    /// One list, or none.
    next: Vec<Vec<ShareV1>>,
    min_copies: u8,
    version: u32,
    created_ms: u64,
    changed: u64,
}

#[derive(Archive, Serialize, Deserialize)]
struct DefinedGroupV1 {
    id: u32,
    name: String,
    start: u8,
    created_ms: u64,
    changed: u64,
}

/// The kind, version and archive of a change.
pub(super) fn encode(change: &CatalogChange) -> (u16, u16, Vec<u8>) {
    match change {
        CatalogChange::CreateTopic { name, kind, shares, min_copies, topics_max } => {
            let archived = CreateTopicV2 {
                name: name.as_str().to_owned(),
                topic_type: *kind as u8,
                shares: shares_v1(shares),
                min_copies: *min_copies,
                topics_max: *topics_max,
            };
            (CREATE_TOPIC, 2, pack(&archived))
        }
        CatalogChange::CreateGroup { name, start, groups_max } => {
            let (name, start, groups_max) = (name.as_str().to_owned(), *start as u8, *groups_max);
            (CREATE_GROUP, 2, pack(&CreateGroupV2 { name, start, groups_max }))
        }
        CatalogChange::UpdateTopic { topic, version, shares, min_copies } => {
            let archived = UpdateTopicV1 {
                topic: topic.get(),
                version: *version,
                shares: shares_v1(shares),
                min_copies: *min_copies,
            };
            (UPDATE_TOPIC, 1, pack(&archived))
        }
        CatalogChange::ActivateTopic { topic, version } => {
            (ACTIVATE_TOPIC, 1, pack(&TopicVersionV1 { topic: topic.get(), version: *version }))
        }
        CatalogChange::WithdrawTopic { topic, version } => {
            (WITHDRAW_TOPIC, 1, pack(&TopicVersionV1 { topic: topic.get(), version: *version }))
        }
        CatalogChange::Confirm { broker_group, upto } => {
            let (broker_group, upto) = (broker_group.as_str().to_owned(), *upto);
            (CONFIRM_COPY, 1, pack(&ConfirmCopyV1 { broker_group, upto }))
        }
        CatalogChange::Copy(delta) => {
            let (version, archive) = encode_copy(delta);
            (COPY_CATALOG, version, archive)
        }
    }
}

pub(super) fn encode_copy(delta: &CatalogDelta) -> (u16, Vec<u8>) {
    (1, pack(&copy_v1(delta)))
}

pub(super) fn decode_copy(version: u16, archive: &[u8]) -> Result<CatalogDelta, CommandError> {
    let kind = COPY_CATALOG;
    if version != 1 {
        return Err(CommandError::Unknown { kind, version });
    }
    copy_of(unpack(kind, archive)?)
}

/// `None`: some other command.
pub(super) fn decode(
    kind: u16,
    version: u16,
    archive: &[u8],
) -> Result<Option<CatalogChange>, CommandError> {
    Ok(Some(match (kind, version) {
        (CREATE_TOPIC, 2) => {
            let archived: CreateTopicV2 = unpack(kind, archive)?;
            CatalogChange::CreateTopic {
                name: topic_name(kind, &archived.name)?,
                kind: topic_type(kind, archived.topic_type)?,
                shares: shares_of(kind, archived.shares)?,
                min_copies: archived.min_copies,
                topics_max: archived.topics_max,
            }
        }
        (CREATE_GROUP, 2) => {
            let CreateGroupV2 { name, start, groups_max } = unpack(kind, archive)?;
            let (name, start) = (group_name(kind, &name)?, group_start(kind, start)?);
            CatalogChange::CreateGroup { name, start, groups_max }
        }
        (UPDATE_TOPIC, 1) => {
            let archived: UpdateTopicV1 = unpack(kind, archive)?;
            CatalogChange::UpdateTopic {
                topic: TopicId::new(archived.topic),
                version: archived.version,
                shares: shares_of(kind, archived.shares)?,
                min_copies: archived.min_copies,
            }
        }
        (ACTIVATE_TOPIC, 1) => {
            let TopicVersionV1 { topic, version } = unpack(kind, archive)?;
            CatalogChange::ActivateTopic { topic: TopicId::new(topic), version }
        }
        (WITHDRAW_TOPIC, 1) => {
            let TopicVersionV1 { topic, version } = unpack(kind, archive)?;
            CatalogChange::WithdrawTopic { topic: TopicId::new(topic), version }
        }
        (CONFIRM_COPY, 1) => {
            let ConfirmCopyV1 { broker_group, upto } = unpack(kind, archive)?;
            let broker_group = BrokerGroupName::parse(&broker_group)
                .map_err(|source| CommandError::Name { kind, source })?;
            CatalogChange::Confirm { broker_group, upto }
        }
        (COPY_CATALOG, 1) => CatalogChange::Copy(copy_of(unpack(kind, archive)?)?),
        _ => return Ok(None),
    }))
}

fn shares_v1(shares: &Shares) -> Vec<ShareV1> {
    let share = |(broker_group, queue_count): &(BrokerGroupName, u16)| ShareV1 {
        broker_group: broker_group.as_str().to_owned(),
        queue_count: *queue_count,
    };
    shares.iter().map(share).collect()
}

fn shares_of(kind: u16, archived: Vec<ShareV1>) -> Result<Shares, CommandError> {
    let share = |share: ShareV1| {
        let name = BrokerGroupName::parse(&share.broker_group);
        name.map(|name| (name, share.queue_count))
    };
    let shares: Result<Shares, _> = archived.into_iter().map(share).collect();
    shares.map_err(|source| CommandError::Name { kind, source })
}

fn topic_name(kind: u16, text: &str) -> Result<TopicName, CommandError> {
    TopicName::parse(text).map_err(|source| CommandError::Name { kind, source })
}

fn group_name(kind: u16, text: &str) -> Result<GroupName, CommandError> {
    GroupName::parse(text).map_err(|source| CommandError::Name { kind, source })
}

fn topic_type(kind: u16, value: u8) -> Result<TopicType, CommandError> {
    TopicType::from_code(value).ok_or(CommandError::Value { kind, field: "topic type", value })
}

fn group_start(kind: u16, value: u8) -> Result<GroupStart, CommandError> {
    GroupStart::from_code(value).ok_or(CommandError::Value { kind, field: "start", value })
}

fn copy_v1(delta: &CatalogDelta) -> CopyCatalogV1 {
    let topic = |topic: &Topic| DefinedTopicV1 {
        id: topic.id.get(),
        name: topic.name.as_str().to_owned(),
        topic_type: topic.kind as u8,
        shares: shares_v1(&topic.shares),
        next: topic.next.iter().map(shares_v1).collect(),
        min_copies: topic.min_copies,
        version: topic.version,
        created_ms: topic.created_ms,
        changed: topic.changed,
    };
    let group = |group: &GroupDefinition| DefinedGroupV1 {
        id: group.id.0,
        name: group.name.as_str().to_owned(),
        start: group.start as u8,
        created_ms: group.created_ms,
        changed: group.changed,
    };
    let mut archived = CopyCatalogV1 {
        from: delta.from,
        to: delta.to,
        topics: delta.topics.iter().map(topic).collect(),
        groups: delta.groups.iter().map(group).collect(),
        deleted_topics: Vec::new(),
        deleted_groups: Vec::new(),
    };
    for deleted in &delta.deleted {
        match deleted {
            Deleted::Topic(id) => archived.deleted_topics.push(id.get()),
            Deleted::Group(id) => archived.deleted_groups.push(id.0),
        }
    }
    archived
}

fn copy_of(archived: CopyCatalogV1) -> Result<CatalogDelta, CommandError> {
    let kind = COPY_CATALOG;
    let topic = |topic: DefinedTopicV1| {
        let mut next = topic.next.into_iter();
        Ok(Topic {
            id: TopicId::new(topic.id),
            name: topic_name(kind, &topic.name)?,
            kind: topic_type(kind, topic.topic_type)?,
            shares: shares_of(kind, topic.shares)?,
            next: next.next().map(|shares| shares_of(kind, shares)).transpose()?,
            min_copies: topic.min_copies,
            version: topic.version,
            created_ms: topic.created_ms,
            changed: topic.changed,
        })
    };
    let group = |group: DefinedGroupV1| {
        Ok(GroupDefinition {
            id: GroupId(group.id),
            name: group_name(kind, &group.name)?,
            start: group_start(kind, group.start)?,
            created_ms: group.created_ms,
            changed: group.changed,
        })
    };
    let topics = archived.deleted_topics.into_iter().map(|id| Deleted::Topic(TopicId::new(id)));
    let groups = archived.deleted_groups.into_iter().map(|id| Deleted::Group(GroupId(id)));
    Ok(CatalogDelta {
        from: archived.from,
        to: archived.to,
        topics: archived.topics.into_iter().map(topic).collect::<Result<_, CommandError>>()?,
        groups: archived.groups.into_iter().map(group).collect::<Result<_, CommandError>>()?,
        deleted: topics.chain(groups).collect(),
    })
}
