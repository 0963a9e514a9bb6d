use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::record::{RecordFields, Run, RunBuilder};
use proptest::prelude::*;

use super::*;
use crate::command::level::FEATURE_LEVEL_MAX;
use crate::command::{
    CatalogChange, CatalogDelta, ClientKey, Command, Deleted, Granted, Lease, LeaseId,
    LeaseRefusal, Outcome, Shares, TopicType,
};
use crate::entry::FRAME_HEADER_BYTES;
use crate::group::leases::IN_FLIGHT_MAX;
use crate::item::PayloadBuilder;
use crate::position::Term;
use crate::queue::index::Line;

const LIMITS: Limits = Limits { topics_max: 5, groups_max: 5 };
const CLIENT: ClientKey = ClientKey(77);

fn here() -> BrokerGroupName {
    BrokerGroupName::parse("broker-a").unwrap()
}

fn offset(raw: u64) -> QueueOffset {
    QueueOffset::new(raw)
}

fn queue(topic: TopicId, queue: u16) -> QueueKey {
    QueueKey { topic, queue: QueueId::new(queue) }
}

fn run(record_count: u64) -> Run {
    let mut builder = RunBuilder::new();
    for _ in 0..record_count {
        builder.push(&RecordFields { message_id: "m", body: b"body", ..RecordFields::default() });
    }
    Run::parse(builder.finish()).unwrap()
}

fn create_topic(name: &str, queue_count: u16) -> Command {
    Command::CreateTopic {
        name: TopicName::parse(name).unwrap(),
        kind: TopicType::Mixed,
        shares: vec![(here(), queue_count), (BrokerGroupName::parse("broker-b").unwrap(), 9)],
    }
}

fn create_group(name: &str, start: GroupStart) -> Command {
    Command::CreateGroup { name: GroupName::parse(name).unwrap(), start }
}

/// Items of one entry to be.
enum Part {
    Run(QueueKey, u64),
    /// Void unless the item of the ordinal was applied.
    Guarded(QueueKey, u64, u16),
    Command(Command),
}

/// A log in memory with the state that follows from it.
struct Node {
    state: State,
    index: Index,
    log: Vec<(Entry, LogOffset)>,
}

impl Node {
    fn new() -> Self {
        Self { state: State::new(here()), index: Index::default(), log: Vec::new() }
    }

    /// One with a topic of two queues and a group that starts at the earliest record.
    fn with_topic_and_group() -> (Self, TopicId, GroupId) {
        let mut node = Self::new();
        let topic = node.topic("t", 2);
        let group = node.group("g", GroupStart::Earliest);
        (node, topic, group)
    }

    fn topic(&mut self, name: &str, queue_count: u16) -> TopicId {
        match self.command(create_topic(name, queue_count)) {
            Ok(Outcome::TopicCreated { topic }) => topic,
            other => panic!("{other:?}"),
        }
    }

    fn group(&mut self, name: &str, start: GroupStart) -> GroupId {
        match self.command(create_group(name, start)) {
            Ok(Outcome::GroupCreated { group }) => group,
            other => panic!("{other:?}"),
        }
    }

    /// The next entry, not applied.
    fn entry(&self, kind: EntryKind, clock_ms: u64, parts: Vec<Part>) -> Entry {
        let mut builder = PayloadBuilder::new();
        for part in parts {
            match part {
                Part::Run(queue, record_count) => builder.push_run(queue, &run(record_count), 0),
                Part::Guarded(queue, record_count, ordinal) => {
                    builder.push_run(queue, &run(record_count), ordinal + 1);
                }
                Part::Command(command) => builder.push_command(&command),
            }
        }
        let (payload, payload_crc, item_count) = builder.finish();
        let index = self.state.applied().map_or(EntryIndex::ZERO, |id| id.index.next());
        let id = EntryId { term: Term::new(1), index };
        Entry { id, kind, clock_ms, item_count, payload_crc, payload }
    }

    fn apply(&mut self, entry: Entry) -> Effects {
        let at = self.state.end();
        let effects = self.state.apply(&entry, at, &mut self.index, &LIMITS).unwrap();
        self.log.push((entry, at));
        effects
    }

    fn batch_at(&mut self, clock_ms: u64, parts: Vec<Part>) -> Effects {
        self.apply(self.entry(EntryKind::Batch, clock_ms, parts))
    }

    fn batch(&mut self, parts: Vec<Part>) -> Vec<Result<Applied, Refusal>> {
        self.batch_at(self.state.clock_ms(), parts).outcomes
    }

    fn command_at(&mut self, clock_ms: u64, command: Command) -> Result<Outcome, Refusal> {
        let mut outcomes = self.batch_at(clock_ms, vec![Part::Command(command)]).outcomes;
        assert_eq!(outcomes.len(), 1);
        match outcomes.remove(0)? {
            Applied::Command(outcome) => Ok(outcome),
            run @ Applied::Run { .. } => panic!("{run:?}"),
        }
    }

    fn command(&mut self, command: Command) -> Result<Outcome, Refusal> {
        self.command_at(self.state.clock_ms(), command)
    }

    /// Stores records and returns the offset of the first.
    fn produce(&mut self, queue: QueueKey, record_count: u64) -> u64 {
        match self.batch(vec![Part::Run(queue, record_count)]).as_slice() {
            [Ok(Applied::Run { base_offset, .. })] => base_offset.get(),
            other => panic!("{other:?}"),
        }
    }

