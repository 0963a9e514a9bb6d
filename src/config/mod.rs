//! Configuration: one table of keys per role, read from files, environment and flags.
//!
//! [`broker`] and [`nameserver`] hold the tables; everything else here is generated from them:
//! parsing, environment names, the commented files in `conf/` and what `--print-config` shows.
//! Nothing is ignored and every fault is told in one run.

use std::path::PathBuf;

mod broker;
mod check;
mod document;
mod fault;
mod key;
mod nameserver;
mod reader;
mod source;
mod value;

pub(crate) use broker::BrokerKeys;
pub(crate) use document::{document, effective};
pub(crate) use fault::{Faults, nearest};
pub(crate) use nameserver::NameserverKeys;
pub(crate) use reader::{Effective, Keys, Loaded};
pub(crate) use value::parse_duration;

pub(crate) use key::Table;
use reader::Reader;
use source::Layers;

/// What was given besides the built-in defaults, weakest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Given {
    /// TOML text with the name to show for it, below the files.
    pub(crate) preset: Option<(&'static str, String)>,
    pub(crate) files: Vec<PathBuf>,
    /// All of the environment: what lacks our prefix is passed over.
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) flags: Vec<Flag>,
}

/// A key set on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flag {
    /// As the user wrote it: `--data-dir`, `--set`.
    pub(crate) flag: &'static str,
    /// `section.key`
    pub(crate) path: String,
    pub(crate) value: String,
}

/// A size in bytes, as typed: `64MiB`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    value::Bytes::parse_text(text).map(|bytes| bytes.0)
}

/// Reads the keys of one role. `others`: tables of a second role in this process, whose keys are
/// no fault.
pub(crate) fn load<K: Keys>(given: &Given, others: &[&'static Table]) -> Result<Loaded<K>, Faults> {
    let mut faults = Vec::new();
    let layers = Layers::collect(given, K::TABLES, others, &mut faults);
    let mut reader = Reader::new(layers, faults);
    let keys = K::read(&mut reader);
    keys.check(&mut reader);
    reader.finish(keys, given.files.clone())
}

#[cfg(test)]
mod tests;
