//! Directed links between processes: each is a listener that passes connections on to one target,
//! and can be told to do that badly.
//!
//! What is done to bytes is what a network does: a blackhole keeps them, and they arrive late if it
//! ends; nothing is dropped from the middle of a connection.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Bytes that a direction holds back at most; beyond it the sender's socket fills.
const HELD_BYTES_MAX: usize = 1 << 20;

/// What happens to bytes of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Pass,
    /// Later by `base`, and up to `jitter` more.
    Delay {
        base: Duration,
        jitter: Duration,
    },
    Slow {
        bytes_per_second: u32,
    },
    /// Nothing arrives, and nobody is told.
    Blackhole,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// From who dials to the target.
    forward: Mode,
    backward: Mode,
    /// Connections are reset, those that stand and those that come.
    cut: bool,
    /// Connections made before the last of these are gone.
    resets: u64,
    /// Connections made before the last of these are dead without a sign.
    forgotten: u64,
}

/// What a link has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub accepted: u64,
    pub refused: u64,
    pub reset: u64,
    pub forward_bytes: u64,
    pub backward_bytes: u64,
    /// Times that bytes came and were not passed on.
    pub held_back: u64,
    /// Times that bytes were passed on later than they came.
    pub late: u64,
}

impl Counts {
    /// Times that something was done to what wanted to pass.
    pub fn felt(&self) -> u64 {
        self.refused + self.reset + self.held_back + self.late
    }
}

impl std::iter::Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |sum, counts| Self {
            accepted: sum.accepted + counts.accepted,
            refused: sum.refused + counts.refused,
            reset: sum.reset + counts.reset,
            forward_bytes: sum.forward_bytes + counts.forward_bytes,
            backward_bytes: sum.backward_bytes + counts.backward_bytes,
            held_back: sum.held_back + counts.held_back,
            late: sum.late + counts.late,
        })
    }
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
    forward_bytes: AtomicU64,
    backward_bytes: AtomicU64,
    held_back: AtomicU64,
    late: AtomicU64,
}

/// Where links run: a thread of their own, whatever blocks in the test.
#[derive(Debug)]
pub struct Network {
    runtime: Option<Runtime>,
}

impl Network {
    pub fn new() -> Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("links").enable_all().build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// A link that listens on a port of its own and leads to `target`.
    pub fn link(&self, target: &str) -> Result<Link> {
        let runtime = self.runtime.as_ref().expect("there until it is dropped");
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?.to_string();
        let (state, watched) = watch::channel(State::default());
        let counters = Arc::new(Counters::default());
        let guard = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        drop(guard);
        runtime.spawn(accept(listener, target.to_owned(), watched, Arc::clone(&counters)));
        let handle = runtime.handle().clone();
        Ok(Link { address, state: Arc::new(state), counters, handle, flapping: Mutex::default() })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One directed link.
#[derive(Debug)]
pub struct Link {
    address: String,
    state: Arc<watch::Sender<State>>,
    counters: Arc<Counters>,
    handle: tokio::runtime::Handle,
    flapping: Mutex<Option<AbortHandle>>,
}

impl Link {
    /// Where to dial it.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Passes everything again.
    pub fn open(&self) {
        self.stop_flapping();
        self.state.send_modify(|state| {
            (state.forward, state.backward, state.cut) = (Mode::Pass, Mode::Pass, false);
        });
    }

    /// From who dials to the target.
    pub fn set_forward(&self, mode: Mode) {
        self.state.send_modify(|state| state.forward = mode);
    }

    pub fn set_backward(&self, mode: Mode) {
        self.state.send_modify(|state| state.backward = mode);
    }

    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|state| (state.forward, state.backward) = (mode, mode));
    }

    /// Resets what stands and what comes, until [`Link::open`].
    pub fn cut(&self) {
        self.state.send_modify(|state| state.cut = true);
    }

    /// Resets what stands; new connections pass.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }

    /// The target forgets what stands without telling; new connections pass.
    pub fn half_open(&self) {
        self.state.send_modify(|state| state.forgotten += 1);
    }

    /// Cut and open again, each for `period`, until [`Link::open`].
    pub fn flap(&self, period: Duration) {
        self.each(period, |state| state.cut = !state.cut);
    }

    /// Resets what stands, once in `period` with a chance of `percent`, until [`Link::open`]: what
    /// loss of packets comes to that outlasts TCP's patience.
    pub fn lose(&self, period: Duration, percent: u8) {
        self.each(period, move |state| {
            state.resets += u64::from(fastrand::u8(..100) < percent);
        });
    }

    fn each(&self, period: Duration, change: impl Fn(&mut State) + Send + 'static) {
        self.stop_flapping();
        let state = Arc::clone(&self.state);
        let task = self.handle.spawn(async move {
            let mut ticks = tokio::time::interval(period);
            loop {
                ticks.tick().await;
                state.send_modify(&change);
            }
        });
        *self.flapping.lock() = Some(task.abort_handle());
    }

