//! Renewal of leases while their client is alive.
//!
//! Clients give no sign of receipt: a message whose reply was lost on its way is renewed as one that
//! is worked on. What this node knows to be unsent is not, nor what was granted before it led and
//! never renewed: its reply may have been lost with whoever led.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{QueueKey, QueueOffset};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::Edge;
use super::receive::RENEWED_LEASE_MS;
use super::settings::retry_pause;
use crate::command::{ClientKey, Command, GroupId, LeaseId};
use crate::group::leases::Flight;
use crate::position::{EntryIndex, Term};
use crate::replica::{Item, ProposeError};
use crate::service::clients::SILENCE_MAX;

const ROUND: Duration = Duration::from_secs(5);
/// Leases that end within this time are renewed.
const ENDING_MS: u64 = 10_000;
/// Lengths of the first, second, ... renewal; the last one goes on.
const RENEWALS_MS: [u64; 6] = [60_000, 180_000, 300_000, 600_000, 1_800_000, 3_600_000];
/// No lease is renewed beyond this time from its delivery.
const HELD_MS_MAX: u64 = 3 * 3_600_000;
/// What is left of leases whose holder is gone, or whose message was never sent.
pub(super) const GIVEN_BACK_MS: u64 = 1000;
/// Records in one command.
const RECORDS_MAX: usize = 1024;

/// What to do with a renewed lease that is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewal {
    For {
        invisible_ms: u64,
    },
    /// Held for too long: deliver it again after the group's pause.
    Retry {
        invisible_ms: u64,
    },
}

/// The lease's own times tell which renewal is next, so a new leader goes on where the old ended.
fn renewal(flight: &Flight, now_ms: u64) -> Renewal {
    let limit_ms = flight.delivered_ms.saturating_add(HELD_MS_MAX);
    let left_ms = limit_ms.saturating_sub(now_ms);
    if left_ms < ENDING_MS {
        let pause = retry_pause(flight.attempt);
        return Renewal::Retry { invisible_ms: u64::try_from(pause.as_millis()).unwrap_or(0) };
    }
    // After n renewals the lease ends at most at the sum of the first lease and those n.
    let held_ms = flight.expires_ms.saturating_sub(flight.delivered_ms);
    let mut reached_ms = RENEWED_LEASE_MS;
    let mut next_ms = RENEWALS_MS[RENEWALS_MS.len() - 1];
    for renewal_ms in RENEWALS_MS {
        if held_ms <= reached_ms {
            next_ms = renewal_ms;
            break;
        }
        reached_ms += renewal_ms;
    }
    Renewal::For { invisible_ms: next_ms.min(left_ms) }
}

/// How this node leads. It begins anew after a while without a quorum: what was decided meanwhile
/// was told to nobody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead {
    term: Term,
    since: Instant,
    /// Leases of earlier entries were granted before.
    granted_from: EntryIndex,
}

impl Lead {
    /// `appended_end`: of the log now, should this be the first look at the term.
    pub(super) fn in_term(
        before: Option<Self>,
        term: Term,
        appended_end: EntryIndex,
        now: Instant,
    ) -> Self {
        let same = before.filter(|lead| lead.term == term);
        same.unwrap_or(Self { term, since: now, granted_from: appended_end })
    }

    /// Whether the holder may never have got the message: only whoever granted the lease could know,
    /// and it led no longer when a first renewal was due.
    fn may_be_unsent(&self, flight: &Flight) -> bool {
        let first_end_ms = flight.delivered_ms.saturating_add(RENEWED_LEASE_MS);
        flight.lease.0 < self.granted_from.get() && flight.expires_ms <= first_end_ms
    }
}

/// What one round proposes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    renewed: BTreeMap<(GroupId, QueueKey, u64), Vec<(QueueOffset, LeaseId)>>,
    retried: Vec<(GroupId, QueueKey, QueueOffset, LeaseId, u64)>,
    /// Holders of leases that were not heard of for long.
    gone: BTreeSet<(GroupId, ClientKey)>,
}