    /// Trims everything before the entry of the log at `ordinal`.
    fn trim_to(&mut self, ordinal: usize) -> Effects {
        let (entry, position) = &self.log[ordinal];
        let trim = Command::Trim { below: entry.id.index, position: *position };
        self.batch_at(self.state.clock_ms(), vec![Part::Command(trim)])
    }

    fn range(&self, queue: QueueKey) -> (u64, u64) {
        let range = self.state.queue_range(queue).unwrap();
        (range.min.get(), range.end.get())
    }

    fn delivery_offset(&self, group: GroupId, queue: QueueKey) -> u64 {
        self.state.delivery_offset(group, queue, &self.index).unwrap().unwrap().get()
    }

    fn digest(&self) -> String {
        self.state.digest().unwrap()
    }
}

fn poll(group: GroupId, queue: QueueKey, from: u64, fresh: &[u64], again: &[u64]) -> Command {
    let offsets = |raw: &[u64]| raw.iter().copied().map(offset).collect();
    Command::Lease(Lease {
        group,
        queue,
        client: CLIENT,
        auto_renew: false,
        invisible_ms: 1_000,
        from: offset(from),
        skip_to: offset(fresh.last().map_or(from, |last| last + 1)),
        fresh: offsets(fresh),
        again: offsets(again),
        unwanted: vec![],
    })
}

#[test]
fn offsets_are_given_in_log_order_and_indexed_where_the_run_lies() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let (first, second) = (queue(topic, 0), queue(topic, 1));
    let at = node.state.end();
    let parts = vec![Part::Run(first, 2), Part::Run(second, 1), Part::Run(first, 3)];
    let effects = node.batch_at(500, parts);
    let run =
        |base| Ok(Applied::Run { base_offset: offset(base), store_time_ms: 500, degraded: false });
    assert_eq!(effects.outcomes, [run(0), run(0), run(2)]);
    assert_eq!(effects.touched, BTreeSet::from([topic]));
    assert_eq!((node.range(first), node.range(second)), ((0, 5), (0, 1)));

    let (entry, _) = node.log.last().unwrap().clone();
    let lines = node.index.lines_from(first, offset(0), 9).unwrap();
    assert_eq!(
        lines.iter().map(|line| (line.base_offset.get(), line.count)).collect::<Vec<_>>(),
        [(0, 2), (2, 3)]
    );
    for line in lines {
        assert_eq!(line.newest_ms, 500);
        let in_payload = line.position.bytes_since(at).unwrap() - FRAME_HEADER_BYTES as u64;
        let start = usize::try_from(in_payload).unwrap();
        let end = start + usize::try_from(line.bytes).unwrap();
        let stored = Run::from_log(entry.payload.slice(start..end)).unwrap();
        stored.verify().unwrap();
        assert_eq!((stored.queue_key(), stored.record_count()), (first, line.count));
    }
    assert_eq!(node.state.end(), at.advance(entry.frame_bytes()));
}

#[test]
fn ack_that_makes_room_for_new_deliveries_touches_the_topic() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let to = queue(topic, 0);
    let count = u64::try_from(IN_FLIGHT_MAX).unwrap();
    node.produce(to, count);
    let all: Vec<u64> = (0..count).collect();
    let Ok(Outcome::Leased { lease, .. }) = node.command(poll(group, to, 0, &all, &[])) else {
        panic!("not leased")
    };
    let mut ack = |at: u64| {
        let records = vec![(offset(at), lease)];
        let clock_ms = node.state.clock_ms();
        let ack = Part::Command(Command::Ack { group, queue: to, records });
        node.batch_at(clock_ms, vec![ack]).touched
    };
    assert_eq!(ack(7), BTreeSet::from([topic]));
    assert_eq!(ack(8), BTreeSet::new());
}

#[test]
fn the_store_clock_never_goes_back() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    for (clock_ms, stored_ms) in [(1_000, 1_000), (400, 1_000), (1_001, 1_001)] {
        let effects = node.batch_at(clock_ms, vec![Part::Run(queue(topic, 0), 1)]);
        let Ok(Applied::Run { store_time_ms, .. }) = &effects.outcomes[0] else { panic!() };
        assert_eq!(*store_time_ms, stored_ms);
    }
    let blank = node.entry(EntryKind::Blank, 0, vec![]);
    node.apply(blank);
    assert_eq!(node.state.clock_ms(), 1_001);
}

#[test]
fn runs_to_what_is_gone_take_no_offset() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let outcomes = node.batch(vec![
        Part::Run(queue(TopicId::new(99), 0), 1),
        Part::Run(queue(topic, 2), 1),
        Part::Run(queue(topic, 0), 1),
        Part::Command(Command::DeleteTopic { topic }),
        Part::Run(queue(topic, 0), 1),
    ]);
    assert_eq!(outcomes[0], Err(Refusal::TopicNotFound));
    assert_eq!(outcomes[1], Err(Refusal::QueueNotFound));
    assert_eq!(
        outcomes[2],
        Ok(Applied::Run { base_offset: offset(0), store_time_ms: 0, degraded: false })
    );
    assert_eq!(outcomes[3], Ok(Applied::Command(Outcome::Done)));
    assert_eq!(outcomes[4], Err(Refusal::TopicNotFound));
    assert_eq!(node.index.lines_from(queue(topic, 0), offset(0), 9).unwrap(), []);
}

