//! Deliveries of one queue to one consumer group: who holds which record, for how long, how often
//! it was delivered.
//!
//! Pure: time is the clock of the entry that is applied, choices come from the leader. A record
//! that was handed out is either consumed or in flight; one whose lease has ended is due again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use drumlin_proto::ids::QueueOffset;

use super::offsets::Progress;
use crate::command::{ClientKey, Granted, Lease, LeaseId, LeaseRefusal, Refusal};

/// Acknowledged deliveries that are remembered, so that an ack whose reply was lost may come again.
pub const ACKED_MAX: usize = 256;

/// Records of a queue that a group may have in flight before it is given new ones. What a consumer
/// never acknowledges would fill memory and checkpoints otherwise.
pub const IN_FLIGHT_MAX: usize = 10_000;

/// A record that was handed out and is not consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flight {
    pub lease: LeaseId,
    /// From here on it is due again.
    pub expires_ms: u64,
    /// 1 on first delivery.
    pub attempt: u16,
    pub client: ClientKey,
    /// The leader extends it while the client lives.
    pub auto_renew: bool,
    /// Given back, to be delivered again when it is due.
    pub given_back: bool,
    pub first_delivered_ms: u64,
    /// Of the present attempt.
    pub delivered_ms: u64,
}

impl Flight {
    pub fn is_due(&self, now_ms: u64) -> bool {
        self.expires_ms <= now_ms
    }
}

/// Where the records of a queue stand for a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Never handed out.
    pub ready: u64,
    /// Leased.
    pub in_flight: u64,
    /// Given back, or the lease ended.
    pub in_retry: u64,
}

impl Backlog {
    /// Records not consumed.
    pub fn lag(&self) -> u64 {
        self.ready + self.in_flight + self.in_retry
    }
}

/// State of one (consumer group, queue).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueLeases {
    progress: Progress,
    flights: BTreeMap<QueueOffset, Flight>,
    /// Of all flights: when they are due.
    by_expiry: BTreeSet<(u64, QueueOffset)>,
    /// Oldest first.
    acked: VecDeque<(QueueOffset, LeaseId)>,
}

impl QueueLeases {
    pub fn starting_at(start: QueueOffset) -> Self {
        Self::from_parts(Progress::starting_at(start), [], []).expect("nothing contradicts itself")
    }

    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// All records below are consumed.
    pub fn committed(&self) -> QueueOffset {
        self.progress.floor()
    }

    /// First record that was never handed out.
    pub fn next(&self) -> QueueOffset {
        self.progress.next()
    }

    pub fn flight(&self, offset: QueueOffset) -> Option<&Flight> {
        self.flights.get(&offset)
    }

    /// Ascending by offset.
    pub fn flights(&self) -> impl ExactSizeIterator<Item = (QueueOffset, &Flight)> {
        self.flights.iter().map(|(offset, flight)| (*offset, flight))
    }

    /// How many new records may be handed out. The leader plans by it; apply takes what is planned.
    pub fn room(&self) -> usize {
        IN_FLIGHT_MAX.saturating_sub(self.flights.len())
    }

    /// Remembered acknowledgements, oldest first.
    pub fn acked(&self) -> impl ExactSizeIterator<Item = (QueueOffset, LeaseId)> {
        self.acked.iter().copied()
    }

    /// Up to `records_max` records to deliver again, ascending; those due longest come first into
    /// the choice, those of `reserved` not at all.
    pub fn due(
        &self,
        now_ms: u64,
        reserved: &BTreeSet<QueueOffset>,
        records_max: usize,
    ) -> Vec<QueueOffset> {
        let due = self.by_expiry.iter().take_while(|(expires_ms, _)| *expires_ms <= now_ms);
        let free = due.map(|(_, offset)| *offset).filter(|offset| !reserved.contains(offset));
        let mut chosen: Vec<QueueOffset> = free.take(records_max).collect();
        chosen.sort_unstable();
        chosen
    }

    /// When the next record becomes due that is not so yet.
    pub fn next_due_ms(&self, now_ms: u64) -> Option<u64> {
        let later = (now_ms.checked_add(1)?, QueueOffset::ZERO);
        self.by_expiry.range(later..).next().map(|(expires_ms, _)| *expires_ms)
    }

    /// Auto-renewed leases that still hold but end by `until_ms`, the first to end first.
    pub fn ending(
        &self,
        now_ms: u64,
        until_ms: u64,
    ) -> impl Iterator<Item = (QueueOffset, &Flight)> {
        let holding = self.by_expiry.iter().skip_while(move |(ends_ms, _)| *ends_ms <= now_ms);
        let ending = holding.take_while(move |(ends_ms, _)| *ends_ms <= until_ms);
        ending
            .filter_map(|(_, offset)| Some((*offset, self.flights.get(offset)?)))
            .filter(|(_, flight)| flight.auto_renew)
    }

