//! The order of one `Produce` stream: what of it may be stored after a failure. Pure.

use std::collections::{HashMap, HashSet};

use drumlin_proto::ids::{DERIVED_TOPIC_CHARS_MAX, QueueKey};

use crate::replica::Chain;

/// Queues that one stream may have failed in, without going on in them.
const BROKEN_MAX: usize = 65_536;

/// The chains of a stream's queues. Those that neither failed nor wait are as good as new ones and
/// are forgotten, so that a stream may use any number of queues.
#[derive(Debug)]
pub(super) struct Chains {
    of: HashMap<QueueKey, Chain>,
    /// Failed before it was known which queue they are, by the topic and queue that were named: a
    /// topic that is created in between must not let the later ones pass.
    unplaced: HashSet<(String, i32)>,
    chains_max: usize,
}

impl Chains {
    pub(super) fn new() -> Self {
        Self { of: HashMap::new(), unplaced: HashSet::new(), chains_max: BROKEN_MAX }
    }

    /// Whether one more queue can fail; without room its failure could not be remembered.
    pub(super) fn make_room(&mut self) -> bool {
        if self.of.len() + self.unplaced.len() >= self.chains_max {
            self.of.retain(|_, chain| !chain.is_idle());
        }
        self.of.len() + self.unplaced.len() < self.chains_max
    }

    /// Whether a run that names this place follows one that found no queue there.
    pub(super) fn follows_unplaced(&mut self, topic: &str, queue_id: i32, resume: bool) -> bool {
        if self.unplaced.is_empty() {
            return false;
        }
        let named = (topic.to_owned(), queue_id);
        match resume {
            true => {
                self.unplaced.remove(&named);
                false
            }
            false => self.unplaced.contains(&named),
        }
    }

    /// Remembers that a run found no queue at the place that it named.
    pub(super) fn refuse_unplaced(&mut self, topic: &str, queue_id: i32) {
        // No topic will ever have a longer name.
        if topic.len() <= DERIVED_TOPIC_CHARS_MAX {
            self.unplaced.insert((topic.to_owned(), queue_id));
        }
    }

    /// The chain that the next run of a queue belongs to: a new one where it resumes.
    pub(super) fn chain(&mut self, queue: QueueKey, resume: bool) -> &Chain {
        if resume {
            self.of.remove(&queue);
        }
        self.of.entry(queue).or_default()
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::{QueueId, TopicId};

    use super::*;

    fn queue(topic: u32) -> QueueKey {
        QueueKey { topic: TopicId::new(topic), queue: QueueId::new(0) }
    }

    #[test]
    fn what_follows_an_unplaced_run_waits_for_a_resumed_one() {
        let mut chains = Chains::new();
        assert!(!chains.follows_unplaced("t", 0, false));
        chains.refuse_unplaced("t", 0);
        assert!(chains.follows_unplaced("t", 0, false));
        assert!(!chains.follows_unplaced("t", 1, false));
        assert!(!chains.follows_unplaced("t", 0, true));
        assert!(!chains.follows_unplaced("t", 0, false));
    }

    #[test]
    fn any_number_of_queues_may_be_used_but_not_failed_in() {
        let mut chains = Chains { chains_max: 4, ..Chains::new() };
        for topic in 0..100 {
            assert!(chains.make_room(), "at topic {topic}");
            chains.chain(queue(topic), false);
        }
        for topic in 100..104 {
            assert!(chains.make_room(), "at topic {topic}");
            chains.chain(queue(topic), false).break_here();
        }
        assert!(!chains.make_room());
        chains.chain(queue(100), true);
        assert!(chains.make_room(), "one goes on");
    }
}
