//! Routes on the wire: what both nameservers and brokers answer, and where a message goes.
//!
//! *Route order* is the order of a topic's queues over all its broker groups: the groups by name,
//! interleaved (a 0, b 0, a 1, b 1, ...). Clients and servers count queues in it.

use std::fmt;
use std::net::IpAddr;

use crate::ids::BrokerGroupName;
use crate::native::{self, TopicRoute, TopicType};
use crate::rocketmq::{self, AddressScheme, MessageType, Permission};

/// As a URL has it, so that it can be dialled and read: an IPv6 literal stands in brackets.
impl fmt::Display for native::Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') && !self.host.starts_with('[') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Which of a topic's `queue_count` queues, counted over all broker groups in route order, holds a
/// message group. Stable for ever: order within a message group depends on it.
///
/// CRC-32 of the UTF-8 message group, modulo the count.
pub fn queue_of_message_group(message_group: &str, queue_count: u32) -> u32 {
    crc32fast::hash(message_group.as_bytes()) % queue_count.max(1)
}

/// All queues of a topic in route order, as (broker group, queue id) where the first is an index
/// into `queue_counts`, the number of queues on each broker group by ascending group name.
pub fn queues_in_route_order(queue_counts: &[u32]) -> impl Iterator<Item = (usize, u32)> + '_ {
    let rounds = queue_counts.iter().copied().max().unwrap_or(0);
    (0..rounds).flat_map(move |queue| {
        (0..queue_counts.len())
            .filter(move |group| queue_counts.get(*group).is_some_and(|count| queue < *count))
            .map(move |group| (group, queue))
    })
}

/// The place of a message group among a topic's queues: (broker group, queue id) as in
/// [`queues_in_route_order`]. `None` if there are no queues.
///
/// The counts are those of the topic's definition, also of groups that are down just now.
pub fn place_of_message_group(message_group: &str, queue_counts: &[u32]) -> Option<(usize, u32)> {
    let total: u32 = queue_counts.iter().fold(0, |sum, count| sum.saturating_add(*count));
    let chosen = usize::try_from(queue_of_message_group(message_group, total)).ok()?;
    queues_in_route_order(queue_counts).nth(chosen)
}

/// What separates a broker group's name from the rest of a receipt handle; no name contains it.
pub const HANDLE_SEPARATOR: char = '.';

/// The broker group that gave a receipt handle: its text up to the first [`HANDLE_SEPARATOR`].
///
/// Every process can find the owner of a handle by this; the rest is the owner's business.
pub fn broker_group_of_handle(receipt_handle: &str) -> Option<BrokerGroupName> {
    let (name, _) = receipt_handle.split_once(HANDLE_SEPARATOR)?;
    BrokerGroupName::parse(name).ok()
}

/// The name that a topic or consumer group has inside: its namespace in front where one is given,
/// in the resource or else in the call's `x-mq-namespace` header.
pub fn name_with_namespace(resource: &rocketmq::Resource, header_namespace: &str) -> String {
    let own = resource.resource_namespace.as_str();
    let namespace = if own.is_empty() { header_namespace } else { own };
    if namespace.is_empty() {
        resource.name.clone()
    } else {
        format!("{namespace}%{}", resource.name)
    }
}

/// Where a process is reached through its listener of this name, or through its only one.
pub fn address_of<'a>(
    listeners: &'a [native::Listener],
    name: &str,
) -> Option<&'a native::Address> {
    let named = listeners.iter().find(|listener| listener.name == name);
    let only = if let [only] = listeners { Some(only) } else { None };
    named.or(only).and_then(|listener| listener.advertised.as_ref())
}

/// One address with its scheme, as RocketMQ clients want it: exactly one address.
pub fn endpoints(address: &native::Address) -> rocketmq::Endpoints {
    let literal = address.host.trim_start_matches('[').trim_end_matches(']');
    let scheme = match literal.parse::<IpAddr>() {
        Ok(IpAddr::V4(_)) => AddressScheme::IPv4,
        Ok(IpAddr::V6(_)) => AddressScheme::IPv6,
        Err(_) => AddressScheme::DomainName,
    };
    let port = i32::try_from(address.port).unwrap_or(i32::MAX);
    let address = rocketmq::Address { host: literal.to_owned(), port };
    rocketmq::Endpoints { scheme: scheme.into(), addresses: vec![address] }
}