    /// Where the records below `end` stand.
    pub fn backlog(&self, now_ms: u64, end: QueueOffset) -> Backlog {
        let mut backlog = Backlog { ready: self.next().count_to(end), ..Backlog::default() };
        for flight in self.flights.values() {
            if flight.given_back || flight.is_due(now_ms) {
                backlog.in_retry += 1;
            } else {
                backlog.in_flight += 1;
            }
        }
        backlog
    }

    /// Grants a lease as planned by the leader and checked by [`Self::check_plan`].
    pub(crate) fn lease(&mut self, plan: &Lease, lease: LeaseId, clock_ms: u64) -> Vec<Granted> {
        let mut granted = Vec::with_capacity(plan.again.len() + plan.fresh.len());
        for offset in &plan.unwanted {
            if self.flights.get(offset).is_some_and(|flight| flight.is_due(clock_ms)) {
                self.land(*offset);
            }
        }
        for offset in &plan.again {
            let Some(flight) = self.flights.get(offset) else { continue };
            // Under the same lease it was granted by this very entry.
            if !flight.is_due(clock_ms) || flight.lease == lease {
                continue;
            }
            let again = Flight {
                attempt: flight.attempt.saturating_add(1),
                first_delivered_ms: flight.first_delivered_ms,
                ..delivery(plan, lease, clock_ms)
            };
            granted.push(Granted { offset: *offset, attempt: again.attempt });
            self.set(*offset, again);
        }
        self.hand_out(plan, lease, clock_ms);
        granted.extend(plan.fresh.iter().map(|offset| Granted { offset: *offset, attempt: 1 }));
        granted
    }

    /// Whether a plan fits the delivery offset `next` and the end of the queue.
    pub(crate) fn check_plan(
        plan: &Lease,
        next: QueueOffset,
        end: QueueOffset,
    ) -> Result<(), Refusal> {
        let lists = [&plan.fresh, &plan.again, &plan.unwanted];
        if !lists.iter().all(|list| list.is_sorted_by(|a, b| a < b)) {
            return Err(Refusal::Malformed { field: "offsets" });
        }
        let handed_out = plan.from..plan.skip_to;
        if plan.skip_to < plan.from || !plan.fresh.iter().all(|offset| handed_out.contains(offset))
        {
            return Err(Refusal::Malformed { field: "range" });
        }
        if handed_out.is_empty() {
            return Ok(());
        }
        if plan.from != next {
            return Err(Refusal::LeaseOutdated { planned: plan.from, actual: next });
        }
        if plan.skip_to > end {
            return Err(Refusal::OffsetOutOfRange { asked: plan.skip_to, min: next, end });
        }
        Ok(())
    }

    /// Moves on to the plan's `skip_to`; what is not in `fresh` counts as consumed.
    fn hand_out(&mut self, plan: &Lease, lease: LeaseId, clock_ms: u64) {
        if plan.skip_to == plan.from {
            return;
        }
        self.progress.hand_out_to(plan.skip_to);
        let mut passed = plan.from;
        for offset in &plan.fresh {
            self.progress.consume(passed, *offset);
            self.set(*offset, delivery(plan, lease, clock_ms));
            passed = offset.advance(1);
        }
        self.progress.consume(passed, plan.skip_to);
    }

    /// Consumes records that are leased under the ids given; one result per record.
    pub(crate) fn ack(
        &mut self,
        records: &[(QueueOffset, LeaseId)],
        clock_ms: u64,
    ) -> Vec<Result<(), LeaseRefusal>> {
        let mut results = Vec::with_capacity(records.len());
        for record in records {
            let (offset, lease) = *record;
            results.push(if self.holds(offset, lease, clock_ms) {
                self.land(offset);
                self.remember(*record);
                Ok(())
            } else if self.acked.contains(record) {
                Ok(())
            } else {
                Err(LeaseRefusal::Gone)
            });
        }
        results
    }

    /// Gives a leased record the new id `lease_after` and a new expiry; it is no longer renewed.
    pub(crate) fn change(
        &mut self,
        (offset, lease): (QueueOffset, LeaseId),
        lease_after: LeaseId,
        invisible_ms: u64,
        clock_ms: u64,
    ) -> Result<(), LeaseRefusal> {
        let flight = self.held(offset, lease, clock_ms).ok_or(LeaseRefusal::Gone)?;
        let changed = Flight {
            lease: lease_after,
            expires_ms: clock_ms.saturating_add(invisible_ms),
            auto_renew: false,
            // Consumers whose leases are renewed for them change one only to give it back.
            given_back: flight.auto_renew || flight.given_back || invisible_ms == 0,
            ..*flight
        };
        self.set(offset, changed);
        Ok(())
    }

