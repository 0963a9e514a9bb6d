//! What gauges show, read off the replica and the disk.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use drumlin_proto::ids::{QueueKey, QueueOffset, TopicId};
use parking_lot::Mutex;

use crate::command::GroupId;
use crate::group::leases::Backlog;
use crate::metrics::reading::{GroupReading, MemberReading, Reading, SeedReading};
use crate::position::EntryIndex;
use crate::replica::Replica;
use crate::replica::membership::Role;
use crate::retention::DiskWatch;
use crate::standing::{Copies, GroupStanding, Standing};

/// Readable and writable, as RocketMQ counts them.
const READ: u64 = 4;
const WRITE: u64 = 2;
/// Raft's own entries have no time; among so many there is one of a leader's.
const FIRST_ENTRIES_MAX: usize = 8;

/// Blocks: looks at the disk and into the index.
pub(super) fn read(
    replica: &Replica,
    disk: &Mutex<DiskWatch>,
    group: &GroupStanding,
    started_s: u64,
) -> Reading {
    let progress = replica.progress();
    let log = replica.log();
    let durable = log.durable_end().borrow().position;
    let refusing_writes = replica.runs_refused().is_some();
    let (topic_count, group_count, trimmed, applied_position) = {
        let view = replica.view();
        let catalog = view.state.catalog();
        let counts = (catalog.definitions().len() as u64, catalog.groups().len() as u64);
        (counts.0, counts.1, view.state.trimmed(), view.state.end())
    };
    let now_ms = replica.clock_ms();
    let mut reading = Reading {
        topic_count,
        group_count,
        groups: groups(replica, now_ms),
        permission: if refusing_writes { READ } else { READ | WRITE },
        appended_index: last(progress.appended_end),
        durable_index: last(progress.durable_end),
        committed_index: last(progress.committed_end),
        applied_index: last(progress.applied_end),
        trimmed_index: trimmed.below.get(),
        term: progress.term.get(),
        leads: progress.leads,
        paired: match group.copies {
            Copies::Paired => Some(true),
            Copies::Alone => Some(false),
            Copies::Single | Copies::Majority => None,
        },
        fenced: is_fenced(group, replica.identity().node_id),
        members: members(group, replica.identity().node_id),
        seeds: seeds(group),
        storage_bytes: log.end().get().saturating_sub(trimmed.position.get()),
        flush_behind_bytes: log.end().get().saturating_sub(durable.get()),
        dispatch_behind_bytes: durable.get().saturating_sub(applied_position.get()),
        reserve_time_ms: oldest_ms(replica, trimmed.below)
            .map_or(0, |oldest_ms| now_ms.saturating_sub(oldest_ms)),
        refusing_writes,
        started_s,
        ..Reading::default()
    };
    match disk.lock().look() {
        Ok((level, space)) => {
            reading.disk_level = level;
            reading.disk_total_bytes = space.total_bytes;
            reading.disk_free_bytes = space.total_bytes.saturating_sub(space.used_bytes);
        }
        Err(error) => tracing::warn!(%error, "the disk's fill level cannot be read"),
    }
    reading
}

fn is_fenced(group: &GroupStanding, me: u64) -> bool {
    let own = group.members.iter().find(|member| member.id == me);
    own.and_then(|own| own.said.as_ref()).is_some_and(|said| said.fenced)
}

fn members(group: &GroupStanding, me: u64) -> Vec<MemberReading> {
    let others = group.members.iter().filter(|member| member.id != me);
    let member = |member: &Standing| MemberReading {
        node: member.node.name.clone(),
        is_witness: member.node.role == Role::Witness,
        is_reachable: member.is_reachable,
        is_lost: member.is_lost_witness(),
        lag_entries: member.lag_entries,
        lag_bytes: member.lag_bytes,
        lag_ms: member.lag_ms,
        disk_percent: (member.said.as_ref())
            .filter(|said| !said.witness)
            .map(|said| u64::from(said.disk_percent)),
    };
    others.map(member).collect()
}

