//! The cluster as operators see it: who is there, how copies stand, and changes of members.

use std::collections::BTreeMap;
use std::time::Duration;

use drumlin_proto::native::cluster_client::ClusterClient;
use drumlin_proto::native::{self, Status};
use futures::future::join_all;
use tonic::transport::Channel;

pub use drumlin_proto::native::{
    Agreement, Copies, DescribeGroupResponse as GroupStanding, GroupMember, KnownGroup, KnownNode,
};

use crate::Client;
use crate::connection::{Address, GRPC_BYTES_MAX};
use crate::error::Error;

/// For questions: a node that does not answer by then is told as such.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// For changes of members: entries must be committed, and a learner may have to catch up.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A change of one broker group, asked of its leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Takes a learner in; `address` is that of its peer port.
    Add { node: String, address: String },
    /// Makes a learner a voter, in place of another member or, with an empty `replaces`, of the
    /// voter of the same name.
    Promote { node: String, replaces: String },
    /// Takes a member out.
    Remove { node: String },
    /// Moves the witness to another nameserver; an empty `address` is looked up there.
    ReplaceWitness { node: String, address: String },
    /// Moves leadership; an empty `node` leaves the choice to the leader.
    Transfer { node: String },
    /// Lets the group use what the newer release brings; 0: the highest that all members know.
    RaiseFeatureLevel { level: u32 },
}

/// All that endpoints know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KnownNodes {
    pub cluster: String,
    /// By name.
    pub groups: Vec<KnownGroup>,
}

/// Asks nodes one by one; clones share the client.
#[derive(Clone, Debug)]
pub struct Cluster {
    client: Client,
}

impl Cluster {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// What all endpoints together know, of which at least one must answer.
    pub async fn list_nodes(&self) -> Result<KnownNodes, Error> {
        let asked = self.client.endpoints().iter().map(|endpoint| async move {
            let request = timed(native::ListNodesRequest {}, ASK_TIMEOUT);
            let answer = self.api(endpoint).list_nodes(request).await;
            let answer = answer.map_err(|status| Error::of_call(endpoint.as_str(), &status))?;
            let answer = answer.into_inner();
            checked(answer.status.as_ref())?;
            Ok::<_, Error>(answer)
        });
        let (mut known, mut failure) = (None, Error::Closed);
        for answer in join_all(asked).await {
            match answer {
                Ok(answer) => merge(known.get_or_insert_with(KnownNodes::default), answer),
                Err(error) => failure = error,
            }
        }
        known.ok_or(failure)
    }

    /// The group of the broker at `address`, as that broker sees it.
    pub async fn describe_group(&self, address: &str) -> Result<GroupStanding, Error> {
        let address = parsed(address)?;
        let request = timed(native::DescribeGroupRequest {}, ASK_TIMEOUT);
        let answer = self.api(&address).describe_group(request).await;
        let answer = answer.map_err(|status| Error::of_call(address.as_str(), &status))?;
        let answer = answer.into_inner();
        checked(answer.status.as_ref()).map(|()| answer)
    }

    /// Makes a change; says what was done. [`crate::Code::NotLeader`]: ask another node of the
    /// group.
    pub async fn change(&self, address: &str, change: Change) -> Result<String, Error> {
        let address = parsed(address)?;
        let mut api = self.api(&address);
        macro_rules! ask {
            ($method:ident, $request:expr) => {
                api.$method(timed($request, CHANGE_TIMEOUT)).await
            };
        }
        let answer = match change {
            Change::Add { node, address } => {
                ask!(add_member, native::AddMemberRequest { node, address })
            }
            Change::Promote { node, replaces } => {
                ask!(promote_member, native::PromoteMemberRequest { node, replaces })
            }
            Change::Remove { node } => ask!(remove_member, native::RemoveMemberRequest { node }),
            Change::ReplaceWitness { node, address } => {
                ask!(replace_witness, native::ReplaceWitnessRequest { node, address })
            }
            Change::Transfer { node } => {
                ask!(transfer_leader, native::TransferLeaderRequest { node })
            }
            Change::RaiseFeatureLevel { level } => {
                ask!(raise_feature_level, native::RaiseFeatureLevelRequest { level })
            }
        };
        let answer = answer.map_err(|status| Error::of_call(address.as_str(), &status))?;
        let answer = answer.into_inner();
        checked(answer.status.as_ref()).map(|()| answer.done)
    }

    fn api(&self, address: &Address) -> ClusterClient<Channel> {
        ClusterClient::new(self.client.connections().channel(address))
            .max_decoding_message_size(GRPC_BYTES_MAX)
    }
}

fn parsed(address: &str) -> Result<Address, Error> {
    Address::parse(address).map_err(|fault| Error::Configuration { faults: vec![fault] })
}

fn checked(status: Option<&Status>) -> Result<(), Error> {
    Error::of_native(status).map_or(Ok(()), Err)
}

fn timed<T>(request: T, timeout: Duration) -> tonic::Request<T> {
    let mut timed = tonic::Request::new(request);
    timed.set_timeout(timeout);
    timed
}

/// Adds what one endpoint knows. Of a group the newest term says who leads.
fn merge(known: &mut KnownNodes, told: native::ListNodesResponse) {
    if known.cluster.is_empty() {
        known.cluster = told.cluster;
    }
    let mut groups: BTreeMap<String, KnownGroup> = std::mem::take(&mut known.groups)
        .into_iter()
        .map(|group| (group.broker_group.clone(), group))
        .collect();
    for told in told.groups {
        match groups.get_mut(&told.broker_group) {
            None => {
                groups.insert(told.broker_group.clone(), told);
            }
            Some(group) => merge_group(group, told),
        }
    }
    known.groups = groups.into_values().collect();
}

fn merge_group(group: &mut KnownGroup, told: KnownGroup) {
    let (mut newer, older) = match told.term > group.term {
        true => (told, std::mem::take(group)),
        false => (std::mem::take(group), told),
    };
    for node in older.nodes {
        match newer.nodes.iter_mut().find(|known| known.node == node.node) {
            Some(known) if known.address.is_none() => known.address = node.address,
            Some(_) => {}
            None => newer.nodes.push(KnownNode { leader: false, ..node }),
        }
    }
    newer.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    *group = newer;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, term: u64, nodes: &[(&str, bool)]) -> KnownGroup {
        let node = |(node, leader): &(&str, bool)| KnownNode {
            node: (*node).into(),
            leader: *leader,
            address: None,
        };
        let nodes = nodes.iter().map(node).collect();
        KnownGroup { broker_group: name.into(), group_uuid: String::new(), term, nodes }
    }

    fn told(groups: Vec<KnownGroup>) -> native::ListNodesResponse {
        native::ListNodesResponse { status: None, cluster: "c".into(), groups }
    }

    #[test]
    fn what_endpoints_know_adds_up_and_the_newest_term_leads() {
        let mut known = KnownNodes::default();
        merge(&mut known, told(vec![group("a", 2, &[("a-0", true)])]));
        merge(&mut known, told(vec![group("b", 1, &[]), group("a", 3, &[("a-1", true)])]));
        merge(&mut known, told(vec![group("a", 1, &[("a-0", true), ("a-2", true)])]));
        let wanted = group("a", 3, &[("a-0", false), ("a-1", true), ("a-2", false)]);
        assert_eq!(known.groups, [wanted, group("b", 1, &[])]);
        assert_eq!(known.cluster, "c");
    }
}
