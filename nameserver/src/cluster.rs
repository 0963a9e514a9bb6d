//! `drumlin.v1.Cluster` at a nameserver: who has registered. How copies stand is asked of brokers.

use std::sync::Arc;

use drumlin_proto::native as api;
use drumlin_proto::native::cluster_server::Cluster;
use drumlin_proto::native::status::Code;
use drumlin_proto::route::address_of;
use tonic::{Request, Response, Status};

use crate::lookup::ListenerAddress;
use crate::shared::Shared;

#[derive(Debug, Clone)]
pub(crate) struct ClusterService {
    pub(crate) shared: Arc<Shared>,
    pub(crate) listener: Arc<ListenerAddress>,
}

type Answer<T> = Result<Response<T>, Status>;

fn elsewhere() -> Status {
    Status::failed_precondition("this is a nameserver: ask a broker of the group")
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn list_nodes(
        &self,
        _: Request<api::ListNodesRequest>,
    ) -> Answer<api::ListNodesResponse> {
        let routes = self.shared.directory.read(|table| table.group_routes(""));
        let node = |node: &api::NodeRoute| api::KnownNode {
            node: node.node.clone(),
            leader: node.leader,
            address: address_of(&node.listeners, &self.listener.name).cloned(),
        };
        let group = |group: &api::GroupRoute| api::KnownGroup {
            broker_group: group.broker_group.clone(),
            group_uuid: group.group_uuid.clone(),
            term: group.term,
            nodes: group.nodes.iter().map(node).collect(),
        };
        Ok(Response::new(api::ListNodesResponse {
            status: Some(api::Status { code: Code::Ok.into(), ..api::Status::default() }),
            cluster: self.shared.config.cluster.clone(),
            groups: routes.iter().map(group).collect(),
        }))
    }

    async fn describe_group(
        &self,
        _: Request<api::DescribeGroupRequest>,
    ) -> Answer<api::DescribeGroupResponse> {
        Err(elsewhere())
    }

    async fn add_member(&self, _: Request<api::AddMemberRequest>) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }

    async fn promote_member(
        &self,
        _: Request<api::PromoteMemberRequest>,
    ) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }

    async fn remove_member(
        &self,
        _: Request<api::RemoveMemberRequest>,
    ) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }

    async fn replace_witness(
        &self,
        _: Request<api::ReplaceWitnessRequest>,
    ) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }

    async fn transfer_leader(
        &self,
        _: Request<api::TransferLeaderRequest>,
    ) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }

    async fn raise_feature_level(
        &self,
        _: Request<api::RaiseFeatureLevelRequest>,
    ) -> Answer<api::ChangeResponse> {
        Err(elsewhere())
    }
}
