#![allow(clippy::indexing_slicing, reason = "tests may panic")]

use bytes::Bytes;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::ids::{QueueId, QueueKey, TopicId};

/// What a record says, owned; also what comes back out of one.
#[derive(Clone, Debug, Default, PartialEq)]
struct Owned {
    message_id: String,
    keys: Vec<String>,
    tag: Option<String>,
    message_group: Option<String>,
    user_properties: Vec<(String, String)>,
    trace_context: Option<String>,
    born_host: Option<String>,
    gzip: bool,
    born_ms: i64,
    body: Vec<u8>,
}

impl Owned {
    fn fields(&self) -> RecordFields<'_> {
        RecordFields {
            message_id: &self.message_id,
            keys: &self.keys,
            tag: self.tag.as_deref(),
            message_group: self.message_group.as_deref(),
            user_properties: &self.user_properties,
            trace_context: self.trace_context.as_deref(),
            born_host: self.born_host.as_deref(),
            body_encoding: self.gzip.then_some(BodyEncoding::Gzip),
            born_ms: self.born_ms,
            body: &self.body,
        }
    }

    fn of(record: Record<'_>) -> Self {
        Self {
            message_id: record.message_id().into(),
            keys: record.keys().map(Into::into).collect(),
            tag: record.tag().map(Into::into),
            message_group: record.message_group().map(Into::into),
            user_properties: record.user_properties().map(|(k, v)| (k.into(), v.into())).collect(),
            trace_context: record.trace_context().map(Into::into),
            born_host: record.born_host().map(Into::into),
            gzip: record.body_encoding() == BodyEncoding::Gzip,
            born_ms: record.born_ms(),
            body: record.body().into(),
        }
    }
}

fn any_record() -> impl Strategy<Value = Owned> {
    let text = || "[a-zé]{1,12}";
    (
        (text(), vec(text(), 0..4), option::of(text()), option::of(text())),
        (btree_map("[a-z]{0,4}", "[a-z]{0,6}", 0..4), option::of(text()), option::of(text())),
        (any::<bool>(), any::<i64>(), vec(any::<u8>(), 0..200)),
    )
        .prop_map(
            |((message_id, keys, tag, message_group), (properties, trace, host), rest)| Owned {
                message_id,
                keys,
                tag,
                message_group,
                user_properties: properties.into_iter().collect(),
                trace_context: trace,
                born_host: host,
                gzip: rest.0,
                born_ms: rest.1,
                body: rest.2,
            },
        )
}

fn run_of(records: &[Owned]) -> Bytes {
    let mut builder = RunBuilder::new();
    records.iter().for_each(|record| builder.push(&record.fields()));
    builder.finish()
}

/// One record with everything in it, and a plain one.
fn sample() -> Vec<Owned> {
    let full = Owned {
        message_id: "01F4A5C2D1B3".into(),
        keys: vec!["order-1".into(), "7".into()],
        tag: Some("eu".into()),
        message_group: Some("customer-9".into()),
        user_properties: vec![("amount".into(), "12".into()), ("currency".into(), "€".into())],
        trace_context: Some("00-00112233445566778899aabbccddeeff-0123456789abcdef-01".into()),
        born_host: Some("198.51.100.7".into()),
        gzip: true,
        born_ms: 1_700_000_000_123,
        body: b"a body".to_vec(),
    };
    let plain = Owned { message_id: "B".into(), born_ms: -1, ..Owned::default() };
    vec![full, plain]
}

/// Gives the run's header the CRC of its changed records, so that only their checks are left.
fn reseal(run: &mut [u8]) {
    let crc = crc32fast::hash(&run[RUN_HEADER_BYTES..]);
    run[40..44].copy_from_slice(&crc.to_le_bytes());
}

