//! Follows queues: one task per broker group, which keeps a `Fetch` stream at its leader.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::broker_client::BrokerClient;
use drumlin_proto::native::{FetchRequest, FetchResponse, FetchedRun, fetch_request};
use drumlin_proto::record::Run;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{Plan, Queues};
use crate::connection::{Address, Backoff, GRPC_BYTES_MAX};
use crate::consumer::At;
use crate::error::{Code, Error};
use crate::message::{Delivery, Place};
use crate::{Client, QueueOffset};

type Batches = mpsc::Sender<Result<VecDeque<Delivery>, Error>>;

const CREDIT_BYTES_MIN: u64 = 64 << 10;
/// How long to wait for the first route of a topic.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(30);

/// The reader of the stream has gone.
struct ReaderGone;

/// How far a queue was read.
#[derive(Clone, Debug)]
struct Cursor {
    place: Place,
    from: At,
    /// Exclusive; where to stop.
    end: Option<QueueOffset>,
    done: bool,
}

impl Cursor {
    fn finish_at_end(&mut self) {
        if let (At::Offset(next), Some(end)) = (self.from, self.end) {
            self.done |= next >= end;
        }
    }

    /// Goes on within what the queue holds now. A range of 0..0 says that it was not told: the
    /// position stays, and the broker finds the nearest when it is asked again.
    fn keep_within(&mut self, min: u64, end: u64) {
        if let At::Offset(next) = self.from
            && 0 < end
            && min <= end
        {
            self.from = At::Offset(QueueOffset::new(next.get().clamp(min, end)));
        }
    }

    /// The records of a run that were not read before, up to the end.
    fn read(&mut self, fetched: &FetchedRun) -> Result<VecDeque<Delivery>, Error> {
        let run = Run::from_log(fetched.run.clone()).and_then(|run| run.verify().map(|()| run));
        let run = run.map_err(|error| Error::Protocol { reason: error.to_string() })?;
        let mut offset = QueueOffset::new(fetched.base_offset);
        let mut read = VecDeque::with_capacity(usize::try_from(run.record_count()).unwrap_or(0));
        for record in run.records() {
            let behind = matches!(self.from, At::Offset(next) if offset < next);
            let beyond = self.end.is_some_and(|end| offset >= end);
            if !behind && !beyond {
                let store_time_ms = fetched.store_time_ms;
                let bytes = run.as_bytes();
                read.push_back(Delivery::of_record(
                    &self.place,
                    offset,
                    store_time_ms,
                    bytes,
                    record,
                ));
            }
            offset = offset.advance(1);
        }
        match self.from {
            At::Offset(next) if next >= offset => {}
            _ => self.from = At::Offset(offset),
        }
        self.finish_at_end();
        Ok(read)
    }
}

/// Runs until all is read, the reader has gone or the client stops.
pub(super) async fn run(client: Client, plan: Plan, batches: Batches, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = batches.closed() => {}
        () = supervise(&client, &plan, &batches, &stop) => {}
    }
}

async fn supervise(client: &Client, plan: &Plan, batches: &Batches, stop: &CancellationToken) {
    if plan.assigned.is_empty() {
        let error = Error::fault("a pull consumer needs a topic: call assign");
        // The reader may have gone.
        batches.send(Err(error)).await.ok();
        return;
    }
    let mut changes = client.routes().changes();
    let mut cursors = match first_cursors(client, plan).await {
        Ok(cursors) => cursors,
        Err(error) => {
            // The reader may have gone.
            batches.send(Err(error)).await.ok();
            return;
        }
    };
    let mut known: BTreeSet<Place> = cursors.iter().map(|c| c.place.clone()).collect();
    let mut followers = JoinSet::new();
    loop {
        let credit_bytes = credit_bytes(plan, known.len());
        for (broker_group, cursors) in by_broker_group(std::mem::take(&mut cursors)) {
            let follower = Follower {
                client: client.clone(),
                broker_group,
                cursors,
                credit_bytes,
                batches: batches.clone(),
            };
            followers.spawn(follower.run(stop.clone()));
        }
        if plan.stop_at_end && followers.is_empty() {
            return;
        }
        tokio::select! {
            Some(ended) = followers.join_next() => match ended {
                Ok(Ok(())) if plan.stop_at_end => {}
                Ok(Ok(())) if followers.is_empty() => return,
                Ok(Ok(())) => {}
                Ok(Err(ReaderGone)) => return,
                Err(error) => tracing::error!(%error, "follower failed"),
            },
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                if !plan.stop_at_end {
                    // A queue that is new has nothing that was not meant to be read.
                    cursors = cursors_of(client, plan, At::Earliest);
                    cursors.retain(|cursor| known.insert(cursor.place.clone()));
                }
            }
        }
    }
}

