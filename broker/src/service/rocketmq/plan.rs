//! What a poll is to be given: chosen here at the leader, decided at apply.
//!
//! Several polls plan while earlier plans are still on their way through the log, so what is
//! planned already is kept per (consumer group, queue) until its outcome is known. Nothing here is
//! the truth: a plan that turns out wrong is refused by apply and made again.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{QueueKey, QueueOffset};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::messages::QueueReader;
use crate::command::{ClientKey, Command, Granted, GroupId, Lease, LeaseId, Outcome};
use crate::filter::TagFilter;
use crate::group::leases::{IN_FLIGHT_MAX, QueueLeases};
use crate::log::ReadError;
use crate::replica::{Applied, Item, ProposeError, Replica};

/// Records looked at by one plan, so that one poll does not hold a queue for long.
const SCAN_RECORDS_MAX: u64 = 8192;
/// Records passed over without a match before that is written to the log.
const SKIP_RECORDS_MAX: u64 = 8192;

/// How long what was looked through is remembered; longer than a poll.
const UNUSED_MAX: Duration = Duration::from_secs(60);

/// What a poll asks of one queue.
#[derive(Clone, Debug)]
pub(super) struct Want {
    pub(super) group: GroupId,
    pub(super) client: ClientKey,
    pub(super) auto_renew: bool,
    pub(super) invisible_ms: u64,
    pub(super) filter: TagFilter,
}

impl Want {
    fn lease(&self, queue: QueueKey, from: QueueOffset, choice: Choice) -> Lease {
        Lease {
            group: self.group,
            queue,
            client: self.client,
            auto_renew: self.auto_renew,
            invisible_ms: self.invisible_ms,
            from,
            skip_to: choice.skip_to,
            fresh: choice.fresh,
            again: Vec::new(),
            unwanted: Vec::new(),
        }
    }
}

/// Plans of one (group, queue) whose outcome is not known yet.
#[derive(Debug)]
struct QueuePlan {
    in_flight: u32,
    /// Delivery offset after all plans in flight.
    next: QueueOffset,
    /// A plan in flight failed, so those behind it will, too.
    failed: bool,
    again: BTreeSet<QueueOffset>,
    /// Looked through without a match: the filter, from where, up to where.
    scanned: Option<(TagFilter, QueueOffset, QueueOffset)>,
    used: Instant,
}

impl Default for QueuePlan {
    fn default() -> Self {
        Self {
            in_flight: 0,
            next: QueueOffset::ZERO,
            failed: false,
            again: BTreeSet::new(),
            scanned: None,
            used: Instant::now(),
        }
    }
}

type Shared = Arc<Mutex<QueuePlan>>;

/// Plans of all groups and queues.
#[derive(Debug, Default)]
pub(super) struct Plans {
    queues: Mutex<HashMap<(GroupId, QueueKey), Shared>>,
}

/// A lease that was proposed.
pub(super) struct Proposed {
    outcome: Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send>>,
    reservation: Reservation,
    pub(super) queue: QueueKey,
    pub(super) record_count: usize,
}

/// Takes its part of the plan back when the outcome is known or nobody waits for it any more.
#[derive(Debug)]
struct Reservation {
    plan: Shared,
    again: Vec<QueueOffset>,
    granted: bool,
    wakes: Arc<Notify>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut plan = self.plan.lock();
        plan.in_flight -= 1;
        for offset in &self.again {
            plan.again.remove(offset);
        }
        plan.failed |= !self.granted;
        if plan.in_flight > 0 {
            return;
        }
        if std::mem::take(&mut plan.failed) {
            self.wakes.notify_waiters();
        }
    }
}

impl Proposed {
    /// The lease and the records granted under it.
    pub(super) async fn outcome(mut self) -> Result<(LeaseId, Vec<Granted>), ProposeError> {
        match self.outcome.await? {
            Applied::Command(Outcome::Leased { lease, granted }) => {
                self.reservation.granted = true;
                Ok((lease, granted))
            }
            Applied::Run { .. } | Applied::Command(_) => Err(ProposeError::UnknownOutcome),
        }
    }
}

/// What the state says of one (group, queue), with what is planned already.
struct Standing {
    next: QueueOffset,
    /// Of up to half of what is asked for, where there are new records for the rest: neither keeps
    /// the other waiting.
    due: Vec<QueueOffset>,
    /// How many records may be delivered for the first time.
    room: usize,
}

