//! Bytes that no client would send: the node stays up, and others do not notice.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use drumlin_tests::node::{Launch, Node};
use drumlin_tests::traffic;

const FRAMES_PER_PORT: usize = 10_000;
const FRAMES_PER_CONNECTION: usize = 50;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One frame: random, or an HTTP/2 frame of random type with a lying length.
fn frame(random: &mut fastrand::Rng) -> Vec<u8> {
    let payload: Vec<u8> = (0..random.usize(0..200)).map(|_| random.u8(..)).collect();
    if random.bool() {
        return payload;
    }
    let length = if random.bool() { payload.len() } else { random.usize(0..1 << 24) };
    let length = u32::try_from(length).expect("24 bits").to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], random.u8(0..12), random.u8(..)];
    frame.extend(random.u32(0..8).to_be_bytes());
    frame.extend(payload);
    frame
}

/// Sends frames until all are out; a port may close a connection whenever it likes.
fn abuse(address: &str, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sent = 0;
    while sent < FRAMES_PER_PORT {
        let mut socket = TcpStream::connect(address)?;
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        socket.set_read_timeout(Some(Duration::from_millis(1)))?;
        if random.bool() && socket.write_all(PREFACE).is_err() {
            continue;
        }
        for _ in 0..FRAMES_PER_CONNECTION {
            sent += 1;
            if socket.write_all(&frame(&mut random)).is_err() {
                break;
            }
        }
        // What it answers does not matter, only that it can be sent.
        let mut answer = [0; 1024];
        while socket.read(&mut answer).is_ok_and(|bytes| bytes > 0) {}
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_frames_to_every_port_disturb_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut node = Node::start(&folder.path().join("data"), &Launch::default())?;
    node.wait_ready(Duration::from_secs(30))?;
    let channel = traffic::connect(&node.broker).await?;
    traffic::create_topic(&channel).await?;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let ports = [node.nameserver.clone(), node.broker.clone(), node.http.clone()];
    let attack = tokio::task::spawn_blocking(move || {
        ports.iter().zip(seed..).try_for_each(|(port, seed)| abuse(port, seed))
    });
    let other = traffic::produce(channel.clone(), "honest".into(), 100, |_| attack.is_finished());
    let history = other.await?;
    attack.await??;
    ensure!(!node.ended()?, "the node ended");
    ensure!(history.acknowledged_count() > 0, "nothing was acknowledged meanwhile");
    let mut history = history;
    let violations = history.check_read(&traffic::read_all(&channel).await?);
    ensure!(violations.is_empty(), "{violations:#?}");
    ensure!(!node.log_text()?.contains("panicked"), "a task panicked: {}", node.log_text()?);
    node.stop(Duration::from_secs(30))
}
