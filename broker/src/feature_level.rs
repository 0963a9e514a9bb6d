//! Raises the feature level of groups that no older release could ever go on with: new ones, those of
//! one node, and to the level of the first release that had groups of several nodes all others.
//! Beyond that they wait for `drumlin cluster upgrade`.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::broker::Context;
use crate::command::Command;
use crate::command::level::{FEATURE_LEVEL_MAX, SHARED_CATALOG_LEVEL};
use crate::config::Config;
use crate::replica::{Item, ProposeError, Replica};

/// Between two looks at what the other members know.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Of a group of one node: to the highest level of this release.
pub(crate) async fn raise_alone(replica: &Replica) -> Result<(), ProposeError> {
    raise(replica, RELEASE_LEVEL).await
}

async fn raise(replica: &Replica, level: u32) -> Result<(), ProposeError> {
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

/// Raises the level of a group of several nodes once all its members know it, whoever leads.
pub(crate) async fn raise_group(context: Arc<Context>, stop: CancellationToken) {
    let raising = async {
        let mut status = context.replica.raft_status();
        loop {
            let level = target(&context.replica);
            if context.replica.feature_level() >= level {
                return;
            }
            if status.wait_for(|status| status.serving).await.is_err() {
                return;
            }
            if all_know(level, &context.config, &context.replica)
                && let Err(error) = raise(&context.replica, level).await
            {
                tracing::warn!(%error, "the feature level was not raised");
            }
            sleep(LOOK_INTERVAL).await;
        }
    };
    stop.run_until_cancelled(raising).await;
}

/// The highest level for a group where nothing was ever defined.
fn target(replica: &Replica) -> u32 {
    let is_new = replica.view().state.catalog().version() == 0;
    if is_new { RELEASE_LEVEL } else { SHARED_CATALOG_LEVEL }
}

fn all_know(level: u32, config: &Config, replica: &Replica) -> bool {
    let peers = replica.peers();
    let peers = peers.borrow();
    let knows = peers
        .values()
        .filter(|peer| peer.fresh && !peer.state.witness && peer.state.feature_level_max >= level);
    knows.count() + 1 >= config.replicas.len()
}
