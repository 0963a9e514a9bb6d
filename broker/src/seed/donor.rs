//! The giving side of a re-seed: holds one set of files as it was at one moment, and reads from it
//! at a bounded rate. What the files mean is the receiver's business.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use drumlin_proto::native::{PullRequest, SeedFile, SeedManifest};
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;
use uuid::Uuid;

use super::{CHECKPOINT, Chunks, LOG, SeedProgress};
use crate::log::{Export, ExportedSegment};

/// What is read and sent at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// A set of files that nobody has made progress with for so long is let go of.
pub const STALLED_MAX: Duration = Duration::from_mins(10);
/// Where the data disk is so full, space matters more than a re-seed.
const DISK_PERCENT_MAX: u8 = 85;

/// Receivers of this node's files, by Raft id.
pub type Sending = BTreeMap<u64, SeedProgress>;

/// Gives files of this node to others; clones share it.
#[derive(Clone, Debug)]
pub struct Donor {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    open: Mutex<Option<Arc<Open>>>,
    sending: watch::Sender<Sending>,
    bytes_per_second_max: Option<u64>,
    /// When the next byte may be sent.
    free_at: tokio::sync::Mutex<Instant>,
    /// Since when nobody has made progress, over all sets; `None`: nobody wants any.
    waits_since: Mutex<Option<Instant>>,
}

/// One set of files.
#[derive(Debug)]
struct Open {
    manifest: SeedManifest,
    files: BTreeMap<String, Source>,
}

/// Where a file's bytes come from: it may have lost its name since.
#[derive(Debug)]
enum Source {
    Segment(ExportedSegment),
    Checkpoint { file: File, file_bytes: u64 },
}

impl Source {
    fn file_bytes(&self) -> u64 {
        match self {
            Self::Segment(segment) => segment.file_bytes(),
            Self::Checkpoint { file_bytes, .. } => *file_bytes,
        }
    }

