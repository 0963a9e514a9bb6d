//! `drumlin broker`: one broker until a signal.

use clap::Args;
use drumlin_broker::broker::Broker as Server;
use drumlin_broker::log::OpenError;

use super::server::{self, ConfigArgs};
use crate::cli::Global;
use crate::config::{BrokerKeys, Loaded};
use crate::failure::{Failure, Kind, chain};
use crate::logging;

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
        logging::start(global, &loaded.keys.node.name, "info,openraft=warn")?;
        server::log_start("broker", &loaded);
        super::runtime()?.block_on(serve(&loaded.keys))
    }
}

async fn serve(keys: &BrokerKeys) -> Result<(), Failure> {
    let config = keys.config();
    let data_dir = config.data_dir.display().to_string();
    let broker = Server::start(config).await.map_err(|error| start_failure(&error))?;
    let addresses: Vec<_> = broker.addresses().iter().map(ToString::to_string).collect();
    tracing::info!(
        listeners = addresses.join(", "),
        http = broker.http_address().map(tracing::field::display),
        data_dir,
        "started"
    );
    let ended = run_until_stopped(&broker).await;
    broker.shutdown().await;
    tracing::info!("stopped");
    ended
}

/// Returns at a signal, or with the reason why the broker cannot go on.
pub(crate) async fn run_until_stopped(broker: &Server) -> Result<(), Failure> {
    tokio::select! {
        signal = server::stop_signal() => {
            tracing::info!(signal = signal?, "stopping");
            Ok(())
        }
        reason = broker.failed() => {
            tracing::error!(reason, "the broker failed");
            Err(Failure::new(Kind::Failed, format!("the broker failed: {reason}")))
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
