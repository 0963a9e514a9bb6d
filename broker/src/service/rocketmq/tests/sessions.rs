//! Telemetry, Heartbeat, NotifyClientTermination.

use drumlin_proto::rocketmq::settings::PubSub;
use drumlin_proto::rocketmq::telemetry_command::Command as Wire;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::*;

fn push_settings() -> Settings {
    let subscription = Subscription {
        group: resource(GROUP),
        subscriptions: vec![SubscriptionEntry {
            topic: resource(TOPIC),
            expression: Some(FilterExpression { r#type: 1, expression: "*".into() }),
        }],
        ..Subscription::default()
    };
    Settings {
        client_type: Some(ClientType::PushConsumer.into()),
        pub_sub: Some(PubSub::Subscription(subscription)),
        ..Settings::default()
    }
}

fn command(settings: Settings) -> TelemetryCommand {
    TelemetryCommand { status: None, command: Some(Wire::Settings(settings)) }
}

type Sent = mpsc::Sender<TelemetryCommand>;

async fn telemetry(fixture: &Fixture) -> (Sent, Streaming<TelemetryCommand>) {
    let (sender, receiver) = mpsc::channel(4);
    let request = slow_call(ReceiverStream::new(receiver));
    let answers = fixture.client.clone().telemetry(request).await.unwrap().into_inner();
    (sender, answers)
}

async fn heartbeat(fixture: &Fixture, client_type: i32, group: Option<&str>) -> Code {
    let request = HeartbeatRequest { group: group.and_then(resource), client_type };
    let answer = fixture.client.clone().heartbeat(call(request)).await.unwrap();
    code(&answer.into_inner().status)
}

async fn terminate(fixture: &Fixture, group: Option<&str>) -> Code {
    let request = NotifyClientTerminationRequest { group: group.and_then(resource) };
    let answer = fixture.client.clone().notify_client_termination(call(request)).await.unwrap();
    code(&answer.into_inner().status)
}

#[tokio::test]
async fn the_settings_reply_carries_an_ok_status_and_settings_each_time() {
    let fixture = Fixture::start().await;
    let (sender, mut answers) = telemetry(&fixture).await;
    for _ in 0..2 {
        sender.send(command(push_settings())).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(code(&answer.status), Code::Ok);
        let Some(Wire::Settings(settings)) = answer.command else { panic!("no settings") };
        let Some(PubSub::Subscription(subscription)) = settings.pub_sub else {
            panic!("no subscription")
        };
        assert_eq!(subscription.long_polling_timeout, wire(Duration::from_secs(20)));
        assert!(settings.backoff_policy.is_some());
    }
    let known = fixture.edge.clients().get("client-1").unwrap();
    assert_eq!(known.client_type, ClientType::PushConsumer);
    fixture.stop().await;
}

#[tokio::test]
async fn refused_settings_get_a_status_and_then_a_stream_error() {
    let fixture = Fixture::start().await;
    let sql = FilterExpression { r#type: 2, expression: "a > 1".into() };
    let mut with_sql = push_settings();
    if let Some(PubSub::Subscription(subscription)) = &mut with_sql.pub_sub {
        subscription.subscriptions[0].expression = Some(sql);
    }
    for (settings, expected) in [
        (Settings { pub_sub: None, ..push_settings() }, Code::BadRequest),
        (Settings { client_type: Some(50), ..push_settings() }, Code::UnrecognizedClientType),
        (with_sql, Code::NotImplemented),
    ] {
        let (sender, mut answers) = telemetry(&fixture).await;
        sender.send(command(settings)).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(code(&answer.status), expected);
        assert_eq!(answer.command, None);
        let error = answers.message().await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }
    fixture.stop().await;
}

#[tokio::test]
async fn a_telemetry_stream_without_a_client_id_is_refused() {
    let fixture = Fixture::start().await;
    let (_sender, receiver) = mpsc::channel(1);
    let request = Request::new(ReceiverStream::new(receiver));
    let mut answers = fixture.client.clone().telemetry(request).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!(code(&answer.status), Code::ClientIdRequired);
    assert_eq!(answers.message().await.unwrap_err().code(), tonic::Code::InvalidArgument);
    fixture.stop().await;
}

#[tokio::test]
async fn answers_to_commands_are_taken_without_a_reply() {
    let fixture = Fixture::start().await;
    let (sender, mut answers) = telemetry(&fixture).await;
    let result = VerifyMessageResult { nonce: "unknown".into() };
    let stray = TelemetryCommand {
        status: Some(Status { code: 12345, message: String::new() }),
        command: Some(Wire::VerifyMessageResult(result)),
    };
    sender.send(stray).await.unwrap();
    sender.send(TelemetryCommand::default()).await.unwrap();
    sender.send(command(push_settings())).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert!(matches!(answer.command, Some(Wire::Settings(_))));
    fixture.stop().await;
}

#[tokio::test]
async fn heartbeats_register_clients_whose_settings_are_not_here() {
    let fixture = Fixture::start().await;
    let push = ClientType::PushConsumer.into();
    assert_eq!(heartbeat(&fixture, push, Some(GROUP)).await, Code::Ok);
    let known = fixture.edge.clients().get("client-1").unwrap();
    assert_eq!(known.client_type, ClientType::PushConsumer);
    assert_eq!(known.groups.first().unwrap().as_str(), GROUP);
    for client_type in 1..=6 {
        assert_eq!(heartbeat(&fixture, client_type, Some(GROUP)).await, Code::Ok);
    }
    assert_eq!(heartbeat(&fixture, 1, None).await, Code::Ok, "producers have no group");
    assert_eq!(heartbeat(&fixture, push, None).await, Code::IllegalConsumerGroup);
    assert_eq!(heartbeat(&fixture, push, Some("a.b")).await, Code::IllegalConsumerGroup);
    for odd in [0, 7, -1, i32::MAX] {
        assert_eq!(heartbeat(&fixture, odd, Some(GROUP)).await, Code::UnrecognizedClientType);
    }
    fixture.stop().await;
}

#[tokio::test]
async fn clients_without_settings_are_served_and_registered_by_their_calls() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    assert_eq!(fixture.edge.clients().get("client-1").unwrap().client_type, ClientType::Producer);
    let mut request = call_as("client-2", push_poll(LONG));
    request.set_timeout(Duration::from_secs(30));
    let stream = fixture.client.clone().receive_message(request).await.unwrap();
    assert_eq!(frames(stream.into_inner()).await.bodies(), ["a"]);
    let known = fixture.edge.clients().get("client-2").unwrap();
    assert_eq!(known.client_type, ClientType::PushConsumer);
    assert_eq!(known.groups.first().unwrap().as_str(), GROUP);
    fixture.stop().await;
}

#[tokio::test]
async fn termination_cleans_up_and_gives_leases_back_but_stream_end_does_not() {
    let fixture = Fixture::start().await;
    fixture.topic(TOPIC).await;
    fixture.store(vec![message("a")]).await;
    let (sender, mut answers) = telemetry(&fixture).await;
    sender.send(command(push_settings())).await.unwrap();
    answers.message().await.unwrap().unwrap();
    assert_eq!(fixture.receive(push_poll(LONG)).await.bodies(), ["a"]);
    drop(sender);
    assert!(answers.message().await.unwrap().is_none());
    assert!(fixture.edge.clients().get("client-1").is_some(), "the stream's end changes nothing");
    assert_eq!(terminate(&fixture, Some(GROUP)).await, Code::Ok);
    assert!(fixture.edge.clients().get("client-1").is_none());
    let again = fixture.receive(push_poll(LONG)).await;
    assert_eq!(system(&again.messages[0]).delivery_attempt(), 2);
    fixture.stop().await;
}

#[tokio::test]
async fn unknown_clients_cannot_leave_and_producers_name_no_group() {
    let fixture = Fixture::start().await;
    assert_eq!(terminate(&fixture, None).await, Code::UnrecognizedClientType);
    for group in [None, Some("")] {
        assert_eq!(heartbeat(&fixture, ClientType::Producer.into(), None).await, Code::Ok);
        assert_eq!(terminate(&fixture, group).await, Code::Ok);
    }
    assert_eq!(terminate(&fixture, Some("a.b")).await, Code::IllegalConsumerGroup);
    fixture.stop().await;
}
