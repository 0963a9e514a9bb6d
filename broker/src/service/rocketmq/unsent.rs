//! Leased records that no client got, kept until they are given back.
//!
//! Whoever holds them lives, so their leases would be renewed for hours: they are not, while they
//! lie here. A record leaves once the log has decided on it, not when it is first proposed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{QueueKey, QueueOffset};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::delivery::Leased;
use super::renew::GIVEN_BACK_MS;
use super::{Edge, POLLS_MAX};
use crate::command::{Command, GroupId, LeaseId};
use crate::replica::{Item, ProposeError};

/// Records kept at once: full batches of all polls.
const RECORDS_MAX: usize = POLLS_MAX * 32;
/// Records proposed before the first is awaited.
const PROPOSED_MAX: usize = 1024;
/// Between attempts, while they fail.
const PAUSE: Duration = Duration::from_secs(1);

type Record = (GroupId, QueueKey, QueueOffset);

#[derive(Debug, Default)]
pub(super) struct Unsent {
    leases: Mutex<BTreeMap<Record, LeaseId>>,
    added: Notify,
}

impl Unsent {
    /// Returns how many found no room; their leases go on as if they had been delivered.
    pub(super) fn add(&self, group: GroupId, records: impl Iterator<Item = Leased>) -> usize {
        let mut leases = self.leases.lock();
        let mut left_out = 0;
        for (queue, lease, granted) in records {
            if leases.len() < RECORDS_MAX {
                leases.insert((group, queue, granted.offset), lease);
            } else {
                left_out += 1;
            }
        }
        drop(leases);
        self.added.notify_one();
        left_out
    }

    pub(super) fn holds(&self, record: Record, lease: LeaseId) -> bool {
        self.leases.lock().get(&record) == Some(&lease)
    }

    fn first(&self) -> Vec<(Record, LeaseId)> {
        let leases = self.leases.lock();
        leases.iter().take(PROPOSED_MAX).map(|(record, lease)| (*record, *lease)).collect()
    }

    fn settle(&self, record: Record, lease: LeaseId) {
        let mut leases = self.leases.lock();
        if leases.get(&record) == Some(&lease) {
            leases.remove(&record);
        }
    }
}

impl Edge {
    /// Makes unsent records deliverable again soon; false if some could not be proposed.
    pub(super) async fn give_back(&self) -> bool {
        let records = self.unsent.first();
        let proposed: Vec<_> = records
            .iter()
            .map(|((group, queue, offset), lease)| {
                let command = Command::ChangeLease {
                    group: *group,
                    queue: *queue,
                    offset: *offset,
                    lease: *lease,
                    invisible_ms: GIVEN_BACK_MS,
                };
                self.replica().propose(Item::Command(command), None)
            })
            .collect();
        let mut all = true;
        for ((record, lease), outcome) in records.into_iter().zip(join_all(proposed).await) {
            match outcome {
                Ok(_) | Err(ProposeError::Refused(_)) => self.unsent.settle(record, lease),
                Err(error) => {
                    tracing::debug!(%error, ?record, "not given back yet");
                    all = false;
                }
            }
        }
        all
    }
}

/// Gives back what is added, until the broker stops.
pub(super) async fn give_back_all(edge: Arc<Edge>) {
    loop {
        let idle = edge.unsent.leases.lock().is_empty();
        let round = async {
            if idle {
                edge.unsent.added.notified().await;
            }
            if !edge.give_back().await {
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = edge.stop.cancelled() => return,
            () = round => {}
        }
    }
}
