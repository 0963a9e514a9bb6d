//! RocketMQ's own `Admin` service, sent on as it comes to the catalog group's leader.

use std::sync::Arc;

use drumlin_proto::rocketmq as mq;
use drumlin_proto::rocketmq::admin_client::AdminClient;
use drumlin_proto::rocketmq::admin_server::Admin;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::forward::{Call, IfLost, MESSAGE_BYTES_MAX, any_group, forward};
use crate::shared::Shared;

#[derive(Debug, Clone)]
pub(crate) struct OfficialAdminService {
    pub(crate) shared: Arc<Shared>,
}

macro_rules! forwarded {
    ($($rpc:ident: $request:ident => $response:ident;)*) => {
        #[tonic::async_trait]
        impl Admin for OfficialAdminService {
            $(async fn $rpc(
                &self,
                request: Request<mq::$request>,
            ) -> Result<Response<mq::$response>, Status> {
                let (call, message) = Call::split(request);
                let group = any_group(&self.shared)?;
                self.shared.metrics.forwards(stringify!($rpc));
                let send = |channel: Channel, request| async move {
                    let client = AdminClient::new(channel);
                    client.max_decoding_message_size(MESSAGE_BYTES_MAX).$rpc(request).await
                };
                forward(&self.shared, &group, &call, message, IfLost::Fail, send).await.map(Response::new)
            })*
        }
    };
}

forwarded! {
    change_log_level: ChangeLogLevelRequest => ChangeLogLevelResponse;
    describe_topic_status: DescribeTopicStatusRequest => DescribeTopicStatusResponse;
    list_subscription: ListSubscriptionRequest => ListSubscriptionResponse;
    describe_subscription: DescribeSubscriptionRequest => DescribeSubscriptionResponse;
    delete_subscription: DeleteSubscriptionRequest => DeleteSubscriptionResponse;
    describe_group_accumulation:
        DescribeGroupAccumulationRequest => DescribeGroupAccumulationResponse;
    list_consumer_connection: ListConsumerConnectionRequest => ListConsumerConnectionResponse;
    reset_group_offset: ResetGroupOffsetRequest => ResetGroupOffsetResponse;
    query_message: ListMessageRequest => ListMessageResponse;
    print_thread_stack_trace: PrintThreadStackTraceRequest => PrintThreadStackTraceResponse;
    verify_message: VerifyMessageRequest => VerifyMessageResponse;
    admin_send_message: AdminSendMessageRequest => AdminSendMessageResponse;
    get_consumer_running_info: GetConsumerRunningInfoRequest => GetConsumerRunningInfoResponse;
    get_topic_route: GetTopicRouteRequest => GetTopicRouteResponse;
    query_time_span: QueryTimeSpanRequest => QueryTimeSpanResponse;
    get_proxy_runtime_stats: GetProxyRuntimeStatsRequest => GetProxyRuntimeStatsResponse;
}
