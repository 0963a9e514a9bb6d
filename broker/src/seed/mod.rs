//! Making a replica whole from another one: a re-seed copies checkpoint and segments as files, a
//! repair fetches single entries. Knows files, marks and progress; when Raft wants either is
//! decided elsewhere.

use std::fmt;

use bytes::Bytes;
use drumlin_proto::native::PullRequest;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::time::Instant;
use tonic::Status;
use uuid::Uuid;

pub mod donor;
pub mod install;
mod mark;
pub mod puller;

/// Folder below the data directory in which a re-seed gathers its files.
pub const FOLDER: &str = "reseed";
/// Folders of a manifest's paths, and of the data directory.
const LOG: &str = "log";
const CHECKPOINT: &str = "checkpoint";

/// Whose re-seed it is: files gathered for another directory are not trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    pub group_uuid: Uuid,
    pub directory_uuid: Uuid,
}

/// How far one copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeedProgress {
    pub done_bytes: u64,
    pub all_bytes: u64,
    /// When `done_bytes` rose last, or the copy began.
    pub advanced_at: Instant,
}

impl SeedProgress {
    fn begin(all_bytes: u64, now: Instant) -> Self {
        Self { done_bytes: 0, all_bytes, advanced_at: now }
    }

    fn advance(&mut self, done_bytes: u64, now: Instant) {
        if done_bytes > self.done_bytes {
            self.advanced_at = now;
        }
        self.done_bytes = done_bytes;
    }
}

/// Bytes of a file, in order.
pub type Chunks = BoxStream<'static, Result<Bytes, Status>>;

/// The way to other data nodes' files, by their Raft ids.
pub trait Peers: fmt::Debug + Send + Sync {
    fn pull(&self, donor: u64, request: PullRequest) -> BoxFuture<'_, Result<Chunks, Status>>;
}

#[cfg(test)]
mod tests;
