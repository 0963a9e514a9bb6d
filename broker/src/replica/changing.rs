//! Changes of a group's membership: one at a time, only by the leader, and only to groups that the
//! witness rules allow. Nodes get a new member id whenever they are added.

use std::collections::{BTreeMap, BTreeSet};

use openraft::ChangeMembers;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::ClientWriteError;
use openraft::errors::RaftError;

use super::bootstrap;
use super::gate::Gone;
use super::leadership::TransferError;
use super::membership::{BrokerNode, Role};
use super::raft_types::{Membership, TypeConfig, entry_id};
use super::{ProposeError, Replica};
use crate::position::EntryIndex;

/// Entries that a learner may lack when it is made a voter.
const PROMOTED_BEHIND_MAX: u64 = 1024;

/// Why a membership is as it was.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("this node does not lead the broker group")]
    NotLeader { leader: Option<u64> },
    /// Leadership had to move first.
    #[error("member {removed} led and has handed over to member {leader}: ask there again")]
    LeadershipMoved { removed: u64, leader: u64 },
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error("member {id} is not in this group")]
    NoMember { id: u64 },
    #[error("member {id} votes already")]
    VotesAlready { id: u64 },
    #[error("{name} at {address} was not made a member: {reason}")]
    NotAdopted { name: String, address: String, reason: String },
    #[error("member {id} is {behind} entries behind: wait until it has caught up")]
    Behind { id: u64, behind: u64 },
    #[error("{data_count} data nodes are an even number: use 1, 2 with a witness, 3, 5, ...")]
    Even { data_count: usize },
    #[error("two data nodes need a witness: add one first")]
    WitnessMissing,
    #[error("a witness goes beside exactly two data nodes, this group would have {data_count}")]
    WitnessSurplus { data_count: usize },
    #[error("another change of the membership is under way")]
    UnderWay,
    /// It may or may not be in force.
    #[error("the outcome is not known: {0}")]
    Unknown(String),
}

/// Who is in a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Members {
    voters: BTreeSet<u64>,
    nodes: BTreeMap<u64, BrokerNode>,
}

impl Members {
    fn of(replica: &Replica) -> Self {
        let all = replica.members();
        let voters = all.iter().filter(|(_, (_, votes))| *votes).map(|(id, _)| *id).collect();
        Self { voters, nodes: all.into_iter().map(|(id, (node, _))| (id, node)).collect() }
    }

    /// A member without a vote that has the name and the role of `node`.
    fn learner(&self, node: &BrokerNode) -> Option<u64> {
        let same = |known: &BrokerNode| known.name == node.name && known.role == node.role;
        let mut learners = self.nodes.iter().filter(|(id, _)| !self.voters.contains(id));
        learners.find(|(_, known)| same(known)).map(|(id, _)| *id)
    }

    fn role(&self, id: u64) -> Option<Role> {
        self.nodes.get(&id).map(|node| node.role)
    }

    /// Voters once `joining` vote and `leaving` do not: with a witness if, and only if, two data
    /// nodes are left. A witness that is no voter yet comes in where one is needed.
    fn voters_with(
        &self,
        joining: Option<u64>,
        leaving: Option<u64>,
    ) -> Result<BTreeSet<u64>, ChangeError> {
        let is = |id: &u64, role| self.role(*id) == Some(role);
        let voting = self.voters.iter().copied().chain(joining);
        let voting: BTreeSet<u64> = voting.filter(|id| Some(*id) != leaving).collect();
        let mut voters: BTreeSet<u64> =
            voting.iter().copied().filter(|id| is(id, Role::Data)).collect();
        let data_count = voters.len();
        if data_count != 2 {
            if data_count.is_multiple_of(2) {
                return Err(ChangeError::Even { data_count });
            }
            return Ok(voters);
        }
        let joins = joining.filter(|id| is(id, Role::Witness));
        let votes = voting.iter().copied().find(|id| is(id, Role::Witness));
        let waits =
            self.nodes.keys().copied().find(|id| is(id, Role::Witness) && Some(*id) != leaving);
        voters.insert(joins.or(votes).or(waits).ok_or(ChangeError::WitnessMissing)?);
        Ok(voters)
    }
}

