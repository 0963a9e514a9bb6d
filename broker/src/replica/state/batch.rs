//! One entry of runs and commands, item by item.

use std::io;
use std::sync::Arc;

use drumlin_proto::ids::{QueueKey, QueueOffset, TopicId};
use drumlin_proto::record::RunHeader;

use super::{
    ApplyError, Effects, Limits, QueueRange, State, TrimPoint, first_offset_from, start_of,
};
use crate::catalog::NewTopic;
use crate::command::level::{FEATURE_LEVEL_MAX, SHARED_CATALOG_LEVEL};
use crate::command::{
    CatalogChange, CatalogDelta, Command, Deleted, GroupId, Lease, LeaseId, LeaseRefusal, Outcome,
    Refusal, Shares,
};
use crate::entry::{Entry, FRAME_HEADER_BYTES};
use crate::group::leases::QueueLeases;
use crate::item::{self, ItemError, ItemView};
use crate::position::{EntryIndex, LogOffset};
use crate::queue::index::{Index, Line};
use crate::replica::Applied;

/// Applies the items of an entry whose frame begins at `at`; the state's clock is the entry's.
pub(super) fn apply(
    state: &mut State,
    entry: &Entry,
    at: LogOffset,
    index: &mut Index,
    limits: &Limits,
) -> Result<Effects, ApplyError> {
    let steps = parse(entry, at)?;
    let mut batch =
        Batch { state, index, limits, entry: entry.id.index, at, effects: Effects::default() };
    for (ordinal, step) in steps.into_iter().enumerate() {
        let outcome = match batch.step(step) {
            Ok(applied) => Ok(applied),
            Err(Stop::Refused(refusal)) => Err(refusal),
            Err(Stop::Guard) => return Err(ApplyError::Guard { id: entry.id, ordinal }),
            Err(Stop::Index(source)) => return Err(ApplyError::Index { id: entry.id, source }),
            Err(Stop::Release { level, release }) => {
                return Err(ApplyError::Release { id: entry.id, level, release });
            }
        };
        batch.effects.outcomes.push(outcome);
    }
    Ok(batch.effects)
}

/// An item that can be applied, and where it lies in the log.
struct Step {
    position: LogOffset,
    act: Act,
}

enum Act {
    Run(RunHeader),
    Command(Command),
}

/// Reads all items before the first one is applied.
fn parse(entry: &Entry, at: LogOffset) -> Result<Vec<Step>, ApplyError> {
    let id = entry.id;
    let payload_at = at.advance(FRAME_HEADER_BYTES as u64);
    let mut steps = Vec::new();
    for (ordinal, placed) in item::items(&entry.payload).enumerate() {
        let placed = placed.map_err(|source| ApplyError::Item { id, source })?;
        let position = payload_at.advance(u64::from(placed.at_bytes));
        let act = match placed.item {
            ItemView::Run(header) => Act::Run(header),
            ItemView::Command(command) => {
                let command = command.decode();
                Act::Command(command.map_err(|source| ApplyError::Command {
                    id,
                    ordinal,
                    source,
                })?)
            }
        };
        steps.push(Step { position, act });
    }
    if u32::try_from(steps.len()) != Ok(entry.item_count) {
        let found = u32::try_from(steps.len()).unwrap_or(u32::MAX);
        let source = ItemError::Count { found, declared: entry.item_count };
        return Err(ApplyError::Item { id, source });
    }
    Ok(steps)
}

/// Why an item does not come into effect.
enum Stop {
    Refused(Refusal),
    Guard,
    Index(io::Error),
    /// The group was raised to a feature level that this release does not know.
    Release {
        level: u32,
        release: String,
    },
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<LeaseRefusal> for Stop {
    fn from(refusal: LeaseRefusal) -> Self {
        Self::Refused(refusal.into())
    }
}

struct Batch<'a> {
    state: &'a mut State,
    index: &'a mut Index,
    limits: &'a Limits,
    entry: EntryIndex,
    at: LogOffset,
    effects: Effects,
}

