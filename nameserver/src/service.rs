//! The access point: `apache.rocketmq.v2` as clients see it at a nameserver. Routes and assignments
//! are answered here, everything else goes to the broker group that owns it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use drumlin_proto::forward::{acks, polls};
use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::native::Topic;
use drumlin_proto::rocketmq::messaging_service_server::MessagingService;
use drumlin_proto::rocketmq::{self as mq, Code};
use drumlin_proto::route;
use futures::future::join_all;
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use crate::forward::{Call, IfLost, any_group, forward, messaging};
use crate::lookup::{ListenerAddress, LookupError, find};
use crate::shared::Shared;
use crate::telemetry;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answer<T> = Result<Response<T>, Status>;

/// Telemetry commands that may wait for a slow client.
const COMMANDS_MAX: usize = 16;

/// One listener's access point.
#[derive(Debug, Clone)]
pub(crate) struct AccessPoint {
    pub(crate) shared: Arc<Shared>,
    pub(crate) listener: Arc<ListenerAddress>,
    /// Sends without a message group so far, over all listeners.
    pub(crate) turn: Arc<AtomicUsize>,
}

fn status(code: Code, message: impl Into<String>) -> Option<mq::Status> {
    Some(mq::Status { code: code.into(), message: message.into() })
}

fn code_of(status: Option<&mq::Status>) -> i32 {
    status.map_or(Code::Unspecified.into(), |status| status.code)
}

/// The call sent to one broker group, counted under its name.
macro_rules! to_group {
    ($self:ident, $rpc:ident, $group:expr, $call:expr, $message:expr) => {{
        $self.shared.metrics.forwards(stringify!($rpc));
        let send =
            |channel: Channel, request| async move { messaging(channel).$rpc(request).await };
        forward(&$self.shared, $group, $call, $message, IfLost::Repeat, send)
    }};
}

impl AccessPoint {
    fn definition(&self, topic: Option<&mq::Resource>, call: &Call) -> Option<Arc<Topic>> {
        let name = route::name_with_namespace(topic?, call.namespace());
        self.shared.directory.read(|table| table.topic(&name))
    }

    /// The broker group that a call about a topic goes to where none is named.
    fn group_of_topic(&self, topic: Option<&mq::Resource>, call: &Call) -> Result<String, Status> {
        let definition = self.definition(topic, call);
        let share = definition.as_ref().and_then(|topic| topic.shares.first());
        share.map_or_else(|| any_group(&self.shared), |share| Ok(share.broker_group.clone()))
    }

    fn group_of_queue(
        &self,
        queue: Option<&mq::MessageQueue>,
        call: &Call,
    ) -> Result<String, Status> {
        match queue.and_then(|queue| queue.broker.as_ref()).map(|broker| &broker.name) {
            Some(name) if !name.is_empty() => Ok(name.clone()),
            _ => self.group_of_topic(queue.and_then(|queue| queue.topic.as_ref()), call),
        }
    }

    /// The owner of a receipt handle; of the topic, where the handle does not tell.
    fn group_of_handle(
        &self,
        handle: &str,
        topic: Option<&mq::Resource>,
        call: &Call,
    ) -> Result<String, Status> {
        self.named_by_handle(handle).map_or_else(|| self.group_of_topic(topic, call), Ok)
    }

    fn named_by_handle(&self, handle: &str) -> Option<String> {
        let named = route::broker_group_of_handle(handle)?.to_string();
        self.shared.directory.read(|table| table.knows_group(&named)).then_some(named)
    }

    /// Where a send goes: with a message group to that one's queue, else to each queue in turn.
    fn group_of_send(
        &self,
        message: &mq::SendMessageRequest,
        call: &Call,
    ) -> Result<String, Status> {
        let topic = message.messages.first().and_then(|message| message.topic.as_ref());
        let Some(definition) = self.definition(topic, call) else { return any_group(&self.shared) };
        let mut shares: Vec<(&str, u32)> = definition
            .shares
            .iter()
            .map(|share| (share.broker_group.as_str(), share.queue_count))
            .collect();
        shares.sort_unstable();
        if message_group(message).is_none() {
            self.shared.directory.read(|table| {
                // Where none has a process, any will do: the call is held for it.
                if shares.iter().any(|(name, _)| table.is_served(name)) {
                    shares.retain(|(name, _)| table.is_served(name));
                }
            });
        }
        let counts: Vec<u32> = shares.iter().map(|(_, count)| *count).collect();
        let place = match message_group(message) {
            Some(group) => route::place_of_message_group(group, &counts),
            None => {
                let queues: Vec<(usize, u32)> = route::queues_in_route_order(&counts).collect();
                let turn = self.turn.fetch_add(1, Ordering::Relaxed);
                queues.get(turn % queues.len().max(1)).copied()
            }
        };
        let chosen = place.and_then(|(group, _)| shares.get(group));
        chosen.map_or_else(|| any_group(&self.shared), |(name, _)| Ok((*name).to_owned()))
    }

