//! `drumlin.v1.Cluster` at a broker: how its group stands, and changes of its members.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::cluster_server::{Cluster, ClusterServer};
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{self as api, Agreement, GroupRoute, Listener};
use drumlin_proto::route::address_of;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::native::{Fault, ok};
use crate::broker::Context;
use crate::command::Command;
use crate::command::level::FEATURE_LEVEL_MAX;
use crate::copies_since::CopiesSince;
use crate::replica::changing::ChangeError;
use crate::replica::leadership::TransferError;
use crate::replica::membership::Role;
use crate::replica::{Item, Replica};
use crate::standing::{self, Copies, GroupStanding, Standing, gone_name};
use crate::whereabouts::Vantage;

/// How long a change that is an entry may wait for its turn.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the service shares over all listeners.
#[derive(Debug)]
pub struct Shared {
    context: Arc<Context>,
    others: watch::Receiver<Arc<Vec<GroupRoute>>>,
    since: CopiesSince,
}

impl Shared {
    /// `others`: broker groups that nameservers have told of.
    pub fn new(
        context: Arc<Context>,
        others: watch::Receiver<Arc<Vec<GroupRoute>>>,
        since: CopiesSince,
    ) -> Arc<Self> {
        Arc::new(Self { context, others, since })
    }
}

/// The service at one listener.
#[derive(Debug)]
pub struct ClusterService {
    shared: Arc<Shared>,
    listener: String,
    vantage: Vantage,
}

type Answer<T> = Result<Response<T>, Status>;

impl ClusterService {
    pub fn server(shared: Arc<Shared>, listener: String, vantage: Vantage) -> ClusterServer<Self> {
        ClusterServer::new(Self { shared, listener, vantage })
    }

    fn changed(&self, done: Result<String, Fault>) -> Answer<api::ChangeResponse> {
        Ok(Response::new(match done {
            Ok(done) => api::ChangeResponse { status: ok(), done },
            Err(fault) => {
                api::ChangeResponse { status: fault.status(&self.vantage), done: String::new() }
            }
        }))
    }

    fn replica(&self) -> &Replica {
        &self.shared.context.replica
    }

    fn own_group(&self) -> api::KnownGroup {
        let context = &self.shared.context;
        let status = *context.replica.raft_status().borrow();
        let own = context.replica.own_state();
        let peers = context.replica.peers().borrow().clone();
        let mut listeners: BTreeMap<u64, (String, Vec<Listener>)> = peers
            .iter()
            .filter(|(_, peer)| peer.fresh && !peer.state.witness)
            .map(|(id, peer)| (*id, (peer.state.node.clone(), peer.state.listeners.clone())))
            .collect();
        listeners.insert(own.node_id, (own.node, own.listeners));
        let node = |(id, (node, listeners)): (u64, (String, Vec<Listener>))| api::KnownNode {
            node,
            leader: status.leader == Some(id),
            address: address_of(&listeners, &self.listener).cloned(),
        };
        api::KnownGroup {
            broker_group: context.config.broker_group.to_string(),
            group_uuid: context.identity.group_uuid.to_string(),
            term: status.term.get(),
            nodes: listeners.into_iter().map(node).collect(),
        }
    }

    fn other_group(&self, group: &GroupRoute) -> api::KnownGroup {
        let node = |node: &api::NodeRoute| api::KnownNode {
            node: node.node.clone(),
            leader: node.leader,
            address: address_of(&node.listeners, &self.listener).cloned(),
        };
        api::KnownGroup {
            broker_group: group.broker_group.clone(),
            group_uuid: group.group_uuid.clone(),
            term: group.term,
            nodes: group.nodes.iter().map(node).collect(),
        }
    }