impl Batch<'_> {
    fn step(&mut self, step: Step) -> Result<Applied, Stop> {
        match step.act {
            Act::Run(header) => {
                let outcome = self.run(&header, step.position);
                if let Err(Stop::Refused(_)) = outcome {
                    self.note_void(&header, step.position);
                }
                outcome
            }
            Act::Command(command) => self.command(&command, step.position).map(Applied::Command),
        }
    }

    /// Gives a run its offsets.
    fn run(&mut self, header: &RunHeader, position: LogOffset) -> Result<Applied, Stop> {
        if let Some(guard) = header.guard.checked_sub(1) {
            match self.effects.outcomes.get(usize::from(guard)) {
                Some(Ok(Applied::Command(_))) => {}
                Some(Err(refusal)) => return Err(Stop::Refused(refusal.clone())),
                Some(Ok(Applied::Run { .. })) | None => return Err(Stop::Guard),
            }
        }
        let queue = header.queue_key();
        let base_offset = self.range(queue)?.end;
        let bytes = u32::try_from(header.run_bytes()).expect("decoded runs are far below 4 GiB");
        self.set_range(queue, |range| {
            range.end = range.end.advance(u64::from(header.record_count));
        });
        let store_time_ms = self.state.clock_ms;
        let count = header.record_count;
        let line = Line { base_offset, position, bytes, count, newest_ms: store_time_ms };
        self.index.append(queue, line);
        self.effects.touched.insert(queue.topic);
        Ok(Applied::Run { base_offset, store_time_ms, degraded: false })
    }

    /// Remembers a refused run, unless its topic was deleted: then none of its runs counts.
    fn note_void(&mut self, header: &RunHeader, position: LogOffset) {
        let catalog = &self.state.catalog;
        if catalog.topic(header.topic).is_some() || !catalog.was_issued(header.topic) {
            Arc::make_mut(&mut self.state.void_runs).insert(position);
        }
    }

    fn command(&mut self, command: &Command, position: LogOffset) -> Result<Outcome, Stop> {
        let clock_ms = self.state.clock_ms;
        match command {
            Command::CreateTopic { name, kind, shares } => {
                let new = NewTopic { name, kind: *kind, shares, min_copies: 1, two_steps: false };
                self.create_topic(new, self.limits.topics_max)
            }
            Command::DeleteTopic { topic } => {
                self.state.catalog.delete_topic(*topic)?;
                self.end(Deleted::Topic(*topic));
                Ok(Outcome::Done)
            }
            Command::CreateGroup { name, start } => {
                let (catalog, groups_max) = (&mut self.state.catalog, self.limits.groups_max);
                let group = catalog.create_group(name, *start, clock_ms, position, groups_max)?;
                Ok(Outcome::GroupCreated { group })
            }
            Command::DeleteGroup { group } => {
                self.state.catalog.delete_group(*group)?;
                self.end(Deleted::Group(*group));
                Ok(Outcome::Done)
            }
            Command::Catalog(change) => self.definition(change, position),
            Command::RaiseFeatureLevel { level, release } => self.raise_level(*level, release),
            #[cfg(test)]
            Command::Unreleased => Ok(Outcome::Done),
            Command::CommitOffset { group, queue, offset } => {
                self.commit_offset(*group, *queue, *offset)
            }
            Command::Lease(lease) => self.lease(lease),
            Command::Ack { group, queue, records } => self.ack(*group, *queue, records),
            Command::ChangeLease { group, queue, offset, lease, invisible_ms } => {
                self.change_lease(*group, *queue, (*offset, *lease), *invisible_ms)
            }
            Command::RenewLeases { group, queue, records, invisible_ms } => {
                self.check_place(*group, *queue)?;
                if let Some(leases) = self.state.groups.queue_mut(*group, *queue) {
                    leases.renew(records, *invisible_ms, clock_ms);
                }
                Ok(Outcome::Done)
            }
            Command::ReleaseClient { group, client, invisible_ms } => {
                self.check_group(*group)?;
                let groups = &mut self.state.groups;
                let topics = groups.release(*group, *client, *invisible_ms, clock_ms);
                self.effects.touched.extend(topics);
                Ok(Outcome::Done)
            }
            Command::Trim { below, position } => self.trim(*below, *position),
        }
    }

    fn raise_level(&mut self, level: u32, release: &str) -> Result<Outcome, Stop> {
        if level > FEATURE_LEVEL_MAX {
            return Err(Stop::Release { level, release: release.to_owned() });
        }
        self.state.feature_level = level.max(self.state.feature_level);
        if self.state.feature_level >= SHARED_CATALOG_LEVEL {
            self.state.catalog.share();
        }
        Ok(Outcome::Done)
    }

    fn definition(&mut self, change: &CatalogChange, position: LogOffset) -> Result<Outcome, Stop> {
        let clock_ms = self.state.clock_ms;
        match change {
            CatalogChange::CreateTopic { name, kind, shares, min_copies, topics_max } => {
                let (kind, min_copies, two_steps) = (*kind, *min_copies, self.has_others(shares));
                let new = NewTopic { name, kind, shares, min_copies, two_steps };
                return self.create_topic(new, *topics_max);
            }
            CatalogChange::UpdateTopic { topic, version, shares, min_copies } => {
                let two_steps = self.has_others(shares);
                let catalog = &mut self.state.catalog;
                catalog.update_topic(*topic, *version, shares, *min_copies, two_steps)?;
                self.begin_queues(*topic);
            }
            CatalogChange::ActivateTopic { topic, version } => {
                self.state.catalog.activate_topic(*topic, *version)?;
                self.begin_queues(*topic);
            }
            CatalogChange::WithdrawTopic { topic, version } => {
                if self.state.catalog.withdraw_topic(*topic, *version)? {
                    self.end(Deleted::Topic(*topic));
                }
            }
            CatalogChange::CreateGroup { name, start, groups_max } => {
                let (catalog, groups_max) = (&mut self.state.catalog, *groups_max);
                let group = catalog.create_group(name, *start, clock_ms, position, groups_max)?;
                return Ok(Outcome::GroupCreated { group });
            }
            CatalogChange::Confirm { broker_group, upto } => {
                self.state.catalog.confirm(broker_group, *upto);
            }
            CatalogChange::Copy(delta) => self.copy(delta, position)?,
        }
        Ok(Outcome::Done)
    }

    fn create_topic(&mut self, new: NewTopic<'_>, topics_max: u32) -> Result<Outcome, Stop> {
        let clock_ms = self.state.clock_ms;
        let topic = self.state.catalog.create_topic(new, clock_ms, topics_max)?;
        self.begin_queues(topic);
        Ok(Outcome::TopicCreated { topic })
    }

    fn copy(&mut self, delta: &CatalogDelta, position: LogOffset) -> Result<(), Refusal> {
        let copied = self.state.catalog.copy(delta, position)?;
        copied.deleted.into_iter().for_each(|deleted| self.end(deleted));
        copied.topics.into_iter().for_each(|topic| self.begin_queues(topic));
        Ok(())
    }

    /// What goes with a definition that is gone.
    fn end(&mut self, deleted: Deleted) {
        match deleted {
            Deleted::Topic(topic) => {
                self.state.queues.remove(&topic);
                self.state.groups.remove_topic(topic);
                self.index.drop_topic(topic);
                self.effects.touched.insert(topic);
            }
            Deleted::Group(group) => {
                let begun = self.state.groups.queues(group);
                self.effects.touched.extend(begun.map(|(queue, _)| queue.topic));
                self.state.groups.remove_group(group);
            }
        }
    }

    fn has_others(&self, shares: &Shares) -> bool {
        shares.iter().any(|(broker_group, _)| *broker_group != self.state.broker_group)
    }

    fn ack(
        &mut self,
        group: GroupId,
        queue: QueueKey,
        records: &[(QueueOffset, LeaseId)],
    ) -> Result<Outcome, Stop> {
        self.check_place(group, queue)?;
        let clock_ms = self.state.clock_ms;
        let Some(leases) = self.state.groups.queue_mut(group, queue) else {
            return Ok(Outcome::Acked(vec![Err(LeaseRefusal::Gone); records.len()]));
        };
        let was_full = leases.room() == 0;
        let acked = leases.ack(records, clock_ms);
        if was_full && leases.room() > 0 {
            self.effects.touched.insert(queue.topic);
        }
        Ok(Outcome::Acked(acked))
    }

    fn change_lease(
        &mut self,
        group: GroupId,
        queue: QueueKey,
        record: (QueueOffset, LeaseId),
        invisible_ms: u64,
    ) -> Result<Outcome, Stop> {
        self.check_place(group, queue)?;
        let (clock_ms, lease) = (self.state.clock_ms, self.lease_id());
        let leases = self.state.groups.queue_mut(group, queue).ok_or(LeaseRefusal::Gone)?;
        leases.change(record, lease, invisible_ms, clock_ms)?;
        self.effects.touched.insert(queue.topic);
        Ok(Outcome::LeaseChanged { lease })
    }

    fn commit_offset(
        &mut self,
        group: GroupId,
        queue: QueueKey,
        offset: QueueOffset,
    ) -> Result<Outcome, Stop> {
        let QueueRange { min, end } = self.check_place(group, queue)?;
        if offset < min || offset > end {
            return Err(Refusal::OffsetOutOfRange { asked: offset, min, end }.into());
        }
        self.state.groups.queue_or_start(group, queue, offset).commit(offset);
        self.effects.touched.insert(queue.topic);
        Ok(Outcome::Done)
    }

    fn lease(&mut self, plan: &Lease) -> Result<Outcome, Stop> {
        let range = self.check_place(plan.group, plan.queue)?;
        let next = match self.state.leases(plan.group, plan.queue) {
            Some(leases) => leases.next(),
            None => self.start(plan.group, plan.queue, range)?,
        };
        QueueLeases::check_plan(plan, next, range.end)?;
        let (clock_ms, lease) = (self.state.clock_ms, self.lease_id());
        let leases = self.state.groups.queue_or_start(plan.group, plan.queue, next);
        let granted = leases.lease(plan, lease, clock_ms);
        self.effects.touched.insert(plan.queue.topic);
        Ok(Outcome::Leased { lease, granted })
    }

    fn trim(&mut self, below: EntryIndex, position: LogOffset) -> Result<Outcome, Stop> {
        let point = TrimPoint { below, position };
        if below > self.entry || position > self.at {
            return Err(Refusal::Malformed { field: "trim point" }.into());
        }
        let before = self.state.trimmed;
        if below <= before.below {
            return Ok(Outcome::Done);
        }
        if position < before.position {
            return Err(Refusal::Malformed { field: "trim position" }.into());
        }
        let ranges: Vec<_> = self.state.queue_ranges().collect();
        for (queue, range) in ranges.into_iter().filter(|(_, range)| range.min < range.end) {
            let min = first_offset_from(queue, position, range, self.index).map_err(Stop::Index)?;
            if min > range.min {
                self.set_range(queue, |range| range.min = min);
                self.effects.expired_count += self.state.groups.trim(queue, min);
            }
        }
        self.index.trim(position).map_err(Stop::Index)?;
        if self.state.void_runs.first().is_some_and(|first| *first < position) {
            let kept = Arc::make_mut(&mut self.state.void_runs).split_off(&position);
            self.state.void_runs = Arc::new(kept);
        }
        self.state.trimmed = point;
        self.effects.trim = Some(point);
        Ok(Outcome::Done)
    }

    /// Deliveries that this entry begins.
    fn lease_id(&self) -> LeaseId {
        LeaseId(self.entry.get())
    }

    /// Queues that the definition asks for and that are not here yet begin empty.
    fn begin_queues(&mut self, topic: TopicId) {
        let broker_group = &self.state.broker_group;
        let definition = self.state.catalog.topic(topic);
        let count = definition.map_or(0, |topic| topic.prepared_queue_count(broker_group));
        let ranges = self.state.queues.entry(topic).or_default();
        if ranges.len() < usize::from(count) {
            let empty = QueueRange { min: QueueOffset::ZERO, end: QueueOffset::ZERO };
            Arc::make_mut(ranges).resize(usize::from(count), empty);
        }
    }

    fn start(
        &self,
        group: GroupId,
        queue: QueueKey,
        range: QueueRange,
    ) -> Result<QueueOffset, Stop> {
        let group = self.state.catalog.group(group).ok_or(Refusal::GroupNotFound)?;
        start_of(group, queue, range, self.index).map_err(Stop::Index)
    }

    fn check_group(&self, group: GroupId) -> Result<(), Refusal> {
        self.state.catalog.group(group).map(|_| ()).ok_or(Refusal::GroupNotFound)
    }

    fn check_place(&self, group: GroupId, queue: QueueKey) -> Result<QueueRange, Refusal> {
        self.check_group(group)?;
        self.range(queue)
    }

    fn range(&self, queue: QueueKey) -> Result<QueueRange, Refusal> {
        if !self.state.queues.contains_key(&queue.topic) {
            return Err(Refusal::TopicNotFound);
        }
        self.state.queue_range(queue).ok_or(Refusal::QueueNotFound)
    }

    fn set_range(&mut self, queue: QueueKey, change: impl FnOnce(&mut QueueRange)) {
        let ranges = self.state.queues.get_mut(&queue.topic).map(Arc::make_mut);
        let range = ranges.and_then(|ranges| ranges.get_mut(usize::from(queue.queue.get())));
        change(range.expect("the caller has seen the queue's range"));
    }
}
