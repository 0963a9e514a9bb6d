//! Digests of the applied state at ends that all replicas pass, and their comparison: the same
//! entries must have given the same state everywhere.
//!
//! An end is one that every so many entries fall on, or where apply has come to rest. Digests are
//! computed off the path of apply, of clones that share what does not change.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::RaftStatus;
use super::peers::PeerStates;
use super::published::Published;
use super::state::State;
use crate::position::EntryIndex;

/// Entries between two digests while apply does not rest.
const INTERVAL_ENTRIES: u64 = 4096;
/// Apply rests when nothing came for so long.
const REST: Duration = Duration::from_secs(1);
/// Of which a member may be behind when it tells its newest.
const KEPT_COUNT: usize = 16;

/// The digest of the state right behind an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Digest {
    pub(crate) end: EntryIndex,
    pub(crate) digest: Bytes,
}

/// What is known; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Digests {
    /// The newest last.
    own: Arc<Mutex<VecDeque<Digest>>>,
    /// By member: where its newest that could be compared lies, and whether it is equal to this
    /// node's.
    compared: Arc<Mutex<BTreeMap<u64, (EntryIndex, bool)>>>,
    mismatches: Counter,
}

impl Digests {
    pub(crate) fn newest(&self) -> Option<Digest> {
        self.own.lock().back().cloned()
    }

    /// Whether each member's state is equal to this node's, where that is known.
    pub(crate) fn equal(&self) -> BTreeMap<u64, bool> {
        self.compared.lock().iter().map(|(id, (_, is_equal))| (*id, *is_equal)).collect()
    }

    /// Differences found.
    pub(crate) fn mismatches(&self) -> Counter {
        self.mismatches.clone()
    }

    fn keep(&self, digest: Digest) {
        let mut own = self.own.lock();
        if own.back().is_some_and(|newest| newest.end >= digest.end) {
            return;
        }
        own.push_back(digest);
        if own.len() > KEPT_COUNT {
            own.pop_front();
        }
    }

    /// Compares with what a member says. True if it differs, and that is news.
    fn compare(&self, member: u64, told: &Digest) -> bool {
        let Some(is_equal) = (self.own.lock().iter())
            .find(|own| own.end == told.end)
            .map(|own| own.digest == told.digest)
        else {
            return false;
        };
        let before = self.compared.lock().insert(member, (told.end, is_equal));
        !is_equal && before.is_none_or(|(end, _)| end != told.end)
    }

    fn forget_others(&self) {
        self.compared.lock().clear();
    }
}

/// Where apply leaves what is to be digested.
#[derive(Debug)]
pub(crate) struct Samples {
    sender: watch::Sender<Option<State>>,
}

impl Samples {
    pub(crate) fn new() -> (Self, watch::Receiver<Option<State>>) {
        let (sender, samples) = watch::channel(None);
        (Self { sender }, samples)
    }

    /// Called behind every entry that was applied.
    pub(crate) fn applied(&self, index: EntryIndex, state: &State) {
        if index.next().get().is_multiple_of(INTERVAL_ENTRIES) {
            self.sender.send_replace(Some(state.clone()));
        }
    }
}

/// What the task goes by.
#[derive(Debug)]
pub(crate) struct Digesting {
    pub(crate) digests: Digests,
    pub(crate) samples: watch::Receiver<Option<State>>,
    pub(crate) published: Arc<Published>,
    pub(crate) peers: watch::Receiver<PeerStates>,
    pub(crate) status: watch::Receiver<RaftStatus>,
    pub(crate) node_id: u64,
    pub(crate) stop: CancellationToken,
}

impl Digesting {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self) {
        let mut ticks = tokio::time::interval(REST);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut seen_end = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                Ok(()) = self.samples.changed() => {
                    let sample = self.samples.borrow_and_update().clone();
                    if let Some(state) = sample {
                        self.digest(state).await;
                    }
                }
                Ok(()) = self.peers.changed() => self.compare(),
                _ = ticks.tick() => {
                    let end = self.published.applied().borrow().id.map(|id| id.index.next());
                    let newest = self.digests.newest().map(|digest| digest.end);
                    if end.is_some() && end == seen_end && newest != end {
                        let state = self.published.applying.read().state.clone();
                        self.digest(state).await;
                    }
                    seen_end = end;
                }
            }
        }
    }

    async fn digest(&self, state: State) {
        let Some(applied) = state.applied() else { return };
        let end = applied.index.next();
        let digested = tokio::task::spawn_blocking(move || state.digest()).await;
        match digested {
            Ok(Ok(digest)) => self.digests.keep(Digest { end, digest: digest.into() }),
            Ok(Err(error)) => tracing::error!(%end, %error, "the state cannot be digested"),
            Err(error) => tracing::error!(%end, %error, "the state cannot be digested"),
        }
    }

    fn compare(&mut self) {
        let peers = self.peers.borrow_and_update().clone();
        if self.status.borrow().leader != Some(self.node_id) {
            self.digests.forget_others();
            return;
        }
        for (id, peer) in peers.iter().filter(|(_, peer)| peer.fresh && !peer.state.witness) {
            if peer.state.digest.is_empty() {
                continue;
            }
            let end = EntryIndex::new(peer.state.digest_end);
            let told = Digest { end, digest: peer.state.digest.clone() };
            if self.digests.compare(*id, &told) {
                self.digests.mismatches.inc();
                tracing::error!(
                    member = peer.state.node, %end,
                    "the same entries gave another state there: compare both with `drumlin log diff`"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(end: u64, text: &'static str) -> Digest {
        Digest { end: EntryIndex::new(end), digest: Bytes::from_static(text.as_bytes()) }
    }

    #[test]
    fn a_member_is_judged_at_an_end_that_both_have() {
        let digests = Digests::default();
        digests.keep(digest(10, "x"));
        digests.keep(digest(20, "y"));
        assert!(!digests.compare(2, &digest(15, "z")));
        assert_eq!(digests.equal(), BTreeMap::new());
        assert!(!digests.compare(2, &digest(10, "x")));
        assert_eq!(digests.equal(), BTreeMap::from([(2, true)]));
    }

    #[test]
    fn a_difference_is_news_once_for_each_end() {
        let digests = Digests::default();
        digests.keep(digest(10, "x"));
        digests.keep(digest(20, "y"));
        assert!(digests.compare(2, &digest(10, "other")));
        assert!(!digests.compare(2, &digest(10, "other")));
        assert!(digests.compare(2, &digest(20, "other")));
        assert_eq!(digests.equal(), BTreeMap::from([(2, false)]));
    }

    #[test]
    fn only_the_newest_are_kept_and_none_goes_back() {
        let digests = Digests::default();
        for end in 1..=u64::try_from(KEPT_COUNT).expect("small") + 3 {
            digests.keep(digest(end, "x"));
        }
        digests.keep(digest(1, "late"));
        assert_eq!(digests.own.lock().len(), KEPT_COUNT);
        assert!(!digests.compare(2, &digest(1, "y")));
        assert!(digests.equal().is_empty());
    }
}