fn credit_bytes(plan: &Plan, queues: usize) -> u64 {
    let share = plan.buffered_bytes_max / queues.max(1);
    u64::try_from(share).unwrap_or(u64::MAX).max(CREDIT_BYTES_MIN)
}

fn by_broker_group(cursors: Vec<Cursor>) -> BTreeMap<Arc<str>, Vec<Cursor>> {
    let mut groups: BTreeMap<Arc<str>, Vec<Cursor>> = BTreeMap::new();
    for cursor in cursors {
        groups.entry(Arc::clone(&cursor.place.broker_group)).or_default().push(cursor);
    }
    groups
}

/// All assigned queues as the routes have them now.
fn cursors_of(client: &Client, plan: &Plan, from: At) -> Vec<Cursor> {
    let mut cursors = Vec::new();
    for (topic, queues) in &plan.assigned {
        let Some(route) = client.routes().get(topic) else { continue };
        let topic: Arc<str> = topic.as_str().into();
        for group in &route.groups {
            for queue_id in 0..group.queue_count {
                if queues.contains(&group.broker_group, queue_id) {
                    let broker_group = Arc::clone(&group.broker_group);
                    let place = Place { topic: Arc::clone(&topic), broker_group, queue_id };
                    cursors.push(Cursor { place, from, end: None, done: false });
                }
            }
        }
    }
    cursors
}

async fn first_cursors(client: &Client, plan: &Plan) -> Result<Vec<Cursor>, Error> {
    let until = Instant::now() + ROUTE_TIMEOUT;
    for (topic, queues) in &plan.assigned {
        let route = client.routes().resolve(topic, until).await?;
        if let Queues::Some(queues) = queues {
            let missing = queues.iter().find(|(broker_group, queue_id)| {
                route.group(broker_group).is_none_or(|group| *queue_id >= group.queue_count)
            });
            if let Some((broker_group, queue_id)) = missing {
                let fault = format!("topic {topic} has no queue {queue_id} on {broker_group}");
                return Err(Error::fault(fault));
            }
        }
    }
    let mut cursors = cursors_of(client, plan, plan.from);
    if plan.stop_at_end {
        for (topic, _) in &plan.assigned {
            bound(client, topic, plan.from, &mut cursors).await?;
        }
    }
    Ok(cursors)
}

