//! Long polls: rounds over a topic's queues that lease what a poll is to be given, and the waiting
//! between them.

use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{GroupName, QueueKey};
use drumlin_proto::rocketmq::{Code, Resource};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Edge;
use super::delivery::{Leased, PollEnd};
use super::plan::{Proposed, Want, next_due_in_ms};
use super::status::Fault;
use crate::catalog::Topic;
use crate::command::{Granted, LeaseId, Refusal};
use crate::filter::TagFilter;
use crate::log::ReadError;
use crate::replica::ProposeError;

/// A checked poll.
#[derive(Debug)]
pub(super) struct PollRequest {
    pub(super) topic: Arc<Topic>,
    /// As the client named it; comes back in every message.
    pub(super) topic_named: Resource,
    pub(super) group: GroupName,
    pub(super) queues: Vec<QueueKey>,
    pub(super) want: Want,
    pub(super) records_max: usize,
    pub(super) ends: Instant,
    /// When it is answered though leases are not decided yet.
    pub(super) late: Instant,
}

impl Edge {
    /// Waits until there is something to give, the poll ends or the client is gone.
    pub(super) async fn poll(
        self: &Arc<Self>,
        poll: &Arc<PollRequest>,
        gone: &mut oneshot::Sender<PollEnd>,
    ) -> Result<Vec<Leased>, Fault> {
        let mut raft = self.replica().raft_status();
        let wakes = self.replica().topic_wakes(poll.topic.id);
        loop {
            let mut woken = std::pin::pin!(wakes.notified());
            woken.as_mut().enable();
            self.still_defined(poll)?;
            // Before the look: what becomes due during it is waited for.
            let looked_ms = self.replica().clock_ms();
            let taken = self.take(poll).await?;
            if let Taken::Records(records) = taken {
                return Ok(records);
            }
            if Instant::now() >= poll.ends {
                self.pass_over(poll);
                return Err(Fault::new(Code::MessageNotFound, "no message until the poll ended"));
            }
            if matches!(taken, Taken::OnTheWay) {
                // A filter may pass over a long backlog this way.
                if gone.is_closed() {
                    return Ok(Vec::new());
                }
                if self.stop.is_cancelled() {
                    return Err(stopping());
                }
                tokio::task::yield_now().await;
                continue;
            }
            let due_ms = next_due_in_ms(self.replica(), looked_ms, poll.want.group, &poll.queues);
            let due = due_ms.map(|ms| Instant::now() + Duration::from_millis(ms.max(1)));
            let until = due.map_or(poll.ends, |due| due.min(poll.ends));
            tokio::select! {
                () = woken => {}
                () = sleep_until(until) => {}
                () = gone.closed() => return Ok(Vec::new()),
                () = self.stop.cancelled() => return Err(stopping()),
                led = raft.wait_for(|status| !status.serving) => {
                    drop(led);
                    return Err(led_elsewhere());
                }
            }
        }
    }

    /// A topic or group that was deleted, also one created again since, ends the poll.
    fn still_defined(&self, poll: &PollRequest) -> Result<(), Fault> {
        let view = self.replica().view();
        let catalog = view.state.catalog();
        if catalog.topic(poll.topic.id).is_none() {
            return Err(Fault::topic_not_found(poll.topic.name.as_str()));
        }
        if catalog.group(poll.want.group).is_none() {
            let text = format!("consumer group {} was deleted", poll.group);
            return Err(Fault::new(Code::ConsumerGroupNotFound, text));
        }
        Ok(())
    }

    /// One round over the topic's queues.
    async fn take(self: &Arc<Self>, poll: &Arc<PollRequest>) -> Result<Taken, Fault> {
        let (mut round, proposed) = match poll.want.filter {
            TagFilter::All => self.choose(poll),
            TagFilter::AnyOf(_) => self.choose_by_reading(poll).await?,
        };
        let edge = self.clone();
        let settled = async move {
            for plan in proposed {
                let queue = plan.queue;
                if let Err(error) = round.settle(queue, plan.outcome().await) {
                    edge.context.metrics.propose_refused(&error);
                    round.failed(error.into());
                }
            }
            round
        };
        self.settled_by(poll, settled).await?.taken()
    }

    /// As [`Edge::choose`], for filters: they read the queues, which may wait for the disk.
    async fn choose_by_reading(
        self: &Arc<Self>,
        poll: &Arc<PollRequest>,
    ) -> Result<(Round, Vec<Proposed>), Fault> {
        let turn = timeout_at(poll.late, self.scans.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(Fault::new(Code::TooManyRequests, "too many filtered polls read queues"));
        };
        let (edge, poll) = (self.clone(), poll.clone());
        let chosen = tokio::task::spawn_blocking(move || edge.choose(&poll)).await;
        chosen.map_err(|error| {
            tracing::error!(%error, "a filtered poll failed");
            Fault::new(Code::InternalServerError, "the queues could not be read")
        })
    }

