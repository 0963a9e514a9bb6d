//! Registrations and the clock in, routes out. It has no clock, no socket and no log line.
//!
//! Invariants: an address is given out only while its process is registered; a broker group's
//! leader is never one of an older term than the newest heard of; a broker group keeps the UUID it
//! was first seen with, until one comes that succeeds it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drumlin_proto::native::register_request::{Heartbeat, Hello, Topics};
use drumlin_proto::native::{
    Address, GroupRoute, Listener, NodeRoute, QueueRoute, Topic, TopicRoute, TopicType,
};
use drumlin_proto::route::address_of;

/// Broker groups that one table takes.
pub const GROUPS_MAX: usize = 256;
/// Nodes of one broker group, dead ones included.
pub const NODES_PER_GROUP_MAX: usize = 32;
/// Topics that one node may register: the brokers' own limit and room for derived ones.
pub const TOPICS_PER_NODE_MAX: usize = 40_000;
/// Named listeners of one node.
pub const LISTENERS_MAX: usize = 16;

/// How long silence is borne.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Silence after which a registration ends.
    pub expiry: Duration,
    /// Time that a broken stream has to come back before its address leaves the routes.
    pub broken_grace: Duration,
    /// Longest time after the start that remembered broker groups are waited for.
    pub start_wait: Duration,
}

/// What outlives a restart of the nameserver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub broker_group: String,
    pub group_uuid: String,
    pub term: u64,
}

/// One registration stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(u64);

/// Why a registration, or a message on its stream, is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("broker group {group} has UUID {known}, not {told}")]
    OtherGroupUuid { group: String, known: String, told: String },
    #[error("{what}: {count} are more than the {count_max} allowed")]
    TooMany { what: &'static str, count: usize, count_max: usize },
    #[error("another stream has taken over this registration")]
    Replaced,
}

/// A node whose registration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    pub broker_group: String,
    pub node: String,
    pub why: WhyGone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhyGone {
    Silent,
    StreamBroken,
}

#[derive(Debug)]
struct Node {
    listeners: Vec<Listener>,
    /// `None` once the registration has ended.
    stream: Option<StreamId>,
    heard: Instant,
    broken_at: Option<Instant>,
    /// Term and whether it leads, once told.
    beat: Option<(u64, bool)>,
    /// Version of `topics`; `None` until all were told.
    topics_version: Option<u64>,
    topics: BTreeMap<String, Arc<Topic>>,
}

impl Node {
    /// Registered, and all that a route needs was told.
    fn is_live(&self) -> bool {
        self.stream.is_some() && self.beat.is_some() && self.topics_version.is_some()
    }

    fn leads_in(&self, term: u64) -> bool {
        self.is_live() && self.beat == Some((term, true))
    }

    /// May stand in: it follows, or it leads in the newest term.
    fn serves_in(&self, term: u64) -> bool {
        self.is_live() && self.beat.is_some_and(|(told, leader)| !leader || told == term)
    }

    fn address(&self, listener: &str) -> Option<&Address> {
        address_of(&self.listeners, listener)
    }

    /// When the registration ends if nothing is heard.
    fn deadline(&self, timing: &Timing) -> Option<Instant> {
        self.stream?;
        let silent = self.heard + timing.expiry;
        Some(self.broken_at.map_or(silent, |at| silent.min(at + timing.broken_grace)))
    }
}

#[derive(Debug)]
struct Group {
    uuid: String,
    catalog: bool,
    /// Newest heard of, from whichever node.
    term: u64,
    nodes: BTreeMap<String, Node>,
}

impl Group {
    fn leader(&self) -> Option<(&String, &Node)> {
        self.nodes.iter().find(|(_, node)| node.leads_in(self.term))
    }

    /// The leader, or else a live replica to stand in, that is reachable through `listener`.
    fn address(&self, listener: &str) -> Option<&Address> {
        let leader = self.leader().and_then(|(_, node)| node.address(listener));
        let serving = self.nodes.values().filter(|node| node.serves_in(self.term));
        leader.or_else(|| serving.filter_map(|node| node.address(listener)).next())
    }