    async fn route(
        &self,
        topic: Option<&mq::Resource>,
        dialled: Option<&mq::Endpoints>,
        call: &Call,
        may_create: bool,
    ) -> Result<Result<drumlin_proto::native::TopicRoute, mq::Status>, Status> {
        let fault = |code: Code, message: String| {
            self.shared.metrics.queried("refused");
            Ok(Err(mq::Status { code: code.into(), message }))
        };
        if call.client_id().is_empty() {
            return fault(Code::ClientIdRequired, "the x-mq-client-id header is missing".into());
        }
        let name = topic.map(|topic| route::name_with_namespace(topic, call.namespace()));
        let name = match TopicName::parse(&name.unwrap_or_default()) {
            Ok(name) => name,
            Err(error) => return fault(Code::IllegalTopic, format!("topic name: {error}")),
        };
        if dialled.is_some_and(|endpoints| !route::is_usable(endpoints)) {
            let text = "the endpoints name no usable address";
            return fault(Code::IllegalAccessPoint, text.into());
        }
        match find(&self.shared, &self.listener, &name, call, may_create).await {
            Ok(route) => {
                self.shared.metrics.queried("found");
                Ok(Ok(route))
            }
            Err(LookupError::Unavailable(text)) => {
                self.shared.metrics.queried("unavailable");
                Err(Status::unavailable(text))
            }
            Err(error @ LookupError::NotFound(_)) => {
                self.shared.metrics.queried("not_found");
                let message = error.to_string();
                Ok(Err(mq::Status { code: Code::TopicNotFound.into(), message }))
            }
            Err(LookupError::NotCreated { code, reason, .. }) => fault(code, reason),
        }
    }
}

/// The message group that all messages of a send agree on.
fn message_group(send: &mq::SendMessageRequest) -> Option<&str> {
    fn of(message: &mq::Message) -> Option<&str> {
        message.system_properties.as_ref()?.message_group.as_deref()
    }
    let first = of(send.messages.first()?)?;
    send.messages.iter().all(|message| of(message) == Some(first)).then_some(first)
}

/// The code of several broker groups' answers: the first that is not OK.
fn worst<T>(answers: Vec<Result<T, Status>>, code: impl Fn(&T) -> i32) -> Result<T, Status> {
    let mut answers = answers.into_iter();
    let none = || Status::unavailable("no broker has registered yet");
    let mut kept = answers.next().ok_or_else(none)?;
    for answer in answers {
        let fine = |answer: &Result<T, Status>| {
            answer.as_ref().is_ok_and(|answer| code(answer) == i32::from(Code::Ok))
        };
        // A group that cannot be reached does not make the others' answer void.
        if kept.is_err() || (fine(&kept) && answer.is_ok()) {
            kept = answer;
        }
    }
    kept
}

#[tonic::async_trait]
impl MessagingService for AccessPoint {
    type ReceiveMessageStream = Answers<mq::ReceiveMessageResponse>;
    type PullMessageStream = Answers<mq::PullMessageResponse>;
    type TelemetryStream = Answers<mq::TelemetryCommand>;

    async fn query_route(
        &self,
        request: Request<mq::QueryRouteRequest>,
    ) -> Answer<mq::QueryRouteResponse> {
        let (call, query) = Call::split(request);
        let route = match self
            .route(query.topic.as_ref(), query.endpoints.as_ref(), &call, true)
            .await?
        {
            Ok(route) => route,
            Err(fault) => {
                let status = Some(fault);
                return Ok(Response::new(mq::QueryRouteResponse { status, ..Default::default() }));
            }
        };
        let topic = query.topic.unwrap_or_default();
        let message_queues = route::message_queues(&topic, &route);
        let status = status(Code::Ok, "");
        Ok(Response::new(mq::QueryRouteResponse { status, message_queues }))
    }

    async fn query_assignment(
        &self,
        request: Request<mq::QueryAssignmentRequest>,
    ) -> Answer<mq::QueryAssignmentResponse> {
        let (call, query) = Call::split(request);
        let refuse = |status| mq::QueryAssignmentResponse { status, assignments: Vec::new() };
        let group = query.group.unwrap_or_default();
        if let Err(error) = GroupName::parse(&route::name_with_namespace(&group, call.namespace()))
            && !call.client_id().is_empty()
        {
            let status = status(Code::IllegalConsumerGroup, format!("group name: {error}"));
            return Ok(Response::new(refuse(status)));
        }
        let route =
            match self.route(query.topic.as_ref(), query.endpoints.as_ref(), &call, false).await? {
                Ok(route) => route,
                Err(fault) => return Ok(Response::new(refuse(Some(fault)))),
            };
        let topic = query.topic.unwrap_or_default();
        let assignments = route::assignments(&topic, &route, false);
        let status = if assignments.is_empty() {
            status(Code::Forbidden, "no readable queue")
        } else {
            status(Code::Ok, "")
        };
        Ok(Response::new(mq::QueryAssignmentResponse { status, assignments }))
    }