    fn describe(&self) -> api::DescribeGroupResponse {
        let context = &self.shared.context;
        let facts = standing::facts(&context.replica, context.config.disk_warn_percent);
        let standing = standing::judge(&facts, Instant::now());
        let members = standing.members.iter().map(wire_member).collect();
        let gate = facts.leads.then_some(&facts.gate);
        let copies = match standing.copies {
            Copies::Single => api::Copies::Single,
            Copies::Paired => api::Copies::Paired,
            Copies::Alone => api::Copies::Alone,
            Copies::Majority => api::Copies::Majority,
        };
        api::DescribeGroupResponse {
            status: ok(),
            cluster: context.config.cluster.clone(),
            broker_group: context.config.broker_group.to_string(),
            group_uuid: context.identity.group_uuid.to_string(),
            catalog: context.config.broker_group == context.config.catalog_group,
            node: context.config.node.clone(),
            leads: facts.leads,
            term: facts.term.get(),
            leader: standing.leader.clone().unwrap_or_default(),
            copies: copies.into(),
            copies_since_ms: self.shared.since.ms(),
            closing: standing.is_closing,
            members,
            refusing: facts.refusing.clone().unwrap_or_default(),
            feature_level: context.replica.feature_level(),
            feature_level_max: standing.feature_level_max,
            problems: standing.problems,
            matched_end: gate.map_or(0, |gate| gate.matched_end.get()),
            witness_sent_end: gate.map_or(0, |gate| gate.sent_end.get()),
            witness_feed_end: gate.map_or(0, |gate| gate.feed_end.get()),
        }
    }

    /// Only of a leader: others do not know how the members stand.
    fn leading(&self) -> Result<GroupStanding, Fault> {
        let context = &self.shared.context;
        let facts = standing::facts(&context.replica, context.config.disk_warn_percent);
        let standing = standing::judge(&facts, Instant::now());
        if facts.leads {
            return Ok(standing);
        }
        let leader = standing.leader.unwrap_or_else(|| "nobody".into());
        let (node, group) = (&context.config.node, &context.config.broker_group);
        Err(Fault::new(Code::NotLeader, format!("{leader} leads broker group {group}, not {node}")))
    }

    async fn add(&self, request: api::AddMemberRequest) -> Result<String, Fault> {
        let api::AddMemberRequest { node, address } = request;
        let id = self.replica().add_member(&node, &address).await.map_err(change_fault)?;
        Ok(format!("{node} is member {id}, without a vote until it is promoted"))
    }

    async fn promote(&self, request: api::PromoteMemberRequest) -> Result<String, Fault> {
        let members = self.leading()?.members;
        let learner = found(&members, &request.node, |member| !member.votes)?;
        let replaced = match request.replaces.as_str() {
            "" => members
                .iter()
                .find(|m| m.votes && m.id != learner.id && m.node.name == learner.node.name),
            named => Some(found(&members, named, |member| member.votes)?),
        };
        let replaced = replaced.map(|member| (member.id, member.node.name.clone()));
        let (id, name) = (learner.id, &learner.node.name);
        let promoted = self.replica().promote(id, replaced.as_ref().map(|(id, _)| *id)).await;
        if let Err(ChangeError::VotesAlready { .. }) = promoted
            && replaced.is_none()
        {
            return Ok(format!("{name} votes already, as member {id}"));
        }
        promoted.map_err(change_fault)?;
        Ok(match replaced {
            Some((old, old_name)) => {
                format!("{name} votes as member {id}, in place of {old_name}, member {old}")
            }
            None => format!("{name} votes as member {id}"),
        })
    }

    async fn remove(&self, request: api::RemoveMemberRequest) -> Result<String, Fault> {
        let members = self.leading()?.members;
        let member = found(&members, &request.node, |_| true)?;
        let (id, name) = (member.id, &member.node.name);
        self.replica().remove(id).await.map_err(change_fault)?;
        Ok(format!("{name}, member {id}, is out of the group"))
    }

    async fn witness(&self, request: api::ReplaceWitnessRequest) -> Result<String, Fault> {
        let api::ReplaceWitnessRequest { node, address } = request;
        let config = &self.shared.context.config;
        let planned = config.witness.iter().find(|witness| witness.name == node);
        let planned = planned.map(|witness| &witness.address);
        let listed = || config.nameservers.iter().find(|known| host(known) == node);
        let address = match address.as_str() {
            "" => planned.or_else(listed).cloned().ok_or_else(|| {
                let text = format!(
                    "the configuration of {} has no address of {node}: write {node}@HOST:PORT, \
                     as brokers reach it",
                    config.node
                );
                Fault::new(Code::InvalidArgument, text)
            })?,
            _ => address,
        };
        let id = self.replica().replace_witness(&node, &address).await.map_err(change_fault)?;
        Ok(format!("the witness is member {id} at {node}, {address}"))
    }

