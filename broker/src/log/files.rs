//! The files of a log and how they come and go: segments, recycled ones, the reserve. Knows no
//! entries.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::LogOptions;
use super::published::Published;
use super::segment::{HEADER_BYTES, Segment, SegmentHeader, parse_file_name};
use super::storage::{Space, Storage, fill_zeros, is_full, sync_result, write_all_at};
use super::writer::Active;
use crate::entry::FrameKey;
use crate::position::{EntryIndex, LogOffset, Term};

const RESERVE_FILE: &str = "reserve";
const NEXT_FILE: &str = "next.tmp";
const POOL_SUFFIX: &str = ".pool";
/// A file made ahead for the next segment.
const PREPARED_FILE: &str = "prepared.tmp";
/// Recycled files that wait for use; more are not worth their space.
const POOL_FILES_MAX: usize = 2;
/// Pause between two tries on a full disk.
const FULL_RETRY: Duration = Duration::from_millis(50);
/// A small disk is not given away as reserve: at most this part of it.
const RESERVE_PART: u64 = 16;

/// The log's directory, and what is kept ready in it.
#[derive(Debug)]
pub(super) struct Files {
    storage: Arc<dyn Storage>,
    group_uuid: uuid::Uuid,
    segment_bytes: u64,
    reserve_bytes: u64,
    ready: Mutex<Ready>,
}

#[derive(Debug, Default)]
struct Ready {
    /// Names of recycled files.
    pool: Vec<String>,
    /// The prepared file is there.
    prepared: bool,
    reserve: bool,
}

/// A segment to begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewSegment {
    pub(super) base: EntryIndex,
    pub(super) base_term: Term,
    pub(super) base_position: LogOffset,
    pub(super) previous: u64,
    pub(super) anew: bool,
}

/// What lies in a log's directory.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Names and sizes, ascending by incarnation.
    pub(super) segments: Vec<(String, u64)>,
    /// Recycled files.
    pub(super) pool: Vec<String>,
    /// Files whose making was cut short.
    pub(super) temporary: Vec<String>,
    pub(super) reserve: bool,
}

pub(super) fn list(storage: &dyn Storage) -> io::Result<Listing> {
    let mut listing = Listing::default();
    for (name, bytes) in storage.list("")? {
        if parse_file_name(&name).is_some() {
            listing.segments.push((name, bytes));
        } else if name.ends_with(POOL_SUFFIX) {
            listing.pool.push(name);
        } else if name.ends_with(".tmp") {
            listing.temporary.push(name);
        } else if name == RESERVE_FILE {
            listing.reserve = true;
        }
    }
    Ok(listing)
}

