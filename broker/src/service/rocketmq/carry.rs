//! Calls that another broker does: sent on to the leader of the broker group that owns what they are
//! about, once. A call that was sent here is done here or not at all.

use std::sync::Arc;

use drumlin_proto::forward::{CarryError, carry, messaging};
use drumlin_proto::native::Address;
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::receive_message_response::Content;
use drumlin_proto::rocketmq::{Code, ReceiveMessageResponse};
use futures::{Stream, StreamExt, stream};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::status::Fault;
use super::{ELECTION_WAIT, Edge, REPLY_MARGIN, validate};
use crate::whereabouts::Leader;

impl Edge {
    /// Until when a call may wait for a leader.
    fn patience(&self, caller: &Caller) -> Instant {
        let now = Instant::now();
        let left = caller.remaining(now).map(|left| left.saturating_sub(REPLY_MARGIN));
        now + left.unwrap_or(ELECTION_WAIT).min(ELECTION_WAIT)
    }

    /// Whether this node leads its broker group, for calls that are not sent on from here.
    pub(super) fn led_here(&self) -> Result<(), Fault> {
        if self.replica().raft_status().borrow().serving {
            return Ok(());
        }
        Err(Fault::not_led("this broker does not lead its group"))
    }

    /// Whether a call about a broker group is done here; if not, its leader does it. Waits for one
    /// within the call's patience.
    pub(super) async fn is_done_here(
        &self,
        caller: &Caller,
        broker_group: &str,
    ) -> Result<bool, Fault> {
        if self.whereabouts.is_own(broker_group) {
            let led = self.led_here();
            if led.is_ok() || caller.forwarded {
                return led.map(|()| true);
            }
        } else if caller.forwarded {
            let text = format!("this broker does not belong to {broker_group}");
            return Err(Fault::not_led(text));
        }
        let until = self.patience(caller);
        let waiting = self.whereabouts.leader_by(until, broker_group, &caller.listener);
        match self.stop.run_until_cancelled(waiting).await {
            Some(Leader::Here) => Ok(true),
            Some(Leader::There { .. }) => Ok(false),
            Some(Leader::Unknown) => {
                Err(Fault::not_led(format!("broker group {broker_group} has no leader now")))
            }
            None => Err(Fault::not_led("the broker is stopping")),
        }
    }

    /// Where a call is sent; this node itself, should it lead by now.
    async fn address_by(
        &self,
        until: Instant,
        caller: &Caller,
        broker_group: &str,
    ) -> Option<Address> {
        match self.whereabouts.leader_by(until, broker_group, &caller.listener).await {
            Leader::There { address, .. } => Some(address),
            Leader::Here => self.whereabouts.own_address(&caller.listener),
            Leader::Unknown => None,
        }
    }

    /// Sends a call to the leader of a broker group.
    pub(super) async fn carry<Q, A, F>(
        &self,
        caller: &Caller,
        broker_group: &str,
        message: Q,
        send: impl Fn(MessagingServiceClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let send = |channel, request| send(messaging(channel), request);
        self.carry_to(caller, broker_group, message, send).await
    }

    /// As [`Edge::carry`], for calls of any API.
    pub(super) async fn carry_to<Q, A, F>(
        &self,
        caller: &Caller,
        broker_group: &str,
        message: Q,
        send: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let known = self.clients.get(&caller.client_id);
        let call = caller.forward(&self.context.config.node, known.as_ref());
        let until = self.patience(caller);
        let find = |until: std::time::Instant| {
            self.address_by(Instant::from_std(until), caller, broker_group)
        };
        let carrying = carry(&self.forwarder, &call, message, until.into_std(), find, send);
        let carried = self.stop.run_until_cancelled(carrying).await;
        match carried {
            Some(Ok(response)) => Ok(response.into_inner()),
            Some(Err(CarryError::Nobody)) => {
                let text = format!("no leader of broker group {broker_group} took the call");
                Err(Fault::not_led(text))
            }
            Some(Err(CarryError::Failed(status))) => Err(lost(broker_group, &status)),
            None => Err(Fault::new(Code::HaNotAvailable, "the broker is stopping")),
        }
    }
}

/// The leader's answer did not come.
fn lost(broker_group: &str, status: &Status) -> Fault {
    let code = match status.code() {
        tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => Code::ProxyTimeout,
        _ => Code::HaNotAvailable,
    };
    let why = status.message();
    let text =
        format!("no answer of the leader of {broker_group}, it may be done all the same: {why}");
    Fault::new(code, text)
}

/// The frames of a poll that the leader does. A stream that breaks ends as one that timed out, so
/// that what came is kept and the client asks again.
pub(super) fn relayed(
    edge: &Arc<Edge>,
    broker_group: String,
    frames: Streaming<ReceiveMessageResponse>,
) -> impl Stream<Item = Result<ReceiveMessageResponse, Status>> + Send + use<> {
    enum Part {
        Begun(Streaming<ReceiveMessageResponse>),
        /// The status frame went out.
        Told(Streaming<ReceiveMessageResponse>),
        Broken,
        Ended,
    }
    let now_ms = {
        let edge = edge.clone();
        move || i64::try_from(edge.replica().clock_ms()).unwrap_or(i64::MAX)
    };
    let relayed = stream::unfold(Part::Begun(frames), move |part| {
        let (broker_group, now_ms) = (broker_group.clone(), now_ms.clone());
        async move {
            let frame = |content| Ok(ReceiveMessageResponse { content: Some(content) });
            let end = || frame(Content::DeliveryTimestamp(validate::timestamp(now_ms())));
            let (mut frames, told) = match part {
                Part::Begun(frames) => (frames, false),
                Part::Told(frames) => (frames, true),
                Part::Broken => return Some((end(), Part::Ended)),
                Part::Ended => return None,
            };
            match frames.message().await {
                Ok(Some(frame)) => {
                    let last = matches!(frame.content, Some(Content::DeliveryTimestamp(_)));
                    Some((Ok(frame), if last { Part::Ended } else { Part::Told(frames) }))
                }
                Ok(None) | Err(_) if told => Some((end(), Part::Ended)),
                Ok(None) => None,
                Err(error) => {
                    let fault = lost(&broker_group, &error);
                    Some((frame(Content::Status(fault.status())), Part::Broken))
                }
            }
        }
    });
    relayed.take_until(edge.stop.clone().cancelled_owned())
}
