//! Where leadership belongs: it leaves a node that stops or whose disk stalls, and goes back to the
//! preferred node when that is in step. Never to a witness.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::gate::Mode;
use super::membership::{BrokerNode, Role};
use super::raft_types::entry_id;
use super::{RaftStatus, Replica};
use crate::position::EntryIndex;

/// Between two looks at the disk's progress.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two moves of leadership to the preferred node.
const MOVE_BACK_INTERVAL: Duration = Duration::from_mins(1);
/// How long the preferred node must be in step before it leads again.
const STEADY_INTERVAL: Duration = Duration::from_secs(2);
/// Entries that a peer in step may be behind: those in flight.
const IN_FLIGHT_ENTRIES: u64 = 64;
/// Since when what is not durable waits is known this often at most.
const SAMPLES_MAX: usize = 256;

/// Why leadership was not moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("this node does not lead the broker group")]
    NotLeader { leader: Option<u64> },
    #[error("member {id} is no data node that votes in this group")]
    NoTarget { id: u64 },
    #[error("no other data node is in step")]
    NobodyInStep,
    #[error("member {id} has not taken the lead in time")]
    NotTaken { id: u64 },
    #[error("the replica has ended: {0}")]
    Ended(String),
}

/// How long the oldest entry that is not durable has waited, by samples.
#[derive(Debug, Default)]
struct Stall {
    /// The log's end at a time, ascending; the front is not durable yet.
    samples: VecDeque<(Instant, EntryIndex)>,
}

impl Stall {
    fn sample(&mut self, now: Instant, appended_end: EntryIndex, durable_end: EntryIndex) {
        while self.samples.front().is_some_and(|(_, end)| *end <= durable_end) {
            self.samples.pop_front();
        }
        let is_new = self.samples.back().is_none_or(|(_, end)| *end < appended_end);
        if appended_end > durable_end && is_new && self.samples.len() < SAMPLES_MAX {
            self.samples.push_back((now, appended_end));
        }
    }

    fn since(&self, now: Instant) -> Duration {
        self.samples.front().map_or(Duration::ZERO, |(at, _)| now.duration_since(*at))
    }
}

/// Watches over a node's leadership.
#[derive(Debug)]
pub(crate) struct Leadership {
    pub(crate) replica: Replica,
    /// Name of the node that leads when it is in step.
    pub(crate) preferred: Option<String>,
    pub(crate) election_timeout: Duration,
    pub(crate) stop: CancellationToken,
}

impl Leadership {
    /// Runs until `stop`.
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.watch()).await;
    }

    async fn watch(self) {
        let replica = &self.replica;
        let me = replica.identity().node_id;
        let status = replica.raft_status();
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stall = Stall::default();
        let mut steady_since: Option<Instant> = None;
        let mut moved_at: Option<Instant> = None;
        loop {
            looks.tick().await;
            let now = Instant::now();
            if replica.is_given_away_in_vain(now) {
                replica.request_restart("leadership was given away and nobody took it");
                return;
            }
            let appended_end = replica.appended_end();
            stall.sample(now, appended_end, replica.log().settled_end().borrow().index);
            let status: RaftStatus = *status.borrow();
            if status.leader == Some(me) {
                replica.tell_yields(false);
            }
            if status.leader != Some(me) || replica.other_data_voters().is_empty() {
                steady_since = None;
                continue;
            }
            if stall.since(now) > 2 * self.election_timeout {
                self.leave_stalled(stall.since(now)).await;
                if replica.shared.ended.borrow().is_some() {
                    return;
                }
                stall = Stall::default();
                continue;
            }
            let Some(target) = self.preferred_in_step().filter(|_| status.serving) else {
                steady_since = None;
                continue;
            };
            let steady = now.duration_since(*steady_since.get_or_insert(now)) >= STEADY_INTERVAL;
            let rested = moved_at.is_none_or(|at| now.duration_since(at) >= MOVE_BACK_INTERVAL);
            if steady && rested {
                moved_at = Some(now);
                tracing::info!(target, "leadership goes back to the preferred node");
                if let Err(error) = replica.transfer(Some(target)).await {
                    tracing::warn!(target, %error, "the preferred node does not lead");
                }
            }
        }
    }

    /// The preferred node, if it is another one, has all that this one has, and was not sent out of
    /// the lead by an operator.
    fn preferred_in_step(&self) -> Option<u64> {
        let preferred = self.preferred.as_deref()?;
        let gate = self.replica.gate().borrow().clone();
        if gate.mode != Mode::Paired || gate.closing || !gate.gone.is_empty() {
            return None;
        }
        let voters = self.replica.other_data_voters();
        let (id, _) = voters.iter().find(|(_, node)| node.name == preferred)?;
        let yields = self.replica.peers().borrow().get(id).is_some_and(|peer| peer.state.yields);
        (!yields && self.replica.is_in_step(*id)).then_some(*id)
    }

    /// The disk does not do its work: a peer in step leads, or nobody until this node has begun
    /// anew. Resolves when leadership is gone or the restart is asked for.
    async fn leave_stalled(&self, since: Duration) {
        let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        tracing::error!(since_ms, "the disk stalls: this node gives leadership up");
        match self.replica.transfer(None).await {
            Ok(to) => tracing::warn!(to, "leadership has moved away from a disk that stalls"),
            Err(error) => {
                let reason = format!("the disk stalls for {since_ms} ms and {error}");
                self.replica.refuse_runs(Some(reason.clone()));
                self.replica.request_restart(&reason);
            }
        }
    }
}