    /// Proposes to lease what the queues have for the poll.
    fn choose(&self, poll: &PollRequest) -> (Round, Vec<Proposed>) {
        // In turn with other calls, it could always be the same few.
        let first = fastrand::usize(..poll.queues.len().max(1));
        let mut room = poll.records_max;
        let mut round = Round::default();
        let mut proposed: Vec<Proposed> = Vec::new();
        for queue in poll.queues.iter().cycle().skip(first).take(poll.queues.len()) {
            match self.plans.propose(self.replica(), *queue, &poll.want, room, Some(poll.late)) {
                Ok(None) => {}
                Ok(Some(plan)) => {
                    room -= plan.record_count;
                    proposed.push(plan);
                }
                // Trimmed between two looks: the next one begins behind it.
                Err(ReadError::Trimmed { .. }) => round.looks_again = true,
                Err(error) => round.failed(unreadable(*queue, error)),
            }
            if room == 0 {
                break;
            }
        }
        (round, proposed)
    }

    /// The round, if it is settled in time. If not, it goes on, and what it leases is given back.
    async fn settled_by(
        self: &Arc<Self>,
        poll: &PollRequest,
        settled: impl Future<Output = Round> + Send + 'static,
    ) -> Result<Round, Fault> {
        let mut settled = Box::pin(settled);
        if let Ok(round) = timeout_at(poll.late, &mut settled).await {
            return Ok(round);
        }
        let (edge, group) = (self.clone(), poll.want.group);
        self.tasks.spawn(async move {
            let left_out = edge.unsent.add(group, settled.await.records.into_iter());
            if left_out > 0 {
                tracing::warn!(left_out, "late leases end by themselves");
            }
        });
        Err(Fault::late())
    }

    /// What a filter left out counts as consumed when the poll ends.
    fn pass_over(&self, poll: &PollRequest) {
        for queue in &poll.queues {
            match self.plans.pass_over(self.replica(), *queue, &poll.want) {
                Ok(Some(proposed)) => {
                    self.tasks.spawn(async move {
                        if let Err(error) = proposed.outcome().await {
                            tracing::debug!(%error, "passing over filtered messages failed");
                        }
                    });
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, ?queue, "the queue cannot be read"),
            }
        }
    }
}

/// Nothing was taken: the next poll is sent on to whoever leads then.
pub(super) fn led_elsewhere() -> Fault {
    Fault::new(Code::MessageNotFound, "this broker does not lead its group any more")
}

fn stopping() -> Fault {
    Fault::new(Code::HaNotAvailable, "the broker is stopping")
}

fn unreadable(queue: QueueKey, error: ReadError) -> Fault {
    tracing::error!(%error, ?queue, "a queue cannot be read");
    Fault::new(Code::InternalServerError, error.to_string())
}

/// What one round brought.
#[derive(Debug)]
enum Taken {
    Records(Vec<Leased>),
    /// Something was proposed that granted nothing: look again at once.
    OnTheWay,
    Nothing,
}

/// What the queues of one round gave, each for itself: records that were leased are delivered,
/// whatever became of other queues.
#[derive(Debug, Default)]
struct Round {
    records: Vec<Leased>,
    /// Of the first queue that failed.
    fault: Option<Fault>,
    looks_again: bool,
    /// A plan was overtaken; the poll is woken once others that depend on it are settled.
    outdated: bool,
}

impl Round {
    fn failed(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    /// Errors: what is more than an overtaken plan.
    fn settle(
        &mut self,
        queue: QueueKey,
        outcome: Result<(LeaseId, Vec<Granted>), ProposeError>,
    ) -> Result<(), ProposeError> {
        match outcome {
            Ok((lease, granted)) => {
                self.looks_again = true;
                self.records.extend(granted.into_iter().map(|record| (queue, lease, record)));
            }
            Err(ProposeError::Refused(
                Refusal::LeaseOutdated { .. } | Refusal::OffsetOutOfRange { .. },
            )) => self.outdated = true,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn taken(self) -> Result<Taken, Fault> {
        match self.fault {
            _ if !self.records.is_empty() => Ok(Taken::Records(self.records)),
            Some(fault) => Err(fault),
            None if self.looks_again && !self.outdated => Ok(Taken::OnTheWay),
            None => Ok(Taken::Nothing),
        }
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::{QueueId, QueueOffset, TopicId};

    use super::*;

    #[test]
    fn records_of_a_round_are_delivered_whatever_fails_beside_them() {
        let queue = |queue| QueueKey { topic: TopicId::new(1), queue: QueueId::new(queue) };
        let busy = || ProposeError::Busy { waiting_bytes: 2, bytes_max: 1 };
        let granted = Granted { offset: QueueOffset::ZERO, attempt: 1 };
        let mut round = Round::default();
        let refused = round.settle(queue(0), Err(busy())).unwrap_err();
        round.failed(refused.into());
        round.settle(queue(1), Ok((LeaseId(7), vec![granted]))).unwrap();
        round.failed(unreadable(queue(2), std::io::Error::other("bad sector").into()));
        let taken = round.taken();
        let Ok(Taken::Records(records)) = taken else { panic!("{taken:?}") };
        assert_eq!(records, [(queue(1), LeaseId(7), granted)]);
        let mut failed = Round::default();
        failed.failed(busy().into());
        failed.settle(queue(1), Ok((LeaseId(8), Vec::new()))).unwrap();
        assert_eq!(failed.taken().unwrap_err().code, Code::TooManyRequests);
    }
}
