//! Where broker groups answer, as far as this node knows: its own from its replica and from what the
//! members say of themselves, the others as nameservers told last. It dials nobody.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use drumlin_proto::forward::INTERNAL_LISTENER;
use drumlin_proto::native::{
    Address, GroupRoute, LeaderHint, Listener, QueueRoute, Topic, TopicRoute,
};
use drumlin_proto::route::address_of;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::replica::RaftStatus;
use crate::replica::peers::{PeerState, PeerStates};

/// A leader that did not answer for so long is not named. Raft finds out sooner when it is gone;
/// this is for groups that cannot elect another.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// Who leads a broker group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leader {
    /// This node.
    Here,
    There {
        address: Address,
        term: u64,
    },
    /// It elects, or nobody that knows it was heard of.
    Unknown,
}

/// What is known of this node, its members and the other broker groups; clones share it.
#[derive(Clone, Debug)]
pub struct Whereabouts {
    broker_group: String,
    listeners: Vec<Listener>,
    status: watch::Receiver<RaftStatus>,
    /// Newest term seen that had a leader: one that only a candidate has seen must not hide the
    /// leader of an older one from clients.
    led_term: Arc<AtomicU64>,
    members: watch::Receiver<PeerStates>,
    others: watch::Receiver<Arc<Vec<GroupRoute>>>,
}

impl Whereabouts {
    /// `listeners` are this node's own.
    pub fn new(
        broker_group: String,
        listeners: Vec<Listener>,
        status: watch::Receiver<RaftStatus>,
        members: watch::Receiver<PeerStates>,
        others: watch::Receiver<Arc<Vec<GroupRoute>>>,
    ) -> Self {
        let led_term = Arc::default();
        Self { broker_group, listeners, status, led_term, members, others }
    }

    pub fn is_own(&self, broker_group: &str) -> bool {
        self.broker_group == broker_group
    }

    /// Whether the broker group is this node's or one that a nameserver has told of.
    pub fn knows(&self, broker_group: &str) -> bool {
        let others = self.others.borrow();
        self.is_own(broker_group) || others.iter().any(|group| group.broker_group == broker_group)
    }

    /// Where this node is reached.
    pub fn own_address(&self, listener: &str) -> Option<Address> {
        let internal = address_of(&self.listeners, INTERNAL_LISTENER);
        internal.or_else(|| address_of(&self.listeners, listener)).cloned()
    }

    /// The broker groups that nameservers have told of, without this node's.
    pub fn other_groups(&self) -> Vec<String> {
        self.others.borrow().iter().map(|group| group.broker_group.clone()).collect()
    }

    /// The leader of a broker group, at its listener of this name.
    pub fn leader(&self, broker_group: &str, listener: &str) -> Leader {
        if self.is_own(broker_group) {
            self.own_leader(listener)
        } else {
            self.other_leader(broker_group, listener)
        }
    }

    fn own_leader(&self, listener: &str) -> Leader {
        let status = *self.status.borrow();
        if status.serving {
            return Leader::Here;
        }
        let members = self.members.borrow();
        let leader = status.leader.and_then(|leader| members.get(&leader));
        let heard = |leader: &&PeerState| leader.fresh || leader.heard_at.elapsed() < SILENCE_MAX;
        let leader = leader.filter(heard);
        match leader.and_then(|leader| address_of(&leader.state.listeners, listener)) {
            Some(address) => Leader::There { address: address.clone(), term: status.term.get() },
            None => Leader::Unknown,
        }
    }

    fn other_leader(&self, broker_group: &str, listener: &str) -> Leader {
        let others = self.others.borrow();
        let group = others.iter().find(|group| group.broker_group == broker_group);
        let found = group.and_then(|group| {
            let leader = group.nodes.iter().find(|node| node.leader)?;
            Some((address_of(&leader.listeners, listener)?.clone(), group.term))
        });
        found.map_or(Leader::Unknown, |(address, term)| Leader::There { address, term })
    }

