//! Every RPC with missing, wrong, oversized and hostile fields: a code in an OK reply, no panic.

use std::collections::HashMap;

use drumlin_proto::rocketmq::admin_client::AdminClient;
use drumlin_proto::rocketmq::pull_message_response;

use super::*;

fn names() -> Vec<Option<Resource>> {
    let long = "x".repeat(100_000);
    let texts = ["", " ", "a.b", "ö", "\u{0}", "%%%\n", "rmq_sys_x", "TBW102", long.as_str()];
    let named = texts.into_iter().map(resource);
    let odd = Some(Resource { resource_namespace: "n\u{1}".into(), name: "a".into() });
    [None, odd].into_iter().chain(named).collect()
}

/// Calls one RPC with every bad name and expects one of the codes.
macro_rules! refused {
    ($fixture:expr, $rpc:ident, $codes:expr, |$name:ident| $request:expr) => {
        for $name in names() {
            let shown = format!("{:?}", $name.as_ref().map(|n| n.name.chars().take(20)));
            let answer = $fixture.client.clone().$rpc(call($request)).await;
            let told = code(&answer.unwrap().into_inner().status);
            assert!($codes.contains(&told), "{} {shown}: {told:?}", stringify!($rpc));
        }
    };
}

#[tokio::test]
async fn bad_names_are_refused_by_every_call() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let topic = [Code::IllegalTopic];
    let group = [Code::IllegalConsumerGroup];
    refused!(fixture, query_route, topic, |name| QueryRouteRequest {
        topic: name,
        endpoints: None
    });
    refused!(fixture, query_assignment, topic, |name| QueryAssignmentRequest {
        topic: name,
        group: resource(GROUP),
        endpoints: None
    });
    refused!(fixture, query_assignment, [Code::IllegalConsumerGroup, Code::Ok], |name| {
        QueryAssignmentRequest { topic: resource(TOPIC), group: name, endpoints: None }
    });
    refused!(fixture, send_message, topic, |name| SendMessageRequest {
        messages: vec![Message { topic: name, ..message("a") }]
    });
    refused!(fixture, ack_message, topic, |name| AckMessageRequest {
        group: resource(GROUP),
        topic: name,
        entries: vec![AckMessageEntry::default()]
    });
    refused!(fixture, change_invisible_duration, topic, |name| ChangeInvisibleDurationRequest {
        group: resource(GROUP),
        topic: name,
        ..ChangeInvisibleDurationRequest::default()
    });
    for name in names().into_iter().filter(|name| !is_group(name)) {
        let request = AckMessageRequest {
            group: name.clone(),
            topic: resource(TOPIC),
            entries: vec![AckMessageEntry::default()],
        };
        let answer = fixture.client.clone().ack_message(call(request)).await.unwrap();
        assert!(group.contains(&code(&answer.into_inner().status)));
        let heartbeat = HeartbeatRequest { group: name, client_type: 2 };
        let answer = fixture.client.clone().heartbeat(call(heartbeat)).await.unwrap();
        assert!(group.contains(&code(&answer.into_inner().status)));
    }
    fixture.stop().await;
}

/// Reserved for topics only.
fn is_group(name: &Option<Resource>) -> bool {
    name.as_ref().is_some_and(|name| ["rmq_sys_x", "TBW102"].contains(&name.name.as_str()))
}