    /// The node whose topics count: the leader, else the live one that knows most, else (so that
    /// topics do not vanish with their last process) the dead one that knew most.
    fn voice(&self) -> Option<&Node> {
        let told = || self.nodes.values().filter(|node| node.topics_version.is_some());
        let leader = self.leader().map(|(_, node)| node);
        let live = || told().filter(|node| node.is_live()).max_by_key(|node| node.topics_version);
        leader.or_else(live).or_else(|| told().max_by_key(|node| node.topics_version))
    }

    fn is_live(&self) -> bool {
        self.nodes.values().any(Node::is_live)
    }
}

/// Where every topic is, as far as brokers have told.
#[derive(Debug)]
pub struct RouteTable {
    timing: Timing,
    started: Instant,
    groups: BTreeMap<String, Group>,
    streams: BTreeMap<StreamId, (String, String)>,
    awaited: Vec<String>,
    last_stream: u64,
    generation: u64,
}

impl RouteTable {
    /// A table that knows the UUIDs and terms of `remembered` and waits for those groups.
    pub fn new(timing: Timing, remembered: Vec<Remembered>, now: Instant) -> Self {
        let awaited = remembered.iter().map(|group| group.broker_group.clone()).collect();
        let group = |known: Remembered| {
            let nodes = BTreeMap::new();
            let group = Group { uuid: known.group_uuid, catalog: false, term: known.term, nodes };
            (known.broker_group, group)
        };
        Self {
            timing,
            started: now,
            groups: remembered.into_iter().map(group).collect(),
            streams: BTreeMap::new(),
            awaited,
            last_stream: 0,
            generation: 0,
        }
    }

    /// Rises with every change that a route or a broker could see.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What to remember, by broker group name.
    pub fn remembered(&self) -> Vec<Remembered> {
        let remembered = |(name, group): (&String, &Group)| Remembered {
            broker_group: name.clone(),
            group_uuid: group.uuid.clone(),
            term: group.term,
        };
        self.groups.iter().map(remembered).collect()
    }

    /// Whether absence means anything yet: the remembered groups are back, or were waited for.
    pub fn is_settled(&self, now: Instant) -> bool {
        let back = |name: &String| self.groups.get(name).is_some_and(Group::is_live);
        now >= self.started + self.timing.start_wait || self.awaited.iter().all(back)
    }

    /// Whether any broker group was ever heard of.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Begins a registration; one of the same node that is there already is taken over.
    pub fn hello(&mut self, hello: &Hello, now: Instant) -> Result<StreamId, Refusal> {
        bounded("listeners", hello.listeners.len(), LISTENERS_MAX)?;
        self.succeed(hello);
        let known = self.groups.get(&hello.broker_group);
        if let Some(group) = known.filter(|group| group.uuid != hello.group_uuid) {
            return Err(Refusal::OtherGroupUuid {
                group: hello.broker_group.clone(),
                known: group.uuid.clone(),
                told: hello.group_uuid.clone(),
            });
        }
        match known {
            None => bounded("broker groups", self.groups.len() + 1, GROUPS_MAX)?,
            Some(group) if !group.nodes.contains_key(&hello.node) => {
                bounded("nodes of a broker group", group.nodes.len() + 1, NODES_PER_GROUP_MAX)?;
            }
            Some(_) => {}
        }
        self.last_stream += 1;
        let stream = StreamId(self.last_stream);
        let place = (hello.broker_group.clone(), hello.node.clone());
        self.streams.retain(|_, known| *known != place);
        self.streams.insert(stream, place);
        let group = self.groups.entry(hello.broker_group.clone()).or_insert_with(|| Group {
            uuid: hello.group_uuid.clone(),
            catalog: hello.catalog,
            term: 0,
            nodes: BTreeMap::new(),
        });
        group.catalog = hello.catalog;
        let node = group.nodes.entry(hello.node.clone()).or_insert_with(|| Node {
            listeners: Vec::new(),
            stream: None,
            heard: now,
            broken_at: None,
            beat: None,
            topics_version: None,
            topics: BTreeMap::new(),
        });
        if node.stream.is_none() {
            node.beat = None;
        }
        node.listeners.clone_from(&hello.listeners);
        node.stream = Some(stream);
        node.heard = now;
        node.broken_at = None;
        self.generation += 1;
        Ok(stream)
    }

