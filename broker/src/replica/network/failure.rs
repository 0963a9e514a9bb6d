//! Why another member has not answered, and what that says of it.

use std::error::Error as StdError;
use std::io;

use openraft::errors::{RPCError, Unreachable};

use crate::replica::raft_types::TypeConfig;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("member {name} has no address")]
    NoAddress { name: String },
    #[error("member {name} at {address} refuses: {reason}")]
    Refused { name: String, address: String, reason: String },
    #[error("member {name} at {address} does not answer: {reason}")]
    Silent { name: String, address: String, reason: String },
    #[error("the connection to member {name} at {address} broke: {reason}")]
    Broken { name: String, address: String, reason: String },
    #[error("member {name} answers what cannot be used: {reason}")]
    Invalid { name: String, reason: String },
    #[error("member {name} lost entries that it had answered as synced")]
    Lost { name: String },
    #[error(
        "the witness at {name} lost entries that it had answered as synced, and counts no more: \
        replace it, `drumlin cluster replace-witness`"
    )]
    LostWitness { name: String },
    #[error("an answer of member {name} is from before its log went back")]
    Stale { name: String },
    #[error("this node may not campaign: {reason}")]
    Doubt { reason: &'static str },
    #[error("a witness does not lead")]
    Witness,
}

impl From<LinkError> for Unreachable<TypeConfig> {
    fn from(error: LinkError) -> Self {
        Self::new(&error)
    }
}

impl From<LinkError> for RPCError<TypeConfig> {
    fn from(error: LinkError) -> Self {
        Self::Unreachable(error.into())
    }
}

fn causes<'e>(
    error: &'e (dyn StdError + 'static),
) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let cause = next?;
        next = cause.source();
        Some(cause)
    })
}

pub(super) fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn io_kind(error: &(dyn StdError + 'static)) -> Option<io::ErrorKind> {
    causes(error).find_map(|cause| Some(cause.downcast_ref::<io::Error>()?.kind()))
}

/// Whether nobody takes connections at the address.
pub(super) fn refused(error: &(dyn StdError + 'static)) -> bool {
    io_kind(error) == Some(io::ErrorKind::ConnectionRefused)
}

/// Also when nobody answered the connection's pings.
pub(super) fn timed_out(error: &(dyn StdError + 'static)) -> bool {
    io_kind(error) == Some(io::ErrorKind::TimedOut)
        || causes(error).any(|cause| cause.to_string().contains("timed out"))
}