fn seeds(group: &GroupStanding) -> Vec<SeedReading> {
    let said = group.members.iter().filter(|member| member.is_reachable);
    let said = said.filter_map(|member| member.said.as_ref());
    let seeded = said.filter(|said| said.seed_all_bytes > 0).map(|said| SeedReading {
        node: said.node.clone(),
        done_bytes: said.seed_done_bytes,
        all_bytes: said.seed_all_bytes,
    });
    seeded.collect()
}

/// Inclusive, where an end is exclusive; 0 where there is none.
fn last(end: EntryIndex) -> u64 {
    end.previous().map_or(0, EntryIndex::get)
}

/// Time of the oldest entry that has one.
fn oldest_ms(replica: &Replica, below: EntryIndex) -> Option<u64> {
    let mut index = below;
    for _ in 0..FIRST_ENTRIES_MAX {
        let entries = replica.log().entries(index, index.next(), 1).ok()?;
        match entries.first()?.clock_ms {
            0 => index = index.next(),
            clock_ms => return Some(clock_ms),
        }
    }
    None
}

/// One queue of a group: what of it is looked up outside of the lock.
struct Begun {
    group: GroupId,
    queue: QueueKey,
    backlog: Backlog,
    /// Oldest record that is not consumed, and that was never handed out.
    oldest: QueueOffset,
    next: QueueOffset,
    end: QueueOffset,
}

fn groups(replica: &Replica, now_ms: u64) -> Vec<GroupReading> {
    let mut sums: BTreeMap<(GroupId, TopicId), GroupReading> = BTreeMap::new();
    for begun in begun(replica, now_ms) {
        let age_ms = |from: QueueOffset| match from < begun.end {
            true => now_ms.saturating_sub(stored_ms(replica, begun.queue, from)?).into(),
            false => None,
        };
        let (lag_ms, queueing_ms) = (age_ms(begun.oldest), age_ms(begun.next));
        let key = (begun.group, begun.queue.topic);
        let Some(sum) = entry(&mut sums, key, replica) else { continue };
        sum.ready += begun.backlog.ready;
        sum.in_flight += begun.backlog.in_flight;
        sum.in_retry += begun.backlog.in_retry;
        sum.lag_ms = sum.lag_ms.max(lag_ms.unwrap_or(0));
        sum.queueing_ms = sum.queueing_ms.max(queueing_ms.unwrap_or(0));
    }
    sums.into_values().collect()
}

fn begun(replica: &Replica, now_ms: u64) -> Vec<Begun> {
    let view = replica.view();
    let with_range = view.state.groups().iter().filter_map(|(group, queue, leases)| {
        Some((group, queue, leases, view.state.queue_range(queue)?))
    });
    let begun = with_range.map(|(group, queue, leases, range)| Begun {
        group,
        queue,
        backlog: leases.backlog(now_ms, range.end),
        oldest: leases.committed().max(range.min),
        next: leases.next().max(range.min),
        end: range.end,
    });
    begun.collect()
}

/// `None`: the topic or the group is gone.
fn entry<'a>(
    sums: &'a mut BTreeMap<(GroupId, TopicId), GroupReading>,
    key: (GroupId, TopicId),
    replica: &Replica,
) -> Option<&'a mut GroupReading> {
    let vacant = match sums.entry(key) {
        Entry::Occupied(occupied) => return Some(occupied.into_mut()),
        Entry::Vacant(vacant) => vacant,
    };
    let view = replica.view();
    let catalog = view.state.catalog();
    let topic = catalog.topic(key.1)?.name.clone();
    let group = catalog.group(key.0)?.name.clone();
    let (ready, in_flight, in_retry, lag_ms, queueing_ms) = (0, 0, 0, 0, 0);
    let empty = GroupReading { topic, group, ready, in_flight, in_retry, lag_ms, queueing_ms };
    Some(vacant.insert(empty))
}

/// Store time of the run that holds the record, or of the first readable one behind it.
fn stored_ms(replica: &Replica, queue: QueueKey, offset: QueueOffset) -> Option<u64> {
    match replica.lines_from(queue, offset, 1) {
        Ok(lines) => lines.first().map(|line| line.newest_ms),
        Err(error) => {
            tracing::debug!(?queue, %offset, %error, "the age of a record cannot be read");
            None
        }
    }
}