type Attributes<'a> = &'a [(u8, &'a [u8])];

/// A run of one record with these attributes as they are.
fn run_with_attributes(kind: u8, attributes: Attributes<'_>) -> Bytes {
    let mut list = BytesMut::new();
    for (kind, value) in attributes {
        list.put_u8(*kind);
        list.put_u16_le(u16::try_from(value.len()).unwrap());
        list.put_slice(value);
    }
    let tag = attributes.iter().find(|(kind, _)| *kind == TAG);
    let mut run = run_of(&[Owned { message_id: "x".into(), ..Owned::default() }]).to_vec();
    run.truncate(RUN_HEADER_BYTES + RECORD_HEADER_BYTES);
    run.extend_from_slice(&list);
    let size = |bytes: usize| u32::try_from(bytes).unwrap().to_le_bytes();
    let (run_bytes, record_bytes) = (run.len(), RECORD_HEADER_BYTES + list.len());
    run[0..4].copy_from_slice(&size(run_bytes));
    run[20..24].copy_from_slice(&size(record_bytes));
    run[48..52].copy_from_slice(&size(record_bytes));
    run[56..60].copy_from_slice(&size(list.len()));
    run[60] = kind;
    run[62..64].copy_from_slice(&u16::try_from(attributes.len()).unwrap().to_le_bytes());
    let tag_hash = tag.map_or(0, |(_, tag)| crc32fast::hash(tag));
    run[64..68].copy_from_slice(&tag_hash.to_le_bytes());
    reseal(&mut run);
    run.into()
}

proptest! {
    #[test]
    fn what_went_in_comes_out(records in vec(any_record(), 1..6)) {
        let run = Run::parse(run_of(&records)).unwrap();
        let read: Vec<_> = run.records().map(Owned::of).collect();
        prop_assert_eq!(&read, &records);
        for (record, fields) in run.records().zip(&records) {
            prop_assert_eq!(record.record_bytes(), fields.fields().record_bytes());
            prop_assert_eq!(record.kind(), fields.fields().kind());
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        if let Ok(run) = Run::from_log(bytes.clone().into()) {
            run.records().map(Owned::of).for_each(drop);
        }
        prop_assert!(Run::parse(bytes.into()).is_err());
    }

    #[test]
    fn damaged_records_behind_a_right_crc_never_panic(
        records in vec(any_record(), 1..3),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = run_of(&records).to_vec();
        for (at, value) in damage {
            let at = RUN_HEADER_BYTES + at.index(bytes.len() - RUN_HEADER_BYTES);
            bytes[at] = value;
        }
        reseal(&mut bytes);
        let run = Run::from_log(bytes.into()).unwrap();
        let read = run.records().map(Owned::of).count();
        if run.verify().is_ok() {
            prop_assert_eq!(read, records.len());
        }
    }

    #[test]
    fn extended_header_fits_the_joined_records(
        first in vec(any_record(), 1..4),
        second in vec(any_record(), 1..4),
    ) {
        let [head, tail] = [&first, &second].map(|records| Run::parse(run_of(records)).unwrap());
        let mut header = *head.header();
        prop_assert!(header.extend(tail.header(), RUN_BYTES_MAX));
        let bytes = [&header.encode()[..], &head.records_bytes(), &tail.records_bytes()].concat();
        let joined = Run::parse(bytes.into()).unwrap();
        let read: Vec<_> = joined.records().map(Owned::of).collect();
        prop_assert_eq!(read, [first, second].concat());
    }

    #[test]
    fn item_crc_is_that_of_the_bytes(records in vec(any_record(), 1..4), guard in 0..3_u16) {
        let run = Run::parse(run_of(&records)).unwrap();
        let queue = QueueKey { topic: TopicId::new(7), queue: QueueId::new(3) };
        let header = run.header().placed(queue, guard);
        let mut item = [&header.encode()[..], &run.records_bytes()].concat();
        item.resize(item.len().next_multiple_of(ITEM_ALIGN_BYTES), 0);
        prop_assert_eq!(header.item_hasher().finalize(), crc32fast::hash(&item));
        prop_assert_eq!(header.run_bytes() + header.padding_bytes(), item.len());
        let stored = Run::from_log(item.into()).unwrap();
        stored.verify().unwrap();
        prop_assert_eq!(stored.queue_key(), queue);
        prop_assert_eq!(stored.as_bytes().len(), run.as_bytes().len());
    }
}

#[test]
fn every_flipped_bit_of_a_run_is_found() {
    let bytes = run_of(&sample());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let found = Run::parse(damaged.into()).is_err();
        assert!(found, "bit {} of byte {} may change unnoticed", bit % 8, bit / 8);
    }
}

#[test]
fn every_cut_of_a_run_is_found() {
    let bytes = run_of(&sample());
    for end in 0..bytes.len() {
        assert!(Run::parse(bytes.slice(..end)).is_err(), "cut at {end}");
        assert!(Run::from_log(bytes.slice(..end)).is_err(), "cut at {end}");
    }
    let longer = [&bytes[..], b"\0"].concat();
    assert_eq!(Run::parse(longer.into()).unwrap_err(), RunError::Header { field: "run bytes" });
}

#[test]
fn bytes_of_version_one_are_read_and_built_for_ever() {
    let golden = include_bytes!("../../golden/run-1.bin");
    let run = Run::parse(Bytes::from_static(golden)).unwrap();
    let read: Vec<_> = run.records().map(Owned::of).collect();
    assert_eq!(read, sample());
    assert_eq!(run_of(&sample()), golden[..], "building gives other bytes than version 1 did");
}

#[test]
fn unknown_attributes_are_passed_over() {
    let run = run_with_attributes(1, &[(MESSAGE_ID, b"id"), (TAG, b"eu"), (90, b"later")]);
    let run = Run::parse(run).unwrap();
    let record = run.records().next().unwrap();
    assert_eq!((record.message_id(), record.tag()), ("id", Some("eu")));
}

#[test]
fn special_attributes_are_refused_by_their_kind() {
    for kind in [128, 129, 255] {
        let run = run_with_attributes(1, &[(MESSAGE_ID, b"id"), (kind, b"12345678")]);
        assert_eq!(Run::parse(run).unwrap_err(), RunError::Unsupported { record: 0, kind });
    }
}

#[test]
fn wrong_attributes_are_refused_with_their_name() {
    let long = vec![b'x'; TEXT_BYTES_MAX + 1];
    let cases: [(u8, Attributes<'_>, &str); 14] = [
        (1, &[(TAG, b"eu")], "message id"),
        (1, &[(MESSAGE_ID, b"")], "message id"),
        (1, &[(MESSAGE_ID, b"\xff")], "message id"),
        (1, &[(MESSAGE_ID, &long)], "message id"),
        (1, &[(MESSAGE_ID, b"a"), (MESSAGE_ID, b"b")], "attribute order"),
        (1, &[(TAG, b"eu"), (MESSAGE_ID, b"a")], "attribute order"),
        (1, &[(0, b"x"), (MESSAGE_ID, b"a")], "attribute order"),
        (1, &[(MESSAGE_ID, b"a"), (MESSAGE_GROUP, b"g")], "kind"),
        (2, &[(MESSAGE_ID, b"a")], "kind"),
        (3, &[(MESSAGE_ID, b"a")], "kind"),
        (9, &[(MESSAGE_ID, b"a")], "kind"),
        (1, &[(MESSAGE_ID, b"a"), (KEYS, b"\x00\x00")], "keys"),
        (1, &[(MESSAGE_ID, b"a"), (KEYS, b"\x05\x00abc")], "keys"),
        (
            1,
            &[(MESSAGE_ID, b"a"), (USER_PROPERTIES, b"\x01\x00b\x00\x00\x01\x00a\x00\x00")],
            "user properties",
        ),
    ];
    for (kind, attributes, field) in cases {
        let error = Run::parse(run_with_attributes(kind, attributes)).unwrap_err();
        assert_eq!(error, RunError::Record { record: 0, field }, "{attributes:?}");
    }
}

#[test]
fn properties_beyond_their_limit_are_refused() {
    let key = vec![b'k'; PROPERTIES_BYTES_MAX + 1];
    let length = u16::try_from(key.len()).unwrap().to_le_bytes();
    let keys = [&length[..], &key].concat();
    let run = run_with_attributes(1, &[(MESSAGE_ID, b"a"), (KEYS, &keys)]);
    let too_large = RunError::TooLarge { bytes: key.len(), bytes_max: PROPERTIES_BYTES_MAX };
    assert_eq!(Run::parse(run).unwrap_err(), too_large);
}

#[test]
fn fields_beyond_a_limit_cannot_be_built() {
    let body = vec![0; BODY_BYTES_MAX + 1];
    let fields = RecordFields { message_id: "a", body: &body, ..RecordFields::default() };
    assert!(matches!(fields.check(), Err(InvalidFields::TooLarge { field: "body", .. })));
    assert_eq!(RecordFields::default().check(), Err(InvalidFields::NoMessageId));
    let pairs = [("b".to_owned(), String::new()), ("a".to_owned(), String::new())];
    let fields =
        RecordFields { message_id: "a", user_properties: &pairs, ..RecordFields::default() };
    assert_eq!(fields.check(), Err(InvalidFields::PropertyOrder));
}

#[test]
fn most_overhead_of_keys_fits_its_attribute() {
    let keys = vec!["k".to_owned(); PROPERTIES_BYTES_MAX];
    let fields = RecordFields { message_id: "a", keys: &keys, ..RecordFields::default() };
    fields.check().unwrap();
    let mut builder = RunBuilder::new();
    builder.push(&fields);
    let run = Run::parse(builder.finish()).unwrap();
    assert_eq!(run.records().next().unwrap().keys().count(), PROPERTIES_BYTES_MAX);
}

#[test]
fn runs_that_would_become_too_large_stay_two() {
    let run = Run::parse(run_of(&sample())).unwrap();
    let mut header = *run.header();
    let doubled = 2 * run.as_bytes().len() - RUN_HEADER_BYTES;
    assert!(!header.extend(run.header(), doubled - 1));
    assert_eq!(header, *run.header());
    assert!(header.extend(run.header(), doubled));
}
