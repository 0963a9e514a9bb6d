//! Takes over early from a leader that is gone. A follower waits longer than any voter holds to its
//! leader, by a random time, so that candidates do not meet; the only data node that is left beside
//! a witness meets nobody, and asks as soon as it hears that nobody listens at the leader's port.
//!
//! The votes are asked for as ever, pre-votes first: whoever still hears the leader refuses.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::fence::Fence;
use super::membership::{BrokerNode, Role};
use super::network::Links;
use super::raft_types::Raft;

/// Between two rounds of pre-votes; the first ones are refused while the leader's lease lasts.
const ROUND_INTERVAL: Duration = Duration::from_millis(100);
/// Then the ordinary election timeout has long passed.
const PATIENCE: Duration = Duration::from_secs(3);

/// What it goes by.
#[derive(Debug)]
pub(crate) struct Succession {
    pub(crate) raft: Raft,
    pub(crate) links: Links,
    /// While closed, nobody is succeeded.
    pub(crate) fence: Fence,
    /// Told when a stream of the leader broke.
    pub(crate) broken: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl Succession {
    /// Runs until `stop`, or the end of Raft.
    pub(crate) async fn run(self) {
        while self.stop.run_until_cancelled(self.broken.notified()).await.is_some() {
            if self.stop.run_until_cancelled(self.succeed()).await.is_none() {
                return;
            }
        }
    }

    async fn succeed(&self) {
        let until = Instant::now() + PATIENCE;
        while !self.fence.is_closed()
            && let Some((leader, node)) = self.predecessor()
            && Instant::now() < until
            && self.links.is_gone(&node).await
        {
            if self.raft.trigger().elect(true).await.is_err() {
                return;
            }
            tracing::debug!(leader, "nobody listens at the leader's port");
            tokio::time::sleep(ROUND_INTERVAL).await;
        }
    }

    /// The leader, where this node is the only other one that may lead.
    fn predecessor(&self) -> Option<(u64, BrokerNode)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        let me = *self.raft.node_id();
        let members = metrics.membership_config.membership();
        let role = |id: &u64| members.get_node(id).map(|node| node.role);
        let mut others = members.voter_ids().filter(|id| *id != me && *id != leader).peekable();
        let is_heir = others.peek().is_some() && others.all(|id| role(&id) == Some(Role::Witness));
        let is_voter = members.voter_ids().any(|id| id == me);
        let node = members.get_node(&leader)?;
        (is_heir && is_voter && leader != me).then(|| (leader, node.clone()))
    }
}
