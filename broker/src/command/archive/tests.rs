use super::*;
use crate::command::{CatalogChange, CatalogDelta, Deleted, GroupDefinition, Shares, Topic};

fn queue() -> QueueKey {
    QueueKey { topic: TopicId::new(0x0102_0304), queue: QueueId::new(0x0506) }
}

fn offset(raw: u64) -> QueueOffset {
    QueueOffset::new(raw)
}

/// One command of each kind, in the order of the kinds.
fn one_of_each() -> Vec<Command> {
    let group = GroupId(0x0a0b_0c0d);
    let records = vec![(offset(5), LeaseId(70)), (offset(6), LeaseId(71))];
    vec![
        Command::CreateTopic {
            name: TopicName::parse("orders-of-the-day").unwrap(),
            kind: TopicType::Mixed,
            shares: vec![
                (BrokerGroupName::parse("a").unwrap(), 8),
                (BrokerGroupName::parse("broker-b").unwrap(), 4),
            ],
        },
        Command::DeleteTopic { topic: queue().topic },
        Command::CreateGroup {
            name: GroupName::parse("billing").unwrap(),
            start: GroupStart::Latest,
        },
        Command::DeleteGroup { group },
        Command::CommitOffset { group, queue: queue(), offset: offset(0x1122_3344_5566_7788) },
        Command::Lease(Lease {
            group,
            queue: queue(),
            client: ClientKey(0xfeed_beef),
            auto_renew: true,
            invisible_ms: 60_000,
            from: offset(10),
            skip_to: offset(14),
            fresh: vec![offset(10), offset(13)],
            again: vec![offset(2)],
            unwanted: vec![offset(4)],
        }),
        Command::Ack { group, queue: queue(), records: records.clone() },
        Command::ChangeLease {
            group,
            queue: queue(),
            offset: offset(5),
            lease: LeaseId(70),
            invisible_ms: 1_000,
        },
        Command::RenewLeases { group, queue: queue(), records, invisible_ms: 60_000 },
        Command::ReleaseClient { group, client: ClientKey(0xfeed_beef), invisible_ms: 1_000 },
        Command::Trim { below: EntryIndex::new(99), position: LogOffset::new(0x1_0000_0000) },
    ]
}

/// One of each kind or version that feature level 2 introduced.
fn one_of_each_of_level_2() -> Vec<Command> {
    let shares: Shares = vec![
        (BrokerGroupName::parse("a").unwrap(), 8),
        (BrokerGroupName::parse("broker-b").unwrap(), 4),
    ];
    let (topic, version) = (queue().topic, 7);
    let defined = Topic {
        id: topic,
        name: TopicName::parse("orders-of-the-day").unwrap(),
        kind: TopicType::Fifo,
        shares: shares[..1].to_vec(),
        next: Some(shares.clone()),
        min_copies: 2,
        version,
        created_ms: 0x1122_3344_5566,
        changed: 99,
    };
    let group = GroupDefinition {
        id: GroupId(0x0a0b_0c0d),
        name: GroupName::parse("billing").unwrap(),
        start: GroupStart::Latest,
        created_ms: 5,
        changed: 98,
    };
    let delta = CatalogDelta {
        from: 90,
        to: 100,
        topics: vec![defined.clone(), Topic { next: None, ..defined.clone() }],
        groups: vec![group.clone()],
        deleted: vec![Deleted::Topic(TopicId::new(3)), Deleted::Group(GroupId(4))],
    };
    let Topic { name, kind, .. } = defined;
    let changes = [
        CatalogChange::CreateTopic {
            name,
            kind,
            shares: shares.clone(),
            min_copies: 2,
            topics_max: 10_000,
        },
        CatalogChange::CreateGroup { name: group.name, start: group.start, groups_max: 9 },
        CatalogChange::UpdateTopic { topic, version, shares, min_copies: 1 },
        CatalogChange::ActivateTopic { topic, version },
        CatalogChange::WithdrawTopic { topic, version },
        CatalogChange::Confirm {
            broker_group: BrokerGroupName::parse("broker-b").unwrap(),
            upto: 100,
        },
        CatalogChange::Copy(delta),
    ];
    let raise = Command::RaiseFeatureLevel { level: 2, release: "0.2.0".into() };
    changes.into_iter().map(Command::Catalog).chain([raise]).collect()
}

