//! What all edges of one nameserver share.

use std::collections::BTreeSet;

use tokio::sync::watch;
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
    /// Broker groups and UUIDs that others have succeeded, as far as registered brokers say.
    pub(crate) succeeded: watch::Sender<BTreeSet<(String, String)>>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}