    async fn transfer(&self, request: api::TransferLeaderRequest) -> Result<String, Fault> {
        let members = self.leading()?.members;
        let to = match request.node.as_str() {
            "" => None,
            named => {
                let target = found(&members, named, |member| member.votes)?;
                if target.leads {
                    return Ok(format!("{} leads already", target.node.name));
                }
                Some(target.id)
            }
        };
        let id = self.replica().transfer(to).await.map_err(transfer_fault)?;
        self.replica().tell_yields(true);
        let name = members.iter().find(|member| member.id == id);
        Ok(format!("{} leads now", name.map_or("another node", |member| &member.node.name)))
    }

    async fn raise_level(&self, level: u32) -> Result<String, Fault> {
        let standing = self.leading()?;
        let data = || standing.members.iter().filter(|member| member.node.role == Role::Data);
        if let Some(silent) = data().find(|member| !member.is_reachable) {
            let text = format!("{} does not answer: what it knows is not known", silent.node.name);
            return Err(Fault::new(Code::PreconditionFailed, text));
        }
        let all_know = standing.feature_level_max.min(FEATURE_LEVEL_MAX);
        let (level, now) =
            (if level == 0 { all_know } else { level }, self.replica().feature_level());
        if level <= now {
            return Ok(format!("the feature level is {now} already"));
        }
        if level > all_know {
            let text = format!("not all nodes know feature level {level}, only {all_know}");
            return Err(Fault::new(Code::PreconditionFailed, text));
        }
        let release = env!("CARGO_PKG_VERSION").to_owned();
        let command = Command::RaiseFeatureLevel { level, release };
        let deadline = Some(Instant::now() + CHANGE_TIMEOUT);
        self.replica().propose(Item::Command(command), deadline).await?;
        Ok(format!("the feature level is now {level}"))
    }
}

/// The member of this name or id; of several with one name the one that is `meant`.
fn found<'a>(
    members: &'a [Standing],
    text: &str,
    meant: impl Fn(&Standing) -> bool,
) -> Result<&'a Standing, Fault> {
    let refused = |text: String| Fault::new(Code::InvalidArgument, text);
    let id: Option<u64> = text.parse().ok();
    let named = |member: &&Standing| member.node.name == text || Some(member.id) == id;
    let all: Vec<_> = members.iter().filter(named).collect();
    match all.as_slice() {
        [] => Err(refused(format!("{text} is no member of this broker group"))),
        [only] => Ok(only),
        several => match several.iter().filter(|member| meant(member)).collect::<Vec<_>>()[..] {
            [only] => Ok(only),
            _ => {
                let ids: Vec<_> = several.iter().map(|member| member.id.to_string()).collect();
                Err(refused(format!(
                    "{text} is the name of members {}: give an id",
                    ids.join(", ")
                )))
            }
        },
    }
}

/// Of `host:port`.
fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

fn change_fault(error: ChangeError) -> Fault {
    let code = match &error {
        ChangeError::NotLeader { .. } | ChangeError::LeadershipMoved { .. } => Code::NotLeader,
        ChangeError::UnderWay => Code::Busy,
        ChangeError::Unknown(_) => Code::UnknownOutcome,
        ChangeError::Transfer(error) => return transfer_fault(error.clone()),
        ChangeError::NoMember { .. }
        | ChangeError::VotesAlready { .. }
        | ChangeError::NotAdopted { .. }
        | ChangeError::Behind { .. }
        | ChangeError::Even { .. }
        | ChangeError::WitnessMissing
        | ChangeError::WitnessSurplus { .. } => Code::PreconditionFailed,
    };
    Fault::new(code, error.to_string())
}