fn standing(
    replica: &Replica,
    (group, queue): (GroupId, QueueKey),
    plan: &QueuePlan,
    records_max: usize,
) -> Result<Option<Standing>, ReadError> {
    let now_ms = replica.clock_ms();
    let view = replica.view();
    let Some(delivered) = view.state.delivery_offset(group, queue, &view.index)? else {
        return Ok(None);
    };
    let next = if plan.in_flight > 0 { plan.next } else { delivered };
    let has_new = view.state.queue_range(queue).is_some_and(|range| next < range.end);
    let due_max = if has_new { records_max.div_ceil(2) } else { records_max };
    let leases = view.state.leases(group, queue);
    let due = leases.map_or_else(Vec::new, |leases| leases.due(now_ms, &plan.again, due_max));
    let room = leases.map_or(IN_FLIGHT_MAX, QueueLeases::room);
    Ok(Some(Standing { next, due, room }))
}

/// Milliseconds from now until a record of these queues becomes due again for the group; 0 if one
/// has since `looked_ms`.
pub(super) fn next_due_in_ms(
    replica: &Replica,
    looked_ms: u64,
    group: GroupId,
    queues: &[QueueKey],
) -> Option<u64> {
    let view = replica.view();
    let due_ms = queues
        .iter()
        .filter_map(|queue| view.state.leases(group, *queue)?.next_due_ms(looked_ms))
        .min()?;
    Some(due_ms.saturating_sub(replica.clock_ms()))
}

/// Records never delivered before that one plan takes.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    fresh: Vec<QueueOffset>,
    /// Behind the last record looked at.
    skip_to: QueueOffset,
}

impl Plans {
    fn queue(&self, group: GroupId, queue: QueueKey) -> Shared {
        self.queues.lock().entry((group, queue)).or_default().clone()
    }

    /// Chooses up to `records_max` records of a queue and proposes to lease them; `None` if there
    /// is nothing to give.
    ///
    /// Reads the queue where there is a filter, so it may wait for the disk.
    pub(super) fn propose(
        &self,
        replica: &Replica,
        queue: QueueKey,
        want: &Want,
        records_max: usize,
        deadline: Option<Instant>,
    ) -> Result<Option<Proposed>, ReadError> {
        let shared = self.queue(want.group, queue);
        let mut plan = shared.lock();
        plan.used = Instant::now();
        if plan.failed {
            return Ok(None);
        }
        let Some(standing) = standing(replica, (want.group, queue), &plan, records_max)? else {
            return Ok(None);
        };
        let Some((min, end)) = replica.queue_range(queue) else { return Ok(None) };
        let from = standing.next;
        let mut reader = QueueReader::new(replica, queue);
        let (again, unwanted) = wanted(&mut reader, standing.due, &want.filter)?;
        let room = (records_max - again.len()).min(standing.room);
        let start = plan.scan_start(&want.filter, from).max(min);
        let mut choice = match &want.filter {
            TagFilter::All => first_of(start, end.max(start), room),
            TagFilter::AnyOf(_) => matching(&mut reader, start, end, room, &want.filter)?,
        };
        choice.skip_to = choice.skip_to.max(from);
        if again.is_empty() && unwanted.is_empty() && choice.fresh.is_empty() {
            if from.count_to(choice.skip_to) < SKIP_RECORDS_MAX {
                plan.scanned = Some((want.filter.clone(), from, choice.skip_to));
                return Ok(None);
            }
        } else if choice.fresh.is_empty() && want.filter == TagFilter::All {
            choice.skip_to = from;
        }
        let lease = Lease { again, unwanted, ..want.lease(queue, from, choice) };
        Ok(Some(plan.commit(&shared, replica, lease, deadline)))
    }

    /// Proposes to pass over what a filter left out, for polls that end without a match.
    pub(super) fn pass_over(
        &self,
        replica: &Replica,
        queue: QueueKey,
        want: &Want,
    ) -> Result<Option<Proposed>, ReadError> {
        let shared = self.queue(want.group, queue);
        let mut plan = shared.lock();
        let idle = plan.in_flight == 0 && !plan.failed;
        let Some((filter, from, to)) = plan.scanned.take().filter(|_| idle) else {
            return Ok(None);
        };
        let standing = standing(replica, (want.group, queue), &plan, 0)?;
        if filter != want.filter || from == to || standing.is_none_or(|s| s.next != from) {
            return Ok(None);
        }
        let choice = Choice { fresh: Vec::new(), skip_to: to };
        Ok(Some(plan.commit(&shared, replica, want.lease(queue, from, choice), None)))
    }

    /// Forgets queues that nobody plans for any more.
    pub(super) fn sweep(&self, now: Instant) {
        self.queues
            .lock()
            .retain(|_, plan| Arc::strong_count(plan) > 1 || plan.lock().used + UNUSED_MAX > now);
    }
}

impl QueuePlan {
    /// Where a scan begins that would begin at `from`, had none been made before.
    fn scan_start(&self, filter: &TagFilter, from: QueueOffset) -> QueueOffset {
        match &self.scanned {
            Some((scanned, first, to)) if scanned == filter && *first <= from && from <= *to => *to,
            Some(_) | None => from,
        }
    }

