//! Follows Raft: role, leader and term for everyone else, and the leader clock.
//!
//! Raft leaves a leader its title until it hears of a higher term, which one that is cut off never
//! does. Here the title ends once no quorum has answered for so long that another node may lead, and
//! comes back with the next answer.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::{Instant as _, WatchReceiver};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::RaftStatus;
use super::clock_source::ClockSource;
use super::peers::{PeerState, PeerStates};
use super::published::Published;
use super::raft_types::Raft;
use super::start::Ended;
use crate::log::LogClosed;
use crate::position::Term;

/// Where the follower tells.
#[derive(Debug)]
pub(crate) struct StatusSenders {
    pub(crate) status: watch::Sender<RaftStatus>,
    pub(crate) clock_jump_ms: watch::Sender<u64>,
    pub(crate) elections: Counter,
    /// Why Raft or its log has ended, if not by a shutdown.
    pub(crate) ended: watch::Sender<Option<Ended>>,
}

/// What it goes by.
#[derive(Debug)]
pub(crate) struct Following {
    pub(crate) raft: Raft,
    pub(crate) published: Arc<Published>,
    pub(crate) clock: Arc<ClockSource>,
    pub(crate) senders: StatusSenders,
    pub(crate) peers: watch::Receiver<PeerStates>,
    pub(crate) log_closed: watch::Receiver<Option<LogClosed>>,
    /// Without an answer of a quorum for so long a leader counts as none.
    pub(crate) quorum_silence_max: Duration,
    pub(crate) stop: CancellationToken,
}

/// What Raft says of this node and the group.
#[derive(Clone, Copy, Debug)]
struct Seen {
    term: Term,
    leads: bool,
    leader: Option<u64>,
    /// No other voter is there to answer.
    is_lone: bool,
    /// When what a quorum answered last was sent, while this node leads.
    confirmed_at: Option<Instant>,
}

/// How long a leader counts as one without being confirmed.
#[derive(Debug)]
struct Title {
    silence_max: Duration,
    /// The term it leads, and since when.
    led: Option<(Term, Instant)>,
}

impl Title {
    fn new(silence_max: Duration) -> Self {
        Self { silence_max, led: None }
    }

    /// Until when it holds if no answer comes; `None`: there is no title, or nobody to ask.
    fn holds_until(&mut self, seen: &Seen, now: Instant) -> Option<Instant> {
        if !seen.leads {
            self.led = None;
            return None;
        }
        let begun = self.led.filter(|(term, _)| *term == seen.term).map_or(now, |(_, at)| at);
        self.led = Some((seen.term, begun));
        let confirmed = seen.confirmed_at.map_or(begun, |at| at.max(begun));
        (!seen.is_lone).then(|| confirmed + self.silence_max)
    }
}

/// What was told of before.
#[derive(Debug, Default)]
struct Announced {
    /// The term that the leader clock was started for.
    clock_term: Option<Term>,
    /// The last known.
    leader: Option<(u64, Term)>,
}

