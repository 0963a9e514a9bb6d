//! `drumlin dev`: nameserver and broker in one process on loopback.

use std::path::PathBuf;

use clap::Args;

use crate::cli::Global;
use crate::failure::{Failure, Kind};

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Where everything is kept
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 9876)]
    nameserver_port: u16,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 8081)]
    broker_port: u16,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 8082)]
    http_port: u16,
    /// One key of broker or nameserver
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = super::server::setting)]
    set: Vec<(String, String)>,
}

impl Dev {
    pub(crate) fn run(&self, _global: &Global) -> Result<(), Failure> {
        Err(Failure::new(Kind::NotSupported, "dev is not supported yet"))
    }
}