/// Resolves begin and end of a topic's cursors, so that those with nothing to read end at once.
async fn bound(
    client: &Client,
    topic: &str,
    from: At,
    cursors: &mut [Cursor],
) -> Result<(), Error> {
    let admin = client.admin();
    let earliest = admin.query_offsets(topic, At::Earliest).await?;
    let latest = admin.query_offsets(topic, At::Latest).await?;
    let begin = match from {
        At::TimeMs(_) => admin.query_offsets(topic, from).await?,
        At::Earliest => earliest.clone(),
        At::Latest => latest.clone(),
        At::Offset(offset) => {
            let at = |p: &crate::admin::QueuePosition| crate::admin::QueuePosition {
                offset: offset.get(),
                ..p.clone()
            };
            earliest.iter().map(at).collect()
        }
    };
    for cursor in cursors.iter_mut().filter(|cursor| &*cursor.place.topic == topic) {
        let offset_in = |positions: &[crate::admin::QueuePosition]| {
            let found = positions.iter().find(|position| {
                position.queue_id == cursor.place.queue_id
                    && position.broker_group == *cursor.place.broker_group
            });
            found.map(|position| position.offset).ok_or_else(|| Error::Protocol {
                reason: format!("no offset of queue {}", cursor.place.queue_id),
            })
        };
        let (min, end) = (offset_in(&earliest)?, offset_in(&latest)?);
        let from = offset_in(&begin)?.max(min);
        cursor.from = At::Offset(QueueOffset::new(from));
        cursor.end = Some(QueueOffset::new(end));
        cursor.finish_at_end();
    }
    Ok(())
}

/// Reads the queues of one broker group, wherever it is led.
struct Follower {
    client: Client,
    broker_group: Arc<str>,
    cursors: Vec<Cursor>,
    credit_bytes: u64,
    batches: Batches,
}

/// How a stream ended.
enum Ended {
    AllRead,
    ReaderGone,
    Broken(String),
}

