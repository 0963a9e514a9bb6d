//! What becomes of a delivery: AckMessage and ChangeInvisibleDuration.

use std::collections::BTreeMap;
use std::sync::Arc;

use drumlin_proto::forward::acks;
use drumlin_proto::ids::{GroupName, QueueKey, QueueOffset, TopicName};
use drumlin_proto::rocketmq::messaging_service_client::MessagingServiceClient;
use drumlin_proto::rocketmq::{
    AckMessageEntry, AckMessageRequest, AckMessageResponse, AckMessageResultEntry,
    ChangeInvisibleDurationRequest, ChangeInvisibleDurationResponse, Code, Status,
};
use drumlin_proto::route::broker_group_of_handle;
use futures::future::join_all;
use tonic::transport::Channel;

use super::caller::Caller;
use super::handle::Handle;
use super::status::{Fault, ok, overall};
use super::{Edge, validate};
use crate::command::{Command, GroupId, LeaseId, LeaseRefusal, Outcome, Refusal};
use crate::replica::{Applied, Item, ProposeError};

/// Entries of one AckMessage request.
const ENTRIES_MAX: usize = 256;

impl Edge {
    /// The broker group that gave a handle; this node's where it does not tell of a known one.
    fn owner_of_handle(&self, handle: &str) -> String {
        let named = broker_group_of_handle(handle).map(|name| name.to_string());
        let known = named.filter(|name| self.whereabouts.knows(name));
        known.unwrap_or_else(|| self.context.config.broker_group.to_string())
    }

    /// What a handle names, if it was given to this group for this topic.
    fn delivery(
        &self,
        handle: &str,
        group: &GroupName,
        topic: &TopicName,
    ) -> Result<Handle, Fault> {
        let invalid = |text: String| Fault::new(Code::InvalidReceiptHandle, text);
        let handle = Handle::decode(handle, &self.context.config.broker_group)
            .map_err(|error| invalid(error.to_string()))?;
        let view = self.replica().view();
        let catalog = view.state.catalog();
        let same_group =
            catalog.group(handle.group).is_some_and(|definition| definition.name == *group);
        let same_topic =
            catalog.topic(handle.queue.topic).is_some_and(|definition| definition.name == *topic);
        if same_group && same_topic {
            return Ok(handle);
        }
        Err(invalid("the receipt handle is of another group or topic".into()))
    }
}

/// Finishes deliveries; the entries are independent of each other.
pub(super) async fn ack(
    edge: &Arc<Edge>,
    caller: Arc<Caller>,
    request: AckMessageRequest,
) -> Result<AckMessageResponse, Fault> {
    let group = validate::group_name(request.group.as_ref(), &caller.namespace)?;
    let topic = validate::topic_name(request.topic.as_ref(), &caller.namespace)?;
    if request.entries.is_empty() {
        return Err(Fault::new(Code::InternalServerError, "the request acknowledges nothing"));
    }
    let entry_count = request.entries.len();
    if entry_count > ENTRIES_MAX {
        let text = format!("{entry_count} entries, {ENTRIES_MAX} are allowed");
        return Err(Fault::new(Code::BadRequest, text));
    }
    let own = edge.context.config.broker_group.as_str();
    let parts = acks::parts(&request, |handle| edge.owner_of_handle(handle));
    if parts.len() > 1 {
        return Ok(ack_in_parts(edge, &caller, &request, parts).await);
    }
    let owner = parts.into_keys().next().unwrap_or_else(|| own.to_owned());
    if edge.is_done_here(&caller, &owner).await? {
        match ack_here(edge, &caller, &group, &topic, &request).await {
            // The lead was lost meanwhile, and nothing was proposed.
            Err(fault) if fault.not_led && !caller.forwarded => {}
            done => return done,
        }
    }
    carry_acks(edge, &caller, &owner, request).await
}

/// Acknowledges entries at their owners.
async fn ack_in_parts(
    edge: &Arc<Edge>,
    caller: &Caller,
    request: &AckMessageRequest,
    parts: BTreeMap<String, Vec<usize>>,
) -> AckMessageResponse {
    let answers = parts.into_iter().map(|(owner, places)| async move {
        let part = acks::part(request, &places);
        let answer = Box::pin(ack_at(edge, caller, &owner, part)).await;
        (places, answer)
    });
    acks::merge(request, join_all(answers).await)
}