    /// A UUID that was made to succeed the known one takes its place. Those that still have the old
    /// one are out: what they say is refused from now on, and so is their next hello.
    fn succeed(&mut self, hello: &Hello) {
        let Some(group) = self.groups.get_mut(&hello.broker_group) else { return };
        if !hello.succeeds_group_uuids.contains(&group.uuid) {
            return;
        }
        group.uuid.clone_from(&hello.group_uuid);
        group.nodes.clear();
        self.streams.retain(|_, (broker_group, _)| *broker_group != hello.broker_group);
        self.generation += 1;
    }

    fn node(&mut self, stream: StreamId) -> Result<(&mut Group, String), Refusal> {
        let (group, node) = self.streams.get(&stream).cloned().ok_or(Refusal::Replaced)?;
        let group = self.groups.get_mut(&group).ok_or(Refusal::Replaced)?;
        Ok((group, node))
    }

    /// Takes a heartbeat. Answers whether the node must tell all its topics again.
    pub fn heartbeat(
        &mut self,
        stream: StreamId,
        beat: &Heartbeat,
        now: Instant,
    ) -> Result<bool, Refusal> {
        let (group, name) = self.node(stream)?;
        let term_before = group.term;
        group.term = group.term.max(beat.term);
        let term = group.term;
        let node = group.nodes.get_mut(&name).ok_or(Refusal::Replaced)?;
        let was = node.beat.replace((beat.term, beat.leader));
        node.heard = now;
        let resend = node.topics_version != Some(beat.topics_version);
        if was != node.beat || term != term_before {
            self.generation += 1;
        }
        Ok(resend)
    }

    /// Takes all topics of a node, or what changed of them.
    pub fn topics(&mut self, stream: StreamId, told: Topics, now: Instant) -> Result<(), Refusal> {
        let (group, name) = self.node(stream)?;
        let node = group.nodes.get_mut(&name).ok_or(Refusal::Replaced)?;
        node.heard = now;
        if told.full {
            bounded("topics", told.changed.len(), TOPICS_PER_NODE_MAX)?;
            node.topics.clear();
        } else if node.topics_version.is_none_or(|known| known > told.version) {
            // Cannot be applied to what is known; the next heartbeat asks for all.
            return Ok(());
        }
        for topic in told.changed {
            node.topics.insert(topic.name.clone(), Arc::new(topic));
        }
        for name in &told.deleted {
            node.topics.remove(name);
        }
        bounded("topics", node.topics.len(), TOPICS_PER_NODE_MAX)?;
        node.topics_version = Some(told.version);
        self.generation += 1;
        Ok(())
    }

    /// The stream ended; its node has a moment to come back.
    pub fn stream_broken(&mut self, stream: StreamId, now: Instant) {
        if let Ok((group, name)) = self.node(stream)
            && let Some(node) = group.nodes.get_mut(&name)
        {
            node.broken_at = Some(now);
        }
        self.streams.remove(&stream);
    }

    /// When [`Self::on_tick`] has something to do, if nothing is heard until then.
    pub fn next_deadline(&self) -> Option<Instant> {
        let nodes = self.groups.values().flat_map(|group| group.nodes.values());
        nodes.filter_map(|node| node.deadline(&self.timing)).min()
    }

    /// Ends the registrations that were silent or broken for too long.
    pub fn on_tick(&mut self, now: Instant) -> Vec<Gone> {
        let mut gone = Vec::new();
        for (group_name, group) in &mut self.groups {
            for (name, node) in &mut group.nodes {
                if node.deadline(&self.timing).is_none_or(|deadline| now < deadline) {
                    continue;
                }
                let broken = node.broken_at.is_some_and(|at| now >= at + self.timing.broken_grace);
                let why = if broken { WhyGone::StreamBroken } else { WhyGone::Silent };
                node.stream = None;
                node.broken_at = None;
                self.streams.retain(|_, (of, known)| of != group_name || known != name);
                gone.push(Gone { broker_group: group_name.clone(), node: name.clone(), why });
            }
        }
        if !gone.is_empty() {
            self.generation += 1;
        }
        gone
    }

