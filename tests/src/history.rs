//! What producers and readers were told, and whether it can be true.

use std::collections::{BTreeMap, BTreeSet};

/// A queue of the topic under test.
pub type Queue = u32;
/// What was sent: unique in a run.
pub type Value = String;

/// Everything that was acknowledged and read so far, over all restarts.
#[derive(Clone, Debug, Default)]
pub struct History {
    acknowledged: BTreeMap<(Queue, u64), Value>,
    /// Sends whose outcome is not known; they may be there, any number of times.
    unknown: BTreeSet<Value>,
    read: BTreeMap<(Queue, u64), Value>,
    committed: BTreeMap<Queue, u64>,
}

/// What must never happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Acknowledged at this offset, and not there.
    Lost { queue: Queue, offset: u64, value: Value },
    /// One offset, two values.
    OffsetReused { queue: Queue, offset: u64, values: [Value; 2] },
    /// Acknowledged once, there more than once.
    Duplicate { value: Value, places: Vec<(Queue, u64)> },
    /// Read, but never sent.
    Phantom { queue: Queue, offset: u64, value: Value },
    /// Offsets of a queue are not dense.
    Gap { queue: Queue, offset: u64 },
    /// Read once, and gone later.
    Vanished { queue: Queue, offset: u64, value: Value },
    /// A committed offset went back.
    OffsetWentBack { queue: Queue, from: u64, to: Option<u64> },
}

impl History {
    pub fn acknowledged(&mut self, queue: Queue, offset: u64, value: Value) -> Option<Violation> {
        self.unknown.remove(&value);
        let before = self.acknowledged.insert((queue, offset), value.clone());
        before.map(|first| Violation::OffsetReused { queue, offset, values: [first, value] })
    }

    pub fn unknown(&mut self, value: Value) {
        self.unknown.insert(value);
    }

    pub fn committed(&mut self, queue: Queue, offset: u64) {
        let known = self.committed.entry(queue).or_default();
        *known = (*known).max(offset);
    }

    /// The highest committed offset of each queue.
    pub fn committed_offsets(&self) -> BTreeMap<Queue, u64> {
        self.committed.clone()
    }

    pub fn acknowledged_count(&self) -> usize {
        self.acknowledged.len()
    }

    pub fn merge(&mut self, other: Self) -> Vec<Violation> {
        let mut violations = Vec::new();
        for ((queue, offset), value) in other.acknowledged {
            violations.extend(self.acknowledged(queue, offset, value));
        }
        self.unknown.extend(other.unknown);
        for (queue, offset) in other.committed {
            self.committed(queue, offset);
        }
        violations
    }

    /// Compares a read of every queue, from its oldest to its end, with all that is known.
    pub fn check_read(&mut self, queues: &BTreeMap<Queue, Vec<(u64, Value)>>) -> Vec<Violation> {
        let mut violations = Vec::new();
        let mut places: BTreeMap<&Value, Vec<(Queue, u64)>> = BTreeMap::new();
        let mut now = BTreeMap::new();
        for (&queue, records) in queues {
            let mut expected = 0;
            for (offset, value) in records {
                if *offset != expected {
                    violations.push(Violation::Gap { queue, offset: expected });
                }
                expected = offset + 1;
                places.entry(value).or_default().push((queue, *offset));
                now.insert((queue, *offset), value.clone());
            }
        }
        violations.extend(self.missing(&now));
        let acknowledged: BTreeSet<&Value> = self.acknowledged.values().collect();
        for (value, places) in places {
            let sent_once = acknowledged.contains(value);
            if !sent_once && !self.unknown.contains(value) {
                let (queue, offset) = places[0];
                violations.push(Violation::Phantom { queue, offset, value: value.clone() });
            } else if sent_once && !self.unknown.contains(value) && places.len() > 1 {
                violations.push(Violation::Duplicate { value: value.clone(), places });
            }
        }
        self.read = now;
        violations
    }