fn transfer_fault(error: TransferError) -> Fault {
    let code = match &error {
        TransferError::NotLeader { .. } => Code::NotLeader,
        TransferError::NoTarget { .. } | TransferError::NobodyInStep => Code::PreconditionFailed,
        TransferError::NotTaken { .. } => Code::UnknownOutcome,
        TransferError::Ended(_) => Code::Unavailable,
    };
    Fault::new(code, error.to_string())
}

fn wire_member(member: &Standing) -> api::GroupMember {
    let digest = match member.is_equal {
        None => Agreement::Unknown,
        Some(true) => Agreement::Equal,
        Some(false) => Agreement::Differs,
    };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    api::GroupMember {
        node: member.node.name.clone(),
        node_id: member.id,
        address: member.node.address.clone(),
        witness: member.node.role == Role::Witness,
        voter: member.votes,
        leader: member.leads,
        reachable: member.is_reachable,
        heard_ago_ms: member.heard_ago.map(ms),
        state: member.said.clone(),
        lag_entries: member.lag_entries,
        lag_bytes: member.lag_bytes,
        lag_ms: member.lag_ms,
        gone: member.gone.map(gone_name).unwrap_or_default().to_owned(),
        digest: digest.into(),
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn list_nodes(
        &self,
        _: Request<api::ListNodesRequest>,
    ) -> Answer<api::ListNodesResponse> {
        let others = self.shared.others.borrow().clone();
        let mut groups: Vec<_> = others.iter().map(|group| self.other_group(group)).collect();
        groups.push(self.own_group());
        groups.sort_by(|a, b| a.broker_group.cmp(&b.broker_group));
        let cluster = self.shared.context.config.cluster.clone();
        Ok(Response::new(api::ListNodesResponse { status: ok(), cluster, groups }))
    }

    async fn describe_group(
        &self,
        _: Request<api::DescribeGroupRequest>,
    ) -> Answer<api::DescribeGroupResponse> {
        Ok(Response::new(self.describe()))
    }

    async fn add_member(
        &self,
        request: Request<api::AddMemberRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.add(request.into_inner()).await)
    }

    async fn promote_member(
        &self,
        request: Request<api::PromoteMemberRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.promote(request.into_inner()).await)
    }

    async fn remove_member(
        &self,
        request: Request<api::RemoveMemberRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.remove(request.into_inner()).await)
    }

    async fn replace_witness(
        &self,
        request: Request<api::ReplaceWitnessRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.witness(request.into_inner()).await)
    }

    async fn transfer_leader(
        &self,
        request: Request<api::TransferLeaderRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.transfer(request.into_inner()).await)
    }

    async fn raise_feature_level(
        &self,
        request: Request<api::RaiseFeatureLevelRequest>,
    ) -> Answer<api::ChangeResponse> {
        self.changed(self.raise_level(request.into_inner().level).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::membership::BrokerNode;

    fn member(id: u64, name: &str, votes: bool) -> Standing {
        Standing {
            id,
            node: BrokerNode { name: name.into(), ..BrokerNode::default() },
            votes,
            leads: false,
            is_reachable: true,
            heard_ago: None,
            said: None,
            lag_entries: None,
            lag_bytes: None,
            lag_ms: None,
            gone: None,
            is_equal: None,
        }
    }

    #[test]
    fn a_node_that_lost_its_disk_is_told_from_the_member_that_it_was() {
        let members = [member(1, "a-0", true), member(2, "a-1", true), member(9, "a-1", false)];
        let id = |text, votes: Option<bool>| {
            let meant = |member: &Standing| votes.is_none_or(|votes| member.votes == votes);
            found(&members, text, meant).map(|member| member.id).ok()
        };
        assert_eq!(id("a-0", None), Some(1));
        assert_eq!(id("a-1", Some(false)), Some(9));
        assert_eq!(id("a-1", Some(true)), Some(2));
        assert_eq!((id("a-1", None), id("9", None), id("x", None)), (None, Some(9), None));
    }

    #[test]
    fn a_host_is_all_before_the_port() {
        assert_eq!((host("nameserver-1:9876"), host("[::1]:9876")), ("nameserver-1", "[::1]"));
    }
}
