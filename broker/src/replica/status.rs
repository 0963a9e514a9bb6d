//! Follows Raft: role, leader and term for everyone else, and the leader clock.

use std::sync::Arc;

use openraft::async_runtime::WatchReceiver;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
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

/// Runs until `stop`, or the end of Raft or of its log.
pub(crate) async fn follow(
    raft: Raft,
    published: Arc<Published>,
    clock: Arc<ClockSource>,
    senders: StatusSenders,
    peers: watch::Receiver<PeerStates>,
    mut closed: watch::Receiver<Option<LogClosed>>,
    stop: CancellationToken,
) {
    let mut metrics = raft.server_metrics();
    let mut applied = published.applied();
    let me = *raft.node_id();
    // A log may fail while nobody waits for it, of which Raft hears nothing.
    while closed.borrow_and_update().is_none() {
        let (term, leads, leader) = {
            let seen = metrics.borrow_and_update();
            let leads = seen.state.is_leader();
            // A vote from before a restart still names this node.
            let leader = seen.current_leader.filter(|leader| leads || *leader != me);
            (Term::new(seen.vote.leader_id.term), leads, leader)
        };
        let applied_term = applied.borrow_and_update().id.map(|id| id.term);
        let status = RaftStatus { term, leader, serving: leads && applied_term == Some(term) };
        announce(status, &published, &clock, &senders, &peers);
        tokio::select! {
            () = stop.cancelled() => break,
            changed = metrics.changed() => if changed.is_err() { break },
            changed = closed.changed() => if changed.is_err() { break },
            changed = applied.changed(), if leads && !status.serving => {
                if changed.is_err() { break }
            }
        }
    }
    clock.resign();
    senders.status.send_modify(|status| *status = RaftStatus { serving: false, ..*status });
    if !stop.is_cancelled() {
        let reason = match (&*closed.borrow(), &raft.metrics().borrow_watched().running_state) {
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

/// The clock is set before anyone hears that this node serves.
fn announce(
    status: RaftStatus,
    published: &Published,
    clock: &ClockSource,
    senders: &StatusSenders,
    peers: &watch::Receiver<PeerStates>,
) {
    let before = *senders.status.borrow();
    if status == before {
        return;
    }
    if status.serving && (!before.serving || status.term != before.term) {
        let highest_ms = published.applying.read().state.clock_ms();
        senders.clock_jump_ms.send_replace(clock.elect(highest_ms, walls_ms(peers)));
        tracing::info!(term = %status.term, "this node leads the broker group");
    } else if before.serving && !status.serving {
        clock.resign();
        tracing::warn!(term = %status.term, "this node no longer leads the broker group");
    }
    if status.leader.is_some() && (status.leader, status.term) != (before.leader, before.term) {
        senders.elections.inc();
    }
    senders.status.send_replace(status);
}
