//! A client's settings: checked, and answered with the server's values over what it sent. Pure.

use std::time::Duration;

use drumlin_proto::record::BODY_BYTES_MAX;
use drumlin_proto::rocketmq::retry_policy::Strategy;
use drumlin_proto::rocketmq::settings::PubSub;
use drumlin_proto::rocketmq::{
    ClientType, Code, CustomizedBackoff, ExponentialBackoff, Metric, Publishing, RetryPolicy,
    Settings, Subscription,
};

use super::status::Fault;
use super::validate;
use crate::service::clients::Sighting;

/// Messages of one poll at most.
pub(super) const RECEIVE_BATCH_MAX: i32 = 32;
/// Longest poll.
pub(super) const POLL_MAX: Duration = Duration::from_secs(20);
/// Attempts of one send, by the client.
const SEND_ATTEMPTS: i32 = 3;
/// Deliveries of one message before it is a dead letter.
const DELIVERY_ATTEMPTS: i32 = 17;
/// Pauses before the second, third, ... delivery.
const RETRY_SECONDS: [u32; 18] =
    [1, 5, 10, 30, 60, 120, 180, 240, 300, 360, 420, 480, 540, 600, 1200, 1800, 3600, 7200];
const LITE_SUBSCRIPTIONS_MAX: i32 = 2000;
const LITE_TOPIC_CHARS_MAX: i32 = 64;
/// Topics or subscriptions in one client's settings.
const TOPICS_MAX: usize = 1024;