async fn ack_at(
    edge: &Arc<Edge>,
    caller: &Caller,
    owner: &str,
    part: AckMessageRequest,
) -> AckMessageResponse {
    let answer = match edge.is_done_here(caller, owner).await {
        Ok(true) => {
            let group = validate::group_name(part.group.as_ref(), &caller.namespace);
            let topic = validate::topic_name(part.topic.as_ref(), &caller.namespace);
            match (group, topic) {
                (Ok(group), Ok(topic)) => ack_here(edge, caller, &group, &topic, &part).await,
                (Err(fault), _) | (_, Err(fault)) => Err(fault),
            }
        }
        Ok(false) => Err(Fault::not_led("another broker acknowledges these")),
        Err(fault) => Err(fault),
    };
    let answer = match answer {
        Err(fault) if fault.not_led && !caller.forwarded => {
            carry_acks(edge, caller, owner, part).await
        }
        answer => answer,
    };
    answer.unwrap_or_else(|fault| AckMessageResponse {
        status: Some(fault.status()),
        entries: Vec::new(),
    })
}

async fn carry_acks(
    edge: &Edge,
    caller: &Caller,
    owner: &str,
    request: AckMessageRequest,
) -> Result<AckMessageResponse, Fault> {
    let send = |mut leader: MessagingServiceClient<Channel>, request| async move {
        leader.ack_message(request).await
    };
    edge.carry(caller, owner, request, send).await
}

/// Errors: nothing was done, another broker leads.
async fn ack_here(
    edge: &Arc<Edge>,
    caller: &Caller,
    group: &GroupName,
    topic: &TopicName,
    request: &AckMessageRequest,
) -> Result<AckMessageResponse, Fault> {
    let decoded: Vec<Result<Handle, Fault>> = request
        .entries
        .iter()
        .map(|entry| edge.delivery(&entry.receipt_handle, group, topic))
        .collect();
    let statuses = finish(edge, caller, decoded).await?;
    let entries: Vec<AckMessageResultEntry> =
        request.entries.iter().cloned().zip(statuses).map(acknowledged).collect();
    let status = overall(entries.iter().filter_map(|entry| entry.status.as_ref()));
    Ok(AckMessageResponse { status, entries })
}

fn acknowledged((entry, status): (AckMessageEntry, Status)) -> AckMessageResultEntry {
    AckMessageResultEntry {
        message_id: entry.message_id,
        receipt_handle: entry.receipt_handle,
        status: Some(status),
    }
}

/// Acknowledgements of one queue.
#[derive(Default)]
struct QueueAcks {
    /// Each once.
    records: Vec<(QueueOffset, LeaseId)>,
    /// Places of an entry and of its record.
    entries: Vec<(usize, usize)>,
}

impl QueueAcks {
    fn add(&mut self, entry: usize, record: (QueueOffset, LeaseId)) {
        let place = self.records.iter().position(|known| *known == record).unwrap_or_else(|| {
            self.records.push(record);
            self.records.len() - 1
        });
        self.entries.push((entry, place));
    }
}