#[tokio::test]
async fn bad_polls_end_in_frames_with_a_code() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let good = || poll(SHORT, LEASE);
    let queue = |topic| Some(MessageQueue { topic, ..MessageQueue::default() });
    let seconds = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    let filter =
        |r#type, expression: &str| Some(FilterExpression { r#type, expression: expression.into() });
    let mut rows: Vec<(&str, ReceiveMessageRequest, Code)> = vec![
        ("nothing at all", ReceiveMessageRequest::default(), Code::IllegalTopic),
        ("no queue", ReceiveMessageRequest { message_queue: None, ..good() }, Code::IllegalTopic),
        (
            "hostile queue id",
            ReceiveMessageRequest {
                message_queue: Some(MessageQueue {
                    id: i32::MIN,
                    permission: 99,
                    accept_message_types: vec![77; 1000],
                    ..queue(resource(TOPIC)).unwrap()
                }),
                ..good()
            },
            Code::MessageNotFound,
        ),
        ("no group", ReceiveMessageRequest { group: None, ..good() }, Code::IllegalConsumerGroup),
        ("batch 0", ReceiveMessageRequest { batch_size: 0, ..good() }, Code::BadRequest),
        (
            "negative batch",
            ReceiveMessageRequest { batch_size: i32::MIN, ..good() },
            Code::BadRequest,
        ),
        (
            "huge batch",
            ReceiveMessageRequest { batch_size: i32::MAX, ..good() },
            Code::MessageNotFound,
        ),
        (
            "no lease",
            ReceiveMessageRequest { invisible_duration: None, ..good() },
            Code::IllegalInvisibleTime,
        ),
        (
            "endless lease",
            ReceiveMessageRequest { invisible_duration: seconds(i64::MAX, i32::MAX), ..good() },
            Code::IllegalInvisibleTime,
        ),
        (
            "negative poll",
            ReceiveMessageRequest { long_polling_timeout: seconds(-1, 0), ..good() },
            Code::IllegalPollingTime,
        ),
        (
            "unknown filter",
            ReceiveMessageRequest { filter_expression: filter(42, "*"), ..good() },
            Code::IllegalFilterExpression,
        ),
        (
            "endless filter",
            ReceiveMessageRequest { filter_expression: filter(1, &"a||".repeat(99_999)), ..good() },
            Code::IllegalFilterExpression,
        ),
        (
            "no filter",
            ReceiveMessageRequest { filter_expression: None, ..good() },
            Code::MessageNotFound,
        ),
        (
            "hostile attempt id",
            ReceiveMessageRequest { attempt_id: Some("\u{0}".repeat(10_000)), ..good() },
            Code::MessageNotFound,
        ),
    ];
    for name in names() {
        let request = ReceiveMessageRequest { message_queue: queue(name), ..good() };
        rows.push(("bad topic", request, Code::IllegalTopic));
    }
    for (row, request, expected) in rows {
        assert_eq!(fixture.receive(request).await.code(), expected, "{row}");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn a_call_without_a_client_id_is_told_so() {
    let fixture = Fixture::start().await;
    macro_rules! nameless {
        ($($rpc:ident: $request:ident,)*) => {$(
            let request = Request::new($request::default());
            let answer = fixture.client.clone().$rpc(request).await.unwrap().into_inner();
            assert_eq!(code(&answer.status), Code::ClientIdRequired, stringify!($rpc));
        )*};
    }
    nameless!(
        query_route: QueryRouteRequest,
        query_assignment: QueryAssignmentRequest,
        heartbeat: HeartbeatRequest,
        notify_client_termination: NotifyClientTerminationRequest,
        send_message: SendMessageRequest,
        ack_message: AckMessageRequest,
        change_invisible_duration: ChangeInvisibleDurationRequest,
        end_transaction: EndTransactionRequest,
        forward_message_to_dead_letter_queue: ForwardMessageToDeadLetterQueueRequest,
        recall_message: RecallMessageRequest,
        sync_lite_subscription: SyncLiteSubscriptionRequest,
        update_offset: UpdateOffsetRequest,
        get_offset: GetOffsetRequest,
        query_offset: QueryOffsetRequest,
    );
    let request = Request::new(ReceiveMessageRequest::default());
    let stream = fixture.client.clone().receive_message(request).await.unwrap();
    assert_eq!(frames(stream.into_inner()).await.code(), Code::ClientIdRequired);
    fixture.stop().await;
}

#[tokio::test]
async fn what_is_not_built_says_so_in_its_status() {
    let fixture = Fixture::start().await;
    macro_rules! not_built {
        ($($rpc:ident: $request:ident,)*) => {$(
            let request = call($request::default());
            let answer = fixture.client.clone().$rpc(request).await.unwrap().into_inner();
            assert_eq!(code(&answer.status), Code::NotImplemented, stringify!($rpc));
            let text = answer.status.unwrap().message;
            assert!(text.ends_with("not supported yet"), "{text}");
        )*};
    }
    not_built!(
        forward_message_to_dead_letter_queue: ForwardMessageToDeadLetterQueueRequest,
        recall_message: RecallMessageRequest,
        sync_lite_subscription: SyncLiteSubscriptionRequest,
        update_offset: UpdateOffsetRequest,
        get_offset: GetOffsetRequest,
        query_offset: QueryOffsetRequest,
    );
    let mut client = fixture.client.clone();
    let blank = client.end_transaction(call(EndTransactionRequest::default())).await.unwrap();
    assert_eq!(code(&blank.into_inner().status), Code::InvalidTransactionId);
    let ended = EndTransactionRequest { transaction_id: "t".into(), ..Default::default() };
    let ended = client.end_transaction(call(ended)).await.unwrap();
    assert_eq!(code(&ended.into_inner().status), Code::NotImplemented);
    let pull = PullMessageRequest { offset: 17, ..PullMessageRequest::default() };
    let mut frames = client.pull_message(call(pull)).await.unwrap().into_inner();
    let first = frames.message().await.unwrap().unwrap().content.unwrap();
    let pull_message_response::Content::Status(status) = first else { panic!("{first:?}") };
    assert_eq!(status.code(), Code::NotImplemented);
    let second = frames.message().await.unwrap().unwrap().content.unwrap();
    assert_eq!(second, pull_message_response::Content::NextOffset(17));
    assert!(frames.message().await.unwrap().is_none());
    fixture.stop().await;
}

#[tokio::test]
async fn admin_calls_say_that_they_are_not_built() {
    let fixture = Fixture::start().await;
    let url = format!("http://127.0.0.1:{}", fixture.address.port);
    let mut admin = AdminClient::connect(url).await.unwrap();
    let answer = admin.describe_topic_status(DescribeTopicStatusRequest::default()).await.unwrap();
    assert_eq!(code(&answer.into_inner().status), Code::NotImplemented);
    let answer = admin.query_message(ListMessageRequest::default()).await.unwrap();
    assert_eq!(code(&answer.into_inner().status), Code::NotImplemented);
    let answer = admin.change_log_level(ChangeLogLevelRequest { level: 99 }).await.unwrap();
    assert!(answer.into_inner().remark.contains("NOT_IMPLEMENTED"));
    fixture.stop().await;
}

#[tokio::test]
async fn bad_acks_and_changes_have_their_codes() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let ack =
        |entries| AckMessageRequest { group: resource(GROUP), topic: resource(TOPIC), entries };
    let entry = |handle: &str| AckMessageEntry {
        message_id: "i".repeat(10_000),
        receipt_handle: handle.into(),
        lite_topic: Some("l".into()),
    };
    for (row, entries, expected) in [
        ("none", vec![], Code::InternalServerError),
        ("empty handle", vec![entry("")], Code::InvalidReceiptHandle),
        ("long handle", vec![entry(&"f".repeat(1 << 20))], Code::InvalidReceiptHandle),
        ("odd handle", vec![entry("broker-a.ö\u{0}")], Code::InvalidReceiptHandle),
        ("foreign handle", vec![entry("broker-z.00")], Code::InvalidReceiptHandle),
        ("too many", vec![AckMessageEntry::default(); 257], Code::BadRequest),
    ] {
        let answer = fixture.client.clone().ack_message(call(ack(entries))).await.unwrap();
        assert_eq!(code(&answer.into_inner().status), expected, "{row}");
    }
    for (row, duration, expected) in [
        ("negative", Some((-1, 0)), Code::IllegalInvisibleTime),
        ("endless", Some((i64::MAX, i32::MAX)), Code::IllegalInvisibleTime),
        ("missing is 0", None, Code::InvalidReceiptHandle),
    ] {
        let request = ChangeInvisibleDurationRequest {
            group: resource(GROUP),
            topic: resource(TOPIC),
            invisible_duration: duration
                .map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
            ..ChangeInvisibleDurationRequest::default()
        };
        let answer = fixture.client.clone().change_invisible_duration(call(request)).await;
        assert_eq!(code(&answer.unwrap().into_inner().status), expected, "{row}");
    }
    fixture.stop().await;
}

