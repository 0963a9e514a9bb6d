//! What the other members say of themselves, asked once a second and when the leader changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::{StateRequest, StateResponse};
use futures::future::join_all;
use openraft::async_runtime::WatchReceiver;
use openraft::storage::RaftStateMachine;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::membership::BrokerNode;
use super::network::Links;
use super::raft_types::TypeConfig;

const ASK_INTERVAL: Duration = Duration::from_secs(1);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// By node id, of all other members, once they have answered.
pub type PeerStates = Arc<BTreeMap<u64, PeerState>>;

/// What one member last said of itself.
#[derive(Clone, Debug)]
pub struct PeerState {
    pub state: StateResponse,
    pub heard_at: Instant,
    /// It answered when it was last asked.
    pub fresh: bool,
}

/// Asks until `stop`, or the end of Raft.
pub(crate) async fn follow<SM>(
    raft: openraft::Raft<TypeConfig, SM>,
    links: Links,
    states: watch::Sender<PeerStates>,
    stop: CancellationToken,
) where
    SM: RaftStateMachine<TypeConfig>,
{
    let me = *raft.node_id();
    let mut metrics = raft.server_metrics();
    let mut leader = None;
    let mut ticks = tokio::time::interval(ASK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
            changed = metrics.changed() => {
                if changed.is_err() {
                    return;
                }
                let leader_now = metrics.borrow_and_update().current_leader;
                if std::mem::replace(&mut leader, leader_now) == leader_now {
                    continue;
                }
            }
        }
        let others: Vec<(u64, BrokerNode)> = {
            let seen = metrics.borrow_and_update();
            let members = seen.membership_config.membership();
            let others = members.nodes().filter(|(id, _)| **id != me);
            others.map(|(id, node)| (*id, node.clone())).collect()
        };
        let asked = join_all(others.iter().map(|(id, node)| ask(&links, *id, node)));
        let Some(answers) = stop.run_until_cancelled(asked).await else { return };
        let before = states.borrow().clone();
        let mut now = BTreeMap::new();
        for ((id, _), answer) in others.into_iter().zip(answers) {
            let heard =
                answer.map(|state| PeerState { state, heard_at: Instant::now(), fresh: true });
            let stale = || before.get(&id).map(|known| PeerState { fresh: false, ..known.clone() });
            if let Some(state) = heard.or_else(stale) {
                now.insert(id, state);
            }
        }
        states.send_replace(Arc::new(now));
    }
}

/// `None` if it did not answer.
async fn ask(links: &Links, id: u64, node: &BrokerNode) -> Option<StateResponse> {
    let mut client = links.client(id, node).ok()?;
    let asked = client.state(links.request(id, StateRequest {}));
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, asked).await.ok()?.ok()?;
    links.answered(id);
    Some(answer.into_inner())
}