impl Round {
    fn add(
        &mut self,
        (group, queue): (GroupId, QueueKey),
        (offset, flight): (QueueOffset, &Flight),
        alive: bool,
        now_ms: u64,
    ) {
        if !alive {
            self.gone.insert((group, flight.client));
            return;
        }
        if flight.expires_ms > now_ms.saturating_add(ENDING_MS) {
            return;
        }
        match renewal(flight, now_ms) {
            Renewal::For { invisible_ms } => {
                let key = (group, queue, invisible_ms);
                self.renewed.entry(key).or_default().push((offset, flight.lease));
            }
            Renewal::Retry { invisible_ms } => {
                self.retried.push((group, queue, offset, flight.lease, invisible_ms));
            }
        }
    }

    pub(super) fn commands(self) -> Vec<Command> {
        let mut commands = Vec::new();
        for ((group, queue, invisible_ms), records) in self.renewed {
            for records in records.chunks(RECORDS_MAX) {
                let records = records.to_vec();
                commands.push(Command::RenewLeases { group, queue, records, invisible_ms });
            }
        }
        for (group, queue, offset, lease, invisible_ms) in self.retried {
            commands.push(Command::ChangeLease { group, queue, offset, lease, invisible_ms });
        }
        for (group, client) in self.gone {
            commands.push(Command::ReleaseClient { group, client, invisible_ms: GIVEN_BACK_MS });
        }
        commands
    }
}

impl Edge {
    /// Looks at every renewed lease.
    pub(super) fn renewals(&self, lead: &Lead, now: Instant) -> Round {
        let mut round = Round::default();
        let now_ms = self.replica().clock_ms();
        // A new leader knows no client yet and takes all as alive.
        let all_alive = now < lead.since + SILENCE_MAX;
        // Walked without the view: whoever holds it delays apply, and those who wait for that.
        let queues: Vec<_> = {
            let view = self.replica().view();
            let queues = view.state.groups().iter();
            queues.map(|(group, queue, leases)| (group, queue, Arc::clone(leases))).collect()
        };
        for (group, queue, leases) in queues {
            for (offset, flight) in leases.flights() {
                let ends_soon = flight.expires_ms <= now_ms.saturating_add(ENDING_MS);
                let unsent =
                    || ends_soon && self.unsent.holds((group, queue, offset), flight.lease);
                if !flight.auto_renew || flight.is_due(now_ms) || unsent() {
                    continue;
                }
                let alive = all_alive || self.clients.is_alive(flight.client, now);
                if !alive || !lead.may_be_unsent(flight) {
                    round.add((group, queue), (offset, flight), alive, now_ms);
                }
            }
        }
        round
    }

    /// Proposes in order; answers when all are decided. Lost ones come again in the next round.
    pub(super) async fn propose_all(&self, commands: Vec<Command>) {
        let proposed: Vec<_> = commands
            .into_iter()
            .map(|command| self.replica().propose(Item::Command(command), None))
            .collect();
        for outcome in futures::future::join_all(proposed).await {
            match outcome {
                Ok(_) | Err(ProposeError::Refused(_)) => {}
                Err(error) => tracing::debug!(%error, "a lease was not changed"),
            }
        }
    }
}

