//! `drumlin nameserver`: one nameserver, with the witnesses that it hosts, until a signal.

use clap::Args;
use drumlin_broker::replica::witness::{Pace, WitnessHost, WitnessOptions};
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
        logging::start(global, &loaded.keys.node.name, "info,openraft=error")?;
        server::log_start("nameserver", &loaded);
        super::runtime()?.block_on(serve(&loaded.keys))
    }
}

async fn serve(keys: &NameserverKeys) -> Result<(), Failure> {
    let witnesses = WitnessHost::open(WitnessOptions {
        cluster: keys.cluster.name.clone(),
        node: keys.node.name.clone(),
        dir: keys.node.data_dir.join("witness"),
        pace: Pace::default(),
    });
    let witnesses = witnesses.await.map_err(|error| start_failure(&error))?;
    let started = Server::start_with(keys.config(), witnesses.routes()).await;
    let nameserver = started.map_err(|error| start_failure(&error))?;
    let addresses: Vec<_> = nameserver.addresses().iter().map(ToString::to_string).collect();
    tracing::info!(
        listeners = addresses.join(", "),
        http = nameserver.http_address().map(tracing::field::display),
        witnesses = ?witnesses.groups(),
        "started"
    );
    let signal = tokio::select! {
        signal = server::stop_signal() => signal?,
        () = retire_succeeded(&nameserver, &witnesses) => unreachable!("it does not end"),
    };
    tracing::info!(signal, "stopping");
    witnesses.shutdown().await;
    nameserver.shutdown().await;
    tracing::info!("stopped");
    Ok(())
}

/// Takes witnesses of groups out of use that an unsafe election has replaced. Does not end.
async fn retire_succeeded(nameserver: &Server, witnesses: &WitnessHost) {
    let mut succeeded = nameserver.succeeded();
    loop {
        let groups = succeeded.borrow_and_update().clone();
        for (broker_group, group_uuid) in &groups {
            witnesses.retire_succeeded(broker_group, group_uuid).await;
        }
        if succeeded.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

pub(crate) fn start_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::new(Kind::Failed, format!("the nameserver cannot start: {}", chain(error)))
}