    async fn heartbeat(
        &self,
        request: Request<mq::HeartbeatRequest>,
    ) -> Answer<mq::HeartbeatResponse> {
        let (call, beat) = Call::split(request);
        let groups = self.shared.directory.read(|table| table.live_groups());
        let send = |group: String| {
            let (beat, call) = (beat.clone(), call.clone());
            async move { to_group!(self, heartbeat, &group, &call, beat).await }
        };
        let answers = join_all(groups.into_iter().map(send)).await;
        worst(answers, |answer| code_of(answer.status.as_ref())).map(Response::new)
    }

    async fn notify_client_termination(
        &self,
        request: Request<mq::NotifyClientTerminationRequest>,
    ) -> Answer<mq::NotifyClientTerminationResponse> {
        let (call, notice) = Call::split(request);
        let groups = self.shared.directory.read(|table| table.live_groups());
        let send = |group: String| {
            let (notice, call) = (notice.clone(), call.clone());
            async move { to_group!(self, notify_client_termination, &group, &call, notice).await }
        };
        let answers = join_all(groups.into_iter().map(send)).await;
        worst(answers, |answer| code_of(answer.status.as_ref())).map(Response::new)
    }

    async fn send_message(
        &self,
        request: Request<mq::SendMessageRequest>,
    ) -> Answer<mq::SendMessageResponse> {
        let (call, send) = Call::split(request);
        let topic = send.messages.first().and_then(|message| message.topic.as_ref());
        let topic = topic.map(|topic| topic.name.clone()).unwrap_or_default();
        let line = match message_group(&send) {
            Some(group) => Some(self.shared.forwarder.stand_in_line(&topic, group).await),
            None => None,
        };
        let group = self.group_of_send(&send, &call)?;
        let answer = to_group!(self, send_message, &group, &call, send).await;
        drop(line);
        answer.map(Response::new)
    }

    async fn receive_message(
        &self,
        request: Request<mq::ReceiveMessageRequest>,
    ) -> Answer<Self::ReceiveMessageStream> {
        let (call, receive) = Call::split(request);
        let group = self.group_of_queue(receive.message_queue.as_ref(), &call)?;
        if !self.shared.directory.read(|table| table.knows_group(&group)) {
            use mq::receive_message_response::Content;
            let fault = Content::Status(mq::Status {
                code: Code::BadRequest.into(),
                message: format!("there is no broker {group:?}"),
            });
            let ends = Content::DeliveryTimestamp(Default::default());
            let frame = |content| Ok(mq::ReceiveMessageResponse { content: Some(content) });
            let frames = futures::stream::iter([frame(fault), frame(ends)]);
            return Ok(Response::new(Box::pin(frames)));
        }
        let first = to_group!(self, receive_message, &group, &call, receive.clone()).await?;
        let stop = self.shared.stop.clone().cancelled_owned();
        let again = {
            let point = self.clone();
            move || {
                let (point, group) = (point.clone(), group.clone());
                let (call, receive) = (call.clone(), receive.clone());
                async move {
                    let frames = to_group!(point, receive_message, &group, &call, receive).await;
                    frames.map_err(|error| mq::Status {
                        code: Code::HaNotAvailable.into(),
                        message: error.message().to_owned(),
                    })
                }
            }
        };
        let frames = polls::frames(first, again, Default::default);
        Ok(Response::new(Box::pin(frames.take_until(Box::pin(stop)))))
    }

    async fn ack_message(
        &self,
        request: Request<mq::AckMessageRequest>,
    ) -> Answer<mq::AckMessageResponse> {
        let (call, ack) = Call::split(request);
        // Handles that name no group are all of one: that of the topic.
        let unnamed = self.group_of_topic(ack.topic.as_ref(), &call)?;
        let parts = acks::parts(&ack, |handle| {
            self.named_by_handle(handle).unwrap_or_else(|| unnamed.clone())
        });
        if parts.len() <= 1 {
            let group = parts.into_keys().next().unwrap_or(unnamed);
            let answer = to_group!(self, ack_message, &group, &call, ack).await;
            return answer.map(Response::new);
        }
        self.ack_in_parts(&call, ack, parts).await.map(Response::new)
    }