    /// Extends leases that still hold under the ids given; none is shortened.
    pub(crate) fn renew(
        &mut self,
        records: &[(QueueOffset, LeaseId)],
        invisible_ms: u64,
        clock_ms: u64,
    ) {
        for (offset, lease) in records {
            if let Some(flight) = self.held(*offset, *lease, clock_ms) {
                let expires_ms = flight.expires_ms.max(clock_ms.saturating_add(invisible_ms));
                self.set(*offset, Flight { expires_ms, ..*flight });
            }
        }
    }

    pub(crate) fn has_renewed_leases_of(&self, client: ClientKey) -> bool {
        self.flights.values().any(|flight| flight.auto_renew && flight.client == client)
    }

    /// Ends auto-renewed leases of a client at the latest in `invisible_ms`.
    pub(crate) fn release(&mut self, client: ClientKey, invisible_ms: u64, clock_ms: u64) {
        let leases = self.flights.iter();
        let of_client: Vec<(QueueOffset, Flight)> = leases
            .filter(|(_, flight)| flight.auto_renew && flight.client == client)
            .map(|(offset, flight)| (*offset, *flight))
            .collect();
        for (offset, flight) in of_client {
            let expires_ms = flight.expires_ms.min(clock_ms.saturating_add(invisible_ms));
            self.set(offset, Flight { expires_ms, auto_renew: false, ..flight });
        }
    }

    /// Begins anew at `offset`: all leases end, deliveries go on from there.
    pub(crate) fn commit(&mut self, offset: QueueOffset) {
        *self = Self::starting_at(offset);
    }

    /// Ends what lies below the queue's minimum; returns how many records were in flight there.
    pub(crate) fn trim(&mut self, min: QueueOffset) -> u64 {
        let mut expired = 0;
        while let Some((offset, flight)) = self.flights.first_key_value()
            && *offset < min
        {
            let (offset, expires_ms) = (*offset, flight.expires_ms);
            self.by_expiry.remove(&(expires_ms, offset));
            self.flights.remove(&offset);
            expired += 1;
        }
        self.progress.raise(min);
        self.acked.retain(|(offset, _)| *offset >= min);
        expired
    }

    fn held(&self, offset: QueueOffset, lease: LeaseId, clock_ms: u64) -> Option<&Flight> {
        let flight = self.flights.get(&offset)?;
        (flight.lease == lease && !flight.is_due(clock_ms)).then_some(flight)
    }

    fn holds(&self, offset: QueueOffset, lease: LeaseId, clock_ms: u64) -> bool {
        self.held(offset, lease, clock_ms).is_some()
    }

    fn set(&mut self, offset: QueueOffset, flight: Flight) {
        if let Some(before) = self.flights.insert(offset, flight) {
            self.by_expiry.remove(&(before.expires_ms, offset));
        }
        self.by_expiry.insert((flight.expires_ms, offset));
    }

    /// A record in flight is consumed.
    fn land(&mut self, offset: QueueOffset) {
        if let Some(flight) = self.flights.remove(&offset) {
            self.by_expiry.remove(&(flight.expires_ms, offset));
            self.progress.consume(offset, offset.advance(1));
        }
    }

    fn remember(&mut self, acked: (QueueOffset, LeaseId)) {
        if self.acked.len() == ACKED_MAX {
            self.acked.pop_front();
        }
        self.acked.push_back(acked);
    }

    /// `None` if the parts contradict each other.
    pub(crate) fn from_parts(
        progress: Progress,
        flights: impl IntoIterator<Item = (QueueOffset, Flight)>,
        acked: impl IntoIterator<Item = (QueueOffset, LeaseId)>,
    ) -> Option<Self> {
        let flights: BTreeMap<_, _> = flights.into_iter().collect();
        let acked: VecDeque<_> = acked.into_iter().collect();
        let open =
            |offset: &QueueOffset| *offset < progress.next() && !progress.is_consumed(*offset);
        let complete = u64::try_from(flights.len()) == Ok(progress.open_count());
        if !complete || !flights.keys().all(open) || acked.len() > ACKED_MAX {
            return None;
        }
        let by_expiry = flights.iter().map(|(offset, flight)| (flight.expires_ms, *offset));
        Some(Self { by_expiry: by_expiry.collect(), progress, flights, acked })
    }
}

/// A first delivery under a plan.
fn delivery(plan: &Lease, lease: LeaseId, clock_ms: u64) -> Flight {
    Flight {
        lease,
        expires_ms: clock_ms.saturating_add(plan.invisible_ms),
        attempt: 1,
        client: plan.client,
        auto_renew: plan.auto_renew,
        given_back: false,
        first_delivered_ms: clock_ms,
        delivered_ms: clock_ms,
    }
}

#[cfg(test)]
mod tests;
