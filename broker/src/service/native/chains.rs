//! The order of one `Produce` stream: what of it may be stored after a failure. Pure.

use std::collections::HashMap;

use drumlin_proto::ids::QueueKey;

use crate::replica::Chain;

/// Queues that one stream may have failed in, without going on in them.
const BROKEN_MAX: usize = 65_536;

/// The chains of a stream's queues. Those that neither failed nor wait are as good as new ones and
/// are forgotten, so that a stream may use any number of queues.
#[derive(Debug)]
pub(super) struct Chains {
    of: HashMap<QueueKey, Chain>,
    chains_max: usize,
}

impl Chains {
    pub(super) fn new() -> Self {
        Self { of: HashMap::new(), chains_max: BROKEN_MAX }
    }

    /// Whether one more queue can fail; without room its failure could not be remembered.
    pub(super) fn make_room(&mut self) -> bool {
        if self.of.len() >= self.chains_max {
            self.of.retain(|_, chain| !chain.is_idle());
        }
        self.of.len() < self.chains_max
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