#[test]
fn a_guarded_run_shares_the_fate_of_its_command() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let to = queue(topic, 0);
    let outcomes = node.batch(vec![
        Part::Command(create_group("g2", GroupStart::Earliest)),
        Part::Guarded(to, 1, 0),
        Part::Command(Command::DeleteGroup { group: GroupId(50) }),
        Part::Guarded(to, 5, 2),
        Part::Run(to, 1),
    ]);
    assert!(
        matches!(outcomes[1], Ok(Applied::Run { base_offset, .. }) if base_offset == offset(0))
    );
    assert_eq!(outcomes[3], Err(Refusal::GroupNotFound));
    assert!(
        matches!(outcomes[4], Ok(Applied::Run { base_offset, .. }) if base_offset == offset(1))
    );
}

#[test]
fn an_index_made_again_passes_over_refused_runs() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let to = queue(topic, 0);
    let refused = || Part::Command(Command::DeleteGroup { group: GroupId(50) });
    let not_yet = queue(TopicId::new(topic.get() + 1), 0);
    for _ in 0..2 {
        node.batch(vec![refused(), Part::Guarded(to, 5, 0), Part::Run(to, 2)]);
        node.batch(vec![Part::Run(not_yet, 1), Part::Run(to, 1)]);
    }
    let trim_at = node.log.len() - 2;
    assert_eq!(node.state.void_runs.len(), 4);
    node.topic("t2", 1);
    node.produce(not_yet, 3);
    assert_eq!(node.lines(&node.reindexed()), node.lines(&node.index));
    node.trim_to(trim_at);
    assert_eq!(node.state.void_runs.len(), 2);
    assert_eq!(node.range(to), (3, 6));
    assert_eq!(node.lines(&node.reindexed()), node.lines(&node.index));
}

#[test]
fn a_guard_that_names_no_command_before_it_stops_apply() {
    let (node, topic, _) = Node::with_topic_and_group();
    let to = queue(topic, 0);
    for (parts, ordinal) in [
        (vec![Part::Guarded(to, 1, 0)], 0),
        (vec![Part::Run(to, 1), Part::Guarded(to, 1, 0)], 1),
        (vec![Part::Guarded(to, 1, 1), Part::Command(create_topic("x", 1))], 0),
    ] {
        let (mut state, entry) = (node.state.clone(), node.entry(EntryKind::Batch, 0, parts));
        let mut index = Index::default();
        let error = state.apply(&entry, state.end(), &mut index, &LIMITS).unwrap_err();
        assert!(matches!(error, ApplyError::Guard { ordinal: found, .. } if found == ordinal));
    }
}

#[test]
fn an_unknown_command_stops_apply_before_anything_of_its_entry() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let parts = vec![Part::Run(queue(topic, 0), 1), Part::Command(create_topic("x", 1))];
    let mut entry = node.entry(EntryKind::Batch, 0, parts);
    let command = crate::item::items(&entry.payload).nth(1).unwrap().unwrap();
    let kind_at = usize::try_from(command.at_bytes).unwrap() + 8;
    let mut payload = entry.payload.to_vec();
    payload[kind_at] = 0xee;
    entry.payload = payload.into();
    let before = node.state.clone();
    let at = node.state.end();
    let error = node.state.apply(&entry, at, &mut node.index, &LIMITS).unwrap_err();
    let ApplyError::Command { ordinal: 1, source, .. } = error else { panic!("{error:?}") };
    assert!(matches!(source, CommandError::Unknown { kind: 0xee, version: 1 }));
    assert_eq!(node.state, before);
}

#[test]
fn an_entry_with_another_number_of_items_stops_apply() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let mut entry = node.entry(EntryKind::Batch, 0, vec![Part::Run(queue(topic, 0), 1)]);
    entry.item_count = 2;
    let at = node.state.end();
    let error = node.state.apply(&entry, at, &mut node.index, &LIMITS).unwrap_err();
    let ApplyError::Item { source, .. } = error else { panic!("{error:?}") };
    assert!(matches!(source, ItemError::Count { found: 1, declared: 2 }));
}

#[test]
#[should_panic(expected = "applied in place of")]
fn an_entry_is_applied_once() {
    let (mut node, ..) = Node::with_topic_and_group();
    let (entry, _) = node.log.last().unwrap().clone();
    let at = node.state.end();
    node.state.apply(&entry, at, &mut node.index, &LIMITS).unwrap();
}

#[test]
fn a_topic_created_again_begins_at_zero_and_knows_no_old_leases() {
    let (mut node, old, group) = Node::with_topic_and_group();
    node.produce(queue(old, 0), 3);
    node.command(poll(group, queue(old, 0), 0, &[0, 1], &[])).unwrap();
    let effects = node.batch_at(0, vec![Part::Command(Command::DeleteTopic { topic: old })]);
    assert_eq!(effects.touched, BTreeSet::from([old]), "polls learn that it is gone");
    let new = node.topic("t", 2);
    assert_ne!(new, old);
    assert_eq!(node.produce(queue(new, 0), 1), 0);
    assert!(node.state.leases(group, queue(old, 0)).is_none());
    assert_eq!(node.delivery_offset(group, queue(new, 0)), 0);
    let records = vec![(offset(0), LeaseId(3))];
    let ack = Command::Ack { group, queue: queue(old, 0), records };
    assert_eq!(node.command(ack), Err(Refusal::TopicNotFound));
}