impl Replica {
    fn appended_end(&self) -> EntryIndex {
        self.log().last().map_or(EntryIndex::ZERO, |id| id.index.next())
    }

    /// Voters that may lead, but for this node.
    pub fn other_data_voters(&self) -> BTreeMap<u64, BrokerNode> {
        let me = self.identity().node_id;
        let members = self.members().into_iter();
        let others =
            members.filter(|(id, (node, votes))| *id != me && *votes && node.role == Role::Data);
        others.map(|(id, (node, _))| (id, node)).collect()
    }

    /// Whether a member answers, takes entries and has what this leader has, but for what is in
    /// flight.
    fn is_in_step(&self, id: u64) -> bool {
        let healthy = self
            .peers()
            .borrow()
            .get(&id)
            .filter(|peer| peer.fresh && !peer.state.fenced)
            .is_some_and(|peer| !peer.state.stopping && !peer.state.disk_full);
        let matched_end = {
            let metrics = self.shared.raft.metrics();
            let metrics = metrics.borrow_watched();
            let progress = metrics.replication.as_ref().and_then(|all| all.get(&id).cloned());
            progress.flatten().map_or(EntryIndex::ZERO, |at| entry_id(&at).index.next())
        };
        let behind = self.appended_end().get().saturating_sub(matched_end.get());
        healthy && behind <= IN_FLIGHT_ENTRIES
    }

    /// Moves leadership to a data node, or to any that is in step; returns who leads once this node
    /// does not any more.
    pub async fn transfer(&self, to: Option<u64>) -> Result<u64, TransferError> {
        let me = self.identity().node_id;
        let mut status = self.raft_status();
        let RaftStatus { term, leader, .. } = *status.borrow_and_update();
        if leader != Some(me) {
            return Err(TransferError::NotLeader { leader });
        }
        let targets = self.other_data_voters();
        let target = match to {
            Some(id) if !targets.contains_key(&id) => return Err(TransferError::NoTarget { id }),
            Some(id) => Some(id).filter(|id| self.is_in_step(*id)),
            None => targets.keys().copied().find(|id| self.is_in_step(*id)),
        };
        let id = target.ok_or(TransferError::NobodyInStep)?;
        let ended = |error: String| TransferError::Ended(error);
        let patience = 3 * self.shared.election_timeout + Duration::from_secs(1);
        let until = Instant::now() + patience;
        // Before Raft does it: whoever waits here may be gone by then.
        *self.shared.given_away.lock() = Some((term, until));
        let trigger = self.shared.raft.trigger();
        trigger.transfer_leader(id).await.map_err(|fatal| ended(fatal.to_string()))?;
        let moved = status.wait_for(|status| status.leader.is_some_and(|leader| leader != me));
        let moved = tokio::time::timeout_at(until, moved).await;
        match moved.map(|status| status.map(|status| status.leader)) {
            Ok(Ok(leader)) => Ok(leader.unwrap_or(id)),
            Ok(Err(_)) => Err(ended("it is stopping".to_owned())),
            Err(_) => Err(TransferError::NotTaken { id }),
        }
    }

    /// Whether Raft still has this node lead a term that it was to give away long ago. It takes no
    /// writes then, nor does it send heartbeats, so that this node counts as no leader; but nothing
    /// is given back: only a new start does that.
    fn is_given_away_in_vain(&self, now: Instant) -> bool {
        let Some((term, until)) = *self.shared.given_away.lock() else { return false };
        let metrics = self.shared.raft.metrics();
        let metrics = metrics.borrow_watched();
        now >= until && metrics.state.is_leader() && metrics.current_term == term.get()
    }

    /// Before a stop: tells the others, and lets one of them lead first if it can.
    pub async fn hand_over(&self) {
        self.tell_stopping();
        if self.shared.ended.borrow().is_some() {
            return;
        }
        match self.transfer(None).await {
            Ok(to) => tracing::info!(to, "leadership has moved before the stop"),
            Err(TransferError::NotLeader { .. }) => {}
            Err(error) if self.other_data_voters().is_empty() => {
                tracing::debug!(%error, "nobody else can lead");
            }
            Err(error) => tracing::warn!(%error, "stopping without another leader"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(index: u64) -> EntryIndex {
        EntryIndex::new(index)
    }

    #[test]
    fn disk_that_goes_on_slowly_is_judged_by_the_oldest_entry_that_waits() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut stall = Stall::default();
        stall.sample(at(0), end(0), end(0));
        assert_eq!(stall.since(at(900)), Duration::ZERO, "nothing waits");
        stall.sample(at(100), end(5), end(0));
        stall.sample(at(200), end(9), end(0));
        assert_eq!(stall.since(at(300)), Duration::from_millis(200));
        stall.sample(at(300), end(9), end(4));
        assert_eq!(
            stall.since(at(300)),
            Duration::from_millis(200),
            "four of five are no progress"
        );
        stall.sample(at(400), end(9), end(5));
        assert_eq!(stall.since(at(400)), Duration::from_millis(200));
        stall.sample(at(500), end(9), end(9));
        assert_eq!(stall.since(at(900)), Duration::ZERO);
    }

    #[test]
    fn stall_that_lasts_keeps_its_oldest_sample() {
        let start = Instant::now();
        let mut stall = Stall::default();
        for n in 0..2000 {
            stall.sample(start + Duration::from_millis(n * 100), end(n + 1), end(0));
        }
        assert_eq!(stall.since(start + Duration::from_secs(200)), Duration::from_secs(200));
        assert!(stall.samples.len() <= SAMPLES_MAX);
    }
}
