//! `drumlin topic`: definitions of topics, and where their queues begin and end.

use clap::{Args, Subcommand, ValueEnum};

use crate::cli::{Global, NamesrvShort};
use crate::failure::{Failure, Kind};
use crate::moment::Start;

#[derive(Debug, Args)]
pub(crate) struct Topic {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Create a topic
    Create {
        name: String,
        /// On each broker group
        #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_535))]
        queues: u32,
        /// What it accepts
        #[arg(long = "type", value_enum, default_value_t = Type::Normal)]
        kind: Type,
        /// Broker groups that get queues [default: all]
        #[arg(long, value_name = "A,B", value_delimiter = ',')]
        groups: Vec<String>,
    },
    /// List all topics
    List,
    /// Show a topic and its queues
    Describe { name: String },
    /// Delete a topic and all that is in it
    Delete { name: String },
    /// Show the offset of a moment in every queue of a topic
    Offsets {
        name: String,
        /// earliest, latest, or a time
        #[arg(long, default_value = "latest", allow_hyphen_values = true)]
        at: Start,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Type {
    Normal,
    Fifo,
    Mixed,
}

impl Topic {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let _global = global.clone().with(self.short.short.as_ref());
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
