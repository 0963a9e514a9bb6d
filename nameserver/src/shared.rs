//! What all edges of one nameserver share.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clients::Clients;
use crate::config::Config;
use crate::directory::Directory;
use crate::forward::Forwarder;
use crate::metrics::Metrics;

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) directory: Directory,
    pub(crate) forwarder: Forwarder,
    pub(crate) clients: Clients,
    pub(crate) metrics: Metrics,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}
