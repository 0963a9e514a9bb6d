//! One broker as a whole: puts the parts together, starts and stops them.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::replica::Replica;

/// What the edges share.
#[derive(Debug)]
pub struct Context {
    pub config: Config,
    pub replica: Replica,
    pub metrics: Arc<Metrics>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("I/O failed")]
    Io(#[from] std::io::Error),
}

/// A running broker.
#[derive(Debug)]
pub struct Broker {}

impl Broker {
    pub async fn start(_config: Config) -> Result<Self, StartError> {
        unimplemented!()
    }

    /// Bound addresses of the listeners, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        unimplemented!()
    }

    pub fn http_address(&self) -> Option<SocketAddr> {
        unimplemented!()
    }

    /// Stops taking calls, finishes those in flight, closes the log.
    pub async fn shutdown(self) {
        unimplemented!()
    }
}