    fn stop_flapping(&self) {
        if let Some(task) = self.flapping.lock().take() {
            task.abort();
        }
    }

    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { accepted, refused, reset, forward_bytes, backward_bytes, held_back, late } =
            &*self.counters;
        Counts {
            accepted: get(accepted),
            refused: get(refused),
            reset: get(reset),
            forward_bytes: get(forward_bytes),
            backward_bytes: get(backward_bytes),
            held_back: get(held_back),
            late: get(late),
        }
    }
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
}

async fn accept(
    listener: TcpListener,
    target: String,
    state: watch::Receiver<State>,
    counters: Arc<Counters>,
) {
    loop {
        let Ok((source, _)) = listener.accept().await else {
            // Out of descriptors: whoever dials waits until some are free.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (target, state, counters) = (target.clone(), state.clone(), Arc::clone(&counters));
        tokio::spawn(async move {
            if state.borrow().cut {
                add(&counters.refused, 1);
                source.set_zero_linger().ok();
                return;
            }
            match TcpStream::connect(&target).await {
                Ok(sink) => {
                    add(&counters.accepted, 1);
                    connection(source, sink, state, &counters).await;
                }
                Err(_nobody_there) => {
                    source.set_zero_linger().ok();
                }
            }
        });
    }
}

async fn connection(
    mut source: TcpStream,
    mut sink: TcpStream,
    state: watch::Receiver<State>,
    counters: &Counters,
) {
    source.set_nodelay(true).ok();
    sink.set_nodelay(true).ok();
    let born = *state.borrow();
    let ended = {
        let (from_source, to_source) = source.split();
        let (from_sink, to_sink) = sink.split();
        let forward = Direction {
            state: state.clone(),
            born,
            mode: |state| state.forward,
            bytes: &counters.forward_bytes,
            held_back: &counters.held_back,
            late: &counters.late,
        };
        let backward = Direction {
            mode: |state| state.backward,
            bytes: &counters.backward_bytes,
            state,
            ..forward.clone()
        };
        tokio::try_join!(forward.run(from_source, to_sink), backward.run(from_sink, to_source))
    };
    if ended.is_err() {
        add(&counters.reset, 1);
        source.set_zero_linger().ok();
        sink.set_zero_linger().ok();
    }
}

#[derive(Clone)]
struct Direction<'a> {
    state: watch::Receiver<State>,
    /// As it was when the connection was made.
    born: State,
    mode: fn(&State) -> Mode,
    bytes: &'a AtomicU64,
    held_back: &'a AtomicU64,
    late: &'a AtomicU64,
}

impl Direction<'_> {
    /// Until both sides are done; an error means that the connection is to be reset.
    async fn run(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
        let mut held: VecDeque<(Instant, Bytes)> = VecDeque::new();
        let mut held_bytes = 0;
        let mut chunk = vec![0; 64 << 10];
        let mut ended = false;
        loop {
            self.passable(from.as_ref()).await?;
            if ended && held.is_empty() {
                return to.shutdown().await;
            }
            let due = held.front().map(|(due, _)| *due);
            tokio::select! {
                changed = self.state.changed() => changed.map_err(io::Error::other)?,
                read = from.read(&mut chunk), if !ended && held_bytes < HELD_BYTES_MAX => {
                    let count = read?;
                    ended = count == 0;
                    // As it is now: these bytes may have been sent after a change that is not seen yet.
                    let mode = (self.mode)(&self.state.borrow());
                    let arrives = arrival(mode, count, held.back().map(|(due, _)| *due));
                    if count > 0 {
                        add(self.held_back, usize::from(mode == Mode::Blackhole));
                        add(self.late, usize::from(arrives > Instant::now()));
                        held_bytes += count;
                        held.push_back((arrives, Bytes::copy_from_slice(&chunk[..count])));
                    }
                }
                written = write_when(due, held.front().map(|(_, bytes)| bytes), &mut to),
                    if due.is_some() =>
                {
                    let count = written?;
                    add(self.bytes, count);
                    held_bytes -= count;
                    if let Some((_, bytes)) = held.front_mut() {
                        bytes.advance(count);
                        if bytes.is_empty() {
                            held.pop_front();
                        }
                    }
                }
            }
        }
    }

    /// Waits while nothing may pass.
    async fn passable(&mut self, from: &TcpStream) -> io::Result<()> {
        let mut counted = false;
        loop {
            let state = *self.state.borrow_and_update();
            if state.cut || state.resets != self.born.resets {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if (self.mode)(&state) != Mode::Blackhole && state.forgotten == self.born.forgotten {
                return Ok(());
            }
            tokio::select! {
                changed = self.state.changed() => changed.map_err(io::Error::other)?,
                ready = from.readable(), if !counted => {
                    ready?;
                    counted = true;
                    add(self.held_back, 1);
                }
            }
        }
    }
}

