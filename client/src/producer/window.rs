//! The window: how much may be unacknowledged, in bytes and messages; and who waits for what is.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{Semaphore, TryAcquireError, oneshot};

use crate::error::Error;
use crate::message::Receipt;

/// Room for unacknowledged messages. Waiters get it in the order in which they came.
#[derive(Debug)]
pub(super) struct Window {
    bytes: Semaphore,
    messages: Semaphore,
    bytes_max: usize,
    messages_max: usize,
}

impl Window {
    pub(super) fn new(bytes_max: usize, messages_max: usize) -> Self {
        Self {
            bytes: Semaphore::new(bytes_max),
            messages: Semaphore::new(messages_max),
            bytes_max,
            messages_max,
        }
    }

    /// What a message counts for; one larger than the window takes all of it.
    pub(super) fn charge_of(&self, record_bytes: usize) -> u32 {
        u32::try_from(record_bytes.min(self.bytes_max)).unwrap_or(u32::MAX)
    }

    /// Waits for room and takes it; it is given back by [`Window::release`].
    pub(super) async fn admit(&self, charge: u32) -> Result<(), Error> {
        let message = self.messages.acquire().await.map_err(|_| Error::Closed)?;
        let bytes = self.bytes.acquire_many(charge).await.map_err(|_| Error::Closed)?;
        message.forget();
        bytes.forget();
        Ok(())
    }

    pub(super) fn try_admit(&self, charge: u32) -> Result<(), Error> {
        let refused = |error| match error {
            TryAcquireError::Closed => Error::Closed,
            TryAcquireError::NoPermits => self.full(),
        };
        let message = self.messages.try_acquire().map_err(refused)?;
        let bytes = self.bytes.try_acquire_many(charge).map_err(refused)?;
        message.forget();
        bytes.forget();
        Ok(())
    }

    pub(super) fn full(&self) -> Error {
        Error::WindowFull { window_bytes: self.bytes_max, window_messages: self.messages_max }
    }

    pub(super) fn release(&self, charge: u32, messages: usize) {
        self.bytes.add_permits(usize::try_from(charge).unwrap_or(0));
        self.messages.add_permits(messages);
    }

    /// Nobody gets room any more.
    pub(super) fn close(&self) {
        self.bytes.close();
        self.messages.close();
    }
}

/// Who is told about one message.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) message_id: String,
    pub(super) charge: u32,
    /// Flushes that it belongs to: all that came after this number was given out.
    pub(super) epoch: u64,
    pub(super) ack: Option<oneshot::Sender<Result<Receipt, Error>>>,
}

/// What is unacknowledged, and the flushes that wait for it.
#[derive(Debug)]
pub(super) struct Ledger {
    window: Arc<Window>,
    epoch: u64,
    outstanding: BTreeMap<u64, u64>,
    flushes: Vec<(u64, oneshot::Sender<()>)>,
}

impl Ledger {
    pub(super) fn new(window: Arc<Window>) -> Self {
        Self { window, epoch: 0, outstanding: BTreeMap::new(), flushes: Vec::new() }
    }

    pub(super) fn accept(
        &mut self,
        message_id: String,
        charge: u32,
        ack: Option<oneshot::Sender<Result<Receipt, Error>>>,
    ) -> Waiter {
        *self.outstanding.entry(self.epoch).or_default() += 1;
        Waiter { message_id, charge, epoch: self.epoch, ack }
    }

    pub(super) fn settle(&mut self, waiter: Waiter, result: Result<Receipt, Error>) {
        self.window.release(waiter.charge, 1);
        if let Some(count) = self.outstanding.get_mut(&waiter.epoch) {
            *count -= 1;
            if *count == 0 {
                self.outstanding.remove(&waiter.epoch);
            }
        }
        let unheard = match waiter.ack {
            Some(ack) => ack.send(result).err(),
            None => Some(result),
        };
        if let Some(Err(error)) = unheard {
            tracing::warn!(message_id = waiter.message_id, %error, "message failed unheard");
        }
    }

    pub(super) fn flush(&mut self, done: oneshot::Sender<()>) {
        self.flushes.push((self.epoch, done));
        self.epoch += 1;
        self.finish_flushes();
    }

    /// Answers the flushes whose messages are all settled.
    pub(super) fn finish_flushes(&mut self) {
        let oldest = self.outstanding.keys().next().copied().unwrap_or(u64::MAX);
        for (_, done) in self.flushes.extract_if(.., |(epoch, _)| *epoch < oldest) {
            // Whoever flushed may have gone.
            done.send(()).ok();
        }
    }

    /// Whether anyone waits for batches to be sent without lingering.
    pub(super) fn flushing(&self) -> bool {
        !self.flushes.is_empty()
    }

    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Arc::new(Window::new(1000, 10)))
    }

    #[test]
    fn flush_waits_for_what_was_accepted_before_it_only() {
        let mut ledger = ledger();
        let before = ledger.accept("a".into(), 1, None);
        let (done, mut flushed) = oneshot::channel();
        ledger.flush(done);
        let after = ledger.accept("b".into(), 1, None);
        ledger.finish_flushes();
        assert!(flushed.try_recv().is_err());
        ledger.settle(before, Err(Error::Closed));
        ledger.finish_flushes();
        assert!(flushed.try_recv().is_ok());
        assert_eq!(ledger.outstanding(), 1);
        ledger.settle(after, Err(Error::Closed));
        assert_eq!(ledger.outstanding(), 0);
    }

    #[test]
    fn flush_of_nothing_is_done_at_once() {
        let (done, mut flushed) = oneshot::channel();
        ledger().flush(done);
        assert!(flushed.try_recv().is_ok());
    }

    #[test]
    fn one_way_sends_fail_when_the_window_is_full() {
        let window = Window::new(100, 2);
        window.try_admit(60).unwrap();
        assert!(matches!(window.try_admit(60), Err(Error::WindowFull { .. })));
        window.try_admit(40).unwrap();
        assert!(matches!(window.try_admit(0), Err(Error::WindowFull { .. })));
        window.release(60, 1);
        window.try_admit(60).unwrap();
        window.close();
        assert_eq!(window.try_admit(0), Err(Error::Closed));
    }

    #[test]
    fn message_larger_than_the_window_takes_all_of_it() {
        let window = Window::new(100, 2);
        assert_eq!(window.charge_of(5000), 100);
    }
}
