//! The route table with a clock and a wake: the one place that shares it between tasks.

use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::route_table::RouteTable;

#[derive(Debug)]
pub(crate) struct Directory {
    table: Mutex<RouteTable>,
    /// The table's generation.
    changed: watch::Sender<u64>,
    /// A deadline may have moved forward.
    deadline_moved: Notify,
}

impl Directory {
    pub(crate) fn new(table: RouteTable) -> Self {
        let changed = watch::Sender::new(table.generation());
        Self { table: Mutex::new(table), changed, deadline_moved: Notify::new() }
    }

    pub(crate) fn read<T>(&self, look: impl FnOnce(&RouteTable) -> T) -> T {
        look(&self.table.lock())
    }

    /// Changes the table and wakes those that wait for what changed.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut RouteTable, Instant) -> T) -> T {
        let mut table = self.table.lock();
        let deadline_before = table.next_deadline();
        let result = change(&mut table, Instant::now());
        let (generation, deadline) = (table.generation(), table.next_deadline());
        drop(table);
        self.changed.send_if_modified(|known| std::mem::replace(known, generation) != generation);
        if deadline.is_some_and(|deadline| deadline_before.is_none_or(|before| deadline < before)) {
            self.deadline_moved.notify_one();
        }
        result
    }

    /// Told the table's generation whenever it rises.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Looks again after every change until there is an answer; `None` at the deadline.
    pub(crate) async fn wait_for<T>(
        &self,
        deadline: Instant,
        mut look: impl FnMut(&RouteTable) -> Option<T>,
    ) -> Option<T> {
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            if let Some(found) = self.read(&mut look) {
                return Some(found);
            }
            tokio::select! {
                changed = changes.changed() => changed.ok()?,
                () = tokio::time::sleep_until(deadline.into()) => return None,
            }
        }
    }

    /// Ends registrations when their time has come, until told to stop.
    pub(crate) async fn run_clock(&self, stop: CancellationToken) {
        loop {
            for gone in self.update(RouteTable::on_tick) {
                let (broker_group, node) = (gone.broker_group, gone.node);
                tracing::warn!(broker_group, node, why = ?gone.why, "a broker left the routes");
            }
            let deadline = self.read(RouteTable::next_deadline);
            let ripe = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = ripe => {}
                () = self.deadline_moved.notified() => {}
                () = stop.cancelled() => return,
            }
        }
    }
}
