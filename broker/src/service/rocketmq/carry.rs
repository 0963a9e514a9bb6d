//! Calls that another broker does: sent on to the leader of the broker group that owns what they are
//! about, and to the next one if that goes away. A call that was sent here is done here or not at all.

use drumlin_proto::forward::{CarryError, IfLost, carry, messaging};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{Code, ReceiveMessageRequest, ReceiveMessageResponse};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use super::caller::Caller;
use super::status::Fault;
use super::{ELECTION_WAIT, Edge, REPLY_MARGIN};
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

    /// Begins a poll at the leader of a broker group.
    pub(super) async fn carry_poll(
        &self,
        caller: &Caller,
        broker_group: &str,
        request: ReceiveMessageRequest,
    ) -> Result<Streaming<ReceiveMessageResponse>, Fault> {
        let send = |mut leader: MessagingServiceClient<Channel>, request| async move {
            leader.receive_message(request).await
        };
        self.carry(caller, broker_group, request, send).await
    }

    /// As [`Edge::carry`], for calls of any API that may be done twice.
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
            self.whereabouts.address_by(Instant::from_std(until), broker_group, &caller.listener)
        };
        let (until, if_lost) = (until.into_std(), IfLost::Repeat);
        let carrying = carry(&self.forwarder, &call, message, if_lost, until, find, send);
        match self.stop.run_until_cancelled(carrying).await {
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