    /// As [`Whereabouts::leader`] for calls between brokers: at the internal listener where there
    /// is one, else at that of the caller. Waits until one is known.
    pub async fn leader_by(&self, until: Instant, broker_group: &str, listener: &str) -> Leader {
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            let leader = match self.leader(broker_group, INTERNAL_LISTENER) {
                Leader::Unknown => self.leader(broker_group, listener),
                known => known,
            };
            if leader != Leader::Unknown {
                return leader;
            }
            match timeout_at(until, changes.changed()).await {
                Ok(Some(())) => {}
                Ok(None) | Err(_) => return Leader::Unknown,
            }
        }
    }

    /// As [`Whereabouts::leader_by`]: where the leader is called; this node itself, should it lead by
    /// then.
    pub async fn address_by(
        &self,
        until: Instant,
        broker_group: &str,
        listener: &str,
    ) -> Option<Address> {
        match self.leader_by(until, broker_group, listener).await {
            Leader::There { address, .. } => Some(address),
            Leader::Here => self.own_address(listener),
            Leader::Unknown => None,
        }
    }

    /// For whoever asked this node in vain.
    pub fn hint(&self, broker_group: &str, listener: &str) -> Option<LeaderHint> {
        match self.leader(broker_group, listener) {
            Leader::There { address, term } => Some(LeaderHint {
                broker_group: broker_group.to_owned(),
                address: Some(address),
                term,
            }),
            Leader::Here | Leader::Unknown => None,
        }
    }

    /// A topic's route with the addresses of one listener: of each broker group its leader, or a live
    /// replica that stands in. Of the own group that is this node, which is alive.
    pub fn route(&self, topic: &Topic, listener: &str) -> TopicRoute {
        let mut queues: Vec<QueueRoute> = topic
            .shares
            .iter()
            .map(|share| {
                let (leader, term) = self.answers_for(&share.broker_group, listener);
                let (broker_group, queue_count) = (share.broker_group.clone(), share.queue_count);
                QueueRoute { broker_group, queue_count, leader, term }
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

    fn answers_for(&self, broker_group: &str, listener: &str) -> (Option<Address>, u64) {
        if self.is_own(broker_group) {
            let status = *self.status.borrow();
            let led = status.leader.map_or(0, |_| status.term.get());
            let term = self.led_term.fetch_max(led, Ordering::Relaxed).max(led);
            return match self.own_leader(listener) {
                Leader::There { address, .. } => (Some(address), term),
                Leader::Here | Leader::Unknown => {
                    (address_of(&self.listeners, listener).cloned(), term)
                }
            };
        }
        let others = self.others.borrow();
        let group = others.iter().find(|group| group.broker_group == broker_group);
        let Some(group) = group else { return (None, 0) };
        // The leader first where there is one.
        let address = group.nodes.iter().find_map(|node| address_of(&node.listeners, listener));
        (address.cloned(), group.term)
    }

    pub fn at(&self, listener: &str) -> Vantage {
        Vantage { whereabouts: self.clone(), listener: listener.into() }
    }

    pub fn changes(&self) -> Changes {
        Changes {
            status: self.status.clone(),
            members: self.members.clone(),
            others: self.others.clone(),
        }
    }
}

/// Whereabouts for the callers of one listener; clones share them.
#[derive(Clone, Debug)]
pub struct Vantage {
    whereabouts: Whereabouts,
    listener: Arc<str>,
}

impl Vantage {
    /// The leader of this node's own broker group, unless it is this node.
    pub fn own_hint(&self) -> Option<LeaderHint> {
        self.hint(&self.whereabouts.broker_group)
    }

    pub fn hint(&self, broker_group: &str) -> Option<LeaderHint> {
        self.whereabouts.hint(broker_group, &self.listener)
    }

    pub fn route(&self, topic: &Topic) -> TopicRoute {
        self.whereabouts.route(topic, &self.listener)
    }

    pub fn changes(&self) -> Changes {
        self.whereabouts.changes()
    }
}

/// Told whenever an answer may have changed.
#[derive(Clone, Debug)]
pub struct Changes {
    status: watch::Receiver<RaftStatus>,
    members: watch::Receiver<PeerStates>,
    others: watch::Receiver<Arc<Vec<GroupRoute>>>,
}

impl Changes {
    pub fn mark_unchanged(&mut self) {
        self.status.mark_unchanged();
        self.members.mark_unchanged();
        self.others.mark_unchanged();
    }

    /// Cancellation-safe. `None` once the replica has ended.
    pub async fn changed(&mut self) -> Option<()> {
        tokio::select! {
            changed = self.status.changed() => changed.ok(),
            Ok(()) = self.members.changed() => Some(()),
            Ok(()) = self.others.changed() => Some(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::native::{NodeRoute, StateResponse, TopicShare};

    use super::*;
    use crate::position::Term;

    fn listeners(node: &str) -> Vec<Listener> {
        let listener = |name: &str| Listener {
            name: name.into(),
            advertised: Some(Address { host: format!("{node}.{name}"), port: 8081 }),
        };
        vec![listener("internal"), listener("external")]
    }

    struct Known {
        status: watch::Sender<RaftStatus>,
        members: watch::Sender<PeerStates>,
        others: watch::Sender<Arc<Vec<GroupRoute>>>,
        whereabouts: Whereabouts,
    }

    /// Node 1 of group a, whose other member is node 2.
    fn known() -> Known {
        let (status, seen) = watch::channel(RaftStatus::default());
        let (members, heard) = watch::channel(Arc::default());
        let (others, told) = watch::channel(Arc::default());
        let whereabouts = Whereabouts::new("a".into(), listeners("a1"), seen, heard, told);
        Known { status, members, others, whereabouts }
    }

    /// Node 2 was heard of.
    fn heard(fresh: bool) -> PeerStates {
        let heard_at = if fresh { Instant::now() } else { Instant::now() - SILENCE_MAX };
        let state = StateResponse { listeners: listeners("a2"), ..StateResponse::default() };
        Arc::new([(2, PeerState { state, heard_at, fresh })].into())
    }

    fn raft(term: u64, leader: Option<u64>, serving: bool) -> RaftStatus {
        RaftStatus { term: Term::new(term), leader, serving }
    }

    fn topic(shares: &[(&str, u32)]) -> Topic {
        let share = |(group, count): &(&str, u32)| TopicShare {
            broker_group: (*group).into(),
            queue_count: *count,
        };
        let shares = shares.iter().map(share).collect();
        Topic { name: "t".into(), shares, ..Topic::default() }
    }

    fn hosts(route: &TopicRoute) -> Vec<(&str, Option<&str>, u64)> {
        let queues = route.queues.iter();
        queues.map(|q| (&*q.broker_group, q.leader.as_ref().map(|a| &*a.host), q.term)).collect()
    }

    #[test]
    fn own_group_is_named_by_its_leader_and_by_this_node_while_it_elects() {
        let known = known();
        let own = |known: &Known| {
            let route = known.whereabouts.route(&topic(&[("a", 1)]), "external");
            hosts(&route).first().map(|(_, host, term)| (host.unwrap().to_owned(), *term)).unwrap()
        };
        known.status.send_replace(raft(3, Some(2), false));
        assert_eq!(own(&known), ("a1.external".into(), 3), "nothing was heard of node 2");
        known.members.send_replace(heard(true));
        assert_eq!(own(&known), ("a2.external".into(), 3));
        known.members.send_replace(heard(false));
        assert_eq!(own(&known), ("a1.external".into(), 3), "it may be gone");
        known.members.send_replace(heard(true));
        let hint = known.whereabouts.hint("a", "internal").unwrap();
        assert_eq!((hint.address.unwrap().host, hint.term), ("a2.internal".into(), 3));
        known.status.send_replace(raft(4, None, false));
        assert_eq!(own(&known), ("a1.external".into(), 3), "a candidate's term is nobody's yet");
        assert_eq!(known.whereabouts.leader("a", "external"), Leader::Unknown);
        known.status.send_replace(raft(4, Some(1), true));
        assert_eq!(own(&known), ("a1.external".into(), 4));
        assert_eq!(known.whereabouts.leader("a", "external"), Leader::Here);
    }

    #[test]
    fn other_groups_are_named_as_nameservers_told() {
        let known = known();
        let node = |name: &str, leader| NodeRoute {
            node: name.into(),
            leader,
            listeners: listeners(name),
        };
        let group =
            |nodes| GroupRoute { broker_group: "b".into(), group_uuid: "u".into(), term: 7, nodes };
        known.status.send_replace(raft(1, Some(1), true));
        let route =
            |known: &Known| known.whereabouts.route(&topic(&[("b", 1), ("a", 2)]), "internal");
        assert_eq!(hosts(&route(&known)), [("a", Some("a1.internal"), 1), ("b", None, 0)]);
        assert!(!known.whereabouts.knows("b"));
        known.others.send_replace(Arc::new(vec![group(vec![node("b2", true), node("b1", false)])]));
        assert_eq!(hosts(&route(&known))[1], ("b", Some("b2.internal"), 7));
        known.others.send_replace(Arc::new(vec![group(vec![node("b1", false)])]));
        assert_eq!(hosts(&route(&known))[1], ("b", Some("b1.internal"), 7), "it stands in");
        assert_eq!(known.whereabouts.leader("b", "internal"), Leader::Unknown);
    }

    #[tokio::test]
    async fn a_leader_is_waited_for() {
        let known = known();
        let until = Instant::now() + Duration::from_secs(60);
        let waiting = known.whereabouts.leader_by(until, "a", "external");
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        known.members.send_replace(heard(true));
        assert!(futures::poll!(&mut waiting).is_pending());
        known.status.send_replace(raft(2, Some(2), false));
        let Leader::There { address, term } = waiting.await else { panic!("it is elsewhere") };
        assert_eq!((address.host.as_str(), term), ("a2.internal", 2));
    }
}
