//! `drumlin broker`: one broker until a signal.

use clap::Args;
use drumlin_broker::broker::Broker as Server;

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
        logging::start(global, "info")?;
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
    let signal = server::stop_signal().await?;
    tracing::info!(signal, "stopping");
    broker.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

/// Corruption has an exit code of its own.
pub(crate) fn start_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(Kind::Failed, format!("the broker cannot start: {}", chain(error)))
}
