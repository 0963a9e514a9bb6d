//! What the state machine shows to everyone else: the applied state behind one lock, how far it
//! may be read, and who waits for topics.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use drumlin_proto::ids::TopicId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{Applying, ReadableEnd};
use crate::fault::{Fault, injected};
use crate::log::DurableEnd;
use crate::position::{EntryId, EntryIndex, LogOffset};

/// Topics with waiters up to which nothing is swept.
const UNSWEPT_WAITERS_MIN: usize = 64;

/// The last applied entry and the position behind its frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AppliedEnd {
    pub(crate) id: Option<EntryId>,
    pub(crate) position: LogOffset,
}

impl AppliedEnd {
    /// Exclusive.
    pub(crate) fn end_index(self) -> EntryIndex {
        self.id.map_or(EntryIndex::ZERO, |id| id.index.next())
    }

    fn readable(self) -> ReadableEnd {
        ReadableEnd { index: self.end_index(), position: self.position }
    }
}

/// The read side of the state machine.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) applying: RwLock<Applying>,
    applied: watch::Sender<AppliedEnd>,
    settled: watch::Receiver<DurableEnd>,
    readable: watch::Sender<ReadableEnd>,
    catalog_version: watch::Sender<u64>,
    feature_level: AtomicU32,
    waking: Mutex<Waking>,
}

/// Waiters by topic, and the topics to be told once their entries are readable.
#[derive(Debug, Default)]
struct Waking {
    waiters: BTreeMap<TopicId, Arc<Notify>>,
    /// With so many, those nobody holds are forgotten before another is added.
    waiters_max: usize,
    due: VecDeque<(EntryIndex, BTreeSet<TopicId>)>,
}

impl Published {
    pub(crate) fn new(
        applying: Applying,
        applied: AppliedEnd,
        settled: watch::Receiver<DurableEnd>,
    ) -> Self {
        let feature_level = AtomicU32::new(applying.state.feature_level());
        let published = Self {
            feature_level,
            applying: RwLock::new(applying),
            applied: watch::Sender::new(applied),
            settled,
            readable: watch::Sender::new(ReadableEnd::default()),
            catalog_version: watch::Sender::new(0),
            waking: Mutex::default(),
        };
        published.publish();
        published
    }

    pub(crate) fn applied(&self) -> watch::Receiver<AppliedEnd> {
        self.applied.subscribe()
    }

    pub(crate) fn readable(&self) -> watch::Receiver<ReadableEnd> {
        self.readable.subscribe()
    }

    pub(crate) fn catalog_version(&self) -> watch::Receiver<u64> {
        self.catalog_version.subscribe()
    }

    pub(crate) fn feature_level(&self) -> u32 {
        self.feature_level.load(Ordering::Relaxed)
    }

    /// What the state says after an entry.
    pub(crate) fn note_feature_level(&self, level: u32) {
        self.feature_level.store(level, Ordering::Relaxed);
    }

    /// The state machine has applied everything up to `applied`; `touched` changed with it.
    pub(crate) fn advance(&self, applied: AppliedEnd, touched: BTreeSet<TopicId>) {
        let end = applied.readable();
        if !touched.is_empty() {
            self.waking.lock().due.push_back((end.index, touched));
        }
        self.applied.send_replace(applied);
        self.publish();
    }

    /// Moves the readable end to where both apply and the log have come, and wakes who waits there.
    pub(crate) fn publish(&self) {
        let settled = *self.settled.borrow();
        let settled = ReadableEnd { index: settled.index, position: settled.position };
        let applied = self.applied.borrow().readable();
        let end = if injected(Fault::AckBeforeSync) { applied } else { settled.min(applied) };
        self.readable.send_if_modified(|readable| {
            let rises = end > *readable;
            if rises {
                *readable = end;
            }
            rises
        });
        if end == applied {
            let version = self.applying.read().state.catalog().version();
            self.catalog_version
                .send_if_modified(|seen| std::mem::replace(seen, version) != version);
        }
        let mut waking = self.waking.lock();
        while waking.due.front().is_some_and(|(index, _)| *index <= end.index) {
            let Some((_, touched)) = waking.due.pop_front() else { break };
            for topic in touched {
                let Some(waiters) = waking.waiters.get(&topic) else { continue };
                waiters.notify_waiters();
                if Arc::strong_count(waiters) == 1 {
                    waking.waiters.remove(&topic);
                }
            }
        }
    }

    /// Publishes whenever the log has settled more.
    pub(crate) async fn follow_settled(self: Arc<Self>, stop: CancellationToken) {
        let mut settled = self.settled.clone();
        while let Some(Ok(())) = stop.run_until_cancelled(settled.changed()).await {
            self.publish();
        }
    }

    /// Who waits for a topic; forgotten some time after nobody does any more.
    pub(crate) fn waiters(&self, topic: TopicId) -> Arc<Notify> {
        let mut waking = self.waking.lock();
        if waking.waiters.len() >= waking.waiters_max {
            // Also of topics that are gone and are not told of any more.
            waking.waiters.retain(|_, waiters| Arc::strong_count(waiters) > 1);
            waking.waiters_max = (2 * waking.waiters.len()).max(UNSWEPT_WAITERS_MIN);
        }
        Arc::clone(waking.waiters.entry(topic).or_default())
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::BrokerGroupName;

    use super::*;
    use crate::queue::index::Index;
    use crate::replica::state::State;

    #[test]
    fn waiters_of_topics_that_nobody_tells_of_are_forgotten() {
        let state = State::new(BrokerGroupName::parse("a").unwrap());
        let applying = Applying { state, index: Index::default() };
        let (index, position) = (EntryIndex::ZERO, LogOffset::ZERO);
        let end = DurableEnd { incarnation: 0, index, position };
        let (_log, settled) = watch::channel(end);
        let published = Published::new(applying, AppliedEnd::default(), settled);
        let held: Vec<_> = (0..100).map(|topic| published.waiters(TopicId::new(topic))).collect();
        for topic in 100..10_000 {
            published.waiters(TopicId::new(topic));
        }
        for (topic, waiters) in (0..).zip(&held) {
            assert!(Arc::ptr_eq(waiters, &published.waiters(TopicId::new(topic))));
        }
        assert!(published.waking.lock().waiters.len() <= 200);
    }
}
