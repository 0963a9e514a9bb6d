//! `drumlin nameserver`: one nameserver until a signal.

use clap::Args;
use drumlin_nameserver::Nameserver as Server;

use super::server::{self, ConfigArgs};
use crate::cli::Global;
use crate::config::{Loaded, NameserverKeys};
use crate::failure::{Failure, Kind, chain};
use crate::logging;

#[derive(Debug, Args)]
pub(crate) struct Nameserver {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Nameserver {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.config.answer_example::<NameserverKeys>("nameserver")? {
            return Ok(());
        }
        let loaded: Loaded<NameserverKeys> = self.config.load()?;
        if self.config.answer(&loaded, global)? {
            return Ok(());
        }
        self.config.tie_to_parent()?;
        logging::start(global, &loaded.keys.node.name, "info,openraft=warn")?;
        server::log_start("nameserver", &loaded);
        super::runtime()?.block_on(serve(&loaded.keys))
    }
}

async fn serve(keys: &NameserverKeys) -> Result<(), Failure> {
    let nameserver = Server::start(keys.config()).await.map_err(|error| start_failure(&error))?;
    let addresses: Vec<_> = nameserver.addresses().iter().map(ToString::to_string).collect();
    tracing::info!(
        listeners = addresses.join(", "),
        http = nameserver.http_address().map(tracing::field::display),
        "started"
    );
    let signal = server::stop_signal().await?;
    tracing::info!(signal, "stopping");
    nameserver.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

pub(crate) fn start_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(Kind::Failed, format!("the nameserver cannot start: {}", chain(error)))
}
