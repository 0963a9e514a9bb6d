//! `drumlin msg`: one message, by its place or its time.

use clap::{Args, Subcommand, ValueEnum};

use crate::cli::{Global, NamesrvShort};
use crate::failure::{Failure, Kind};
use crate::moment::{Place, TopicMoment};

#[derive(Debug, Args)]
pub(crate) struct Msg {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print one message: headers, then the body
    Get(Get),
}

#[derive(Debug, Args)]
struct Get {
    #[command(flatten)]
    which: Which,
    #[arg(long, value_enum, default_value_t = Body::Text)]
    body: Body,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The message at a place
    #[arg(long, value_name = "TOPIC/BROKERGROUP/ID:OFFSET")]
    offset: Option<Place>,
    /// The first message stored at or after a time
    #[arg(long, value_name = "TOPIC@TIME")]
    time: Option<TopicMoment>,
}

/// How a body is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Body {
    Text,
    Hex,
    Base64,
    /// The bytes as they are, without headers
    Raw,
    None,
}

impl Msg {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let _global = global.clone().with(self.short.short.as_ref());
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