impl Following {
    /// Runs until `stop`, or the end of Raft or of its log.
    pub(crate) async fn run(mut self) {
        let mut metrics = self.raft.server_metrics();
        let mut confirmed = self.raft.data_metrics();
        let mut applied = self.published.applied();
        let mut title = Title::new(self.quorum_silence_max);
        let mut announced = Announced::default();
        let me = *self.raft.node_id();
        // A log may fail while nobody waits for it, of which Raft hears nothing.
        while self.log_closed.borrow_and_update().is_none() {
            let now = Instant::now();
            let seen = {
                let seen = metrics.borrow_and_update();
                let confirmed = confirmed.borrow_and_update();
                Seen {
                    term: Term::new(seen.vote.leader_id.term),
                    leads: seen.state.is_leader(),
                    leader: seen.current_leader,
                    is_lone: seen.membership_config.membership().voter_ids().eq([me]),
                    confirmed_at: confirmed
                        .last_quorum_acked
                        .and_then(|at| now.checked_sub(at.elapsed())),
                }
            };
            let holds_until = title.holds_until(&seen, now);
            let holds = seen.leads && holds_until.is_none_or(|at| now < at);
            let applied_term = applied.borrow_and_update().id.map(|id| id.term);
            let status = RaftStatus {
                term: seen.term,
                // A vote from before a restart still names this node.
                leader: seen.leader.filter(|leader| holds || *leader != me),
                serving: holds && applied_term == Some(seen.term),
            };
            self.announce(&mut announced, status, seen.leads);
            let lapse = async {
                match holds_until.filter(|_| holds) {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => break,
                changed = metrics.changed() => if changed.is_err() { break },
                changed = self.log_closed.changed() => if changed.is_err() { break },
                changed = applied.changed(), if holds && !status.serving => {
                    if changed.is_err() { break }
                }
                () = lapse => {}
                changed = confirmed.changed(), if seen.leads && !holds => {
                    if changed.is_err() { break }
                }
            }
        }
        self.end();
    }

    /// The clock is set before anyone hears that this node serves, and runs for as long as Raft lets
    /// it lead: entries of its term may wait to be committed.
    fn announce(&self, announced: &mut Announced, status: RaftStatus, leads: bool) {
        let before = *self.senders.status.borrow();
        let term = status.term;
        if !leads && announced.clock_term.take().is_some() {
            self.clock.resign();
        }
        if status.serving && announced.clock_term != Some(term) {
            let highest_ms = self.published.applying.read().state.clock_ms();
            let jump_ms = self.clock.elect(highest_ms, walls_ms(&self.peers));
            self.senders.clock_jump_ms.send_replace(jump_ms);
            announced.clock_term = Some(term);
        }
        if status == before {
            return;
        }
        match (before.serving, status.serving) {
            (false, true) => tracing::info!(%term, "this node leads the broker group"),
            (true, false) if leads => tracing::warn!(%term, silence_max = ?self.quorum_silence_max,
                "no quorum answers: this node does not count as leader until one does"),
            (true, false) => tracing::warn!(%term, "this node no longer leads the broker group"),
            _ => {}
        }
        if let Some(leader) = status.leader.map(|leader| (leader, term))
            && announced.leader.replace(leader) != Some(leader)
        {
            self.senders.elections.inc();
        }
        self.senders.status.send_replace(status);
    }

    fn end(self) {
        let Self { raft, clock, senders, log_closed, stop, .. } = self;
        clock.resign();
        senders.status.send_modify(|status| *status = RaftStatus { serving: false, ..*status });
        if stop.is_cancelled() {
            return;
        }
        let reason = match (&*log_closed.borrow(), &raft.metrics().borrow_watched().running_state) {
            (Some(closed), _) => closed.to_string(),
            (None, Err(fatal)) => fatal.to_string(),
            (None, Ok(())) => "raft has stopped".to_owned(),
        };
        tracing::error!(reason, "the replica has failed");
        senders.ended.send_replace(Some(Ended::Failed(reason)));
    }
}

/// What the walls of the other members say now, as far as they answer.
fn walls_ms(peers: &watch::Receiver<PeerStates>) -> Vec<u64> {
    let peers = peers.borrow();
    let told = peers.values().filter(|peer| peer.fresh && peer.state.wall_ms > 0);
    let since_ms =
        |peer: &PeerState| u64::try_from(peer.heard_at.elapsed().as_millis()).unwrap_or(u64::MAX);
    told.map(|peer| peer.state.wall_ms.saturating_add(since_ms(peer))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_millis(1_400);

    fn seen(term: u64, confirmed_at: Option<Instant>) -> Seen {
        let (term, leader) = (Term::new(term), Some(1));
        Seen { term, leads: true, leader, is_lone: false, confirmed_at }
    }

    #[test]
    fn title_holds_for_a_while_after_the_last_answer_of_a_quorum() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut title = Title::new(SILENCE);
        assert_eq!(title.holds_until(&seen(3, None), start), Some(start + SILENCE));
        assert_eq!(title.holds_until(&seen(3, None), at(900)), Some(start + SILENCE));
        assert_eq!(title.holds_until(&seen(3, Some(at(950))), at(990)), Some(at(950) + SILENCE));
        assert_eq!(title.holds_until(&seen(3, Some(at(950))), at(9_000)), Some(at(950) + SILENCE));
    }

    #[test]
    fn each_term_begins_with_a_new_title() {
        let start = Instant::now();
        let later = start + Duration::from_secs(60);
        let mut title = Title::new(SILENCE);
        title.holds_until(&seen(3, Some(start)), start);
        let next = title.holds_until(&seen(4, None), later);
        assert_eq!(next, Some(later + SILENCE));
        let follower = Seen { leads: false, ..seen(5, None) };
        assert_eq!(title.holds_until(&follower, later), None);
        let again = title.holds_until(&seen(4, None), later + SILENCE);
        assert_eq!(again, Some(later + 2 * SILENCE));
    }

    #[test]
    fn lone_voter_needs_no_answer() {
        let now = Instant::now();
        let lone = Seen { is_lone: true, ..seen(1, None) };
        assert_eq!(Title::new(SILENCE).holds_until(&lone, now), None);
    }
}
