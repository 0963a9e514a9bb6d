//! Streams of appends to one member: what goes out, past the gate, and what comes back, to the gate
//! and to Raft.

use std::sync::Arc;

use drumlin_proto::native as proto;
use futures::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::BoxStream;
use openraft::errors::RPCError;
use openraft::raft::{AppendEntriesRequest, StreamAppendError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::failure::LinkError;
use super::link::{LOST, Link, Purpose};
use super::session::Session;
use crate::position::{EntryIndex, Term};
use crate::replica::gate::{Conflict, Matched};
use crate::replica::membership::Role;
use crate::replica::raft_types::{TypeConfig, entry_id};
use crate::replica::wire::{self, StreamAppendResult};

/// What a member answers, in the order of the requests.
type Answers<'s> = BoxStream<'s, Result<StreamAppendResult, RPCError<TypeConfig>>>;

impl Link {
    /// Opens a stream of appends. What is left of it ends with the answers: also a request that waits
    /// at the gate, and the connection that carries it.
    pub(super) async fn append<'s, S>(
        &'s mut self,
        input: S,
    ) -> Result<Answers<'s>, RPCError<TypeConfig>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let mut client = match self.purpose {
            Purpose::Entries => self.connect().await?,
            Purpose::Control => self.control()?,
        };
        let session = Arc::new(Session::new(self.gating().losses(self.target)));
        let over = CancellationToken::new();
        let outgoing = self.outgoing(input, Arc::clone(&session));
        let outgoing = outgoing.take_until(over.clone().cancelled_owned());
        let over = over.drop_guard();
        let call = client.append(self.shared.request(self.target, outgoing));
        let answers = match tokio::time::timeout(self.idle(), call).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => {
                let error = self.judge(&status, self.purpose == Purpose::Control);
                return Err(self.failed(error).into());
            }
            Err(_) => {
                let address = self.shared.address(&self.node).unwrap_or_default();
                let reason = format!("no stream after {:?}", self.idle());
                let silent = LinkError::Silent { name: self.name(), address, reason };
                return Err(self.failed(silent).into());
            }
        };
        let state = Some((self, session, answers, over));
        let answers = stream::unfold(state, |state| async move {
            let (link, session, mut answers, over) = state?;
            let answer = link.next_answer(&session, &mut answers).await?;
            let more = matches!(answer, Ok(Ok(_)));
            Some((answer, more.then_some((link, session, answers, over))))
        });
        Ok(Box::pin(answers))
    }

    /// The requests as they go out, those to a witness once the gate lets them.
    fn outgoing<S>(
        &self,
        requests: S,
        session: Arc<Session>,
    ) -> impl Stream<Item = proto::AppendRequest> + Send + 'static
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let (shared, role, target) = (Arc::clone(&self.shared), self.node.role, self.target);
        requests.then(move |request| {
            let (shared, session) = (Arc::clone(&shared), Arc::clone(&session));
            async move {
                let term = Term::new(request.vote.leader_id.term);
                let is_witness = role == Role::Witness;
                if is_witness && let Some(last) = request.entries.last() {
                    shared.parts.gating.pass(term, EntryIndex::new(last.log_id.index)).await;
                }
                // Heartbeats say it: whoever lacks it has lost it.
                let answered_end = match request.entries.is_empty() {
                    true => shared.parts.gating.answered_end(target, term),
                    false => EntryIndex::ZERO,
                };
                // What is committed and on all data nodes is of no use to a witness.
                let committed = request.leader_commit.as_ref().map(entry_id);
                let trim_upto = committed.filter(|committed| {
                    is_witness && shared.parts.gating.matched_end(term) > Some(committed.index)
                });
                let wire = wire::append_to_wire(request, role, trim_upto, answered_end);
                let bytes = wire.entries.iter().map(|entry| entry.payload.len() as u64).sum();
                session.sent(term, bytes);
                wire
            }
        })
    }

    /// The next answer; `None` once the member has ended the stream in order.
    async fn next_answer(
        &mut self,
        session: &Session,
        answers: &mut Streaming<proto::AppendResponse>,
    ) -> Option<Result<StreamAppendResult, RPCError<TypeConfig>>> {
        let idle = self.idle();
        loop {
            let wake_at = session.deadline(idle).unwrap_or_else(|| Instant::now() + idle);
            let answer = tokio::select! {
                biased;
                answer = answers.message() => answer,
                () = tokio::time::sleep_until(wake_at) => {
                    if session.deadline(idle).is_some_and(|at| at <= Instant::now()) {
                        let address = self.shared.address(&self.node).unwrap_or_default();
                        let reason = format!("nothing for {idle:?} while answers are owed");
                        let silent = LinkError::Silent { name: self.name(), address, reason };
                        return Some(Err(self.failed(silent).into()));
                    }
                    continue;
                }
            };
            return match answer {
                Ok(None) => None,
                Ok(Some(answer)) => Some(self.take(session, answer).map_err(Into::into)),
                Err(status) => {
                    let error = self.judge(&status, session.was_answered());
                    Some(Err(self.failed(error).into()))
                }
            };
        }
    }

    /// Tells the gate what an answer says.
    fn take(
        &mut self,
        session: &Session,
        answer: proto::AppendResponse,
    ) -> Result<StreamAppendResult, LinkError> {
        let term = session.answered();
        let answer = wire::appended_from_wire(answer).map_err(|error| {
            let invalid = self.invalid(&error);
            self.failed(invalid)
        })?;
        if self.purpose == Purpose::Control {
            self.shared.answered(self.target);
        }
        let (target, losses) = (self.target, session.losses);
        match &answer {
            // What a heartbeat matches is known already.
            Ok(Some(id)) if self.purpose == Purpose::Entries => {
                let end = entry_id(id).index.next();
                if self.gating().matched(target, term, losses, end) == Matched::Stale {
                    let stale = LinkError::Stale { name: self.name() };
                    return Err(self.failed(stale));
                }
            }
            Err(StreamAppendError::Conflict(id)) => {
                let index = entry_id(id).index;
                let (conflict, is_held_back) = self.gating().conflict(target, term, losses, index);
                if conflict == Conflict::Lost {
                    let error = self.lost(conflict);
                    tracing::error!(%error, %term, %index, "{LOST}");
                }
                if is_held_back {
                    let lost = self.lost(conflict);
                    return Err(self.failed(lost));
                }
            }
            Ok(_) | Err(StreamAppendError::HigherVote(_)) => self.gating().heard(target),
        }
        self.is_back();
        Ok(answer)
    }

    /// Why a conflict is not handed on.
    fn lost(&self, conflict: Conflict) -> LinkError {
        let name = self.name();
        match conflict {
            Conflict::Stale => LinkError::Stale { name },
            _ if self.is_witness() => LinkError::LostWitness { name },
            Conflict::Usual | Conflict::Lost => LinkError::Lost { name },
        }
    }
}
