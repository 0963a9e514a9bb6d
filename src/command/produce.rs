//! `drumlin produce`: lines of stdin, or one body, as messages.

use clap::Args;

use crate::cli::{Global, NamesrvShort};
use crate::failure::{Failure, Kind};

#[derive(Debug, Args)]
pub(crate) struct Produce {
    topic: String,
    #[command(flatten)]
    short: NamesrvShort,
    /// One message with this body, instead of a message per line of stdin
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
    /// For look-up; never routes
    #[arg(long, value_name = "KEY")]
    key: Vec<String>,
    #[arg(long)]
    tag: Option<String>,
    #[arg(long, value_name = "KEY=VALUE", value_parser = property)]
    property: Vec<(String, String)>,
    /// Messages of one group stay in order
    #[arg(long, value_name = "GROUP")]
    message_group: Option<String>,
}

fn property(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        Some(_) | None => Err("write KEY=VALUE".into()),
    }
}

impl Produce {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let _global = global.clone().with(self.short.short.as_ref());
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
