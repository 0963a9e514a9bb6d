//! `drumlin log`: reads the log of a stopped or running node; takes no lock, changes nothing.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::Global;
use crate::failure::{Failure, Kind};

#[derive(Debug, Args)]
pub(crate) struct Log {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print entries
    Dump {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
        #[arg(long, value_name = "N")]
        from_index: Option<u64>,
        /// Inclusive
        #[arg(long, value_name = "N")]
        to_index: Option<u64>,
        /// Entries at most
        #[arg(long, default_value_t = 100)]
        max: u64,
    },
    /// Check every entry: 0 clean or torn tail only, 8 corrupt
    Verify {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
        /// Look into every record too
        #[arg(long)]
        deep: bool,
    },
    /// Show the segments
    Stat {
        /// A log's folder, a node's data directory, or the root of `dev`'s
        dir: PathBuf,
    },
}

impl Log {
    pub(crate) fn run(&self, _global: &Global) -> Result<(), Failure> {
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