fn arrival(mode: Mode, bytes: usize, before: Option<Instant>) -> Instant {
    let now = Instant::now();
    let earliest = before.map_or(now, |before| before.max(now));
    match mode {
        Mode::Pass | Mode::Blackhole => earliest,
        Mode::Delay { base, jitter } => earliest.max(now + base + jitter.mul_f64(fastrand::f64())),
        Mode::Slow { bytes_per_second } => {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            earliest + Duration::from_secs(1) * bytes / bytes_per_second.max(1)
        }
    }
}

async fn write_when(
    due: Option<Instant>,
    bytes: Option<&Bytes>,
    to: &mut WriteHalf<'_>,
) -> io::Result<usize> {
    let (Some(due), Some(bytes)) = (due, bytes) else { return Ok(0) };
    tokio::time::sleep_until(due).await;
    to.write(bytes).await
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream as Socket;
    use std::time::Instant;

    use super::*;

    /// An echo server, and a link to it.
    fn echo() -> (Network, Link) {
        let network = Network::new().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            while let Ok((mut socket, _)) = listener.accept() {
                std::thread::spawn(move || {
                    let mut other = socket.try_clone().unwrap();
                    std::io::copy(&mut socket, &mut other).ok();
                });
            }
        });
        let link = network.link(&address).unwrap();
        (network, link)
    }

    fn dial(link: &Link) -> Socket {
        let socket = Socket::connect(link.address()).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        socket
    }

    fn ask(socket: &mut Socket) -> io::Result<()> {
        socket.write_all(b"ping")?;
        socket.read_exact(&mut [0; 4])
    }

    fn timed_out(result: io::Result<()>) -> bool {
        let timeouts = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut];
        result.is_err_and(|error| timeouts.contains(&error.kind()))
    }

    #[test]
    fn bytes_pass_and_are_counted() {
        let (_network, link) = echo();
        ask(&mut dial(&link)).unwrap();
        // Bytes are counted once they are on their way.
        while link.counts().backward_bytes < 4 {
            std::thread::yield_now();
        }
        let counts = link.counts();
        assert_eq!((counts.accepted, counts.forward_bytes, counts.backward_bytes), (1, 4, 4));
    }

    #[test]
    fn a_cut_link_resets_what_stands_and_what_comes() {
        let (_network, link) = echo();
        let mut socket = dial(&link);
        ask(&mut socket).unwrap();
        link.cut();
        assert!(ask(&mut socket).is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock));
        let refused = Socket::connect(link.address()).and_then(|mut socket| ask(&mut socket));
        assert!(refused.is_err());
        let counts = link.counts();
        assert_eq!((counts.reset, counts.refused), (1, 1));
        link.open();
        ask(&mut dial(&link)).unwrap();
    }

    #[test]
    fn a_blackhole_holds_established_connections_too_and_lets_go_in_the_end() {
        let (_network, link) = echo();
        let mut socket = dial(&link);
        ask(&mut socket).unwrap();
        link.set(Mode::Blackhole);
        assert!(timed_out(ask(&mut socket)));
        assert!(timed_out(ask(&mut dial(&link))));
        assert!(link.counts().held_back >= 1);
        link.open();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.read_exact(&mut [0; 4]).unwrap();
    }

    #[test]
    fn one_direction_can_be_lost_alone() {
        let (_network, link) = echo();
        let mut socket = dial(&link);
        ask(&mut socket).unwrap();
        link.set_backward(Mode::Blackhole);
        assert!(timed_out(ask(&mut socket)));
        let counts = link.counts();
        assert_eq!((counts.forward_bytes, counts.backward_bytes), (8, 4));
    }

    #[test]
    fn a_forgotten_connection_stays_dead_and_new_ones_pass() {
        let (_network, link) = echo();
        let mut socket = dial(&link);
        ask(&mut socket).unwrap();
        link.half_open();
        assert!(timed_out(ask(&mut socket)));
        ask(&mut dial(&link)).unwrap();
        link.open();
        assert!(timed_out(ask(&mut socket)));
        link.reset();
        assert!(!timed_out(ask(&mut socket)));
    }

    #[test]
    fn a_lossy_link_resets_what_stands_and_takes_new_connections() {
        let (_network, link) = echo();
        link.lose(Duration::from_millis(1), 100);
        let mut socket = dial(&link);
        while ask(&mut socket).is_ok() {}
        assert!(link.counts().reset >= 1);
        link.open();
        ask(&mut dial(&link)).unwrap();
        assert_eq!(link.counts().refused, 0);
    }

    #[test]
    fn delay_and_slowness_are_felt() {
        let (_network, link) = echo();
        let mut socket = dial(&link);
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let base = Duration::from_millis(50);
        link.set(Mode::Delay { base, jitter: Duration::from_millis(10) });
        let began = Instant::now();
        ask(&mut socket).unwrap();
        assert!(began.elapsed() >= 2 * base);
        assert!(link.counts().late >= 2);
        link.open();
        link.set_forward(Mode::Slow { bytes_per_second: 40 });
        let began = Instant::now();
        ask(&mut socket).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(100));
    }
}