#[test]
fn a_topic_without_a_share_here_has_no_queue_here() {
    let mut node = Node::new();
    let create = Command::CreateTopic {
        name: TopicName::parse("elsewhere").unwrap(),
        kind: TopicType::Normal,
        shares: vec![(BrokerGroupName::parse("broker-b").unwrap(), 4)],
    };
    let Ok(Outcome::TopicCreated { topic }) = node.command(create) else { panic!() };
    let outcomes = node.batch(vec![Part::Run(queue(topic, 0), 1)]);
    assert_eq!(outcomes, [Err(Refusal::QueueNotFound)]);
}

#[test]
fn a_group_starts_where_its_definition_says() {
    let (mut node, topic, earliest) = Node::with_topic_and_group();
    let (busy, idle) = (queue(topic, 0), queue(topic, 1));
    node.produce(busy, 3);
    let latest = node.group("late", GroupStart::Latest);
    assert_eq!((node.delivery_offset(earliest, busy), node.delivery_offset(latest, busy)), (0, 3));
    node.produce(busy, 2);
    node.produce(idle, 1);
    assert_eq!(node.delivery_offset(latest, busy), 3, "what comes later is not passed over");
    assert_eq!(node.delivery_offset(latest, idle), 0);
    assert!(node.command(poll(latest, busy, 0, &[0], &[])).is_err());
    assert!(node.state.leases(latest, busy).is_none(), "a refused plan leaves no trace");
    node.command(poll(latest, busy, 3, &[3], &[])).unwrap();
    assert_eq!(node.state.leases(latest, busy).unwrap().committed(), offset(3));
}

#[test]
fn records_in_the_entry_of_a_late_group_count_by_their_order() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    let outcomes = node.batch(vec![
        Part::Run(queue(topic, 0), 2),
        Part::Command(create_group("late", GroupStart::Latest)),
        Part::Run(queue(topic, 0), 1),
    ]);
    let Ok(Applied::Command(Outcome::GroupCreated { group })) = outcomes[1] else { panic!() };
    assert_eq!(node.delivery_offset(group, queue(topic, 0)), 2);
}

#[test]
fn leases_end_by_the_clock_of_the_entries() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let from = queue(topic, 0);
    node.produce(from, 2);
    let year_ms = 365 * 24 * 3_600_000;
    let first = node.command_at(year_ms, poll(group, from, 0, &[0, 1], &[]));
    let grant = |offset_raw, attempt| Granted { offset: offset(offset_raw), attempt };
    let Ok(Outcome::Leased { lease, granted }) = first else { panic!("{first:?}") };
    assert_eq!(granted, [grant(0, 1), grant(1, 1)]);
    // The leader's clock is an hour behind: time stands still, no lease ends or is frozen later.
    let early = node.command_at(year_ms - 3_600_000, poll(group, from, 2, &[], &[0]));
    assert!(matches!(early, Ok(Outcome::Leased { granted, .. }) if granted.is_empty()));
    let ack = |record, lease| Command::Ack { group, queue: from, records: vec![(record, lease)] };
    assert_eq!(node.command_at(0, ack(offset(0), lease)), Ok(Outcome::Acked(vec![Ok(())])));
    // A year forward: what is left is due at once, and the old handle is of no use.
    let late = node.command_at(2 * year_ms, poll(group, from, 2, &[], &[0, 1]));
    let Ok(Outcome::Leased { lease: second, granted }) = late else { panic!("{late:?}") };
    assert_eq!(granted, [grant(1, 2)]);
    let gone = Ok(Outcome::Acked(vec![Err(LeaseRefusal::Gone)]));
    assert_eq!(node.command(ack(offset(1), lease)), gone);
    assert_eq!(node.command(ack(offset(1), second)), Ok(Outcome::Acked(vec![Ok(())])));
    assert_eq!(node.state.leases(group, from).unwrap().committed(), offset(2));
}

#[test]
fn commands_on_leases_need_group_queue_and_lease() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let from = queue(topic, 0);
    let change = |group, queue| Command::ChangeLease {
        group,
        queue,
        offset: offset(0),
        lease: LeaseId(1),
        invisible_ms: 0,
    };
    assert_eq!(node.command(change(GroupId(9), from)), Err(Refusal::GroupNotFound));
    assert_eq!(node.command(change(group, queue(topic, 9))), Err(Refusal::QueueNotFound));
    assert_eq!(node.command(change(group, from)), Err(LeaseRefusal::Gone.into()));
    let release = Command::ReleaseClient { group: GroupId(9), client: CLIENT, invisible_ms: 1_000 };
    assert_eq!(node.command(release), Err(Refusal::GroupNotFound));
    let renew = Command::RenewLeases { group, queue: from, records: vec![], invisible_ms: 1_000 };
    assert_eq!(node.command(renew), Ok(Outcome::Done));
}

#[test]
fn a_nack_makes_the_record_due_and_wakes_the_topic() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let from = queue(topic, 0);
    node.produce(from, 1);
    let Ok(Outcome::Leased { lease, .. }) = node.command(poll(group, from, 0, &[0], &[])) else {
        panic!()
    };
    let nack =
        Command::ChangeLease { group, queue: from, offset: offset(0), lease, invisible_ms: 0 };
    let effects = node.batch_at(0, vec![Part::Command(nack)]);
    assert_eq!(effects.touched, BTreeSet::from([topic]));
    let again = node.command(poll(group, from, 1, &[], &[0]));
    let Ok(Outcome::Leased { granted, .. }) = again else { panic!("{again:?}") };
    assert_eq!(granted, [Granted { offset: offset(0), attempt: 2 }]);
}