    fn missing(&self, now: &BTreeMap<(Queue, u64), Value>) -> Vec<Violation> {
        let mut violations = Vec::new();
        for (&(queue, offset), value) in &self.acknowledged {
            match now.get(&(queue, offset)) {
                None => violations.push(Violation::Lost { queue, offset, value: value.clone() }),
                Some(found) if found != value => violations.push(Violation::OffsetReused {
                    queue,
                    offset,
                    values: [value.clone(), found.clone()],
                }),
                Some(_) => {}
            }
        }
        for (&(queue, offset), value) in &self.read {
            match now.get(&(queue, offset)) {
                None => {
                    violations.push(Violation::Vanished { queue, offset, value: value.clone() });
                }
                Some(found) if found != value => violations.push(Violation::OffsetReused {
                    queue,
                    offset,
                    values: [value.clone(), found.clone()],
                }),
                Some(_) => {}
            }
        }
        violations
    }

    /// Compares committed offsets as read after a restart.
    pub fn check_committed(&self, stored: &BTreeMap<Queue, Option<u64>>) -> Vec<Violation> {
        let went_back = |(&queue, &from): (&Queue, &u64)| {
            let to = stored.get(&queue).copied().flatten();
            (to < Some(from)).then_some(Violation::OffsetWentBack { queue, from, to })
        };
        self.committed.iter().filter_map(went_back).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let mut history = History::default();
        for offset in 0..3 {
            assert_eq!(history.acknowledged(0, offset, format!("v{offset}")), None);
        }
        history.unknown("u".into());
        history
    }

    fn read(values: &[&str]) -> BTreeMap<Queue, Vec<(u64, Value)>> {
        let records = (0..).zip(values).map(|(offset, value)| (offset, (*value).to_owned()));
        BTreeMap::from([(0, records.collect())])
    }

    #[test]
    fn a_true_history_passes() {
        assert_eq!(history().check_read(&read(&["v0", "v1", "v2"])), []);
        assert_eq!(history().check_read(&read(&["v0", "v1", "v2", "u", "u"])), []);
    }

    #[test]
    fn each_violation_is_found() {
        let found = |values: &[&str]| history().check_read(&read(values));
        assert!(matches!(found(&["v0", "v1"])[..], [Violation::Lost { offset: 2, .. }]));
        assert!(matches!(found(&["v0", "v1", "v2", "v1"])[..], [Violation::Duplicate { .. }]));
        assert!(matches!(found(&["v0", "v1", "v2", "x"])[..], [Violation::Phantom { .. }]));
        let swapped = found(&["v1", "v0", "v2"]);
        assert!(swapped.iter().all(|v| matches!(v, Violation::OffsetReused { .. })));
        assert_eq!(swapped.len(), 2);
        let gap = BTreeMap::from([(
            0,
            vec![(0, "v0".into()), (1, "v1".into()), (2, "v2".into()), (4, "u".into())],
        )]);
        assert_eq!(history().check_read(&gap), [Violation::Gap { queue: 0, offset: 3 }]);
    }

    #[test]
    fn what_was_read_once_must_stay() {
        let mut history = history();
        assert_eq!(history.check_read(&read(&["v0", "v1", "v2", "u"])), []);
        assert!(matches!(
            history.check_read(&read(&["v0", "v1", "v2"]))[..],
            [Violation::Vanished { offset: 3, .. }]
        ));
    }

    #[test]
    fn one_offset_is_acknowledged_once() {
        assert!(matches!(
            history().acknowledged(0, 1, "other".into()),
            Some(Violation::OffsetReused { offset: 1, .. })
        ));
    }

    #[test]
    fn committed_offsets_may_not_go_back() {
        let mut history = history();
        history.committed(0, 7);
        assert_eq!(history.check_committed(&BTreeMap::from([(0, Some(7))])), []);
        let back = history.check_committed(&BTreeMap::from([(0, Some(6))]));
        assert_eq!(back, [Violation::OffsetWentBack { queue: 0, from: 7, to: Some(6) }]);
        let gone = history.check_committed(&BTreeMap::from([(0, None)]));
        assert_eq!(gone, [Violation::OffsetWentBack { queue: 0, from: 7, to: None }]);
    }
}
