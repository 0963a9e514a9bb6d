//! The taking side of a re-seed: gathers the donor's files in a folder of their own, as far as it
//! comes each time, checks every frame of them, and marks the folder complete. What was there
//! before stays untouched: see [`super::install`].

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::{PullRequest, SeedFile, SeedManifest};
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Status;

use super::mark::{CLEARED_FILE, COMPLETE_FILE, Mark, SOURCE_FILE, decode_source, encode_source};
use super::{CHECKPOINT, FOLDER, LOG, Peers, Receiver, SeedProgress};
use crate::disk::{Disk, DiskFile, RealDisk, read_file, replace_file};
use crate::log::staged::{self, StagedLog};
use crate::log::{OpenError, Vote};
use crate::replica::checkpoint::{self, CheckpointError};

/// How long a donor may take for the next piece.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a re-seed has not come further. What was gathered stays.
#[derive(Debug, thiserror::Error)]
enum PullError {
    #[error("I/O failed")]
    Io(#[from] io::Error),
    #[error("the donor's list names {0}, which is no file of a re-seed")]
    Path(String),
    #[error("the donor does not give {path}")]
    Donor { path: String, source: Box<Status> },
    #[error("the donor's {path} ends at byte {at} of {bytes}")]
    Short { path: String, at: u64, bytes: u64 },
    #[error("the donor sent nothing of {path} for {CHUNK_TIMEOUT:?}")]
    Silent { path: String },
    #[error("the checksum of {path} does not match")]
    Checksum { path: String },
    #[error("the copied log does not hold")]
    Log(#[from] OpenError),
    #[error("the copied checkpoint does not hold")]
    Checkpoint(#[from] CheckpointError),
    #[error("the list has {0} checkpoints, not one")]
    Checkpoints(usize),
    #[error("the copied log ends in term {found}, behind that of its leader {leader}")]
    Term { found: u64, leader: u64 },
}

/// Takes files from others; clones share it.
#[derive(Clone, Debug)]
pub struct Puller {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The data directory.
    root: PathBuf,
    receiver: Receiver,
    peers: Arc<dyn Peers>,
    job: Mutex<Option<Job>>,
    progress: watch::Sender<Option<SeedProgress>>,
    complete: watch::Sender<bool>,
}

#[derive(Debug)]
struct Job {
    seed_id: String,
    task: JoinHandle<()>,
}

impl Puller {
    pub fn new(root: &Path, receiver: Receiver, peers: Arc<dyn Peers>) -> Self {
        let shared = Shared {
            root: root.to_owned(),
            receiver,
            peers,
            job: Mutex::default(),
            progress: watch::Sender::default(),
            complete: watch::Sender::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// `None`: nothing is taken.
    pub fn progress(&self) -> watch::Receiver<Option<SeedProgress>> {
        self.shared.progress.subscribe()
    }

    /// True once all is there: the node must begin anew, and [`super::install`] does the rest.
    pub fn complete(&self) -> watch::Receiver<bool> {
        self.shared.complete.subscribe()
    }

    /// Goes on taking what a leader gives; answers at once with how far it has come. `vote` is
    /// that of its leadership, synced here.
    pub fn offer(&self, donor: u64, vote: Vote, manifest: &SeedManifest) -> SeedProgress {
        let all_bytes = manifest.files.iter().map(|file| file.bytes).sum();
        let mut job = self.shared.job.lock();
        let goes_on = job
            .as_ref()
            .is_some_and(|job| job.seed_id == manifest.seed_id && !job.task.is_finished());
        if !goes_on && !*self.shared.complete.borrow() {
            let before = job.take();
            if before.as_ref().is_none_or(|before| before.seed_id != manifest.seed_id) {
                tracing::info!(donor, seed = manifest.seed_id, all_bytes, "a re-seed begins");
            }
            self.shared.progress.send_replace(Some(SeedProgress::begin(all_bytes, Instant::now())));
            let pull =
                Pull { shared: Arc::clone(&self.shared), donor, vote, manifest: manifest.clone() };
            let task = tokio::spawn(async move {
                if let Some(before) = before {
                    before.task.abort();
                    // Aborted or ended: either way it writes no more.
                    before.task.await.ok();
                }
                pull.run().await;
            });
            *job = Some(Job { seed_id: manifest.seed_id.clone(), task });
        }
        let progress = *self.shared.progress.borrow();
        progress.unwrap_or_else(|| SeedProgress::begin(all_bytes, Instant::now()))
    }

    /// Waits until nothing is taken any more.
    #[cfg(test)]
    pub(super) async fn ended(&self) {
        let job = self.shared.job.lock().take();
        if let Some(job) = job {
            job.task.await.unwrap();
        }
    }

    /// Takes no more.
    pub async fn stop(&self) {
        let job = self.shared.job.lock().take();
        if let Some(job) = job {
            job.task.abort();
            job.task.await.ok();
        }
    }
}

/// One attempt.
struct Pull {
    shared: Arc<Shared>,
    donor: u64,
    vote: Vote,
    manifest: SeedManifest,
}

impl Pull {
    async fn run(self) {
        let (donor, seed) = (self.donor, self.manifest.seed_id.clone());
        let shared = Arc::clone(&self.shared);
        match self.pull_all().await {
            Ok(staged) => {
                tracing::info!(donor, seed, last = %staged.last, "a re-seed is complete");
                shared.complete.send_replace(true);
            }
            Err(error) => {
                let reason = error_chain(&error);
                tracing::warn!(donor, seed, reason, "a re-seed stopped; it goes on when asked");
            }
        }
    }

    async fn pull_all(self) -> Result<StagedLog, PullError> {
        let this = Arc::new(self);
        let preparing = Arc::clone(&this);
        blocking(move || preparing.prepare()).await?;
        let mut done_bytes = 0;
        for file in &this.manifest.files {
            this.pull_file(file, done_bytes).await?;
            done_bytes += file.bytes;
        }
        let finishing = Arc::clone(&this);
        blocking(move || finishing.finish()).await
    }

    fn folder(&self) -> PathBuf {
        self.shared.root.join(FOLDER)
    }

    /// Makes the folder ready: what is in it afterwards is a beginning of the files to come.
    fn prepare(&self) -> Result<(), PullError> {
        let disk = RealDisk;
        let folder = self.folder();
        let mut wanted = BTreeSet::new();
        for file in &self.manifest.files {
            wanted.insert(checked_path(&file.path)?);
        }
        let same_source = read_file(&disk, &folder.join(SOURCE_FILE))?
            .and_then(|bytes| decode_source(&bytes).ok())
            .is_some_and(|source| source == (self.shared.receiver, self.donor));
        for part in [LOG, CHECKPOINT] {
            let dir = folder.join(part);
            disk.create_dir(&dir)?;
            for name in disk.list(&dir)? {
                let path = dir.join(&name);
                let keep = same_source
                    && part == LOG
                    && self.manifest.files.iter().any(|file| {
                        file.path == format!("{part}/{name}") && fits(&disk, &path, file.bytes)
                    });
                if !keep {
                    disk.remove(&path)?;
                }
            }
            disk.sync_dir(&dir)?;
        }
        for name in disk.list(&folder)? {
            if [SOURCE_FILE, COMPLETE_FILE, CLEARED_FILE].contains(&name.as_str()) {
                disk.remove(&folder.join(name))?;
            }
        }
        let source = encode_source(self.shared.receiver, self.donor);
        replace_file(&disk, &folder, SOURCE_FILE, &[&source])?;
        disk.sync_dir(&self.shared.root)?;
        Ok(())
    }

    async fn pull_file(&self, wanted: &SeedFile, before_bytes: u64) -> Result<(), PullError> {
        let (part, name) = checked_path(&wanted.path)?;
        let path = self.folder().join(part).join(name);
        let file = blocking(move || Ok(open_or_create(&RealDisk, &path)?)).await?;
        let mut at = file.file_bytes()?;
        self.advance(before_bytes + at);
        if at < wanted.bytes {
            let donor =
                |status| PullError::Donor { path: wanted.path.clone(), source: Box::new(status) };
            let request = PullRequest {
                seed_id: self.manifest.seed_id.clone(),
                path: wanted.path.clone(),
                from: at,
            };
            let pulling = self.shared.peers.pull(self.donor, request);
            let silent = |_| PullError::Silent { path: wanted.path.clone() };
            let mut chunks = tokio::time::timeout(CHUNK_TIMEOUT, pulling)
                .await
                .map_err(silent)?
                .map_err(donor)?;
            while at < wanted.bytes {
                let next = tokio::time::timeout(CHUNK_TIMEOUT, chunks.next()).await;
                let Some(chunk) = next.map_err(silent)? else { break };
                let mut chunk = chunk.map_err(donor)?;
                let left = wanted.bytes - at;
                chunk.truncate(usize::try_from(left).map_or(chunk.len(), |l| l.min(chunk.len())));
                let chunk_bytes = chunk.len() as u64;
                let into = Arc::clone(&file);
                blocking(move || Ok(into.write_at(&chunk, at)?)).await?;
                at += chunk_bytes;
                self.advance(before_bytes + at);
            }
        }
        if at != wanted.bytes {
            let (path, bytes) = (wanted.path.clone(), wanted.bytes);
            return Err(PullError::Short { path, at, bytes });
        }
        blocking(move || Ok(file.sync()?)).await
    }

    fn advance(&self, done_bytes: u64) {
        self.shared.progress.send_modify(|progress| {
            if let Some(progress) = progress {
                progress.advance(done_bytes, Instant::now());
            }
        });
    }

    /// Checks what was gathered, syncs the folder, and marks it complete.
    fn finish(&self) -> Result<StagedLog, PullError> {
        let disk = RealDisk;
        let folder = self.folder();
        let dirs = [folder.join(LOG), folder.join(CHECKPOINT)];
        let mark = self.check_checkpoint(&disk, &folder)?;
        let staged = staged::check(&dirs[0], self.shared.receiver.group_uuid, &mark);
        if let Err(OpenError::Corrupt { segment, .. } | OpenError::Segment { segment, .. }) =
            &staged
        {
            // Taken anew next time.
            disk.remove(&dirs[0].join(segment))?;
        }
        let staged = staged?;
        if staged.last.term > self.vote.term {
            let (found, leader) = (staged.last.term.get(), self.vote.term.get());
            return Err(PullError::Term { found, leader });
        }
        for dir in dirs.iter().chain([&folder, &self.shared.root]) {
            disk.sync_dir(dir)?;
        }
        let receiver = self.shared.receiver;
        let complete = Mark { receiver, donor: self.donor, vote: self.vote, staged };
        replace_file(&disk, &folder, COMPLETE_FILE, &[&complete.encode()])?;
        Ok(staged)
    }

    fn check_checkpoint(
        &self,
        disk: &RealDisk,
        folder: &Path,
    ) -> Result<crate::log::CheckpointMark, PullError> {
        let with_crc = self.manifest.files.iter().filter(|file| file.path.starts_with(CHECKPOINT));
        let files: Vec<_> = with_crc.collect();
        let [file] = files.as_slice() else { return Err(PullError::Checkpoints(files.len())) };
        let path = folder.join(&file.path);
        let bytes = read_file(disk, &path)?.unwrap_or_default();
        if Some(crc32fast::hash(&bytes)) != file.crc {
            disk.remove(&path)?;
            return Err(PullError::Checksum { path: file.path.clone() });
        }
        let meta = checkpoint::read_meta(&path, &bytes)?;
        let (found, own) = (meta.group_uuid, self.shared.receiver.group_uuid);
        if found != own {
            return Err(CheckpointError::OtherGroup { path, found, own }.into());
        }
        Ok(meta.mark())
    }
}

/// Folder and name of a manifest's path, which comes from another node.
fn checked_path(path: &str) -> Result<(&str, &str), PullError> {
    let refused = || PullError::Path(path.to_owned());
    let (part, name) = path.split_once('/').ok_or_else(refused)?;
    let known = match part {
        LOG => staged::is_segment_name(name),
        CHECKPOINT => checkpoint::is_file_name(name),
        _ => false,
    };
    if known { Ok((part, name)) } else { Err(refused()) }
}

fn fits(disk: &RealDisk, path: &Path, file_bytes_max: u64) -> bool {
    disk.open(path)
        .and_then(|file| file.file_bytes())
        .is_ok_and(|file_bytes| file_bytes <= file_bytes_max)
}

fn open_or_create(disk: &RealDisk, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
    match disk.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => disk.create(path),
        result => result,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PullError> + Send + 'static,
) -> Result<T, PullError> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