/// Whether endpoints that a client names could be dialled.
pub fn is_usable(endpoints: &rocketmq::Endpoints) -> bool {
    let usable = |address: &rocketmq::Address| {
        !address.host.trim().is_empty() && (1..=65535).contains(&address.port)
    };
    let scheme_known = AddressScheme::try_from(endpoints.scheme).is_ok();
    scheme_known && !endpoints.addresses.is_empty() && endpoints.addresses.iter().all(usable)
}

/// The message types that a topic of this type takes. Only types that are built are named, because
/// old clients stop on numbers that they do not know.
pub fn accept_message_types(topic_type: TopicType) -> Vec<i32> {
    let types: &[MessageType] = match topic_type {
        TopicType::Normal => &[MessageType::Normal],
        TopicType::Fifo => &[MessageType::Fifo],
        TopicType::Mixed => &[MessageType::Normal, MessageType::Fifo],
        TopicType::Unspecified => &[],
    };
    types.iter().map(|message_type| i32::from(*message_type)).collect()
}

fn message_queue(
    topic: &rocketmq::Resource,
    group: &native::QueueRoute,
    id: i32,
    accept_message_types: Vec<i32>,
) -> rocketmq::MessageQueue {
    rocketmq::MessageQueue {
        topic: Some(topic.clone()),
        id,
        permission: Permission::ReadWrite.into(),
        broker: Some(rocketmq::Broker {
            name: group.broker_group.clone(),
            id: 0,
            endpoints: group.leader.as_ref().map(endpoints),
        }),
        accept_message_types,
    }
}

/// Broker groups of a route that have an address, in order.
fn reachable(route: &TopicRoute) -> Vec<&native::QueueRoute> {
    route.queues.iter().filter(|group| group.leader.is_some()).collect()
}