impl Files {
    pub(super) fn new(storage: Arc<dyn Storage>, options: &LogOptions, listing: &Listing) -> Self {
        let ready = Ready { pool: listing.pool.clone(), prepared: false, reserve: listing.reserve };
        Self {
            storage,
            group_uuid: options.group_uuid,
            segment_bytes: options.segment_bytes,
            reserve_bytes: options.reserve_bytes.min(options.segment_bytes),
            ready: Mutex::new(ready),
        }
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Makes a segment's file durably: whoever finds one under a segment's name finds its header
    /// valid. May be called again after an error: it starts over.
    pub(super) fn begin(&self, new: NewSegment, incarnation: u64) -> io::Result<Active> {
        let (recycled, prepared) = {
            let ready = self.ready.lock();
            (ready.pool.last().cloned(), ready.prepared)
        };
        let header = SegmentHeader {
            group_uuid: self.group_uuid,
            incarnation,
            base: new.base,
            base_term: new.base_term,
            base_position: new.base_position,
            previous: new.previous,
            anew: new.anew,
            recycled: recycled.is_some(),
        };
        let temporary = match &recycled {
            Some(name) => name,
            None if prepared => PREPARED_FILE,
            None => NEXT_FILE,
        };
        let file = if recycled.is_some() || prepared {
            self.storage.open(temporary)?
        } else {
            self.storage.create(temporary)?
        };
        write_all_at(file.as_ref(), &header.encode(), 0)?;
        sync_result(file.sync())?;
        let name = header.file_name();
        self.storage.rename(temporary, &name)?;
        {
            let mut ready = self.ready.lock();
            ready.pool.retain(|pooled| Some(pooled) != recycled.as_ref());
            ready.prepared &= recycled.is_some();
        }
        sync_result(self.storage.sync_folder(""))?;
        let key = FrameKey::of_group(self.group_uuid);
        let segment =
            Segment::new(header, name, file.as_ref(), self.segment_bytes, HEADER_BYTES, key)?;
        Ok(Active { segment: Arc::new(segment), file })
    }

    /// Makes a file of `bytes` zeros for the next segment, unless one is ready.
    pub(super) fn make_next(&self, bytes: u64) -> io::Result<()> {
        {
            let ready = self.ready.lock();
            if ready.prepared || !ready.pool.is_empty() {
                return Ok(());
            }
        }
        let file = self.storage.create(PREPARED_FILE)?;
        match fill_zeros(file.as_ref(), 0, bytes).and_then(|()| file.sync()) {
            Ok(()) => {
                self.ready.lock().prepared = true;
                Ok(())
            }
            Err(error) => {
                self.remove(PREPARED_FILE)?;
                Err(error)
            }
        }
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match self.storage.remove(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    /// Lets go of a segment that nobody needs: kept for reuse if nobody reads it any more, else
    /// unlinked. Durable when it returns, so that segments go in order.
    pub(super) fn retire(&self, segment: Arc<Segment>) -> io::Result<()> {
        let name = segment.name().to_owned();
        let unread = segment.is_unread();
        drop(segment);
        let room = {
            let ready = self.ready.lock();
            let full = !ready.reserve && self.reserve_bytes > 0;
            ready.pool.len() < POOL_FILES_MAX && !full
        };
        if unread && room {
            let pooled = format!("{name}{POOL_SUFFIX}");
            self.storage.rename(&name, &pooled)?;
            self.storage.sync_folder("")?;
            self.ready.lock().pool.push(pooled);
            return Ok(());
        }
        self.remove(&name)?;
        self.storage.sync_folder("")
    }

    /// Gives the reserve's space to the log; false if it was given already.
    pub(super) fn free_reserve(&self) -> io::Result<bool> {
        let mut ready = self.ready.lock();
        if let Some(name) = ready.pool.pop() {
            drop(ready);
            self.remove(&name)?;
            return Ok(true);
        }
        if ready.prepared {
            ready.prepared = false;
            drop(ready);
            self.remove(PREPARED_FILE)?;
            return Ok(true);
        }
        if !ready.reserve {
            return Ok(false);
        }
        ready.reserve = false;
        drop(ready);
        self.remove(RESERVE_FILE)?;
        Ok(true)
    }

    /// Repeats an operation that finds no space as long as there is some held back to give to it.
    pub(super) fn with_reserve<T>(
        &self,
        mut operation: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match operation() {
                Err(error) if is_full(&error) && self.free_reserve()? => {
                    tracing::warn!("the disk is full: the log uses what it held back");
                }
                result => return result,
            }
        }
    }

    /// Repeats an operation until the disk has space for it, and says meanwhile that it has none.
    /// Other errors pass; so does this one once the log is being closed.
    pub(super) fn until_space<T>(
        &self,
        published: &Published,
        closing: &AtomicBool,
        mut operation: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let error = match operation() {
                Err(error) if is_full(&error) => error,
                result => return result,
            };
            if !published.disk_full.send_replace(true) {
                tracing::warn!("the disk is full: nothing is lost, writes wait for space");
            }
            if self.free_reserve()? {
                continue;
            }
            if closing.load(Ordering::Acquire) {
                return Err(error);
            }
            std::thread::sleep(FULL_RETRY);
        }
    }

    fn reserve_bytes_of(&self, space: Space) -> u64 {
        self.reserve_bytes.min(space.total_bytes / RESERVE_PART)
    }

    /// Takes the reserve's space again where its file is there: whoever made it may not have come
    /// to that. Does nothing if there is no such file.
    pub(super) fn retake_reserve(&self) -> io::Result<()> {
        if !self.ready.lock().reserve {
            return Ok(());
        }
        let bytes = self.reserve_bytes_of(self.storage.space()?);
        match self.storage.open(RESERVE_FILE)?.allocate(bytes) {
            Err(error) if is_full(&error) => {
                self.ready.lock().reserve = false;
                self.remove(RESERVE_FILE)
            }
            result => result,
        }
    }

    /// Takes the reserve's space if there is half as much again; true if it is held now.
    pub(super) fn restore_reserve(&self) -> io::Result<bool> {
        if self.ready.lock().reserve || self.reserve_bytes == 0 {
            return Ok(true);
        }
        let space = self.storage.space()?;
        let reserve_bytes = self.reserve_bytes_of(space);
        if space.free_bytes < reserve_bytes + reserve_bytes / 2 {
            return Ok(false);
        }
        let taken = self.storage.create(RESERVE_FILE).and_then(|file| {
            file.allocate(reserve_bytes)?;
            file.sync()
        });
        match taken {
            Ok(()) => {
                self.ready.lock().reserve = true;
                Ok(true)
            }
            Err(error) => {
                self.remove(RESERVE_FILE)?;
                if is_full(&error) { Ok(false) } else { Err(error) }
            }
        }
    }
}
