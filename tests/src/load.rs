//! Load on a cluster: clients that send, read, commit and ask, and tell the recorder all of it.
//!
//! Most speak the native API themselves: no SDK in between could hide or repeat anything. Two use
//! the SDK, which is to go on through any fault by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, PATIENCE, wait_for};
use crate::event::{Queue, Recorder, Seen, acknowledged_by};

mod asker;
pub mod native;
mod producer;
mod reader;
mod sdk;

/// Before a client tries again what failed: it must not keep a processor busy.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// How much load, on what.
#[derive(Clone, Debug)]
pub struct Mix {
    pub topic: String,
    /// Per broker group.
    pub queue_count: u32,
    /// Per broker group.
    pub producers: usize,
    pub body_bytes: usize,
    /// Between two sends of a producer.
    pub pause: Duration,
    pub with_sdk: bool,
    /// Copies that an acknowledged message has.
    pub min_copies: u32,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            topic: "durable".into(),
            queue_count: 2,
            producers: 3,
            body_bytes: 300,
            pause: Duration::from_millis(2),
            with_sdk: true,
            min_copies: 1,
        }
    }
}

/// What all clients know.
#[derive(Debug)]
struct Shared {
    mix: Mix,
    recorder: Recorder,
    /// Names and addresses of the data nodes of each broker group.
    groups: BTreeMap<String, Vec<(String, String)>>,
    nameservers: Vec<String>,
    /// Of each queue up to where it was read, record by record.
    read: Mutex<BTreeMap<Queue, u64>>,
    /// For those that send.
    sent_enough: CancellationToken,
    /// For all.
    stop: CancellationToken,
}

impl Shared {
    fn queue(&self, group: &str, id: u32) -> Queue {
        Queue::new(&self.mix.topic, group, id)
    }

    fn nodes(&self, group: &str) -> &[(String, String)] {
        self.groups.get(group).map_or(&[], Vec::as_slice)
    }

    /// Waits, unless the load is to end.
    async fn pause(&self, pause: Duration) {
        self.stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}

#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    tasks: JoinSet<Result<()>>,
}

impl Load {
    /// Creates the topic and starts all clients.
    pub async fn start(cluster: &Cluster, mix: Mix) -> Result<Self> {
        let mut groups = BTreeMap::new();
        for group in cluster.groups() {
            let mut nodes = Vec::new();
            for name in cluster.members(&group) {
                let address = cluster.client_address(&name)?;
                nodes.push((name, address));
            }
            groups.insert(group, nodes);
        }
        let nameservers = cluster.nameservers();
        let nameservers = nameservers.iter().map(|name| cluster.client_address(name));
        let shared = Shared {
            mix,
            recorder: cluster.recorder.clone(),
            groups,
            nameservers: nameservers.collect::<Result<_>>()?,
            read: Mutex::default(),
            sent_enough: CancellationToken::new(),
            stop: CancellationToken::new(),
        };
        create_topic(&shared).await?;
        let mut load = Self { shared: Arc::new(shared), tasks: JoinSet::new() };
        load.spawn_all();
        Ok(load)
    }

    fn spawn_all(&mut self) {
        for group in self.shared.groups.keys() {
            for number in 0..self.shared.mix.producers {
                let (shared, group) = (Arc::clone(&self.shared), group.clone());
                self.tasks.spawn(producer::run(shared, group, number));
            }
            let (shared, of_group) = (Arc::clone(&self.shared), group.clone());
            self.tasks.spawn(reader::run(shared, of_group));
            let (shared, of_group) = (Arc::clone(&self.shared), group.clone());
            self.tasks.spawn(asker::run(shared, of_group));
        }
        if self.shared.mix.with_sdk {
            self.tasks.spawn(sdk::produce(Arc::clone(&self.shared)));
            self.tasks.spawn(sdk::consume(Arc::clone(&self.shared)));
        }
    }