/// One command per queue, all proposed before the first is awaited. Fails if none of them could be
/// proposed here, where another broker leads.
async fn finish(
    edge: &Arc<Edge>,
    caller: &Caller,
    decoded: Vec<Result<Handle, Fault>>,
) -> Result<Vec<Status>, Fault> {
    let mut by_queue: BTreeMap<(GroupId, QueueKey), QueueAcks> = BTreeMap::new();
    let mut statuses = Vec::with_capacity(decoded.len());
    for (entry, handle) in decoded.into_iter().enumerate() {
        match handle {
            Ok(handle) => {
                let acks = by_queue.entry((handle.group, handle.queue)).or_default();
                acks.add(entry, (handle.offset, handle.lease));
                statuses.push(ok());
            }
            Err(fault) => statuses.push(fault.status()),
        }
    }
    let proposed = by_queue.into_iter().map(|((group, queue), acks)| {
        let command = Command::Ack { group, queue, records: acks.records };
        let outcome = edge.decided(Item::Command(command), caller);
        async move { (acks.entries, outcome.await) }
    });
    let proposed: Vec<_> = proposed.collect();
    let decided = |outcome: Result<Result<Applied, ProposeError>, Fault>| {
        outcome?.map_err(|error| {
            edge.context.metrics.propose_refused(&error);
            Fault::from(error)
        })
    };
    let outcomes = join_all(proposed).await.into_iter();
    let outcomes: Vec<_> = outcomes.map(|(entries, outcome)| (entries, decided(outcome))).collect();
    let not_led = |outcome: &Result<Applied, Fault>| matches!(outcome, Err(fault) if fault.not_led);
    if outcomes.iter().all(|(_, outcome)| not_led(outcome))
        && let Some((_, Err(fault))) = outcomes.first()
    {
        return Err(fault.clone());
    }
    for (entries, outcome) in outcomes {
        let results = match outcome {
            Ok(Applied::Command(Outcome::Acked(results))) => results,
            Ok(Applied::Run { .. } | Applied::Command(_)) => Vec::new(),
            Err(fault) => {
                entries.iter().for_each(|(entry, _)| put(&mut statuses, *entry, fault.status()));
                continue;
            }
        };
        for (entry, place) in entries {
            let result = results.get(place).copied().unwrap_or(Err(LeaseRefusal::Gone));
            if let Err(refusal) = result {
                put(&mut statuses, entry, Fault::from(Refusal::Lease(refusal)).status());
            }
        }
    }
    Ok(statuses)
}

fn put(statuses: &mut [Status], entry: usize, status: Status) {
    if let Some(place) = statuses.get_mut(entry) {
        *place = status;
    }
}

/// Gives a delivery a new lease from now: longer, or 0 and a backoff to have it again.
pub(super) async fn change(
    edge: &Arc<Edge>,
    caller: Arc<Caller>,
    request: ChangeInvisibleDurationRequest,
) -> Result<ChangeInvisibleDurationResponse, Fault> {
    let group = validate::group_name(request.group.as_ref(), &caller.namespace)?;
    let topic = validate::topic_name(request.topic.as_ref(), &caller.namespace)?;
    let duration = request.invisible_duration.unwrap_or_default();
    let invisible_ms = validate::duration_ms(&duration)
        .filter(|ms| *ms <= validate::INVISIBLE_MS_MAX)
        .ok_or_else(|| {
            Fault::new(Code::IllegalInvisibleTime, "an invisible duration is 0 to 12 hours")
        })?;
    if request.suspend() {
        return Err(Fault::not_supported("suspended deliveries"));
    }
    let owner = edge.owner_of_handle(&request.receipt_handle);
    if edge.is_done_here(&caller, &owner).await? {
        match change_here(edge, &caller, &group, &topic, &request, invisible_ms).await {
            // The lead was lost meanwhile, and nothing was proposed.
            Err(fault) if fault.not_led && !caller.forwarded => {}
            done => return done,
        }
    }
    let send = |mut leader: MessagingServiceClient<Channel>, request| async move {
        leader.change_invisible_duration(request).await
    };
    edge.carry(&caller, &owner, request, send).await
}

async fn change_here(
    edge: &Arc<Edge>,
    caller: &Caller,
    group: &GroupName,
    topic: &TopicName,
    request: &ChangeInvisibleDurationRequest,
    invisible_ms: u64,
) -> Result<ChangeInvisibleDurationResponse, Fault> {
    let handle = edge.delivery(&request.receipt_handle, group, topic)?;
    let command = Command::ChangeLease {
        group: handle.group,
        queue: handle.queue,
        offset: handle.offset,
        lease: handle.lease,
        invisible_ms,
    };
    let outcome = edge.decided(Item::Command(command), caller).await?;
    match outcome.inspect_err(|error| edge.context.metrics.propose_refused(error))? {
        Applied::Command(Outcome::LeaseChanged { lease }) => {
            let changed = Handle { lease, ..handle };
            let receipt_handle = changed.encode(&edge.context.config.broker_group);
            Ok(ChangeInvisibleDurationResponse { status: Some(ok()), receipt_handle })
        }
        Applied::Run { .. } | Applied::Command(_) => {
            Err(Fault::new(Code::InternalServerError, "unexpected outcome of a changed lease"))
        }
    }
}