/// A route as QueryRoute answers it: all queues in route order, those of broker groups without an
/// address left out. `topic` is echoed as the client named it.
pub fn message_queues(
    topic: &rocketmq::Resource,
    route: &TopicRoute,
) -> Vec<rocketmq::MessageQueue> {
    let groups = reachable(route);
    let counts: Vec<u32> = groups.iter().map(|group| group.queue_count).collect();
    let types = accept_message_types(route.r#type());
    queues_in_route_order(&counts)
        .filter_map(|(group, queue)| {
            let id = i32::try_from(queue).ok()?;
            Some(message_queue(topic, groups.get(group)?, id, types.clone()))
        })
        .collect()
}

/// A route as QueryAssignment answers it: for a FIFO consumer group every queue, else queue id -1
/// once per broker group.
pub fn assignments(
    topic: &rocketmq::Resource,
    route: &TopicRoute,
    fifo_group: bool,
) -> Vec<rocketmq::Assignment> {
    let queues = if fifo_group {
        message_queues(topic, route)
    } else {
        let types = accept_message_types(route.r#type());
        let groups = reachable(route).into_iter().filter(|group| group.queue_count > 0);
        groups.map(|group| message_queue(topic, group, -1, types.clone())).collect()
    };
    let assignment = |queue| rocketmq::Assignment { message_queue: Some(queue) };
    queues.into_iter().map(assignment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::QueueRoute;

    fn address(host: &str) -> native::Address {
        native::Address { host: host.into(), port: 8081 }
    }

    fn group(name: &str, queue_count: u32, host: Option<&str>) -> QueueRoute {
        QueueRoute { broker_group: name.into(), queue_count, leader: host.map(address), term: 1 }
    }

    fn route(topic_type: TopicType, queues: Vec<QueueRoute>) -> TopicRoute {
        TopicRoute {
            topic: "orders".into(),
            exists: true,
            r#type: topic_type.into(),
            topic_id: 1,
            queues,
        }
    }

    fn named(queues: &[rocketmq::MessageQueue]) -> Vec<(&str, i32)> {
        queues.iter().map(|q| (q.broker.as_ref().unwrap().name.as_str(), q.id)).collect()
    }

    #[test]
    fn broker_groups_are_interleaved() {
        let route =
            route(TopicType::Mixed, vec![group("a", 2, Some("h")), group("b", 3, Some("h"))]);
        let topic = rocketmq::Resource { name: "orders".into(), ..Default::default() };
        let queues = message_queues(&topic, &route);
        assert_eq!(named(&queues), [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2)]);
        assert_eq!(queues[0].topic.as_ref(), Some(&topic));
        assert_eq!(queues[0].permission(), Permission::ReadWrite);
        assert_eq!(queues[0].accept_message_types, [1, 2]);
        assert_eq!(queues[0].broker.as_ref().unwrap().id, 0);
    }

    #[test]
    fn broker_groups_without_an_address_are_left_out_of_answers() {
        let route = route(TopicType::Normal, vec![group("a", 2, None), group("b", 1, Some("h"))]);
        let topic = rocketmq::Resource::default();
        assert_eq!(named(&message_queues(&topic, &route)), [("b", 0)]);
        assert_eq!(assignments(&topic, &route, false).len(), 1);
    }

    #[test]
    fn scheme_follows_the_address() {
        for (host, scheme, told) in [
            ("127.0.0.1", AddressScheme::IPv4, "127.0.0.1"),
            ("::1", AddressScheme::IPv6, "::1"),
            ("[fe80::2]", AddressScheme::IPv6, "fe80::2"),
            ("localhost", AddressScheme::DomainName, "localhost"),
            ("1.2.3", AddressScheme::DomainName, "1.2.3"),
        ] {
            let told_endpoints = endpoints(&address(host));
            assert_eq!(told_endpoints.scheme(), scheme, "{host}");
            let expected = rocketmq::Address { host: told.into(), port: 8081 };
            assert_eq!(told_endpoints.addresses, [expected]);
        }
    }

    #[test]
    fn endpoints_need_a_host_and_a_port() {
        assert!(is_usable(&endpoints(&address("h"))));
        assert!(!is_usable(&endpoints(&address(" "))));
        assert!(!is_usable(&rocketmq::Endpoints::default()));
        let mut wrong = endpoints(&address("h"));
        wrong.scheme = 9;
        assert!(!is_usable(&wrong));
        let far = native::Address { port: 70_000, ..address("h") };
        assert!(!is_usable(&endpoints(&far)), "a port beyond 16 bits");
    }

    #[test]
    fn assignments_name_each_queue_only_for_fifo_groups() {
        let route =
            route(TopicType::Fifo, vec![group("a", 2, Some("h")), group("b", 1, Some("h"))]);
        let topic = rocketmq::Resource::default();
        let ids = |fifo| -> Vec<(String, i32)> {
            let queues = assignments(&topic, &route, fifo).into_iter();
            queues
                .map(|a| a.message_queue.unwrap())
                .map(|q| (q.broker.unwrap().name, q.id))
                .collect()
        };
        assert_eq!(ids(false), [("a".to_owned(), -1), ("b".to_owned(), -1)]);
        assert_eq!(ids(true), [("a".to_owned(), 0), ("b".to_owned(), 0), ("a".to_owned(), 1)]);
    }

    #[test]
    fn handles_lead_to_their_broker_group() {
        let named = |handle| broker_group_of_handle(handle).map(|name| name.to_string());
        assert_eq!(named("broker-a.17.x.y"), Some("broker-a".to_owned()));
        assert_eq!(named("broker-a"), None);
        assert_eq!(named(".17"), None);
        assert_eq!(named("bad name.17"), None);
    }

    #[test]
    fn namespace_of_the_resource_goes_before_that_of_the_header() {
        let resource = |namespace: &str| rocketmq::Resource {
            resource_namespace: namespace.into(),
            name: "orders".into(),
        };
        assert_eq!(name_with_namespace(&resource(""), ""), "orders");
        assert_eq!(name_with_namespace(&resource(""), "eu"), "eu%orders");
        assert_eq!(name_with_namespace(&resource("us"), "eu"), "us%orders");
    }

    #[test]
    fn message_groups_keep_their_place() {
        assert_eq!(queue_of_message_group("order-1", 16), 0xe0b3_7fef_u32 % 16);
        assert_eq!(place_of_message_group("order-1", &[]), None);
        assert_eq!(place_of_message_group("order-1", &[0, 0]), None);
        let place = place_of_message_group("order-1", &[8, 8]).unwrap();
        let at = usize::try_from(queue_of_message_group("order-1", 16)).unwrap();
        assert_eq!(queues_in_route_order(&[8, 8]).nth(at), Some(place));
    }
}
