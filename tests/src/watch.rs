//! Who leads: asked of all brokers again and again, and told to the recorder when it changes.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, look};
use crate::event::{Recorder, What};

const LOOK_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub struct Watch {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A broker, its group, and where it tells about itself.
struct Watched {
    name: String,
    group: String,
    http: String,
}

impl Watch {
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let mut nodes = Vec::new();
        for name in cluster.brokers() {
            let node = cluster.node(&name)?;
            let (group, http) = (node.group.clone(), node.ports.http.clone());
            nodes.push(Watched { name, group, http });
        }
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(nodes, cluster.recorder.clone(), stop.clone()));
        Ok(Self { stop, task })
    }

    pub async fn stop(&mut self) -> Result<()> {
        self.stop.cancel();
        Ok((&mut self.task).await?)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn run(nodes: Vec<Watched>, recorder: Recorder, stop: CancellationToken) {
    let mut known: BTreeMap<String, u64> = BTreeMap::new();
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        for Watched { name, group, http } in &nodes {
            let Ok(seen) = look(http).await else { continue };
            if seen.leads && known.insert(name.clone(), seen.term) != Some(seen.term) {
                let (group, node) = (group.clone(), name.clone());
                recorder.note(What::Leader { group, node, term: seen.term });
            }
        }
    }
}
