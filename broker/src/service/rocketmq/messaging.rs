//! The RPCs of `MessagingService`, each handed to the module that does it.

use drumlin_proto::rocketmq::messaging_service_server::MessagingService;
use drumlin_proto::rocketmq::{
    self as pb, Code, PullMessageResponse, TelemetryCommand, pull_message_response,
};
use futures::stream::{self, Iter};
use std::array;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::receive::Frames;
use super::status::Fault;
use super::{Service, lease, presence, receive, route, send, telemetry};
use tokio::time::Instant;

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl MessagingService for Service {
    type ReceiveMessageStream = Frames;
    type PullMessageStream = Iter<array::IntoIter<Result<PullMessageResponse, Status>, 2>>;
    type TelemetryStream = ReceiverStream<Result<TelemetryCommand, Status>>;

    async fn query_route(
        &self,
        request: Request<pb::QueryRouteRequest>,
    ) -> Reply<pb::QueryRouteResponse> {
        let work = |caller, request| route::query_route(self, caller, request);
        Ok(self.call("QueryRoute", request, work).await)
    }

    async fn query_assignment(
        &self,
        request: Request<pb::QueryAssignmentRequest>,
    ) -> Reply<pb::QueryAssignmentResponse> {
        let work = |caller, request| route::query_assignment(self, caller, request);
        Ok(self.call("QueryAssignment", request, work).await)
    }

    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Reply<pb::HeartbeatResponse> {
        let work = |caller, request| presence::heartbeat(&self.edge, caller, request);
        Ok(self.call("Heartbeat", request, work).await)
    }

    async fn notify_client_termination(
        &self,
        request: Request<pb::NotifyClientTerminationRequest>,
    ) -> Reply<pb::NotifyClientTerminationResponse> {
        let work = |caller, request| presence::terminate(&self.edge, caller, request);
        Ok(self.call("NotifyClientTermination", request, work).await)
    }

    async fn send_message(
        &self,
        request: Request<pb::SendMessageRequest>,
    ) -> Reply<pb::SendMessageResponse> {
        let work = |caller, request| send::send(&self.edge, caller, request);
        Ok(self.call("SendMessage", request, work).await)
    }

    async fn receive_message(
        &self,
        request: Request<pb::ReceiveMessageRequest>,
    ) -> Reply<Self::ReceiveMessageStream> {
        Ok(receive::open(self, request).await)
    }

    async fn ack_message(
        &self,
        request: Request<pb::AckMessageRequest>,
    ) -> Reply<pb::AckMessageResponse> {
        let work = |caller, request| lease::ack(&self.edge, caller, request);
        Ok(self.call("AckMessage", request, work).await)
    }

    async fn change_invisible_duration(
        &self,
        request: Request<pb::ChangeInvisibleDurationRequest>,
    ) -> Reply<pb::ChangeInvisibleDurationResponse> {
        let handle = request.get_ref().receipt_handle.clone();
        let work = |caller, request| lease::change(&self.edge, caller, request);
        let mut answer: Response<pb::ChangeInvisibleDurationResponse> =
            self.call("ChangeInvisibleDuration", request, work).await;
        // Clients take over what they are sent, also from an error.
        if answer.get_ref().receipt_handle.is_empty() {
            answer.get_mut().receipt_handle = handle;
        }
        Ok(answer)
    }

    async fn telemetry(
        &self,
        request: Request<Streaming<TelemetryCommand>>,
    ) -> Reply<Self::TelemetryStream> {
        Ok(Response::new(telemetry::open(&self.edge, &self.listener, request)))
    }

    async fn end_transaction(
        &self,
        request: Request<pb::EndTransactionRequest>,
    ) -> Reply<pb::EndTransactionResponse> {
        let work = async |_, request: pb::EndTransactionRequest| {
            if request.transaction_id.trim().is_empty() {
                let text = "the transaction id is blank";
                return Err(Fault::new(Code::InvalidTransactionId, text));
            }
            Err(Fault::not_supported("transactions"))
        };
        Ok(self.call("EndTransaction", request, work).await)
    }

    async fn forward_message_to_dead_letter_queue(
        &self,
        request: Request<pb::ForwardMessageToDeadLetterQueueRequest>,
    ) -> Reply<pb::ForwardMessageToDeadLetterQueueResponse> {
        let work = async |_, _| Err(Fault::not_supported("dead-letter queues"));
        Ok(self.call("ForwardMessageToDeadLetterQueue", request, work).await)
    }

    async fn recall_message(
        &self,
        request: Request<pb::RecallMessageRequest>,
    ) -> Reply<pb::RecallMessageResponse> {
        let work = async |_, _| Err(Fault::not_supported("delayed messages"));
        Ok(self.call("RecallMessage", request, work).await)
    }

    async fn sync_lite_subscription(
        &self,
        request: Request<pb::SyncLiteSubscriptionRequest>,
    ) -> Reply<pb::SyncLiteSubscriptionResponse> {
        let work = async |_, _| Err(Fault::not_supported("lite topics"));
        Ok(self.call("SyncLiteSubscription", request, work).await)
    }

    async fn pull_message(
        &self,
        request: Request<pb::PullMessageRequest>,
    ) -> Reply<Self::PullMessageStream> {
        let started = Instant::now();
        let caller = Caller::from_metadata(request.metadata(), &self.listener, started);
        let fault = caller.as_ref().err().cloned();
        let fault = fault.unwrap_or_else(|| Fault::not_supported("reads by offset over this API"));
        self.edge.note("PullMessage", caller.as_ref().ok(), fault.code, started);
        let frame = |content| Ok(PullMessageResponse { content: Some(content) });
        let frames = [
            frame(pull_message_response::Content::Status(fault.status())),
            frame(pull_message_response::Content::NextOffset(request.get_ref().offset)),
        ];
        Ok(Response::new(stream::iter(frames)))
    }

    async fn update_offset(
        &self,
        request: Request<pb::UpdateOffsetRequest>,
    ) -> Reply<pb::UpdateOffsetResponse> {
        let work = async |_, _| Err(Fault::not_supported("offset commits over this API"));
        Ok(self.call("UpdateOffset", request, work).await)
    }

    async fn get_offset(
        &self,
        request: Request<pb::GetOffsetRequest>,
    ) -> Reply<pb::GetOffsetResponse> {
        let work = async |_, _| Err(Fault::not_supported("offset queries over this API"));
        Ok(self.call("GetOffset", request, work).await)
    }

    async fn query_offset(
        &self,
        request: Request<pb::QueryOffsetRequest>,
    ) -> Reply<pb::QueryOffsetResponse> {
        let work = async |_, _| Err(Fault::not_supported("offset queries over this API"));
        Ok(self.call("QueryOffset", request, work).await)
    }
}