#[test]
fn commits_are_held_to_the_queue() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let from = queue(topic, 0);
    let entry = node.log.len();
    node.produce(from, 2);
    node.produce(from, 2);
    node.trim_to(entry + 1);
    let commit = |raw| Command::CommitOffset { group, queue: from, offset: offset(raw) };
    for outside in [1, 5] {
        let (min, end) = (offset(2), offset(4));
        let refusal = Refusal::OffsetOutOfRange { asked: offset(outside), min, end };
        assert_eq!(node.command(commit(outside)), Err(refusal));
    }
    for inside in [4, 2] {
        assert_eq!(node.command(commit(inside)), Ok(Outcome::Done));
        assert_eq!(node.state.leases(group, from).unwrap().committed(), offset(inside));
    }
}

#[test]
fn a_trim_moves_minimums_and_ends_what_was_in_flight() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    let (first, second) = (queue(topic, 0), queue(topic, 1));
    node.produce(first, 3);
    let kept = node.log.len();
    node.produce(second, 1);
    node.produce(first, 2);
    node.command(poll(group, first, 0, &[0, 1, 2, 3], &[])).unwrap();
    let effects = node.trim_to(kept);
    let (entry, position) = &node.log[kept];
    let point = TrimPoint { below: entry.id.index, position: *position };
    assert_eq!((effects.trim, effects.expired_count), (Some(point), 3));
    assert_eq!(node.state.trimmed(), point);
    assert_eq!((node.range(first), node.range(second)), ((3, 5), (0, 1)));
    assert_eq!(node.state.leases(group, first).unwrap().committed(), offset(3));
    assert_eq!(node.index.locate(first, offset(2)).unwrap(), None);

    let again = node.trim_to(kept);
    assert_eq!((again.trim, again.expired_count), (None, 0), "the same trim changes nothing");
    let all = node.log.len() - 1;
    node.trim_to(all);
    assert_eq!((node.range(first), node.range(second)), ((5, 5), (1, 1)));
    assert_eq!(node.produce(first, 1), 5, "offsets go on behind what was trimmed");
}

#[test]
fn a_trim_beyond_its_own_entry_is_refused() {
    let (mut node, ..) = Node::with_topic_and_group();
    let refused = Err(Refusal::Malformed { field: "trim point" });
    let (next, end) = (EntryIndex::new(99), node.state.end());
    assert_eq!(node.command(Command::Trim { below: next, position: end }), refused);
    let own = node.state.applied().unwrap().index.next();
    let beyond = node.state.end().advance(1);
    assert_eq!(node.command(Command::Trim { below: own, position: beyond }), refused);
}

#[test]
fn gate_entries_set_the_mode() {
    let mut node = Node::new();
    assert_eq!(node.state.gate(), GateMode::Paired);
    for (kind, gate) in [(EntryKind::Alone, GateMode::Alone), (EntryKind::Paired, GateMode::Paired)]
    {
        node.apply(node.entry(kind, 0, vec![]));
        assert_eq!(node.state.gate(), gate);
        assert_eq!(State::decode(&node.state.encode().unwrap()).unwrap().gate(), gate);
    }
}

#[test]
fn a_clone_keeps_what_it_saw() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    node.produce(queue(topic, 0), 2);
    let (seen, digest) = (node.state.clone(), node.digest());
    node.produce(queue(topic, 0), 2);
    node.command(poll(group, queue(topic, 0), 0, &[0], &[])).unwrap();
    node.command(Command::DeleteGroup { group }).unwrap();
    assert_eq!(seen.digest().unwrap(), digest);
    assert_ne!(node.digest(), digest);
}

#[test]
fn a_damaged_archive_is_refused_or_another_state_but_never_a_panic() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    node.produce(queue(topic, 0), 5);
    node.command(poll(group, queue(topic, 0), 0, &[0, 2, 3], &[])).unwrap();
    let bytes = node.state.encode().unwrap();
    assert_eq!(State::decode(&bytes).unwrap(), node.state);
    for end in 0..bytes.len() {
        assert!(
            matches!(State::decode(&bytes[..end]), Err(StateError::Short { .. })),
            "cut at {end}"
        );
    }
    let mut changed = bytes.clone();
    for bit in 0..bytes.len() * 8 {
        changed[bit / 8] ^= 1 << (bit % 8);
        if let Ok(state) = State::decode(&changed) {
            state.encode().unwrap();
        }
        changed[bit / 8] ^= 1 << (bit % 8);
    }
    changed[2] = 9;
    let unknown = State::decode(&changed).unwrap_err();
    assert!(matches!(unknown, StateError::Unknown { kind: 0x0100, version: 9 }));
}

#[test]
fn the_state_archive_keeps_its_bytes() {
    let (mut node, topic, group) = Node::with_topic_and_group();
    node.group("late", GroupStart::Latest);
    let (first, second) = (queue(topic, 0), queue(topic, 1));
    node.produce(first, 2);
    let void = vec![
        Part::Command(Command::DeleteGroup { group: GroupId(9) }),
        Part::Guarded(second, 1, 0),
    ];
    let kept = node.log.len();
    node.batch(void);
    node.batch_at(1_000, vec![Part::Run(second, 6)]);
    node.command(poll(group, second, 0, &[0, 1, 3, 5], &[])).unwrap();
    let lease = LeaseId(node.state.applied().unwrap().index.get());
    let records = vec![(offset(3), lease)];
    node.command(Command::Ack { group, queue: second, records }).unwrap();
    let (group, queue) = (group, second);
    let nack = Command::ChangeLease { group, queue, offset: offset(1), lease, invisible_ms: 0 };
    node.command(nack).unwrap();
    node.trim_to(kept);
    node.apply(node.entry(EntryKind::Alone, 0, vec![]));
    let bytes = node.state.encode().unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden = include_str!("golden_v1.txt").trim_end();
    assert_eq!(hex, golden, "published bytes may not change: add a version instead");
    assert_eq!(State::decode(&bytes).unwrap(), node.state);
}

