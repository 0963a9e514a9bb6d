//! `drumlin bench`: measures, and says in which units.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::cli::{Global, NamesrvShort};
use crate::config::{parse_duration, parse_size};
use crate::failure::{Failure, Kind};

#[derive(Debug, Args)]
pub(crate) struct Bench {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Acknowledged sends
    Produce(Sends),
    /// What the disk gives: overwrites with fdatasync
    Limits {
        /// Folder on the disk to measure
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Of each size
        #[arg(long, default_value = "5s", value_parser = duration)]
        duration: Duration,
    },
}

#[derive(Debug, Args)]
struct Sends {
    #[arg(long, default_value = "bench")]
    topic: String,
    /// Queues of the topic, if it has to be created
    #[arg(long, default_value_t = 8)]
    queues: u32,
    /// Of each body
    #[arg(long, default_value = "1024", value_parser = parse_size)]
    size: u64,
    #[arg(long, default_value = "10s", value_parser = duration, conflicts_with = "count")]
    duration: Duration,
    /// Messages in all, instead of a duration
    #[arg(long)]
    count: Option<u64>,
    /// Unacknowledged messages of each producer
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    in_flight: u32,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    producers: u32,
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text, "s")
}

impl Bench {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let _global = global.clone().with(self.short.short.as_ref());
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
