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
/// How long entries wait once another term has begun: their outcome may come with its log.
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
    let Answering { mut unanswered, mut readable, status, mut log_closed, copies, commit_seconds } =
        answering;
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
            () = deposed(status.clone(), term) => Err(ProposeError::UnknownOutcome),
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

/// Resolves some time after a term that follows `term` was heard of.
async fn deposed(mut status: watch::Receiver<RaftStatus>, term: Term) {
    if status.wait_for(|status| status.term > term).await.is_err() {
        // The replica has ended, of which Raft tells too.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(DEPOSED_PATIENCE).await;
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