    /// The definition of a topic: the catalog group's word while it is there, else the newest
    /// that any broker group has told.
    pub fn topic(&self, name: &str) -> Option<Arc<Topic>> {
        let catalog = self.groups.values().find(|group| group.catalog && group.is_live());
        if let Some(voice) = catalog.and_then(Group::voice) {
            return voice.topics.get(name).cloned();
        }
        let voices = self.groups.values().filter_map(Group::voice);
        let told = voices.filter_map(|voice| voice.topics.get(name));
        told.max_by_key(|topic| topic.version).cloned()
    }

    /// A topic's route with the addresses of one named listener. A broker group without a live
    /// process is in it without an address.
    pub fn route(&self, topic: &Topic, listener: &str) -> TopicRoute {
        let mut queues: Vec<QueueRoute> = topic
            .shares
            .iter()
            .map(|share| {
                let group = self.groups.get(&share.broker_group);
                QueueRoute {
                    broker_group: share.broker_group.clone(),
                    queue_count: share.queue_count,
                    leader: group.and_then(|group| group.address(listener)).cloned(),
                    term: group.map_or(0, |group| group.term),
                }
            })
            .collect();
        queues.sort_by(|a, b| a.broker_group.cmp(&b.broker_group));
        TopicRoute {
            topic: topic.name.clone(),
            exists: true,
            r#type: topic.r#type,
            topic_id: topic.topic_id,
            queues,
        }
    }

    /// What watchers are told of a topic that does not exist.
    pub fn absent_route(name: &str) -> TopicRoute {
        TopicRoute {
            topic: name.to_owned(),
            exists: false,
            r#type: TopicType::Unspecified.into(),
            topic_id: 0,
            queues: Vec::new(),
        }
    }

    /// Where a broker group answers now: its leader, else a live replica that stands in.
    pub fn address(&self, broker_group: &str, listener: &str) -> Option<Address> {
        self.groups.get(broker_group)?.address(listener).cloned()
    }

    /// Whether a process answers for a broker group now.
    pub fn is_served(&self, broker_group: &str) -> bool {
        let serving = |group: &Group| group.nodes.values().any(|node| node.serves_in(group.term));
        self.groups.get(broker_group).is_some_and(serving)
    }

    pub fn knows_group(&self, broker_group: &str) -> bool {
        self.groups.contains_key(broker_group)
    }

    /// The group that owns all definitions.
    pub fn catalog_group(&self) -> Option<&str> {
        self.groups.iter().find(|(_, group)| group.catalog).map(|(name, _)| name.as_str())
    }

    /// Broker groups with a live process, by name.
    pub fn live_groups(&self) -> Vec<String> {
        let live = self.groups.iter().filter(|(_, group)| group.is_live());
        live.map(|(name, _)| name.clone()).collect()
    }

    /// Broker groups other than `receiver`, with their live nodes, the leader first.
    pub fn group_routes(&self, receiver: &str) -> Vec<GroupRoute> {
        let others = self.groups.iter().filter(|(name, _)| *name != receiver);
        let route = |(name, group): (&String, &Group)| {
            let leader = group.leader().map(|(leader, _)| leader);
            let live = group.nodes.iter().filter(|(_, node)| node.serves_in(group.term));
            let mut nodes: Vec<NodeRoute> = live
                .map(|(node_name, node)| NodeRoute {
                    node: node_name.clone(),
                    leader: Some(node_name) == leader,
                    listeners: node.listeners.clone(),
                })
                .collect();
            nodes.sort_by_key(|node| !node.leader);
            let group_uuid = group.uuid.clone();
            GroupRoute { broker_group: name.clone(), group_uuid, term: group.term, nodes }
        };
        others.map(route).collect()
    }

    /// Live processes and topics, for metrics.
    pub fn counts(&self) -> (usize, usize) {
        let nodes = self.groups.values().flat_map(|group| group.nodes.values());
        let live = nodes.filter(|node| node.is_live()).count();
        let voices = self.groups.values().filter_map(Group::voice);
        (live, voices.map(|voice| voice.topics.len()).max().unwrap_or(0))
    }
}

fn bounded(what: &'static str, count: usize, count_max: usize) -> Result<(), Refusal> {
    if count > count_max { Err(Refusal::TooMany { what, count, count_max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
