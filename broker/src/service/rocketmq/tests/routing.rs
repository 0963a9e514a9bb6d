//! QueryRoute and QueryAssignment.

use super::*;

async fn route(fixture: &Fixture, topic: &str) -> QueryRouteResponse {
    let address = Address { host: "127.0.0.1".into(), port: 8081 };
    let endpoints = Some(Endpoints { scheme: 1, addresses: vec![address] });
    let request = QueryRouteRequest { topic: resource(topic), endpoints };
    fixture.client.clone().query_route(call(request)).await.unwrap().into_inner()
}

async fn assignment(fixture: &Fixture, topic: &str) -> QueryAssignmentResponse {
    let request =
        QueryAssignmentRequest { topic: resource(topic), group: resource(GROUP), endpoints: None };
    fixture.client.clone().query_assignment(call(request)).await.unwrap().into_inner()
}

#[tokio::test]
async fn queue_ids_start_at_zero_per_broker_and_entries_are_complete() {
    let fixture = Fixture::start().await;
    let queues = fixture.topic(TOPIC).await;
    let ids: Vec<i32> = queues.iter().map(|queue| queue.id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7]);
    for queue in &queues {
        assert_eq!(queue.topic, resource(TOPIC));
        assert_eq!(queue.permission(), Permission::ReadWrite);
        let types: Vec<i32> = vec![MessageType::Normal.into(), MessageType::Fifo.into()];
        assert_eq!(queue.accept_message_types, types);
        let broker = queue.broker.as_ref().unwrap();
        assert_eq!((broker.name.as_str(), broker.id), ("broker-a", 0));
        let endpoints = broker.endpoints.as_ref().unwrap();
        assert_eq!(endpoints.scheme(), AddressScheme::IPv4);
        let port = i32::try_from(fixture.address.port).unwrap();
        assert_eq!(endpoints.addresses, [Address { host: "127.0.0.1".into(), port }]);
    }
    assert_eq!(fixture.topic(TOPIC).await, queues, "the order is kept from answer to answer");
    fixture.stop().await;
}

#[tokio::test]
async fn a_query_creates_no_topic_where_that_is_switched_off() {
    let fixture = Fixture::start_with(|config| config.auto_create_topics = false).await;
    let answer = route(&fixture, TOPIC).await;
    let text = "CODE: 17  DESC: No topic route info in name server for the topic: orders";
    assert_eq!(answer.status.clone().unwrap().message, text);
    assert_eq!(code(&answer.status), Code::TopicNotFound);
    assert!(answer.message_queues.is_empty());
    fixture.stop().await;
}

#[tokio::test]
async fn derived_topics_are_never_created_by_a_query() {
    let fixture = Fixture::start().await;
    for topic in ["%DLQ%readers", "%RETRY%readers"] {
        assert_eq!(code(&route(&fixture, topic).await.status), Code::TopicNotFound);
    }
    fixture.stop().await;
}

#[tokio::test]
async fn concurrent_queries_create_a_topic_once() {
    let fixture = Fixture::start().await;
    let queries = (0..10).map(|_| route(&fixture, TOPIC));
    for answer in futures::future::join_all(queries).await {
        assert_eq!(code(&answer.status), Code::Ok);
        assert_eq!(answer.message_queues.len(), 8);
    }
    assert_eq!(fixture.edge.replica().view().state.catalog().definitions().len(), 1);
    fixture.stop().await;
}

#[tokio::test]
async fn too_many_creations_are_throttled() {
    let fixture = Fixture::start().await;
    let names: Vec<String> = (0..60).map(|n| format!("topic-{n}")).collect();
    let queries = names.iter().map(|name| route(&fixture, name));
    let answers = futures::future::join_all(queries).await;
    let throttled: Vec<_> = answers
        .iter()
        .filter(|answer| code(&answer.status) == Code::TooManyRequests)
        .map(|answer| answer.status.clone().unwrap().message)
        .collect();
    assert!(!throttled.is_empty());
    assert!(throttled[0].contains("topics were created"), "{throttled:?}");
    fixture.stop().await;
}

#[tokio::test]
async fn assignments_name_the_broker_once_and_are_stable() {
    let fixture = Fixture::start().await;
    assert_eq!(code(&assignment(&fixture, TOPIC).await.status), Code::TopicNotFound);
    let queues = fixture.topic(TOPIC).await;
    let first = assignment(&fixture, TOPIC).await;
    assert_eq!(code(&first.status), Code::Ok);
    assert_eq!(first.assignments.len(), 1);
    let queue = first.assignments[0].message_queue.as_ref().unwrap();
    assert_eq!(queue.id, -1);
    assert_eq!(queue.broker, queues[0].broker);
    assert_eq!(assignment(&fixture, TOPIC).await, first);
    fixture.stop().await;
}