fn all() -> Vec<Command> {
    let mut all = one_of_each();
    all.extend(one_of_each_of_level_2());
    all
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn written(commands: &[Command]) -> String {
    let line = |command: &Command| {
        let (kind, version, archive) = encode(command);
        format!("{kind} {version} {}\n", hex(&archive))
    };
    commands.iter().map(line).collect()
}

#[test]
fn every_kind_keeps_its_bytes() {
    let why = "published bytes may not change: add a version instead";
    assert_eq!(written(&one_of_each()), include_str!("golden_v1.txt"), "{why}");
    assert_eq!(written(&one_of_each_of_level_2()), include_str!("golden_level_2.txt"), "{why}");
}

#[test]
fn golden_bytes_decode_to_the_commands_they_were_made_of() {
    let golden = [include_str!("golden_v1.txt"), include_str!("golden_level_2.txt")].concat();
    assert_eq!(golden.lines().count(), all().len());
    for (line, command) in golden.lines().zip(all()) {
        let fields: Vec<&str> = line.split(' ').collect();
        let digits = fields[2].as_bytes();
        let archive: Vec<u8> = digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        // One byte in front makes sure that the archive need not be aligned.
        let shifted = [&[0][..], &archive].concat();
        let decoded =
            decode(fields[0].parse().unwrap(), fields[1].parse().unwrap(), &shifted[1..]).unwrap();
        assert_eq!(decoded, command);
    }
}

#[test]
fn unknown_kinds_and_versions_are_told_apart_from_damage() {
    let (kind, version, archive) = encode(&one_of_each()[0]);
    for (kind, version) in [(0, 1), (RAISE_FEATURE_LEVEL + 1, 1), (kind, version + 2), (kind, 0)] {
        let error = decode(kind, version, &archive).unwrap_err();
        assert!(
            matches!(error, CommandError::Unknown { kind: k, version: v } if (k, v) == (kind, version)),
            "{error:?}"
        );
    }
}

#[test]
fn cut_archives_are_refused() {
    for command in all() {
        let (kind, version, archive) = encode(&command);
        for end in 0..archive.len() {
            // A tail that is long enough may read as another value, but never as the same.
            let decoded = decode(kind, version, &archive[..end]);
            assert!(decoded.ok().as_ref() != Some(&command), "cut at {end} of kind {kind}");
        }
        assert!(matches!(decode(kind, version, &[]), Err(CommandError::Archive { .. })));
    }
}

#[test]
fn flipped_bits_never_panic() {
    for command in all() {
        let (kind, version, mut archive) = encode(&command);
        for bit in 0..archive.len() * 8 {
            archive[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = decode(kind, version, &archive) {
                let (again, ..) = encode(&other);
                assert_eq!(again, kind);
            }
            archive[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn names_and_codes_are_parsed_not_trusted() {
    let bad_name = pack(&CreateGroupV1 { name: "no spaces".into(), start: 1 });
    assert!(matches!(decode(CREATE_GROUP, 1, &bad_name), Err(CommandError::Name { .. })));
    let bad_start = pack(&CreateGroupV1 { name: "fine".into(), start: 9 });
    assert!(matches!(
        decode(CREATE_GROUP, 1, &bad_start),
        Err(CommandError::Value { field: "start", value: 9, .. })
    ));
    let bad_type = pack(&CreateTopicV1 { name: "t".into(), topic_type: 0, shares: vec![] });
    assert!(matches!(
        decode(CREATE_TOPIC, 1, &bad_type),
        Err(CommandError::Value { field: "topic type", value: 0, .. })
    ));
}