#[tokio::test]
async fn hostile_messages_are_refused_and_others_still_stored() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    let with = |change: fn(&mut Message)| {
        let mut message = message("a");
        change(&mut message);
        message
    };
    let system = |message: &mut Message| message.system_properties.take().unwrap();
    let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
    let mut odd_times = message("odd times");
    odd_times.system_properties.as_mut().unwrap().born_timestamp = time(i64::MAX, i32::MIN);
    let mut early = message("early");
    early.system_properties.as_mut().unwrap().delivery_timestamp = time(i64::MIN, i32::MIN);
    for (row, hostile, expected) in [
        ("no system properties", with(|m| m.system_properties = None), Code::IllegalMessageId),
        ("nothing", Message::default(), Code::IllegalTopic),
        (
            "many properties",
            with(|m| {
                m.user_properties =
                    (0..10_000).map(|n| (n.to_string(), String::new())).collect::<HashMap<_, _>>();
            }),
            Code::MessagePropertiesTooLarge,
        ),
        (
            "many keys",
            with(|m| m.system_properties.as_mut().unwrap().keys = vec!["k".into(); 20_000]),
            Code::MessagePropertiesTooLarge,
        ),
        (
            "16 KiB of one-byte keys",
            with(|m| m.system_properties.as_mut().unwrap().keys = vec!["k".into(); 16_384]),
            Code::Ok,
        ),
        (
            "unknown numbers",
            with(|m| {
                let system = m.system_properties.as_mut().unwrap();
                system.message_type = 99;
                system.queue_id = i32::MIN;
                system.queue_offset = Some(i64::MIN);
                system.delivery_attempt = Some(i32::MAX);
                system.receipt_handle = Some("x".into());
            }),
            Code::Ok,
        ),
        ("odd times", odd_times, Code::Ok),
        ("early delivery", early, Code::NotImplemented),
    ] {
        let answer = fixture.send(vec![hostile]).await;
        assert_eq!(code(&answer.status), expected, "{row}: {:?}", answer.status);
    }
    let mut kept = message("still here");
    let properties = system(&mut kept);
    kept.system_properties = Some(properties);
    fixture.store(vec![kept]).await;
    let received = fixture.receive(poll(LONG, LEASE)).await;
    assert!(received.bodies().contains(&"still here"));
    fixture.stop().await;
}