    /// Waits until `count` more sends to a broker group are acknowledged.
    pub async fn progress(&self, group: &str, count: usize, limit: Duration) -> Result<Duration> {
        let recorder = &self.shared.recorder;
        let (began, from) = (tokio::time::Instant::now(), recorder.count());
        let what = format!("{count} sends to {group} are not acknowledged");
        wait_for(&what, limit, async || {
            Ok((recorder.count_from(from, acknowledged_by(group)) >= count).then_some(()))
        })
        .await?;
        Ok(began.elapsed())
    }

    /// The same for every broker group.
    pub async fn progress_everywhere(&self, count: usize, limit: Duration) -> Result<()> {
        for group in self.shared.groups.keys() {
            self.progress(group, count, limit).await?;
        }
        Ok(())
    }

    /// Nothing more is sent; waits until readers have got all that was acknowledged.
    pub async fn drain(&self, limit: Duration) -> Result<()> {
        self.shared.sent_enough.cancel();
        wait_for("readers do not get all that was acknowledged", limit, async || {
            let ends = self.shared.recorder.acknowledged_ends();
            let read = self.shared.read.lock();
            let all = ends.iter().all(|(queue, end)| read.get(queue).is_some_and(|at| at >= end));
            Ok(all.then_some(()))
        })
        .await
    }

    /// Ends all clients; fails if one met what no client may meet.
    pub async fn stop(&mut self) -> Result<()> {
        self.shared.sent_enough.cancel();
        self.shared.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended??;
        }
        Ok(())
    }

    pub fn queue_count(&self) -> u32 {
        self.shared.mix.queue_count
    }
}

async fn create_topic(shared: &Shared) -> Result<()> {
    let nodes: Vec<_> = shared.groups.values().flatten().collect();
    let Mix { topic, queue_count, min_copies, .. } = &shared.mix;
    wait_for("the topic is not created", PATIENCE, async || {
        for (_, address) in &nodes {
            let Ok(channel) = native::connect(address).await else { continue };
            if native::create_topic(&channel, topic, *queue_count, *min_copies).await.is_ok() {
                return Ok(Some(()));
            }
        }
        Ok(None)
    })
    .await
}

/// What a value's body is: itself, and bytes that follow from it.
pub fn body_of(value: &str, bytes: usize) -> Vec<u8> {
    let mut body = value.as_bytes().to_vec();
    body.push(b' ');
    let seed = value.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut rng = fastrand::Rng::with_seed(seed);
    body.resize_with(bytes.max(body.len()), || rng.u8(b'a'..=b'z'));
    body
}

/// What somebody who reads a body sees.
pub fn seen(offset: u64, body: &[u8]) -> Seen {
    let end = body.iter().position(|byte| *byte == b' ').unwrap_or(body.len());
    let value = String::from_utf8_lossy(&body[..end]).into_owned();
    let intact = body_of(&value, body.len()) == body;
    Seen { offset, value, intact }
}

/// All queues of a topic as one node has them, into the history.
pub async fn final_read(
    cluster: &Cluster,
    node: &str,
    topic: &str,
    queue_count: u32,
) -> Result<()> {
    let group = &cluster.node(node)?.group;
    let channel = native::connect(&cluster.client_address(node)?).await?;
    let mut read = Vec::new();
    for id in 0..queue_count {
        let (min, seen) = native::read_queue(&channel, topic, id)
            .await
            .with_context(|| format!("queue {id} of {topic} on {node}"))?;
        let (node, queue) = (node.to_owned(), Queue::new(topic, group, id));
        read.push(crate::event::What::FinalRead { node, queue, min, seen });
    }
    // All or nothing: who tries again must not tell a queue twice.
    read.into_iter().for_each(|what| cluster.recorder.note(what));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_tells_its_value_and_whether_it_is_whole() {
        let mut body = body_of("p1-7", 100);
        assert_eq!(body.len(), 100);
        assert_eq!(seen(3, &body), Seen { offset: 3, value: "p1-7".into(), intact: true });
        body[50] ^= 1;
        assert!(!seen(3, &body).intact);
    }
}
