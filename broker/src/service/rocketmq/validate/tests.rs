use drumlin_proto::rocketmq;

use super::*;

const NOW_MS: u64 = 1_700_000_000_000;

fn resource(name: &str) -> Option<Resource> {
    Some(Resource { resource_namespace: String::new(), name: name.into() })
}

fn valid() -> Message {
    let system = SystemProperties { message_id: "id-1".into(), ..SystemProperties::default() };
    Message {
        topic: resource("orders"),
        user_properties: HashMap::new(),
        system_properties: Some(system),
        body: "body".into(),
    }
}

fn with(change: impl FnOnce(&mut Message, &mut SystemProperties)) -> Message {
    let mut message = valid();
    let mut system = message.system_properties.take().unwrap();
    change(&mut message, &mut system);
    message.system_properties = Some(system);
    message
}

fn code_of(messages: &[Message]) -> Code {
    match batch(messages, "", NOW_MS) {
        Ok(_) => Code::Ok,
        Err((_, fault)) => fault.code,
    }
}

fn after_ms(ms: i64) -> Option<prost_types::Timestamp> {
    Some(timestamp(i64::try_from(NOW_MS).unwrap() + ms))
}

/// Every row of the table of send checks, on both sides of its border.
#[test]
fn each_row_of_the_send_table_has_its_code() {
    let digest = |r#type: DigestType, checksum: &str| {
        Some(Digest { r#type: r#type.into(), checksum: checksum.into() })
    };
    let seconds = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    let rows: Vec<(&str, Message, Code)> = vec![
        ("valid", valid(), Code::Ok),
        ("no topic", with(|m, _| m.topic = None), Code::IllegalTopic),
        ("blank topic", with(|m, _| m.topic = resource("")), Code::IllegalTopic),
        ("bad topic", with(|m, _| m.topic = resource("a.b")), Code::IllegalTopic),
        ("reserved topic", with(|m, _| m.topic = resource("TBW102")), Code::IllegalTopic),
        ("long topic", with(|m, _| m.topic = resource(&"t".repeat(128))), Code::IllegalTopic),
        ("empty body", with(|m, _| m.body = "".into()), Code::MessageBodyEmpty),
        ("largest body", with(|m, _| m.body = vec![1; 4_194_304].into()), Code::Ok),
        ("larger body", with(|m, _| m.body = vec![1; 4_194_305].into()), Code::MessageBodyTooLarge),
        ("128 properties", with(|m, _| m.user_properties = numbered(128)), Code::Ok),
        (
            "129 properties",
            with(|m, _| m.user_properties = numbered(129)),
            Code::MessagePropertiesTooLarge,
        ),
        ("reserved key", with_property("KEYS", "v"), Code::IllegalMessagePropertyKey),
        ("sharding key", with_property("__SHARDINGKEY", "v"), Code::Ok),
        ("control in key", with_property("a\nb", "v"), Code::IllegalMessagePropertyKey),
        ("control in value", with_property("a", "v\u{1}"), Code::IllegalMessagePropertyKey),
        ("blank tag", with(|_, s| s.tag = Some(" ".into())), Code::IllegalMessageTag),
        ("bar in tag", with(|_, s| s.tag = Some("a|b".into())), Code::IllegalMessageTag),
        ("control in tag", with(|_, s| s.tag = Some("a\t".into())), Code::IllegalMessageTag),
        ("blank key", with(|_, s| s.keys = vec!["".into()]), Code::IllegalMessageKey),
        ("control in key", with(|_, s| s.keys = vec!["\u{0}".into()]), Code::IllegalMessageKey),
        ("16 KiB of properties", with_property("k", &"v".repeat(16_383)), Code::Ok),
        (
            "more than 16 KiB",
            with_property("k", &"v".repeat(16_384)),
            Code::MessagePropertiesTooLarge,
        ),
        (
            "long trace context",
            with(|_, s| s.trace_context = Some("t".repeat(5000))),
            Code::MessagePropertiesTooLarge,
        ),
        (
            "long born host",
            with(|_, s| s.born_host = "h".repeat(256)),
            Code::MessagePropertiesTooLarge,
        ),
        ("blank id", with(|_, s| s.message_id = " ".into()), Code::IllegalMessageId),
        ("odd id", with(|_, s| s.message_id = "~ö~".into()), Code::Ok),
        ("long id", with(|_, s| s.message_id = "i".repeat(1025)), Code::IllegalMessageId),
        (
            "recovery of an hour",
            with(|_, s| s.orphaned_transaction_recovery_duration = seconds(3600, 0)),
            Code::Ok,
        ),
        (
            "longer recovery",
            with(|_, s| s.orphaned_transaction_recovery_duration = seconds(3600, 1)),
            Code::BadRequest,
        ),
        ("delivery in a day", with(|_, s| s.delivery_timestamp = after_ms(86_400_000)), Code::Ok),
        (
            "later delivery",
            with(|_, s| s.delivery_timestamp = after_ms(86_400_001)),
            Code::IllegalDeliveryTime,
        ),
        (
            "hostile delivery",
            with(|_, s| {
                s.delivery_timestamp =
                    Some(prost_types::Timestamp { seconds: i64::MAX, nanos: i32::MAX });
            }),
            Code::IllegalDeliveryTime,
        ),
        ("past delivery", with(|_, s| s.delivery_timestamp = after_ms(-5)), Code::Ok),
        ("63 bytes of group", with(|_, s| s.message_group = Some("g".repeat(63))), Code::Ok),
        (
            "64 bytes of group",
            with(|_, s| s.message_group = Some("g".repeat(64))),
            Code::IllegalMessageGroup,
        ),
        ("blank group", with(|_, s| s.message_group = Some(" ".into())), Code::IllegalMessageGroup),
        (
            "control in group",
            with(|_, s| s.message_group = Some("a\r".into())),
            Code::IllegalMessageGroup,
        ),
        (
            "right MD5",
            with(|_, s| s.body_digest = digest(DigestType::Md5, &body_md5(b"body"))),
            Code::Ok,
        ),
        (
            "wrong MD5",
            with(|_, s| s.body_digest = digest(DigestType::Md5, &body_md5(b"else"))),
            Code::MessageCorrupted,
        ),
        (
            "right CRC",
            with(|_, s| {
                let crc = format!("{:08x}", crc32fast::hash(b"body"));
                s.body_digest = digest(DigestType::Crc32, &crc);
            }),
            Code::Ok,
        ),
        (
            "SHA-1",
            with(|_, s| s.body_digest = digest(DigestType::Sha1, "00")),
            Code::NotImplemented,
        ),
        (
            "unknown digest",
            with(|_, s| s.body_digest = Some(Digest { r#type: 77, checksum: "a".into() })),
            Code::MessageCorrupted,
        ),
        ("gzip", with(|_, s| s.body_encoding = Encoding::Gzip.into()), Code::Ok),
        ("unknown encoding", with(|_, s| s.body_encoding = 9), Code::BadRequest),
        ("no system properties", without_system(), Code::IllegalMessageId),
    ];
    for (row, message, expected) in rows {
        assert_eq!(code_of(&[message]), expected, "{row}");
    }
}

fn without_system() -> Message {
    Message { system_properties: None, ..valid() }
}

fn with_property(key: &str, value: &str) -> Message {
    with(|message, _| {
        message.user_properties.insert(key.into(), value.into());
    })
}

fn numbered(count: usize) -> HashMap<String, String> {
    (0..count).map(|n| (format!("p{n}"), "v".to_owned())).collect()
}

#[test]
fn a_request_without_messages_is_corrupted() {
    assert_eq!(code_of(&[]), Code::MessageCorrupted);
}

#[test]
fn messages_of_one_request_share_a_topic_and_their_message_group_counts_if_shared() {
    let other_topic = with(|message, _| message.topic = resource("payments"));
    let (at, fault) = batch(&[valid(), other_topic], "", NOW_MS).unwrap_err();
    assert_eq!((at, fault.code), (1, Code::MessageCorrupted));
    let grouped = |group: &str| with(|_, system| system.message_group = Some(group.into()));
    let mixed = batch(&[grouped("a"), grouped("a"), grouped("b")], "", NOW_MS).unwrap();
    assert_eq!((mixed.message_group, mixed.differing), (None, Some(2)));
    let agreed = batch(&[grouped("a"), grouped("a")], "", NOW_MS).unwrap();
    assert_eq!((agreed.message_group.as_deref(), agreed.differing), (Some("a"), None));
}

#[test]
fn a_batch_is_bounded_in_bytes_and_messages() {
    let half = with(|message, _| message.body = vec![1; 2 << 20].into());
    assert_eq!(code_of(&[half.clone(), half.clone()]), Code::Ok);
    assert_eq!(code_of(&[half.clone(), half, valid()]), Code::MessageBodyTooLarge);
    assert_eq!(code_of(&vec![valid(); 4097]), Code::BadRequest);
    let fat = with_property("k", &"v".repeat(16_000));
    assert_eq!(code_of(&vec![fat; 400]), Code::MessageBodyTooLarge);
}

#[test]
fn every_reserved_key_is_refused() {
    for key in RESERVED_KEYS {
        assert_eq!(code_of(&[with_property(key, "v")]), Code::IllegalMessagePropertyKey, "{key}");
    }
}

#[test]
fn the_type_is_derived_and_checked_against_the_topic() {
    let of = |change: fn(&mut SystemProperties)| {
        let mut system = SystemProperties::default();
        change(&mut system);
        derived_type(&system)
    };
    let normal = of(|_| ());
    let fifo = of(|s| s.message_group = Some("g".into()));
    let lying = of(|s| s.message_type = MessageType::Fifo.into());
    let delay = of(|s| s.delivery_timestamp = Some(timestamp(0)));
    let transaction = of(|s| s.message_type = MessageType::Transaction.into());
    let lite = of(|s| s.lite_topic = Some("l".into()));
    let priority = of(|s| s.priority = Some(1));
    assert_eq!(lying, DerivedType::Built(RecordKind::Normal));
    let code = |topic, derived| accepted(topic, derived).map_or_else(|f| f.code, |()| Code::Ok);
    for built in [normal, fifo] {
        assert_eq!(code(TopicType::Mixed, built), Code::Ok);
    }
    for missing in [delay, transaction, lite, priority] {
        assert_eq!(code(TopicType::Mixed, missing), Code::NotImplemented);
        assert_eq!(code(TopicType::Normal, missing), Code::MessagePropertyConflictWithType);
    }
    assert_eq!(code(TopicType::Normal, normal), Code::Ok);
    assert_eq!(code(TopicType::Normal, fifo), Code::MessagePropertyConflictWithType);
    assert_eq!(code(TopicType::Fifo, fifo), Code::Ok);
    assert_eq!(code(TopicType::Fifo, normal), Code::MessagePropertyConflictWithType);
}

#[test]
fn client_properties_have_limits() {
    let code = |pairs: Vec<(String, String)>| {
        let pairs: HashMap<String, String> = pairs.into_iter().collect();
        client_properties(&pairs).map_or_else(|fault| fault.code, |()| Code::Ok)
    };
    let pair = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
    let many = |count: usize, value: &str| -> Vec<(String, String)> {
        (0..count).map(|n| (format!("k{n}"), value.to_owned())).collect()
    };
    assert_eq!(code(vec![]), Code::Ok);
    assert_eq!(code(pair("a.b-c_1", &"ö".repeat(256))), Code::Ok);
    assert_eq!(code(pair(&"k".repeat(64), "")), Code::Ok);
    assert_eq!(code(many(32, "v")), Code::Ok);
    for (row, pairs) in [
        ("too many", many(33, "v")),
        ("too large in all", many(32, &"v".repeat(256))),
        ("empty key", pair("", "v")),
        ("long key", pair(&"k".repeat(65), "v")),
        ("key begins with a digit", pair("1a", "v")),
        ("bad character", pair("a b", "v")),
        ("reserved prefix", pair("rocketmq.x", "v")),
        ("long value", pair("a", &"v".repeat(257))),
    ] {
        assert_eq!(code(pairs), Code::InvalidClientProperties, "{row}");
    }
}

#[test]
fn filters_are_tags_for_now() {
    let code = |r#type: i32, expression: &str| {
        let expression = FilterExpression { r#type, expression: expression.into() };
        filter(Some(&expression)).map_or_else(|fault| fault.code, |_| Code::Ok)
    };
    assert_eq!(filter(None).unwrap(), TagFilter::All);
    assert_eq!(code(0, "*"), Code::Ok);
    assert_eq!(code(1, "a || b"), Code::Ok);
    assert_eq!(code(1, "a|b"), Code::IllegalFilterExpression);
    assert_eq!(code(2, "price > 3"), Code::NotImplemented);
    assert_eq!(code(9, "*"), Code::IllegalFilterExpression);
}

#[test]
fn endpoints_must_be_usable_where_given() {
    let code = |scheme: i32, addresses: &[(&str, i32)]| {
        let addresses = addresses
            .iter()
            .map(|(host, port)| rocketmq::Address { host: (*host).into(), port: *port })
            .collect();
        let endpoints = Endpoints { scheme, addresses };
        access_point(Some(&endpoints)).map_or_else(|fault| fault.code, |()| Code::Ok)
    };
    assert!(access_point(None).is_ok());
    assert_eq!(code(1, &[("127.0.0.1", 8081)]), Code::Ok);
    assert_eq!(code(3, &[("a", 1), ("b", 65535)]), Code::Ok);
    assert_eq!(code(1, &[]), Code::IllegalAccessPoint);
    assert_eq!(code(1, &[(" ", 8081)]), Code::IllegalAccessPoint);
    assert_eq!(code(1, &[("a", 0)]), Code::IllegalAccessPoint);
    assert_eq!(code(1, &[("a", -1)]), Code::IllegalAccessPoint);
    assert_eq!(code(1, &[("a", 65536)]), Code::IllegalAccessPoint);
    assert_eq!(code(44, &[("a", 1)]), Code::IllegalAccessPoint);
}

#[test]
fn durations_and_times_never_overflow() {
    let duration = |seconds, nanos| duration_ms(&prost_types::Duration { seconds, nanos });
    assert_eq!(duration(1, 500_000_000), Some(1500));
    assert_eq!(duration(-1, 0), None);
    assert_eq!(duration(0, -1_000_000), None);
    assert_eq!(duration(i64::MAX, i32::MAX), None);
    let time = |seconds, nanos| timestamp_ms(&prost_types::Timestamp { seconds, nanos });
    assert_eq!(time(i64::MAX, 0), i64::MAX);
    assert_eq!(time(i64::MIN, 0), i64::MIN);
    assert_eq!(timestamp_ms(&timestamp(-1)), -1);
    assert_eq!(timestamp_ms(&timestamp(1_700_000_000_123)), 1_700_000_000_123);
}

#[test]
fn body_digests_are_upper_case() {
    assert_eq!(body_md5(b"body"), "841A2D689AD86BD1611447453C22C6FC");
}