    fn read(&self, at: u64) -> io::Result<Bytes> {
        let left = self.file_bytes().saturating_sub(at);
        let count = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        let mut chunk = vec![0; count];
        match self {
            Self::Segment(segment) => {
                if segment.read_at(at, &mut chunk)? < count {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Self::Checkpoint { file, .. } => file.read_exact_at(&mut chunk, at)?,
        }
        Ok(Bytes::from(chunk))
    }
}

impl Donor {
    /// `bytes_per_second_max` holds for all receivers together.
    pub fn new(bytes_per_second_max: Option<u64>) -> Self {
        let shared = Shared {
            open: Mutex::default(),
            sending: watch::Sender::default(),
            bytes_per_second_max: bytes_per_second_max.filter(|max| *max > 0),
            free_at: tokio::sync::Mutex::new(Instant::now()),
            waits_since: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// What is given now, if anything is.
    pub fn manifest(&self) -> Option<SeedManifest> {
        self.shared.open.lock().as_ref().map(|open| open.manifest.clone())
    }

    pub fn is_open(&self) -> bool {
        self.shared.open.lock().is_some()
    }

    pub fn sending(&self) -> watch::Receiver<Sending> {
        self.shared.sending.subscribe()
    }

    /// Holds a checkpoint and the segments that go with it. Blocks while the checkpoint is read.
    pub fn open(
        &self,
        checkpoint: &Path,
        export: Export,
        now: Instant,
    ) -> io::Result<SeedManifest> {
        let mut files = BTreeMap::new();
        let mut listed = Vec::new();
        let name = checkpoint.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io::Error::other("a checkpoint without a name"))?;
        let (source, crc) = open_checkpoint(checkpoint)?;
        let mut list = |path: String, source: Source, crc: Option<u32>| {
            listed.push(SeedFile { path: path.clone(), bytes: source.file_bytes(), crc });
            files.insert(path, source);
        };
        list(format!("{CHECKPOINT}/{name}"), source, Some(crc));
        for segment in export.segments {
            // Its frames have checksums of their own.
            list(format!("{LOG}/{}", segment.name()), Source::Segment(segment), None);
        }
        let manifest = SeedManifest { seed_id: Uuid::new_v4().to_string(), files: listed };
        let all_bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
        tracing::info!(
            seed = manifest.seed_id,
            files = manifest.files.len(),
            bytes = all_bytes,
            last = %export.last,
            "holds files for a re-seed"
        );
        let open = Open { manifest: manifest.clone(), files };
        self.shared.waits_since.lock().get_or_insert(now);
        *self.shared.open.lock() = Some(Arc::new(open));
        self.shared.sending.send_replace(Sending::new());
        Ok(manifest)
    }

    /// What a receiver said of itself.
    pub fn note(&self, receiver: u64, done_bytes: u64, all_bytes: u64, now: Instant) {
        self.shared.sending.send_modify(|sending| {
            let progress =
                sending.entry(receiver).or_insert_with(|| SeedProgress::begin(all_bytes, now));
            progress.all_bytes = all_bytes;
            if done_bytes > progress.done_bytes {
                *self.shared.waits_since.lock() = Some(now);
            }
            progress.advance(done_bytes, now);
        });
    }

    /// A receiver needs no more; with the last one the files are let go of.
    pub fn done(&self, receiver: u64) {
        let mut others = 0;
        let known = self.shared.sending.send_if_modified(|sending| {
            let known = sending.remove(&receiver).is_some();
            others = sending.len();
            known
        });
        if known && others == 0 {
            *self.shared.waits_since.lock() = None;
            self.close("every receiver has them");
        }
    }

    fn close(&self, reason: &str) {
        if let Some(open) = self.shared.open.lock().take() {
            tracing::info!(seed = open.manifest.seed_id, reason, "lets go of a re-seed's files");
        }
        self.shared.sending.send_replace(Sending::new());
    }

    /// Lets go of files that nobody makes progress with.
    pub fn expire(&self, now: Instant) {
        if self.stalled(now) {
            self.close("nobody made progress with them");
        }
    }

    /// Also while other files are held by now: whoever got no further with the last ones may not.
    fn stalled(&self, now: Instant) -> bool {
        let since = *self.shared.waits_since.lock();
        since.is_some_and(|since| now.saturating_duration_since(since) > STALLED_MAX)
    }

    /// Whether trims may go on: they wait for a re-seed that advances, since what it needs behind
    /// its files would be gone, but not where the fullest replica's disk runs full.
    pub fn allows_trims(&self, fullest_disk_percent: u8, now: Instant) -> bool {
        if self.stalled(now) {
            return true;
        }
        if fullest_disk_percent >= DISK_PERCENT_MAX {
            self.close("a disk runs full");
        }
        self.shared.open.lock().is_none()
    }

    /// The bytes of a file from some place on.
    ///
    /// Errors: `NotFound` where the set is not the one held, or has no such file.
    pub fn pull(&self, request: &PullRequest) -> Result<Chunks, Status> {
        let open = self.held(&request.seed_id)?;
        if !open.files.contains_key(&request.path) {
            return Err(Status::not_found(format!("{} is not in this re-seed", request.path)));
        }
        let begin = (self.clone(), request.path.clone(), request.seed_id.clone(), request.from);
        let chunks = stream::try_unfold(begin, |(donor, path, seed_id, at)| async move {
            let open = donor.held(&seed_id)?;
            let read_path = path.clone();
            let reading = tokio::task::spawn_blocking(move || {
                open.files.get(&read_path).map_or(Ok(Bytes::new()), |source| source.read(at))
            });
            let chunk = reading
                .await
                .map_err(io::Error::other)
                .and_then(|read| read)
                .map_err(|error| Status::internal(format!("{path}: {error}")))?;
            if chunk.is_empty() {
                return Ok(None);
            }
            donor.pace(chunk.len()).await;
            let next = at + chunk.len() as u64;
            Ok(Some((chunk, (donor, path, seed_id, next))))
        });
        Ok(chunks.boxed())
    }

    fn held(&self, seed_id: &str) -> Result<Arc<Open>, Status> {
        let open = self.shared.open.lock().clone();
        open.filter(|open| open.manifest.seed_id == seed_id)
            .ok_or_else(|| Status::not_found(format!("re-seed {seed_id} is not held any more")))
    }

    async fn pace(&self, chunk_bytes: usize) {
        let Some(max) = self.shared.bytes_per_second_max else { return };
        let nanos = (chunk_bytes as u64).saturating_mul(1_000_000_000) / max;
        let until = {
            let mut free_at = self.shared.free_at.lock().await;
            *free_at = (*free_at).max(Instant::now()) + Duration::from_nanos(nanos);
            *free_at
        };
        tokio::time::sleep_until(until).await;
    }
}

fn open_checkpoint(path: &Path) -> io::Result<(Source, u32)> {
    let mut file = File::open(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut file_bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        file_bytes += read as u64;
    }
    Ok((Source::Checkpoint { file, file_bytes }, hasher.finalize()))
}
