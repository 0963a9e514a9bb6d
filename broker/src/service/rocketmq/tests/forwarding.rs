//! Two broker groups: calls about what the other one owns go to its leader.

use std::collections::BTreeSet;

use drumlin_proto::forward::FORWARDED_BY;
use drumlin_proto::ids::TopicName;
use drumlin_proto::native::forwarding_client::ForwardingClient;
use drumlin_proto::native::{AliveClient, AliveRequest, GroupRoute, Listener, NodeRoute};
use drumlin_proto::route::place_of_message_group;

use super::*;
use crate::command::{Command, TopicType};

/// Broker groups a and b, which hold a topic with one queue each and know each other.
async fn pair() -> (Fixture, Fixture) {
    let a = Fixture::start().await;
    let group = BrokerGroupName::parse("broker-b").unwrap();
    let b = Fixture::start_with(|config| {
        config.broker_group = group.clone();
        // Each defines what it is asked for: what copies have to do with it is tested with whole
        // brokers (`broker/several_groups.rs`).
        config.catalog_group = group.clone();
        config.node = "broker-b-0".into();
    })
    .await;
    for (fixture, other) in [(&a, &b), (&b, &a)] {
        let own = |fixture: &Fixture| fixture.edge.context.config.broker_group.clone();
        let mut shares = vec![(own(&a), 1), (own(&b), 1)];
        shares.sort();
        let name = TopicName::parse(TOPIC).unwrap();
        let create = Command::CreateTopic { name, kind: TopicType::Mixed, shares };
        fixture.edge.replica().propose(Item::Command(create), None).await.unwrap();
        let advertised = Some(other.address.clone());
        let listeners = vec![Listener { name: "external".into(), advertised }];
        let node = NodeRoute { node: "n".into(), leader: true, listeners };
        let route = GroupRoute {
            broker_group: own(other).to_string(),
            group_uuid: String::new(),
            term: 1,
            nodes: vec![node],
        };
        fixture.others.send_replace(Arc::new(vec![route]));
    }
    (a, b)
}

/// A message group whose queue lies on this one of the two broker groups.
fn message_group_on(share: usize) -> String {
    let on = |name: &String| place_of_message_group(name, &[1, 1]).map(|(at, _)| at) == Some(share);
    (0..).map(|n| format!("group-{n}")).find(on).unwrap()
}

fn poll_of(broker_group: &str) -> ReceiveMessageRequest {
    let mut poll = poll(Duration::from_secs(5), Duration::from_secs(30));
    let broker = Broker { name: broker_group.into(), ..Broker::default() };
    poll.message_queue.as_mut().unwrap().broker = Some(broker);
    poll
}

#[tokio::test]
async fn a_message_group_is_stored_by_its_owner_wherever_it_arrives() {
    let (a, b) = pair().await;
    let (on_a, on_b) = (message_group_on(0), message_group_on(1));
    for n in 0..4 {
        let sent = a.store(vec![grouped(&n.to_string(), &on_b)]).await;
        assert_eq!(sent.entries[0].offset, n, "in the order of the sends");
        b.store(vec![grouped(&n.to_string(), &on_a)]).await;
    }
    a.store(vec![message("anywhere")]).await;
    // Asked of either, each broker group gives what it holds.
    let mut handles = Vec::new();
    for (asked, owner, expected) in [(&a, "broker-b", 4), (&b, "broker-b", 0), (&b, "broker-a", 5)]
    {
        if expected == 0 {
            continue;
        }
        let received = asked.receive(poll_of(owner)).await;
        assert_eq!(received.messages.len(), expected, "of {owner}");
        handles.extend(received.messages);
    }
    let owners: BTreeSet<&str> =
        handles.iter().map(|m| system(m).receipt_handle().split('.').next().unwrap()).collect();
    assert_eq!(owners, ["broker-a", "broker-b"].into());
    let all: Vec<&Message> = handles.iter().collect();
    let acked = b.ack_all(&all).await;
    assert_eq!(code(&acked.status), Code::Ok, "{acked:?}");
    assert_eq!(acked.entries.len(), 9);
    let route = {
        let request = QueryRouteRequest { topic: resource(TOPIC), endpoints: None };
        a.client.clone().query_route(call(request)).await.unwrap().into_inner()
    };
    let ports: Vec<i32> = route
        .message_queues
        .iter()
        .map(|queue| queue.broker.clone().unwrap().endpoints.unwrap().addresses[0].port)
        .collect();
    let port = |fixture: &Fixture| i32::try_from(fixture.address.port).unwrap();
    assert_eq!(ports, [port(&a), port(&b)]);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_call_that_was_sent_on_is_sent_on_no_further() {
    let (a, b) = pair().await;
    let request = SendMessageRequest { messages: vec![grouped("x", &message_group_on(1))] };
    let mut sent_on = call(request);
    sent_on.metadata_mut().insert(FORWARDED_BY, "broker-c-0".parse().unwrap());
    let answer = a.client.clone().send_message(sent_on).await.unwrap();
    assert!(answer.metadata().contains_key(NOT_LED), "whoever sent it looks elsewhere");
    assert_eq!(code(&answer.into_inner().status), Code::HaNotAvailable);
    b.stop().await;
    let gone = SendMessageRequest { messages: vec![grouped("x", &message_group_on(1))] };
    let mut hasty = call(gone);
    hasty.set_timeout(Duration::from_secs(1));
    let answer = a.client.clone().send_message(hasty).await.unwrap().into_inner();
    assert_eq!(code(&answer.status), Code::HaNotAvailable, "its owner cannot be reached");
    assert_eq!(answer.entries.len(), 1);
    a.stop().await;
}

#[tokio::test]
async fn a_beat_keeps_clients_of_other_nodes_alive() {
    let fixture = Fixture::start().await;
    let address = format!("http://127.0.0.1:{}", fixture.address.port);
    let client = AliveClient {
        client_id: "far".into(),
        client_type: ClientType::PushConsumer.into(),
        consumer_groups: vec!["g1".into(), "not a name".into(), "g2".into()],
    };
    let mut beats = ForwardingClient::connect(address).await.unwrap();
    beats.alive(AliveRequest { clients: vec![client] }).await.unwrap();
    let known = fixture.edge.clients().get("far").unwrap();
    assert_eq!(known.client_type, ClientType::PushConsumer);
    assert_eq!(known.groups.len(), 2);
    fixture.stop().await;
}