/// The voters to be, while both those and the former ones decide.
fn unfinished(membership: &Membership) -> Option<BTreeSet<u64>> {
    match membership.get_joint_config().as_slice() {
        [_, .., last] => Some(last.clone()),
        [] | [_] => None,
    }
}

fn refused(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> ChangeError {
    let unknown = |error: &dyn std::fmt::Display| ChangeError::Unknown(error.to_string());
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
            ChangeError::NotLeader { leader: to.leader_id }
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => {
            tracing::warn!(%error, "raft refuses a change of the membership");
            ChangeError::UnderWay
        }
        RaftError::APIError(error) => unknown(&error),
        RaftError::Fatal(error) => unknown(&error),
    }
}

impl Replica {
    /// Makes the node at `address`, whose data directory is empty, a member without a vote; returns
    /// its id. One that is such a member already stays it.
    pub async fn add_member(&self, name: &str, address: &str) -> Result<u64, ChangeError> {
        let _one = self.begin_change().await?;
        self.add(name, address, Role::Data).await
    }

    /// Makes a member a voter, in place of another one if `replaced` is given, which then leaves
    /// the group.
    pub async fn promote(&self, id: u64, replaced: Option<u64>) -> Result<(), ChangeError> {
        let _one = self.begin_change().await?;
        let members = Members::of(self);
        let role = members.role(id).ok_or(ChangeError::NoMember { id })?;
        if members.voters.contains(&id) {
            return Err(ChangeError::VotesAlready { id });
        }
        if let Some(id) = replaced
            && !members.nodes.contains_key(&id)
        {
            return Err(ChangeError::NoMember { id });
        }
        let voters = members.voters_with(Some(id), replaced)?;
        if role == Role::Witness && !voters.contains(&id) {
            let data_count = voters.len();
            return Err(ChangeError::WitnessSurplus { data_count });
        }
        self.leave_lead_of(replaced).await?;
        self.require_caught_up(id)?;
        self.set_voters(voters).await
    }

    /// Takes a member out of the group. Its data directory must not be used under its id again.
    pub async fn remove(&self, id: u64) -> Result<(), ChangeError> {
        let _one = self.begin_change().await?;
        let members = Members::of(self);
        if !members.nodes.contains_key(&id) {
            return Err(ChangeError::NoMember { id });
        }
        if !members.voters.contains(&id) {
            let change = ChangeMembers::RemoveNodes(BTreeSet::from([id]));
            return self.change(change, false).await;
        }
        let voters = members.voters_with(None, Some(id))?;
        self.leave_lead_of(Some(id)).await?;
        self.set_voters(voters).await
    }

    /// Makes the nameserver at `address` host the group's witness in place of the one before;
    /// returns its id. While the new one catches up, the old one still votes.
    pub async fn replace_witness(&self, name: &str, address: &str) -> Result<u64, ChangeError> {
        let _one = self.begin_change().await?;
        let members = Members::of(self);
        let is = |id: &u64, role| members.role(*id) == Some(role);
        let old = members.voters.iter().copied().find(|id| is(id, Role::Witness));
        let data_count = members.voters.iter().filter(|id| is(id, Role::Data)).count();
        let learns = members
            .nodes
            .iter()
            .any(|(id, node)| node.role == Role::Data && !members.voters.contains(id));
        if data_count != 2 && !(data_count == 1 && learns) {
            return Err(ChangeError::WitnessSurplus { data_count });
        }
        let node = members.nodes.get(&old.unwrap_or_default());
        if let (Some(old), Some(node)) = (old, node)
            && node.name == name
            && !self.is_lost(old)
            && self.answers_as(old, name, address).await
        {
            // As where this was asked before, and the answer did not arrive.
            return Ok(old);
        }
        let id = self.add(name, address, Role::Witness).await?;
        if data_count == 1 {
            // It votes once there is a second data node to vote too.
            return Ok(id);
        }
        self.until_caught_up(id).await?;
        let voters = Members::of(self).voters_with(Some(id), old)?;
        self.set_voters(voters).await?;
        Ok(id)
    }