fn raise(level: u32) -> Command {
    Command::RaiseFeatureLevel { level, release: "0.9".into() }
}

fn shares(groups: &[(&str, u16)]) -> Shares {
    groups.iter().map(|(name, count)| (BrokerGroupName::parse(name).unwrap(), *count)).collect()
}

fn define_topic(name: &str, groups: &[(&str, u16)]) -> Command {
    Command::Catalog(CatalogChange::CreateTopic {
        name: TopicName::parse(name).unwrap(),
        kind: TopicType::Mixed,
        shares: shares(groups),
        min_copies: 2,
        topics_max: 3,
    })
}

#[test]
fn a_topic_of_several_groups_takes_runs_at_apply_before_it_can_be_found() {
    let mut node = Node::new();
    node.command(raise(2)).unwrap();
    let created = node.command(define_topic("t", &[("broker-a", 1), ("broker-b", 1)])).unwrap();
    let Outcome::TopicCreated { topic } = created else { panic!("{created:?}") };
    let name = TopicName::parse("t").unwrap();
    assert!(node.state.catalog().topic_by_name(&name).is_none());
    assert_eq!(node.state.min_copies(topic), 2);
    assert_eq!(node.range(queue(topic, 0)), (0, 0), "its queues are ready");
    let activate = CatalogChange::ActivateTopic { topic, version: 1 };
    node.command(Command::Catalog(activate)).unwrap();
    assert!(node.state.catalog().topic_by_name(&name).is_some());
    node.produce(queue(topic, 0), 3);
    let (version, min_copies) = (2, 1);
    let grown = shares(&[("broker-a", 2), ("broker-b", 1)]);
    let update = CatalogChange::UpdateTopic { topic, version, shares: grown, min_copies };
    node.command(Command::Catalog(update)).unwrap();
    assert_eq!(node.range(queue(topic, 0)), (0, 3));
    assert_eq!(node.range(queue(topic, 1)), (0, 0));
    let withdraw = CatalogChange::WithdrawTopic { topic, version: 3 };
    node.command(Command::Catalog(withdraw)).unwrap();
    let again = State::decode(&node.state.encode().unwrap()).unwrap();
    assert_eq!(again, node.state);
}

#[test]
fn limits_of_the_command_count_not_those_of_the_replica() {
    let mut node = Node::new();
    node.command(raise(2)).unwrap();
    for name in ["t1", "t2", "t3"] {
        node.command(define_topic(name, &[("broker-a", 1)])).unwrap();
    }
    let full = node.command(define_topic("t4", &[("broker-a", 1)]));
    assert_eq!(full, Err(Refusal::TooManyTopics { topics_max: 3 }));
}

#[test]
fn a_feature_level_that_this_release_does_not_know_stops_apply() {
    let mut node = Node::new();
    node.command(raise(2)).unwrap();
    node.command(raise(1)).unwrap();
    assert_eq!(node.state.feature_level(), 2, "it never falls");
    let level = FEATURE_LEVEL_MAX + 1;
    let entry = node.entry(EntryKind::Batch, 0, vec![Part::Command(raise(level))]);
    let at = node.state.end();
    let stopped = node.state.apply(&entry, at, &mut node.index, &LIMITS).unwrap_err();
    let text = stopped.to_string();
    assert!(text.contains("release 0.9"), "{text}");
}

#[test]
fn a_copy_takes_over_definitions_and_what_goes_with_them() {
    let mut owner = Node::new();
    owner.command(raise(2)).unwrap();
    owner.topic("t", 2);
    owner.group("g", GroupStart::Earliest);
    let mut node = Node::new();
    node.state = State::new(BrokerGroupName::parse("broker-b").unwrap());
    node.command(raise(2)).unwrap();
    let copy = |delta| Command::Catalog(CatalogChange::Copy(delta));
    let delta = owner.state.catalog().delta(0, 100);
    node.command(copy(delta.clone())).unwrap();
    assert_eq!(node.state.catalog().defined(), owner.state.catalog().defined());
    let topic = delta.topics[0].id;
    assert_eq!(node.produce(queue(topic, 8), 1), 0, "it has nine queues here");
    let refused = node.command(copy(delta));
    assert_eq!(refused, Err(Refusal::CopyElsewhere { version: 2 }));
    let deleted = vec![Deleted::Topic(topic), Deleted::Group(GroupId(1))];
    let delta = CatalogDelta { from: 2, to: 4, deleted, ..CatalogDelta::default() };
    node.command(copy(delta)).unwrap();
    assert_eq!(node.state.queue_ranges().count(), 0);
    let again = State::decode(&node.state.encode().unwrap()).unwrap();
    assert_eq!(again, node.state);
}