/// Pause before a message is delivered again after its `attempt`th delivery.
pub(super) fn retry_pause(attempt: u16) -> Duration {
    let at = usize::from(attempt.saturating_sub(1)).min(RETRY_SECONDS.len() - 1);
    Duration::from_secs(RETRY_SECONDS.get(at).copied().map_or(0, u64::from))
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// Settings that were accepted.
#[derive(Debug)]
pub(super) struct Accepted {
    /// For the registration of the client.
    pub(super) sighting: Sighting,
    /// The answer.
    pub(super) settings: Settings,
}

/// Checks a client's settings and merges the server's into them.
pub(super) fn accept(mut settings: Settings, namespace: &str) -> Result<Accepted, Fault> {
    let unknown = |text: &str| Err(Fault::new(Code::UnrecognizedClientType, text));
    let client_type = settings.client_type.map(ClientType::try_from);
    let request_timeout = settings
        .request_timeout
        .as_ref()
        .and_then(validate::duration_ms)
        .map(Duration::from_millis);
    let mut sighting = Sighting { request_timeout, ..Sighting::default() };
    validate::client_properties(&settings.client_properties)?;
    let policy = match (&mut settings.pub_sub, client_type) {
        (None, _) => {
            let text = "the settings are neither of a publisher nor of a subscriber";
            return Err(Fault::new(Code::BadRequest, text));
        }
        (_, None | Some(Err(_) | Ok(ClientType::Unspecified))) => {
            return unknown("the client type is unset or unknown");
        }
        (Some(PubSub::Publishing(publishing)), Some(Ok(ClientType::Producer))) => {
            sighting.client_type = Some(ClientType::Producer);
            publisher(publishing, namespace)?
        }
        (Some(PubSub::Publishing(_)), Some(Ok(_))) => {
            return unknown("a consumer's settings cannot be those of a publisher");
        }
        (Some(PubSub::Subscription(_)), Some(Ok(ClientType::Producer))) => {
            return unknown("a producer's settings cannot be those of a subscriber");
        }
        (Some(PubSub::Subscription(subscription)), Some(Ok(client_type))) => {
            sighting.client_type = Some(client_type);
            subscriber(subscription, client_type, namespace, &mut sighting)?
        }
    };
    settings.backoff_policy = Some(policy);
    settings.metric = Some(Metric { on: false, endpoints: None });
    Ok(Accepted { sighting, settings })
}

fn bounded(count: usize) -> Result<(), Fault> {
    if count <= TOPICS_MAX {
        return Ok(());
    }
    Err(Fault::new(Code::BadRequest, format!("{count} topics, {TOPICS_MAX} are allowed")))
}

fn publisher(publishing: &mut Publishing, namespace: &str) -> Result<RetryPolicy, Fault> {
    bounded(publishing.topics.len())?;
    for topic in &publishing.topics {
        validate::topic_name(Some(topic), namespace)?;
    }
    publishing.max_body_size = i32::try_from(BODY_BYTES_MAX).unwrap_or(i32::MAX);
    publishing.validate_message_type = true;
    let backoff = ExponentialBackoff {
        initial: Some(prost_types::Duration { seconds: 0, nanos: 10_000_000 }),
        max: seconds(1),
        multiplier: 2.0,
    };
    Ok(RetryPolicy {
        max_attempts: SEND_ATTEMPTS,
        strategy: Some(Strategy::ExponentialBackoff(backoff)),
    })
}

fn subscriber(
    subscription: &mut Subscription,
    client_type: ClientType,
    namespace: &str,
    sighting: &mut Sighting,
) -> Result<RetryPolicy, Fault> {
    bounded(subscription.subscriptions.len())?;
    sighting.group = Some(validate::group_name(subscription.group.as_ref(), namespace)?);
    for entry in &subscription.subscriptions {
        validate::topic_name(entry.topic.as_ref(), namespace)?;
        validate::filter(entry.expression.as_ref())?;
    }
    // Ordered delivery is a property of the consumer group, and none has it yet.
    subscription.fifo = Some(false);
    subscription.receive_batch_size = Some(RECEIVE_BATCH_MAX);
    subscription.long_polling_timeout = seconds(i64::try_from(POLL_MAX.as_secs()).unwrap_or(20));
    if matches!(client_type, ClientType::LitePushConsumer | ClientType::LiteSimpleConsumer) {
        subscription.lite_subscription_quota = Some(LITE_SUBSCRIPTIONS_MAX);
        subscription.max_lite_topic_size = Some(LITE_TOPIC_CHARS_MAX);
    }
    let next = RETRY_SECONDS.iter().filter_map(|pause| seconds(i64::from(*pause))).collect();
    Ok(RetryPolicy {
        max_attempts: DELIVERY_ATTEMPTS,
        strategy: Some(Strategy::CustomizedBackoff(CustomizedBackoff { next })),
    })
}

#[cfg(test)]
mod tests {
    use drumlin_proto::rocketmq::{
        Address, Endpoints, FilterExpression, Resource, SubscriptionEntry, Ua,
    };

    use super::*;

    fn resource(name: &str) -> Option<Resource> {
        Some(Resource { resource_namespace: String::new(), name: name.into() })
    }

    fn entry(topic: &str, r#type: i32, expression: &str) -> SubscriptionEntry {
        let expression = FilterExpression { r#type, expression: expression.into() };
        SubscriptionEntry { topic: resource(topic), expression: Some(expression) }
    }

    fn base(client_type: ClientType, pub_sub: PubSub) -> Settings {
        let address = Address { host: "127.0.0.1".into(), port: 8081 };
        Settings {
            client_type: Some(client_type.into()),
            access_point: Some(Endpoints { scheme: 1, addresses: vec![address] }),
            request_timeout: seconds(3),
            user_agent: Some(Ua { version: "5.1.0".into(), ..Ua::default() }),
            pub_sub: Some(pub_sub),
            ..Settings::default()
        }
    }

    fn producer() -> Settings {
        let topics = vec![resource("orders").unwrap()];
        base(
            ClientType::Producer,
            PubSub::Publishing(Publishing { topics, ..Publishing::default() }),
        )
    }

    fn consumer(client_type: ClientType) -> Settings {
        let subscription = Subscription {
            group: resource("readers"),
            subscriptions: vec![entry("orders", 1, "a||b")],
            fifo: Some(true),
            long_polling_timeout: seconds(30),
            ..Subscription::default()
        };
        base(client_type, PubSub::Subscription(subscription))
    }

    fn subscription(settings: &Settings) -> &Subscription {
        match settings.pub_sub.as_ref().unwrap() {
            PubSub::Subscription(subscription) => subscription,
            PubSub::Publishing(_) => panic!("not a subscription"),
        }
    }

    fn code(settings: Settings) -> Code {
        accept(settings, "").map_or_else(|fault| fault.code, |_| Code::Ok)
    }

    #[test]
    fn what_the_client_sent_is_echoed() {
        for sent in [producer(), consumer(ClientType::SimpleConsumer)] {
            let told = accept(sent.clone(), "").unwrap().settings;
            assert_eq!(told.client_type, sent.client_type);
            assert_eq!(told.access_point, sent.access_point);
            assert_eq!(told.user_agent, sent.user_agent);
            assert_eq!(told.request_timeout, sent.request_timeout);
        }
        let sent = consumer(ClientType::PushConsumer);
        let told = accept(sent.clone(), "").unwrap().settings;
        assert_eq!(subscription(&told).subscriptions, subscription(&sent).subscriptions);
        assert_eq!(subscription(&told).group, subscription(&sent).group);
    }

    #[test]
    fn a_producer_is_told_body_size_and_exponential_backoff() {
        let accepted = accept(producer(), "").unwrap();
        let Some(PubSub::Publishing(publishing)) = accepted.settings.pub_sub else {
            panic!("not a publisher")
        };
        assert_eq!(publishing.max_body_size, 4_194_304);
        assert!(publishing.validate_message_type);
        let policy = accepted.settings.backoff_policy.unwrap();
        assert_eq!(policy.max_attempts, 3);
        let Some(Strategy::ExponentialBackoff(backoff)) = policy.strategy else {
            panic!("another strategy")
        };
        assert_eq!(backoff.initial.unwrap().nanos, 10_000_000);
        assert_eq!(backoff.max, seconds(1));
        assert!((backoff.multiplier - 2.0).abs() < f32::EPSILON);
        assert_eq!(accepted.settings.metric, Some(Metric { on: false, endpoints: None }));
        assert_eq!(accepted.sighting.request_timeout, Some(Duration::from_secs(3)));
    }

    #[test]
    fn every_consumer_type_is_told_poll_time_batch_and_backoff() {
        for client_type in [
            ClientType::PushConsumer,
            ClientType::SimpleConsumer,
            ClientType::PullConsumer,
            ClientType::LitePushConsumer,
            ClientType::LiteSimpleConsumer,
        ] {
            let accepted = accept(consumer(client_type), "").unwrap();
            let told = subscription(&accepted.settings);
            assert_eq!(told.fifo, Some(false));
            assert_eq!(told.receive_batch_size, Some(32));
            assert_eq!(told.long_polling_timeout, seconds(20));
            let policy = accepted.settings.backoff_policy.clone().unwrap();
            assert_eq!(policy.max_attempts, 17);
            let Some(Strategy::CustomizedBackoff(backoff)) = policy.strategy else {
                panic!("another strategy")
            };
            let pauses: Vec<i64> = backoff.next.iter().map(|pause| pause.seconds).collect();
            assert_eq!(pauses[..5], [1, 5, 10, 30, 60]);
            assert_eq!(pauses.len(), 18);
            assert_eq!(pauses[17], 7200);
            let lite = matches!(
                client_type,
                ClientType::LitePushConsumer | ClientType::LiteSimpleConsumer
            );
            assert_eq!(told.lite_subscription_quota, lite.then_some(2000));
            assert_eq!(told.max_lite_topic_size, lite.then_some(64));
            assert_eq!(accepted.settings.metric, Some(Metric { on: false, endpoints: None }));
            assert_eq!(accepted.sighting.client_type, Some(client_type));
        }
    }

    #[test]
    fn rust_simple_consumers_without_subscriptions_are_accepted() {
        let bare = Subscription { group: resource("readers"), ..Subscription::default() };
        let settings = base(ClientType::SimpleConsumer, PubSub::Subscription(bare));
        assert_eq!(code(Settings { access_point: None, ..settings }), Code::Ok);
    }

    #[test]
    fn a_namespace_goes_before_names() {
        let accepted = accept(consumer(ClientType::PushConsumer), "eu").unwrap();
        assert_eq!(accepted.sighting.group.unwrap().as_str(), "eu%readers");
    }

    #[test]
    fn faulty_settings_have_their_code() {
        let push = ClientType::PushConsumer;
        let with = |change: fn(&mut Subscription)| {
            let mut settings = consumer(ClientType::PushConsumer);
            if let Some(PubSub::Subscription(subscription)) = &mut settings.pub_sub {
                change(subscription);
            }
            settings
        };
        let publishing =
            |topics| PubSub::Publishing(Publishing { topics, ..Publishing::default() });
        let bad_topics = vec![resource("a.b").unwrap()];
        let mut labelled = producer();
        labelled.client_properties.insert("rocketmq.x".into(), "v".into());
        for (row, settings, expected) in [
            ("no pub_sub", Settings { pub_sub: None, ..producer() }, Code::BadRequest),
            ("no type", Settings { client_type: None, ..producer() }, Code::UnrecognizedClientType),
            (
                "type 0",
                Settings { client_type: Some(0), ..producer() },
                Code::UnrecognizedClientType,
            ),
            (
                "unknown type",
                Settings { client_type: Some(99), ..producer() },
                Code::UnrecognizedClientType,
            ),
            ("publishing consumer", base(push, publishing(vec![])), Code::UnrecognizedClientType),
            ("subscribing producer", consumer(ClientType::Producer), Code::UnrecognizedClientType),
            ("bad topic", base(ClientType::Producer, publishing(bad_topics)), Code::IllegalTopic),
            (
                "too many topics",
                base(
                    ClientType::Producer,
                    publishing(vec![resource("t").unwrap(); TOPICS_MAX + 1]),
                ),
                Code::BadRequest,
            ),
            ("no group", with(|s| s.group = None), Code::IllegalConsumerGroup),
            ("bad group", with(|s| s.group = resource("g.h")), Code::IllegalConsumerGroup),
            (
                "bad subscription",
                with(|s| s.subscriptions = vec![entry("", 1, "*")]),
                Code::IllegalTopic,
            ),
            (
                "bad filter",
                with(|s| s.subscriptions = vec![entry("t", 1, "a|b")]),
                Code::IllegalFilterExpression,
            ),
            (
                "SQL filter",
                with(|s| s.subscriptions = vec![entry("t", 2, "a > 1")]),
                Code::NotImplemented,
            ),
            ("reserved label", labelled, Code::InvalidClientProperties),
        ] {
            assert_eq!(code(settings), expected, "{row}");
        }
    }

    #[test]
    fn retry_pauses_follow_the_table() {
        assert_eq!(retry_pause(0), Duration::from_secs(1));
        assert_eq!(retry_pause(1), Duration::from_secs(1));
        assert_eq!(retry_pause(2), Duration::from_secs(5));
        assert_eq!(retry_pause(18), Duration::from_secs(7200));
        assert_eq!(retry_pause(u16::MAX), Duration::from_secs(7200));
    }
}
