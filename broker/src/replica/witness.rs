//! The witness: a voter that keeps votes, membership and the headers of entries, but no payload. It
//! never leads, never asks for votes, and applies nothing but the membership.
//!
//! Its log is the one of data nodes, with a stub in place of each batch, so votes and headers are
//! synced before it answers. It knows nothing of topics, nor of the gate: the leader holds that.

use std::io;
use std::path::PathBuf;

use crate::data_dir::DataDirError;
use crate::log::OpenError;

mod directory;
mod host;
mod machine;
mod mute;
mod trimming;
mod voter;

pub use host::{WitnessHost, WitnessOptions};
use machine::Machine;
pub use voter::Pace;

type WitnessRaft = openraft::Raft<super::raft_types::TypeConfig, Machine>;

/// Why a witness cannot be used. It names its directory, because the process has several.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    #[error("witness directory {} cannot be used", dir.display())]
    Io {
        dir: PathBuf,
        #[source]
        error: io::Error,
    },
    #[error(transparent)]
    Directory(#[from] DataDirError),
    #[error("{} is damaged ({reason}): replace this witness, `drumlin cluster replace-witness`",
        path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("witness directory {} belongs to {what} {found:?}, not to {own:?}", dir.display())]
    OtherOwner { dir: PathBuf, what: &'static str, found: String, own: String },
    #[error("witness directory {} has lost {what}, so it may have forgotten votes and must not \
        vote under its old id: replace it, `drumlin cluster replace-witness`", dir.display())]
    Forgot { dir: PathBuf, what: &'static str },
    #[error("the log of the witness in {} cannot be opened", dir.display())]
    Log {
        dir: PathBuf,
        #[source]
        error: OpenError,
    },
    #[error("the witness in {} cannot start: {reason}", dir.display())]
    Raft { dir: PathBuf, reason: String },
}

#[cfg(test)]
mod tests;