impl Follower {
    async fn run(mut self, stop: CancellationToken) -> Result<(), ReaderGone> {
        let mut backoff = Backoff::new();
        let mut changes = self.client.routes().changes();
        while self.cursors.iter().any(|cursor| !cursor.done) {
            changes.mark_unchanged();
            let Some(leader) = self.leader() else {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    changed = changes.changed() => if changed.is_err() { return Ok(()) },
                }
                continue;
            };
            let ended = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ended = self.fetch(&leader, &mut backoff) => ended,
            };
            match ended {
                Ended::AllRead => return Ok(()),
                Ended::ReaderGone => return Err(ReaderGone),
                Ended::Broken(reason) => {
                    tracing::debug!(broker_group = &*self.broker_group, reason, "fetch ended");
                }
            }
            let pause = tokio::time::sleep(backoff.pause(fastrand::f64()));
            tokio::pin!(pause);
            // Another leader is asked at once.
            while self.leader().is_none_or(|now| now == leader) {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = &mut pause => break,
                    changed = changes.changed() => if changed.is_err() { return Ok(()) },
                }
            }
        }
        Ok(())
    }

    fn leader(&self) -> Option<Address> {
        let routes = self.client.routes();
        self.cursors.iter().find_map(|cursor| {
            routes.get(&cursor.place.topic)?.group(&self.broker_group)?.leader.clone()
        })
    }

    /// Reads at one leader until the stream breaks or all is read.
    async fn fetch(&mut self, leader: &Address, backoff: &mut Backoff) -> Ended {
        let open = self.cursors.iter().enumerate().filter(|(_, cursor)| !cursor.done);
        let opens: Vec<_> = open.map(|(at, cursor)| self.open(at, cursor)).collect();
        let (requests, outbound) = mpsc::channel(opens.len() + 64);
        for open in opens {
            if requests.send(open).await.is_err() {
                return Ended::Broken("the request stream closed".into());
            }
        }
        let mut client = BrokerClient::new(self.client.connections().channel(leader))
            .max_decoding_message_size(GRPC_BYTES_MAX);
        let mut responses = match client.fetch(ReceiverStream::new(outbound)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Ended::Broken(status.message().to_owned()),
        };
        let mut changes = self.client.routes().changes();
        loop {
            let response = tokio::select! {
                response = responses.message() => response,
                changed = changes.changed() => match changed {
                    Ok(()) if self.leader().as_ref() == Some(leader) => continue,
                    Ok(()) => return Ended::Broken("the leader changed".into()),
                    Err(_) => return Ended::Broken("the client ended".into()),
                },
            };
            let response = match response {
                Ok(Some(response)) => response,
                Ok(None) => return Ended::Broken("the broker ended the stream".into()),
                Err(status) => return Ended::Broken(status.message().to_owned()),
            };
            match self.take(response, &requests).await {
                Ok(()) => backoff.reset(),
                Err(ended) => return ended,
            }
            if self.cursors.iter().all(|cursor| cursor.done) {
                return Ended::AllRead;
            }
        }
    }

    fn open(&self, at: usize, cursor: &Cursor) -> FetchRequest {
        request(fetch_request::Request::Open(fetch_request::Open {
            fetch_id: fetch_id(at),
            topic: cursor.place.topic.to_string(),
            queue_id: cursor.place.queue_id,
            from: Some(cursor.from.to_native()),
            credit_bytes: self.credit_bytes,
        }))
    }

    /// Passes a response on and gives its credit back once the reader has room for it.
    async fn take(
        &mut self,
        response: FetchResponse,
        requests: &mpsc::Sender<FetchRequest>,
    ) -> Result<(), Ended> {
        let found = usize::try_from(response.fetch_id).ok();
        let Some(cursor) = found.and_then(|at| self.cursors.get_mut(at.checked_sub(1)?)) else {
            return Err(Ended::Broken("an answer to no fetch".into()));
        };
        if cursor.done {
            return Ok(());
        }
        if let Some(error) = Error::of_native(response.status.as_ref()) {
            if let Some(hint) = response.status.as_ref().and_then(|status| status.leader.as_ref()) {
                self.client.routes().redirect(hint);
            }
            if error.is_retryable() {
                return Err(Ended::Broken(error.to_string()));
            }
            if error.code() == Code::OffsetOutOfRange {
                cursor.keep_within(response.min_offset, response.max_offset);
                return Err(Ended::Broken("the offset lay outside the queue".into()));
            }
            cursor.done = true;
            return self.batches.send(Err(error)).await.map_err(|_| Ended::ReaderGone);
        }
        if let Some(start) = response.start_offset {
            cursor.from = At::Offset(QueueOffset::new(start));
            cursor.finish_at_end();
        }
        let mut credit_bytes = 0;
        for fetched in &response.runs {
            credit_bytes += u64::try_from(fetched.run.len()).unwrap_or(u64::MAX);
            let read = cursor.read(fetched);
            cursor.done |= read.is_err();
            if read.as_ref().is_ok_and(VecDeque::is_empty) {
                continue;
            }
            self.batches.send(read).await.map_err(|_| Ended::ReaderGone)?;
        }
        let next = match cursor.done {
            true => {
                fetch_request::Request::Close(fetch_request::Close { fetch_id: response.fetch_id })
            }
            false if credit_bytes == 0 => return Ok(()),
            false => fetch_request::Request::Credit(fetch_request::Credit {
                fetch_id: response.fetch_id,
                bytes: credit_bytes,
            }),
        };
        let sent = requests.send(request(next)).await;
        sent.map_err(|_| Ended::Broken("the request stream closed".into()))
    }
}

fn request(request: fetch_request::Request) -> FetchRequest {
    FetchRequest { request: Some(request) }
}

/// Fetch ids count from 1.
fn fetch_id(at: usize) -> u32 {
    u32::try_from(at + 1).expect("a topic has far fewer queues than 2^32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_without_a_range_does_not_lead_back_to_the_oldest() {
        let place = Place { topic: "t".into(), broker_group: "a".into(), queue_id: 0 };
        let from = At::Offset(QueueOffset::new(50));
        let mut cursor = Cursor { place, from, end: None, done: false };
        cursor.keep_within(0, 0);
        assert_eq!(cursor.from, At::Offset(QueueOffset::new(50)));
        cursor.keep_within(60, 90);
        assert_eq!(cursor.from, At::Offset(QueueOffset::new(60)));
        cursor.keep_within(10, 20);
        assert_eq!(cursor.from, At::Offset(QueueOffset::new(20)));
    }
}