    /// A change that a former leader left half way is finished first.
    async fn begin_change(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, ChangeError> {
        let one = self.shared.changing.try_lock().map_err(|_| ChangeError::UnderWay)?;
        match self.read_barrier().await {
            Ok(()) => {}
            Err(ProposeError::NotLeader { leader }) => {
                return Err(ChangeError::NotLeader { leader });
            }
            Err(error) => return Err(ChangeError::Unknown(error.to_string())),
        }
        let unfinished = {
            let metrics = self.shared.raft.server_metrics();
            unfinished(metrics.borrow_watched().membership_config.membership())
        };
        if let Some(voters) = unfinished {
            tracing::warn!(?voters, "a change of the membership was left half way: finishing it");
            self.set_voters(voters).await?;
        }
        Ok(one)
    }

    /// The id is in the log before the node hears of it, so that it is nobody else's whatever
    /// becomes of this call; done again, the call goes on from there.
    async fn add(&self, name: &str, address: &str, role: Role) -> Result<u64, ChangeError> {
        let node = BrokerNode { name: name.to_owned(), address: address.to_owned(), role };
        let not_adopted = |reason: String| ChangeError::NotAdopted {
            name: name.to_owned(),
            address: address.to_owned(),
            reason,
        };
        let identity = self.identity();
        let probed = bootstrap::probe(identity, &node).await.map_err(not_adopted)?;
        let is_ours = probed.group_uuid == identity.group_uuid.to_string();
        let mut members = Members::of(self);
        if let Some(id) = members.learner(&node) {
            if is_ours && probed.node_id == id {
                return Ok(id);
            }
            // It was never adopted, or has lost its disk again: either way the id is used up.
            self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id])), false).await?;
            members.nodes.remove(&id);
        }
        if role == Role::Data && !probed.group_uuid.is_empty() {
            let (id, uuid) = (probed.node_id, &probed.group_uuid);
            let reason = format!(
                "it is member {id} of group {uuid} already, and only a node with an empty data \
                 directory can become a member"
            );
            return Err(not_adopted(reason));
        }
        let id = self.next_id(&members);
        let added = ChangeMembers::AddNodes(BTreeMap::from([(id, node.clone())]));
        self.change(added, true).await?;
        let member_ids = members.nodes.into_keys().chain([id]).collect();
        if let Err(reason) = bootstrap::adopt(identity, id, &node, member_ids).await {
            let removed = ChangeMembers::RemoveNodes(BTreeSet::from([id]));
            if let Err(error) = self.change(removed, false).await {
                tracing::warn!(id, %error, "a member that was not adopted stays in the membership");
            }
            return Err(not_adopted(reason));
        }
        tracing::info!(id, name, address, ?role, "added a member");
        Ok(id)
    }

    /// Whether a member lost what it had answered, as the gate has found out or it says itself.
    fn is_lost(&self, id: u64) -> bool {
        let is_found_out = self.gate().borrow().gone.get(&id) == Some(&Gone::Lost);
        is_found_out || self.peers().borrow().get(&id).is_some_and(|peer| peer.state.fenced)
    }

    /// Whether the node at `address` is this member of this group.
    async fn answers_as(&self, id: u64, name: &str, address: &str) -> bool {
        let node = BrokerNode { name: name.into(), address: address.into(), role: Role::Witness };
        let group_uuid = self.identity().group_uuid.to_string();
        let probed = bootstrap::probe(self.identity(), &node).await;
        probed.is_ok_and(|it| it.node_id == id && it.group_uuid == group_uuid)
    }

    /// Above all that were ever given, those of members that are gone too: each addition is an
    /// entry, so the log's end has passed them.
    fn next_id(&self, members: &Members) -> u64 {
        let last_index = self.log().last().map_or(0, |id| id.index.get());
        let highest = members.nodes.keys().copied().max().unwrap_or_default();
        highest.max(last_index) + 1
    }

    fn behind(&self, id: u64) -> u64 {
        let metrics = self.shared.raft.metrics();
        let metrics = metrics.borrow_watched();
        let progress = metrics.replication.as_ref().and_then(|all| all.get(&id).cloned());
        let end = progress.flatten().map_or(EntryIndex::ZERO, |at| entry_id(&at).index.next());
        let last = self.log().last().map_or(EntryIndex::ZERO, |id| id.index.next());
        last.get().saturating_sub(end.get())
    }

    fn require_caught_up(&self, id: u64) -> Result<(), ChangeError> {
        match self.behind(id) {
            behind if behind > PROMOTED_BEHIND_MAX => Err(ChangeError::Behind { id, behind }),
            _ => Ok(()),
        }
    }

    /// Waits for a learner; the caller may give it up at any time.
    async fn until_caught_up(&self, id: u64) -> Result<(), ChangeError> {
        let me = self.identity().node_id;
        let mut metrics = self.shared.raft.metrics();
        while self.behind(id) > PROMOTED_BEHIND_MAX {
            let leader = metrics.borrow_and_update().current_leader;
            if leader != Some(me) {
                return Err(ChangeError::NotLeader { leader });
            }
            let changed = metrics.changed().await;
            changed.map_err(|_| ChangeError::Unknown("the replica has ended".into()))?;
        }
        Ok(())
    }

    /// A leader that is to leave lets a data node lead first.
    async fn leave_lead_of(&self, leaving: Option<u64>) -> Result<(), ChangeError> {
        let me = self.identity().node_id;
        if leaving != Some(me) {
            return Ok(());
        }
        let leader = self.transfer(None).await?;
        Err(ChangeError::LeadershipMoved { removed: me, leader })
    }

    async fn set_voters(&self, voters: BTreeSet<u64>) -> Result<(), ChangeError> {
        self.change(ChangeMembers::ReplaceAllVoters(voters), false).await
    }

    async fn change(
        &self,
        change: ChangeMembers<u64, BrokerNode>,
        retain: bool,
    ) -> Result<(), ChangeError> {
        self.shared.raft.change_membership(change, retain).await.map_err(refused)?;
        let members = self.members();
        tracing::info!(?members, "the membership has changed");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data nodes below ten, witnesses from there.
    fn members(voters: &[u64], learners: &[u64]) -> Members {
        let role = |id| if id < 10 { Role::Data } else { Role::Witness };
        let node =
            |id: u64| BrokerNode { name: id.to_string(), role: role(id), ..Default::default() };
        let all = voters.iter().chain(learners);
        Members {
            voters: voters.iter().copied().collect(),
            nodes: all.map(|id| (*id, node(*id))).collect(),
        }
    }

    fn changed(members: &Members, joining: Option<u64>, leaving: Option<u64>) -> String {
        match members.voters_with(joining, leaving) {
            Ok(voters) => format!("{voters:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_witness_votes_beside_exactly_two_data_nodes() {
        let pair = members(&[1, 2, 10], &[3]);
        assert_eq!(changed(&pair, Some(3), None), "{1, 2, 3}");
        assert_eq!(changed(&pair, Some(3), Some(2)), "{1, 3, 10}");
        assert_eq!(changed(&pair, None, Some(2)), "{1}");
        assert!(changed(&pair, None, Some(10)).contains("need a witness"));
        let alone = members(&[1], &[2]);
        assert!(changed(&alone, Some(2), None).contains("need a witness"));
        assert_eq!(changed(&members(&[1], &[2, 10]), Some(2), None), "{1, 2, 10}");
        let three = members(&[1, 2, 3], &[4]);
        assert!(changed(&three, Some(4), None).contains("even number"));
        assert!(changed(&three, None, Some(3)).contains("need a witness"));
        assert_eq!(changed(&three, Some(4), Some(1)), "{2, 3, 4}");
    }

    #[test]
    fn change_that_was_left_half_way_leads_to_the_voters_to_be() {
        let nodes: BTreeMap<_, _> = (1..=4).map(|id| (id, BrokerNode::default())).collect();
        let of = |configs: &[&[u64]]| {
            let configs = configs.iter().map(|ids| ids.iter().copied().collect()).collect();
            Membership::new(configs, nodes.clone()).unwrap()
        };
        assert_eq!(unfinished(&of(&[&[1, 2, 3]])), None);
        let half_way = of(&[&[1, 2, 3], &[1, 3, 4]]);
        assert_eq!(unfinished(&half_way), Some(BTreeSet::from([1, 3, 4])));
    }

    #[test]
    fn a_new_witness_takes_the_place_of_the_old_one() {
        let pair = members(&[1, 2, 10], &[11]);
        assert_eq!(changed(&pair, Some(11), Some(10)), "{1, 2, 11}");
        assert_eq!(changed(&pair, Some(11), None), "{1, 2, 11}", "never two of them");
    }
}
