//! What became of proposed entries: tells each proposer, in the order of the entries.

use std::time::Duration;

use futures::FutureExt;
use openraft::alias::OneshotReceiverOf;
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::copies::Copies;
use super::merge::Replies;
use crate::command::Refusal;
use crate::log::LogClosed;
use crate::position::{EntryIndex, Term};
use crate::replica::raft_types::TypeConfig;
use crate::replica::{Applied, ProposeError, RaftStatus, ReadableEnd};

/// How long entries wait to be readable once the log takes no more: what it had made durable is on
/// its way.
const CLOSED_PATIENCE: Duration = Duration::from_secs(1);
/// How long entries wait once their leader counts as none: their outcome may come with the log of
/// another term, or with the answer of a quorum.
const DEPOSED_PATIENCE: Duration = Duration::from_secs(1);

/// Where Raft tells what became of an entry.
pub(super) type Outcome = OneshotReceiverOf<TypeConfig, ClientWriteResult<TypeConfig>>;

/// An entry that is in the log and whose outcome is not known yet.
pub(super) struct Proposed {
    pub(super) outcome: Outcome,
    pub(super) replies: Vec<Replies>,
    pub(super) term: Term,
    pub(super) proposed_at: Instant,
}

/// What the answers are made of.
pub(super) struct Answering {
    pub(super) unanswered: mpsc::Receiver<Proposed>,
    pub(super) readable: watch::Receiver<ReadableEnd>,
    pub(super) status: watch::Receiver<RaftStatus>,
    pub(super) log_closed: watch::Receiver<Option<LogClosed>>,
    pub(super) copies: Copies,
    pub(super) commit_seconds: Histogram,
}

/// Answers entry by entry, each once it is readable here: committed, applied and durable.
pub(super) async fn answer_all(answering: Answering) {
    let Answering {
        mut unanswered,
        mut readable,
        mut status,
        mut log_closed,
        copies,
        commit_seconds,
    } = answering;
    let mut patience = Patience::new(DEPOSED_PATIENCE);
    let given_up = async move {
        log_closed.wait_for(Option::is_some).await.ok();
        tokio::time::sleep(CLOSED_PATIENCE).await;
    };
    let given_up = given_up.shared();
    while let Some(Proposed { outcome, replies, term, proposed_at }) = unanswered.recv().await {
        let known = tokio::select! {
            biased;
            known = known(outcome, &mut readable) => known,
            () = given_up.clone() => Err(ProposeError::UnknownOutcome),
            () = patience.end(&mut status, term) => Err(ProposeError::UnknownOutcome),
        };
        match known {
            Ok((index, outcomes)) => {
                commit_seconds.observe(proposed_at.elapsed().as_secs_f64());
                assert_eq!(outcomes.len(), replies.len(), "outcomes of an entry");
                let degraded = copies.degraded(index);
                for (waiting, outcome) in replies.into_iter().zip(outcomes) {
                    waiting.answer(outcome, degraded);
                }
            }
            Err(failure) => {
                for waiting in replies {
                    waiting.fail(&failure);
                }
            }
        }
    }
}

/// How long entries wait for their outcome while their leader counts as none.
struct Patience {
    limit: Duration,
    /// For all that wait now, so that many of them do not wait one after the other.
    until: Option<Instant>,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Self { limit, until: None }
    }

    /// Resolves once this node has not counted as the leader of `term` for so long.
    async fn end(&mut self, status: &mut watch::Receiver<RaftStatus>, term: Term) {
        let leads = |status: &RaftStatus| status.serving && status.term == term;
        loop {
            if leads(&status.borrow_and_update()) {
                self.until = None;
                if status.wait_for(|status| !leads(status)).await.is_err() {
                    // The replica has ended, of which Raft tells too.
                    std::future::pending::<()>().await;
                }
            }
            let until = *self.until.get_or_insert_with(|| Instant::now() + self.limit);
            let told = tokio::time::timeout_at(until, status.wait_for(leads)).await;
            match told.map(|told| told.is_ok()) {
                Ok(true) => {}
                // Nobody will tell any more; an outcome may be on its way.
                Ok(false) => return tokio::time::sleep_until(until).await,
                Err(_) => return,
            }
        }
    }
}

/// What came of an entry, once it is readable.
async fn known(
    outcome: Outcome,
    readable: &mut watch::Receiver<ReadableEnd>,
) -> Result<(EntryIndex, Vec<Result<Applied, Refusal>>), ProposeError> {
    let response = match outcome.await {
        Ok(Ok(response)) => response,
        Ok(Err(ClientWriteError::ForwardToLeader(to))) => {
            return Err(ProposeError::NotLeader { leader: to.leader_id });
        }
        Ok(Err(_)) | Err(_) => return Err(ProposeError::UnknownOutcome),
    };
    let index = EntryIndex::new(response.log_id.index);
    match readable.wait_for(|end| end.index > index).await {
        Ok(_) => Ok((index, response.data.0)),
        Err(_) => Err(ProposeError::UnknownOutcome),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: Term = Term::new(3);

    fn serving(term: u64) -> RaftStatus {
        RaftStatus { term: Term::new(term), leader: Some(1), serving: true }
    }

    #[tokio::test]
    async fn entries_of_a_leader_that_counts_as_none_are_given_up_together() {
        let limit = Duration::from_millis(200);
        let (_sender, mut status) = watch::channel(RaftStatus { serving: false, ..serving(3) });
        let mut patience = Patience::new(limit);
        let began = Instant::now();
        for _ in 0..100 {
            patience.end(&mut status, TERM).await;
        }
        assert!((limit..50 * limit).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn status_that_nobody_tells_any_more_is_waited_for_without_asking_again() {
        let limit = Duration::from_millis(50);
        let (sender, mut status) = watch::channel(RaftStatus { serving: false, ..serving(3) });
        drop(sender);
        let mut patience = Patience::new(limit);
        let mut waits = std::pin::pin!(patience.end(&mut status, TERM));
        let mut poll_count = 0;
        let ended = std::future::poll_fn(|context| {
            poll_count += 1;
            waits.as_mut().poll(context)
        });
        ended.await;
        assert!(poll_count < 10, "{poll_count} polls in {limit:?}");
    }

    #[tokio::test]
    async fn leader_that_counts_again_in_time_gives_nothing_up() {
        let (sender, mut status) = watch::channel(RaftStatus { serving: false, ..serving(3) });
        let mut patience = Patience::new(Duration::from_secs(600));
        let waits = patience.end(&mut status, TERM);
        let back = async {
            sender.send_replace(serving(3));
        };
        tokio::select! {
            biased;
            () = waits => panic!("given up"),
            () = back => {}
        }
        let mut patience = Patience::new(Duration::ZERO);
        let waits = patience.end(&mut status, TERM);
        let mut waits = std::pin::pin!(waits);
        assert!(futures::poll!(&mut waits).is_pending(), "it leads again");
        sender.send_replace(serving(4));
        waits.await;
    }
}
