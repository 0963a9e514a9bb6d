//! Raises the feature level of groups that no older release could ever go on with: new ones, and
//! those of one node. All others wait for `drumlin cluster upgrade`.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::broker::Context;
use crate::command::Command;
use crate::command::level::FEATURE_LEVEL_MAX;
use crate::config::Config;
use crate::replica::{Item, ProposeError, Replica};

/// Between two looks at what the other members know.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// To the highest level of this release.
pub(crate) async fn raise(replica: &Replica) -> Result<(), ProposeError> {
    let level = RELEASE_LEVEL;
    if replica.feature_level() >= level {
        return Ok(());
    }
    let release = env!("CARGO_PKG_VERSION").to_owned();
    let command = Command::RaiseFeatureLevel { level, release };
    let deadline = Some(Instant::now() + PROPOSE_TIMEOUT);
    replica.propose(Item::Command(command), deadline).await?;
    tracing::info!(level, "the broker group's feature level is raised");
    Ok(())
}

/// The level that only tests know is for them to raise to.
const RELEASE_LEVEL: u32 = if cfg!(test) { FEATURE_LEVEL_MAX - 1 } else { FEATURE_LEVEL_MAX };

/// Raises the level of a new group once all its members know it, whoever leads.
pub(crate) async fn raise_new_group(context: Arc<Context>, stop: CancellationToken) {
    let raising = async {
        let mut status = context.replica.raft_status();
        while context.replica.feature_level() < RELEASE_LEVEL && is_new(&context.replica) {
            if status.wait_for(|status| status.serving).await.is_err() {
                return;
            }
            if all_know(&context.config, &context.replica)
                && let Err(error) = raise(&context.replica).await
            {
                tracing::warn!(%error, "the feature level was not raised");
            }
            sleep(LOOK_INTERVAL).await;
        }
    };
    stop.run_until_cancelled(raising).await;
}

/// Nothing was ever defined.
fn is_new(replica: &Replica) -> bool {
    replica.view().state.catalog().version() == 0
}

fn all_know(config: &Config, replica: &Replica) -> bool {
    let peers = replica.peers();
    let peers = peers.borrow();
    let knows = peers.values().filter(|peer| {
        peer.fresh && !peer.state.witness && peer.state.feature_level_max >= RELEASE_LEVEL
    });
    knows.count() + 1 >= config.replicas.len()
}
