//! `drumlin nameserver`: one nameserver until a signal.

use clap::Args;

use super::server::ConfigArgs;
use crate::cli::Global;
use crate::config::{Loaded, NameserverKeys};
use crate::failure::{Failure, Kind};

#[derive(Debug, Args)]
pub(crate) struct Nameserver {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Nameserver {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let loaded: Loaded<NameserverKeys> = self.config.load()?;
        if self.config.answer(&loaded, global)? {
            return Ok(());
        }
        Err(Failure::new(Kind::NotSupported, "the nameserver is not supported yet"))
    }
}