/// Renews leases of clients that are alive, ends those of clients that are not.
pub(super) async fn renew_while_alive(edge: Arc<Edge>) {
    let mut ticks = interval(ROUND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut status = edge.replica().raft_status();
    let mut lead: Option<Lead> = None;
    loop {
        tokio::select! {
            () = edge.stop.cancelled() => return,
            _ = ticks.tick() => {}
            // Seen at once, before this node has granted much.
            Ok(()) = status.changed() => {}
        }
        let now = Instant::now();
        for (_, client) in edge.clients.expire(now) {
            tracing::info!(client = client.client_id, "client silent for too long");
        }
        edge.plans.sweep(now);
        let raft = *status.borrow_and_update();
        if !raft.serving {
            lead = None;
            continue;
        }
        let appended_end = edge.replica().progress().appended_end;
        let lead = lead.insert(Lead::in_term(lead, raft.term, appended_end, now));
        let commands = edge.renewals(lead, now).commands();
        edge.propose_all(commands).await;
    }
}

#[cfg(test)]
mod tests {
    use drumlin_proto::ids::{QueueId, TopicId};

    use super::*;

    const START_MS: u64 = 1_000_000;

    fn flight(expires_ms: u64) -> Flight {
        Flight {
            lease: LeaseId(1),
            expires_ms,
            attempt: 2,
            client: ClientKey(7),
            auto_renew: true,
            given_back: false,
            first_delivered_ms: START_MS,
            delivered_ms: START_MS,
        }
    }

    #[test]
    fn renewals_grow_and_end_after_three_hours() {
        let mut flight = flight(START_MS + 60_000);
        let mut lengths_s = Vec::new();
        let end = loop {
            let now_ms = flight.expires_ms - 7000;
            match renewal(&flight, now_ms) {
                Renewal::For { invisible_ms } => {
                    lengths_s.push(invisible_ms / 1000);
                    flight.expires_ms = now_ms + invisible_ms;
                }
                retry => break retry,
            }
        };
        assert_eq!(lengths_s[..6], [60, 180, 300, 600, 1800, 3600]);
        assert!(lengths_s.len() <= 8, "{lengths_s:?}");
        assert_eq!(flight.expires_ms, START_MS + HELD_MS_MAX);
        assert_eq!(end, Renewal::Retry { invisible_ms: 5000 });
    }

    #[test]
    fn what_an_earlier_leader_granted_may_be_unsent_until_it_was_renewed() {
        let lead = |granted_from| Lead {
            term: Term::new(3),
            since: Instant::now(),
            granted_from: EntryIndex::new(granted_from),
        };
        let first = flight(START_MS + RENEWED_LEASE_MS);
        assert!(lead(2).may_be_unsent(&first));
        assert!(!lead(1).may_be_unsent(&first), "granted here");
        let renewed = flight(START_MS + RENEWED_LEASE_MS + 1);
        assert!(!lead(2).may_be_unsent(&renewed));
    }

    #[test]
    fn a_lead_begins_with_its_term() {
        let (began, index) = (Instant::now(), EntryIndex::new);
        let first = Lead::in_term(None, Term::new(3), index(7), began);
        let later = began + ROUND;
        let same = Lead::in_term(Some(first), Term::new(3), index(9), later);
        assert_eq!((same.since, same.granted_from), (began, index(7)));
        let next = Lead::in_term(Some(same), Term::new(4), index(9), later);
        assert_eq!((next.since, next.granted_from), (later, index(9)));
    }

    #[test]
    fn a_round_renews_what_ends_soon_and_releases_the_silent() {
        let queue = QueueKey { topic: TopicId::new(1), queue: QueueId::new(0) };
        let key = (GroupId(3), queue);
        let offset = QueueOffset::new;
        let now_ms = START_MS + 52_000;
        let mut round = Round::default();
        round.add(key, (offset(0), &flight(START_MS + 60_000)), true, now_ms);
        round.add(key, (offset(1), &flight(now_ms + ENDING_MS + 1)), true, now_ms);
        let silent = Flight { client: ClientKey(8), ..flight(now_ms + 3_000_000) };
        round.add(key, (offset(2), &silent), false, now_ms);
        round.add(key, (offset(3), &silent), false, now_ms);
        assert_eq!(
            round.commands(),
            [
                Command::RenewLeases {
                    group: GroupId(3),
                    queue,
                    records: vec![(offset(0), LeaseId(1))],
                    invisible_ms: 60_000,
                },
                Command::ReleaseClient {
                    group: GroupId(3),
                    client: ClientKey(8),
                    invisible_ms: GIVEN_BACK_MS,
                },
            ]
        );
    }
}