    fn commit(
        &mut self,
        shared: &Shared,
        replica: &Replica,
        lease: Lease,
        deadline: Option<Instant>,
    ) -> Proposed {
        self.in_flight += 1;
        self.next = lease.skip_to;
        self.scanned = None;
        let reserved: Vec<QueueOffset> =
            lease.again.iter().chain(&lease.unwanted).copied().collect();
        self.again.extend(&reserved);
        let record_count = lease.again.len() + lease.fresh.len();
        let queue = lease.queue;
        // Under the lock: the order of proposals is that of the plans.
        let outcome = replica.propose(Item::Command(Command::Lease(lease)), deadline);
        let reservation = Reservation {
            plan: shared.clone(),
            again: reserved,
            granted: false,
            wakes: replica.topic_wakes(queue.topic),
        };
        Proposed { outcome: Box::pin(outcome), reservation, queue, record_count }
    }
}

/// Everything from `start` on, up to `records_max` records.
fn first_of(start: QueueOffset, end: QueueOffset, records_max: usize) -> Choice {
    let count = start.count_to(end).min(u64::try_from(records_max).unwrap_or(u64::MAX));
    let fresh = (0..count).map(|n| start.advance(n)).collect();
    Choice { fresh, skip_to: start.advance(count) }
}

/// Records from `start` on that the filter wants.
fn matching(
    reader: &mut QueueReader,
    start: QueueOffset,
    end: QueueOffset,
    records_max: usize,
    filter: &TagFilter,
) -> Result<Choice, ReadError> {
    let mut choice = Choice { fresh: Vec::new(), skip_to: start };
    if records_max == 0 {
        return Ok(choice);
    }
    let end = end.min(start.advance(SCAN_RECORDS_MAX));
    reader.scan(start, end, |offset, record| {
        if filter.wants(record.tag_hash(), record.tag()) {
            choice.fresh.push(offset);
        }
        choice.skip_to = offset.advance(1);
        choice.fresh.len() < records_max
    })?;
    Ok(choice)
}

/// Splits records that are due again by the filter: wanted ones, others. Those that cannot be read
/// any more are in neither.
fn wanted(
    reader: &mut QueueReader,
    due: Vec<QueueOffset>,
    filter: &TagFilter,
) -> Result<(Vec<QueueOffset>, Vec<QueueOffset>), ReadError> {
    if *filter == TagFilter::All {
        return Ok((due, Vec::new()));
    }
    let (mut again, mut unwanted) = (Vec::new(), Vec::new());
    for offset in due {
        match reader.read(offset, |_, _, record| filter.wants(record.tag_hash(), record.tag()))? {
            Some(true) => again.push(offset),
            Some(false) => unwanted.push(offset),
            None => {}
        }
    }
    Ok((again, unwanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: u64) -> QueueOffset {
        QueueOffset::new(raw)
    }

    #[test]
    fn without_a_filter_the_first_records_are_taken() {
        assert_eq!(first_of(at(3), at(9), 2), Choice { fresh: vec![at(3), at(4)], skip_to: at(5) });
        assert_eq!(first_of(at(3), at(3), 2), Choice { fresh: vec![], skip_to: at(3) });
        assert_eq!(first_of(at(3), at(4), 0), Choice { fresh: vec![], skip_to: at(3) });
    }

    #[test]
    fn a_scan_goes_on_where_the_same_filter_ended() {
        let tags = TagFilter::parse("a").unwrap();
        let other = TagFilter::parse("b").unwrap();
        let scanned = Some((tags.clone(), at(5), at(50)));
        let plan = QueuePlan { scanned, ..QueuePlan::default() };
        assert_eq!(plan.scan_start(&tags, at(5)), at(50));
        assert_eq!(plan.scan_start(&tags, at(20)), at(50));
        assert_eq!(plan.scan_start(&tags, at(4)), at(4));
        assert_eq!(plan.scan_start(&tags, at(51)), at(51));
        assert_eq!(plan.scan_start(&other, at(5)), at(5));
    }

    #[test]
    fn a_failed_plan_wakes_polls_once_nothing_is_in_flight() {
        let plan = Shared::default();
        plan.lock().in_flight = 2;
        plan.lock().again.extend([at(1), at(2)]);
        let wakes = Arc::new(Notify::new());
        let reservation = |offset, granted| Reservation {
            plan: plan.clone(),
            again: vec![at(offset)],
            granted,
            wakes: wakes.clone(),
        };
        let mut woken = std::pin::pin!(wakes.notified());
        woken.as_mut().enable();
        drop(reservation(1, false));
        assert!(plan.lock().failed);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(woken.as_mut().poll(&mut context).is_pending());
        drop(reservation(2, true));
        assert!(!plan.lock().failed);
        assert!(plan.lock().again.is_empty());
        assert!(woken.as_mut().poll(&mut context).is_ready());
    }
}