#[test]
fn the_second_state_archive_keeps_its_bytes() {
    let (mut node, topic, _) = Node::with_topic_and_group();
    node.command(raise(2)).unwrap();
    node.command(define_topic("shared", &[("broker-a", 1), ("broker-b", 2)])).unwrap();
    let confirm = |name: &str, upto| {
        let broker_group = BrokerGroupName::parse(name).unwrap();
        Command::Catalog(CatalogChange::Confirm { broker_group, upto })
    };
    node.command(confirm("broker-b", 0)).unwrap();
    node.command(Command::DeleteTopic { topic }).unwrap();
    node.command(Command::DeleteGroup { group: GroupId(1) }).unwrap();
    node.command(confirm("broker-c", 9)).unwrap();
    node.group("h", GroupStart::Latest);
    let bytes = node.state.encode().unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let golden = include_str!("golden_v2.txt").trim_end();
    assert_eq!(hex, golden, "published bytes may not change: add a version instead");
    assert_eq!(State::decode(&bytes).unwrap(), node.state);
    for end in (0..bytes.len()).step_by(7) {
        assert!(State::decode(&bytes[..end]).is_err());
    }
}

/// What a random history is made of; numbers choose among what exists.
#[derive(Clone, Debug)]
enum Act {
    Topic(u8, u16),
    DropTopic(usize),
    Group(u8, bool),
    DropGroup(usize),
    Produce(usize, u16, u64),
    /// A run with the command before it as its guard.
    Guarded(usize, u64),
    Poll {
        group: usize,
        topic: usize,
        queue: u16,
        batch: usize,
    },
    Ack(usize),
    Nack(usize, u64),
    Commit(usize, usize, u16, u64),
    Release(usize),
    Trim(usize),
    Wait(u64),
    Gate(bool),
}

fn act() -> impl Strategy<Value = Act> {
    let queue = 0u16..3;
    prop_oneof![
        2 => (0u8..4, 1u16..4).prop_map(|(name, queues)| Act::Topic(name, queues)),
        1 => any::<usize>().prop_map(Act::DropTopic),
        2 => (0u8..4, any::<bool>()).prop_map(|(name, late)| Act::Group(name, late)),
        1 => any::<usize>().prop_map(Act::DropGroup),
        8 => (any::<usize>(), queue.clone(), 1u64..5).prop_map(|(t, q, n)| Act::Produce(t, q, n)),
        2 => (any::<usize>(), 1u64..5).prop_map(|(topic, n)| Act::Guarded(topic, n)),
        8 => (any::<usize>(), any::<usize>(), queue.clone(), 1usize..6).prop_map(
            |(group, topic, queue, batch)| Act::Poll { group, topic, queue, batch }
        ),
        6 => any::<usize>().prop_map(Act::Ack),
        3 => (any::<usize>(), 0u64..4).prop_map(|(which, ms)| Act::Nack(which, ms * 150)),
        1 => (any::<usize>(), any::<usize>(), queue, 0u64..20)
            .prop_map(|(g, t, q, o)| Act::Commit(g, t, q, o)),
        1 => any::<usize>().prop_map(Act::Release),
        1 => any::<usize>().prop_map(Act::Trim),
        3 => (0u64..700).prop_map(Act::Wait),
        1 => any::<bool>().prop_map(Act::Gate),
    ]
}

fn pick<T: Clone>(all: &[T], which: usize) -> Option<T> {
    (!all.is_empty()).then(|| all[which % all.len()].clone())
}

impl Node {
    fn topics(&self) -> Vec<TopicId> {
        self.state.catalog().topics().map(|topic| topic.id).collect()
    }

    fn group_ids(&self) -> Vec<GroupId> {
        self.state.catalog().groups().map(|group| group.id).collect()
    }

    fn held(&self) -> Vec<(GroupId, QueueKey, QueueOffset, LeaseId)> {
        let all = self.state.groups().iter();
        all.flat_map(|(group, queue, leases)| {
            leases.flights().map(move |(offset, flight)| (group, queue, offset, flight.lease))
        })
        .collect()
    }