    async fn forward_message_to_dead_letter_queue(
        &self,
        request: Request<mq::ForwardMessageToDeadLetterQueueRequest>,
    ) -> Answer<mq::ForwardMessageToDeadLetterQueueResponse> {
        let (call, message) = Call::split(request);
        let group = self.group_of_handle(&message.receipt_handle, message.topic.as_ref(), &call)?;
        let answer =
            to_group!(self, forward_message_to_dead_letter_queue, &group, &call, message).await;
        answer.map(Response::new)
    }

    async fn change_invisible_duration(
        &self,
        request: Request<mq::ChangeInvisibleDurationRequest>,
    ) -> Answer<mq::ChangeInvisibleDurationResponse> {
        let (call, change) = Call::split(request);
        let group = self.group_of_handle(&change.receipt_handle, change.topic.as_ref(), &call)?;
        let answer = to_group!(self, change_invisible_duration, &group, &call, change).await;
        answer.map(Response::new)
    }

    async fn pull_message(
        &self,
        request: Request<mq::PullMessageRequest>,
    ) -> Answer<Self::PullMessageStream> {
        let (call, pull) = Call::split(request);
        let group = self.group_of_queue(pull.message_queue.as_ref(), &call)?;
        let frames = to_group!(self, pull_message, &group, &call, pull).await?;
        let stop = self.shared.stop.clone().cancelled_owned();
        Ok(Response::new(Box::pin(frames.take_until(Box::pin(stop)))))
    }

    async fn update_offset(
        &self,
        request: Request<mq::UpdateOffsetRequest>,
    ) -> Answer<mq::UpdateOffsetResponse> {
        let (call, update) = Call::split(request);
        let group = self.group_of_queue(update.message_queue.as_ref(), &call)?;
        to_group!(self, update_offset, &group, &call, update).await.map(Response::new)
    }

    async fn get_offset(
        &self,
        request: Request<mq::GetOffsetRequest>,
    ) -> Answer<mq::GetOffsetResponse> {
        let (call, get) = Call::split(request);
        let group = self.group_of_queue(get.message_queue.as_ref(), &call)?;
        to_group!(self, get_offset, &group, &call, get).await.map(Response::new)
    }

    async fn query_offset(
        &self,
        request: Request<mq::QueryOffsetRequest>,
    ) -> Answer<mq::QueryOffsetResponse> {
        let (call, query) = Call::split(request);
        let group = self.group_of_queue(query.message_queue.as_ref(), &call)?;
        to_group!(self, query_offset, &group, &call, query).await.map(Response::new)
    }

    async fn end_transaction(
        &self,
        request: Request<mq::EndTransactionRequest>,
    ) -> Answer<mq::EndTransactionResponse> {
        let (call, end) = Call::split(request);
        let group = self.group_of_topic(end.topic.as_ref(), &call)?;
        to_group!(self, end_transaction, &group, &call, end).await.map(Response::new)
    }

    async fn telemetry(
        &self,
        request: Request<Streaming<mq::TelemetryCommand>>,
    ) -> Answer<Self::TelemetryStream> {
        let (call, inbound) = Call::split(request);
        self.shared.metrics.forwards("telemetry");
        let (answers, stream) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            if let Err(error) = telemetry::relay(&shared, &call, inbound, &answers).await {
                // The client may be gone already; then nobody is left to be told.
                answers.send(Err(error)).await.ok();
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn recall_message(
        &self,
        request: Request<mq::RecallMessageRequest>,
    ) -> Answer<mq::RecallMessageResponse> {
        let (call, recall) = Call::split(request);
        let group = self.group_of_topic(recall.topic.as_ref(), &call)?;
        to_group!(self, recall_message, &group, &call, recall).await.map(Response::new)
    }

    async fn sync_lite_subscription(
        &self,
        request: Request<mq::SyncLiteSubscriptionRequest>,
    ) -> Answer<mq::SyncLiteSubscriptionResponse> {
        let (call, sync) = Call::split(request);
        let group = self.group_of_topic(sync.topic.as_ref(), &call)?;
        to_group!(self, sync_lite_subscription, &group, &call, sync).await.map(Response::new)
    }
}

impl AccessPoint {
    /// Acks entries at their owners and puts the answers together in the order asked.
    async fn ack_in_parts(
        &self,
        call: &Call,
        ack: mq::AckMessageRequest,
        parts: BTreeMap<String, Vec<usize>>,
    ) -> Result<mq::AckMessageResponse, Status> {
        let send = |(group, places): (String, Vec<usize>)| {
            let part = acks::part(&ack, &places);
            async move {
                let answer = to_group!(self, ack_message, &group, call, part).await;
                let answer = answer.unwrap_or_else(|error| mq::AckMessageResponse {
                    status: status(Code::InternalServerError, error.to_string()),
                    entries: Vec::new(),
                });
                (places, answer)
            }
        };
        Ok(acks::merge(&ack, join_all(parts.into_iter().map(send)).await))
    }
}
