//! A node whose log may lack entries that it had answered for, because their syncs were deferred and
//! the power went. Raft would break on it: with its vote a candidate without these entries could
//! lead. So it neither votes nor leads until it has all that the leader had when it came back.
//!
//! Whatever this node may have answered, it had from a leader, and each later leader has what was
//! committed with it. So it is enough to have applied up to where the log of the leader ends now:
//! that is further than what the leader has committed by its answers. Where no data node is left
//! that can lead, an operator decides (`drumlin cluster elect --unsafe`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::RaftStatus;
use super::peers::PeerStates;
use super::published::AppliedEnd;
use super::raft_types::Raft;
use crate::log::Log;
use crate::position::EntryIndex;

/// Whether this node must not vote nor lead now; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence {
    closed: Arc<AtomicBool>,
}

impl Fence {
    pub(crate) fn of(log: &Log) -> Self {
        Self { closed: Arc::new(AtomicBool::new(log.is_fenced())) }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// What lifts the fence.
#[derive(Debug)]
pub(crate) struct Fencing {
    pub(crate) fence: Fence,
    pub(crate) log: Log,
    pub(crate) raft: Raft,
    pub(crate) status: watch::Receiver<RaftStatus>,
    pub(crate) peers: watch::Receiver<PeerStates>,
    pub(crate) applied: watch::Receiver<AppliedEnd>,
    pub(crate) stop: CancellationToken,
}

impl Fencing {
    /// Runs until the fence is lifted, or `stop`.
    pub(crate) async fn run(mut self) {
        if !self.fence.is_closed() {
            return;
        }
        tracing::warn!(
            "the power went before deferred syncs were made up for: this node may lack entries \
             that it had answered, and neither votes nor leads until it has them from a leader; \
             if no node can lead, decide with `drumlin cluster elect --unsafe`"
        );
        let stop = self.stop.clone();
        match stop.run_until_cancelled(self.lift_when_whole()).await {
            Some(Ok(())) | None => {}
            Some(Err(error)) => tracing::error!(%error, "the node stays fenced"),
        }
    }

    async fn lift_when_whole(&mut self) -> io::Result<()> {
        let gone = |_| io::Error::other("the replica has ended");
        let end = loop {
            let status = *self.status.borrow_and_update();
            if let Some(end) = leader_end(status, &self.peers.borrow_and_update()) {
                break end;
            }
            tokio::select! {
                changed = self.status.changed() => changed.map_err(gone)?,
                changed = self.peers.changed() => changed.map_err(gone)?,
            }
        };
        tracing::info!(%end, "a leader told how far its log reaches");
        let whole = self.applied.wait_for(|applied| applied.end_index() >= end);
        whole.await.map_err(gone)?;
        lift(&self.fence, &self.log, &self.raft).await?;
        tracing::info!(%end, "this node has all that the leader had: it votes again");
        Ok(())
    }
}

/// Lets the node vote and lead again, durably.
pub(crate) async fn lift(fence: &Fence, log: &Log, raft: &Raft) -> io::Result<()> {
    let synced = log.lift_fence().map_err(io::Error::other)?;
    synced.await.map_err(|_| io::Error::other("the log closed"))??;
    fence.closed.store(false, Ordering::Release);
    raft.runtime_config().elect(true);
    Ok(())
}

/// Where the log of the leader ends, as it says itself in the term that this node is in.
fn leader_end(status: RaftStatus, peers: &PeerStates) -> Option<EntryIndex> {
    let leader = status.leader?;
    let said = &peers.get(&leader)?.state;
    let leads = said.leader == leader && said.term == status.term.get();
    leads.then(|| EntryIndex::new(said.appended_end))
}

#[cfg(test)]
mod tests {
    use drumlin_proto::native::StateResponse;
    use tokio::time::Instant;

    use super::*;
    use crate::position::Term;
    use crate::replica::peers::PeerState;

    fn told(id: u64, leader: u64, term: u64) -> PeerStates {
        let state = StateResponse { leader, term, appended_end: 70, ..StateResponse::default() };
        let state = PeerState { state, heard_at: Instant::now(), fresh: true };
        Arc::new([(id, state)].into())
    }

    fn follows(leader: Option<u64>) -> RaftStatus {
        RaftStatus { term: Term::new(5), leader, serving: false }
    }

    #[test]
    fn only_who_says_that_it_leads_this_term_is_believed() {
        assert_eq!(leader_end(follows(Some(2)), &told(2, 2, 5)), Some(EntryIndex::new(70)));
        assert_eq!(leader_end(follows(None), &told(2, 2, 5)), None, "no leader is known");
        assert_eq!(leader_end(follows(Some(2)), &told(3, 3, 5)), None, "another one says so");
        assert_eq!(leader_end(follows(Some(2)), &told(2, 0, 5)), None, "it does not lead yet");
        assert_eq!(leader_end(follows(Some(2)), &told(2, 2, 4)), None, "an older term's end");
    }
}
