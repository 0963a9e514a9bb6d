//! `drumlin broker`: one broker until a signal.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use drumlin_broker::broker::{Broker as Server, StartError};
use drumlin_broker::config::Config;
use drumlin_broker::log::OpenError;
use drumlin_broker::replica::start::Ended;

use super::server::{self, ConfigArgs};
use crate::cli::Global;
use crate::config::{BrokerKeys, Loaded};
use crate::failure::{Failure, Kind, chain};
use crate::logging;

/// How long a broker that begins anew waits for its ports.
const REBIND_TIMEOUT: Duration = Duration::from_secs(10);
const REBIND_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct Broker {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Broker {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.config.answer_example::<BrokerKeys>("broker")? {
            return Ok(());
        }
        let loaded: Loaded<BrokerKeys> = self.config.load()?;
        if self.config.answer(&loaded, global)? {
            return Ok(());
        }
        self.config.tie_to_parent()?;
        logging::start(global, &loaded.keys.node.name, "info,openraft=error")?;
        server::log_start("broker", &loaded);
        super::runtime()?.block_on(serve(&loaded.keys))
    }
}

/// Why a run ended in order.
#[derive(Debug)]
pub(crate) enum Run {
    Stopped,
    Restart,
}

async fn serve(keys: &BrokerKeys) -> Result<(), Failure> {
    let mut config = keys.config();
    let data_dir = config.data_dir.display().to_string();
    let mut restarts = false;
    loop {
        let Some(broker) = start(&config, restarts).await? else { return Ok(()) };
        keep_ports(&mut config, &broker);
        let addresses: Vec<_> = broker.addresses().iter().map(ToString::to_string).collect();
        tracing::info!(
            listeners = addresses.join(", "),
            peers = broker.peers_address().map(tracing::field::display),
            http = broker.http_address().map(tracing::field::display),
            data_dir,
            "started"
        );
        let ended = run_until_stopped(&broker).await;
        let closed = broker.shutdown().await;
        if matches!(ended, Ok(Run::Restart)) && !closed {
            let reason = "the broker must begin anew, but its disk does not answer";
            return Err(Failure::new(Kind::Failed, reason));
        }
        if !matches!(ended, Ok(Run::Restart)) {
            tracing::info!("stopped");
            return ended.map(drop);
        }
        restarts = true;
    }
}

/// `None`: a signal came first, while the broker waited for the rest of its group.
async fn start(config: &Config, restarts: bool) -> Result<Option<Server>, Failure> {
    let since = tokio::time::Instant::now();
    loop {
        let started = tokio::select! {
            started = Server::start(config.clone()) => started,
            signal = server::stop_signal() => {
                tracing::info!(signal = signal?, "stopped before the start was complete");
                return Ok(None);
            }
        };
        match started {
            // Connections of the run before may still be closing.
            Err(StartError::Bind { name, bind, source })
                if restarts && since.elapsed() < REBIND_TIMEOUT =>
            {
                tracing::debug!(name, %bind, error = %source, "a port is still in use");
                tokio::time::sleep(REBIND_INTERVAL).await;
            }
            started => return started.map(Some).map_err(|error| start_failure(&error)),
        }
    }
}

/// Whoever knows the ports of this run must find the next one there.
fn keep_ports(config: &mut Config, broker: &Server) {
    let keep = |bind: &mut SocketAddr, bound: SocketAddr| bind.set_port(bound.port());
    for (listener, bound) in config.listeners.iter_mut().zip(broker.addresses()) {
        keep(&mut listener.bind, bound);
    }
    if let (Some(peers), Some(bound)) = (&mut config.peers, broker.peers_address()) {
        keep(&mut peers.bind, bound);
    }
    if let (Some(http), Some(bound)) = (&mut config.http, broker.http_address()) {
        keep(http, bound);
    }
}

/// Returns at a signal, or when the broker must begin anew, or with the reason why it cannot go on.
pub(crate) async fn run_until_stopped(broker: &Server) -> Result<Run, Failure> {
    tokio::select! {
        signal = server::stop_signal() => {
            tracing::info!(signal = signal?, "stopping");
            Ok(Run::Stopped)
        }
        ended = broker.ended() => match ended {
            Ended::Failed(reason) => {
                tracing::error!(reason, "the broker failed");
                Err(Failure::new(Kind::Failed, format!("the broker failed: {reason}")))
            }
            Ended::Restart(reason) => {
                tracing::warn!(reason, "the broker begins anew");
                Ok(Run::Restart)
            }
        }
    }
}

/// Corruption has an exit code of its own.
pub(crate) fn start_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let corrupt = causes
        .filter_map(|cause| cause.downcast_ref::<OpenError>())
        .any(|cause| matches!(cause, OpenError::Corrupt { .. } | OpenError::Segment { .. }));
    let kind = if corrupt { Kind::Corrupt } else { Kind::Failed };
    Failure::new(kind, format!("the broker cannot start: {}", chain(error)))
}
