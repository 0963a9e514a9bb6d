//! The RPCs of RocketMQ's `Admin` service: none is built yet, each says so in its status.

use drumlin_proto::rocketmq as pb;
use tonic::{Request, Response, Status};

use super::status::Fault;

/// Answers NOT_IMPLEMENTED to everything.
#[derive(Clone, Copy, Debug)]
pub struct Admin;

fn refusal() -> pb::Status {
    Fault::not_supported("calls of RocketMQ's Admin service").status()
}

macro_rules! not_supported {
    ($($rpc:ident: $request:ident => $response:ident,)*) => {
        #[tonic::async_trait]
        impl pb::admin_server::Admin for Admin {
            /// Its reply has no status.
            async fn change_log_level(
                &self,
                _request: Request<pb::ChangeLogLevelRequest>,
            ) -> Result<Response<pb::ChangeLogLevelResponse>, Status> {
                let remark = format!("NOT_IMPLEMENTED: {}", refusal().message);
                Ok(Response::new(pb::ChangeLogLevelResponse { remark }))
            }

            $(async fn $rpc(
                &self,
                _request: Request<pb::$request>,
            ) -> Result<Response<pb::$response>, Status> {
                let mut response = pb::$response::default();
                response.status = Some(refusal());
                Ok(Response::new(response))
            })*
        }
    };
}

not_supported!(
    describe_topic_status: DescribeTopicStatusRequest => DescribeTopicStatusResponse,
    list_subscription: ListSubscriptionRequest => ListSubscriptionResponse,
    describe_subscription: DescribeSubscriptionRequest => DescribeSubscriptionResponse,
    delete_subscription: DeleteSubscriptionRequest => DeleteSubscriptionResponse,
    describe_group_accumulation:
        DescribeGroupAccumulationRequest => DescribeGroupAccumulationResponse,
    list_consumer_connection: ListConsumerConnectionRequest => ListConsumerConnectionResponse,
    reset_group_offset: ResetGroupOffsetRequest => ResetGroupOffsetResponse,
    query_message: ListMessageRequest => ListMessageResponse,
    print_thread_stack_trace: PrintThreadStackTraceRequest => PrintThreadStackTraceResponse,
    verify_message: VerifyMessageRequest => VerifyMessageResponse,
    admin_send_message: AdminSendMessageRequest => AdminSendMessageResponse,
    get_consumer_running_info: GetConsumerRunningInfoRequest => GetConsumerRunningInfoResponse,
    get_topic_route: GetTopicRouteRequest => GetTopicRouteResponse,
    query_time_span: QueryTimeSpanRequest => QueryTimeSpanResponse,
    get_proxy_runtime_stats: GetProxyRuntimeStatsRequest => GetProxyRuntimeStatsResponse,
);