    /// The command of an act, as a leader with this state would propose it.
    fn plan(&self, act: &Act, before: &[Part]) -> Option<Part> {
        let command = match *act {
            Act::Topic(name, queues) => create_topic(&format!("t{name}"), queues),
            Act::DropTopic(which) => Command::DeleteTopic { topic: pick(&self.topics(), which)? },
            Act::Group(name, late) => {
                let start = if late { GroupStart::Latest } else { GroupStart::Earliest };
                create_group(&format!("g{name}"), start)
            }
            Act::DropGroup(which) => {
                Command::DeleteGroup { group: pick(&self.group_ids(), which)? }
            }
            Act::Produce(topic, id, count) => {
                return Some(Part::Run(queue(pick(&self.topics(), topic)?, id), count));
            }
            Act::Guarded(topic, count) => {
                let guard = before.iter().rposition(|part| matches!(part, Part::Command(_)))?;
                let guard = u16::try_from(guard).unwrap();
                return Some(Part::Guarded(queue(pick(&self.topics(), topic)?, 0), count, guard));
            }
            Act::Poll { group, topic, queue: id, batch } => {
                let group = pick(&self.group_ids(), group)?;
                let from = queue(pick(&self.topics(), topic)?, id);
                let range = self.state.queue_range(from)?;
                let next = self.delivery_offset(group, from);
                let skip_to = range.end.get().min(next + batch as u64);
                let fresh: Vec<u64> = (next..skip_to).collect();
                let leases = self.state.leases(group, from);
                let again = leases.map_or_else(Vec::new, |leases| {
                    leases.due(self.state.clock_ms(), &BTreeSet::new(), batch)
                });
                let again: Vec<u64> = again.iter().map(|offset| offset.get()).collect();
                match poll(group, from, next, &fresh, &again) {
                    Command::Lease(plan) => {
                        Command::Lease(Lease { auto_renew: batch % 2 == 0, ..plan })
                    }
                    other => other,
                }
            }
            Act::Ack(which) => {
                let (group, queue, offset, lease) = pick(&self.held(), which)?;
                Command::Ack { group, queue, records: vec![(offset, lease)] }
            }
            Act::Nack(which, invisible_ms) => {
                let (group, queue, offset, lease) = pick(&self.held(), which)?;
                Command::ChangeLease { group, queue, offset, lease, invisible_ms }
            }
            Act::Commit(group, topic, id, raw) => Command::CommitOffset {
                group: pick(&self.group_ids(), group)?,
                queue: queue(pick(&self.topics(), topic)?, id),
                offset: offset(raw),
            },
            Act::Release(which) => {
                let group = pick(&self.group_ids(), which)?;
                Command::ReleaseClient { group, client: CLIENT, invisible_ms: 100 }
            }
            Act::Trim(which) => {
                let (entry, position) = pick(&self.log, which)?;
                Command::Trim { below: entry.id.index, position }
            }
            Act::Wait(_) | Act::Gate(_) => return None,
        };
        Some(Part::Command(command))
    }

    /// Plans all acts on the present state and applies them as one entry.
    fn act(&mut self, acts: &[Act]) {
        let waited_ms: u64 =
            acts.iter().map(|act| if let Act::Wait(ms) = act { *ms } else { 0 }).sum();
        let clock_ms = self.state.clock_ms() + waited_ms;
        let gate = acts.iter().find_map(|act| match act {
            Act::Gate(alone) => Some(*alone),
            _ => None,
        });
        if let Some(alone) = gate {
            let kind = if alone { EntryKind::Alone } else { EntryKind::Paired };
            self.apply(self.entry(kind, 0, vec![]));
        }
        let mut parts = Vec::new();
        for act in acts {
            let part = self.plan(act, &parts);
            parts.extend(part);
        }
        let part_count = parts.len();
        let effects = self.batch_at(clock_ms, parts);
        assert_eq!(effects.outcomes.len(), part_count);
        self.check();
    }

    fn check(&self) {
        for (queue, range) in self.state.queue_ranges() {
            assert!(range.min <= range.end);
            let lines = self.index.lines_from(queue, range.min, usize::MAX).unwrap();
            let indexed: u64 = lines.iter().map(|line| u64::from(line.count)).sum();
            assert!(indexed >= range.min.count_to(range.end), "all readable records are indexed");
            assert!(lines.last().is_none_or(|line| line.end_offset() == range.end));
        }
        for (group, queue, leases) in self.state.groups().iter() {
            assert!(self.state.catalog().group(group).is_some(), "{group:?} is gone");
            let range = self.state.queue_range(queue).unwrap();
            assert!(range.min <= leases.committed() && leases.next() <= range.end);
        }
    }

    /// The lines of all queues, out of the index.
    fn lines(&self, index: &Index) -> Vec<(QueueKey, Vec<Line>)> {
        let queues = self.state.queue_ranges();
        let lines = |queue| index.lines_from(queue, QueueOffset::ZERO, usize::MAX).unwrap();
        queues.map(|(queue, _)| (queue, lines(queue))).collect()
    }

    fn reindexed(&self) -> Index {
        let below = self.state.trimmed().below;
        let kept = self.log.iter().filter(|(entry, _)| entry.id.index >= below);
        self.state.reindex(kept.cloned().map(Ok)).unwrap()
    }

    /// The same log from its beginning.
    fn replay(&self) -> Self {
        let mut fresh = Self::new();
        for (entry, at) in &self.log {
            assert_eq!(fresh.state.end(), *at);
            fresh.apply(entry.clone());
        }
        fresh
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn replaying_the_log_gives_the_same_state(
        entries in prop::collection::vec(prop::collection::vec(act(), 1..6), 1..40),
    ) {
        let (mut node, ..) = Node::with_topic_and_group();
        for acts in &entries {
            node.act(acts);
        }
        let replayed = node.replay();
        prop_assert_eq!(replayed.digest(), node.digest());
        prop_assert_eq!(&replayed.state, &node.state);
        prop_assert_eq!(node.lines(&node.reindexed()), node.lines(&node.index));
    }

    #[test]
    fn a_checkpoint_has_the_same_future(
        before in prop::collection::vec(prop::collection::vec(act(), 1..6), 1..25),
        after in prop::collection::vec(prop::collection::vec(act(), 1..6), 1..15),
    ) {
        let (mut node, ..) = Node::with_topic_and_group();
        for acts in &before {
            node.act(acts);
        }
        let bytes = node.state.encode().unwrap();
        let mut restored = node.replay();
        restored.state = State::decode(&bytes).unwrap();
        prop_assert_eq!(&restored.state.encode().unwrap(), &bytes);
        let behind = node.log.len();
        for acts in &after {
            node.act(acts);
        }
        for (entry, _) in &node.log[behind..] {
            restored.apply(entry.clone());
        }
        prop_assert_eq!(restored.digest(), node.digest());
    }
}
