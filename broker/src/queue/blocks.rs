//! Blocks of index lines in a few shared files.
//!
//! A block that changed is written to a page that neither of the two kept checkpoints refers to, so
//! no crash and no torn write harms a page that a checkpoint needs, and a freed page is found by
//! looking at what both refer to. Knows pages and blocks; when to write, and when a checkpoint
//! counts as kept, is the checkpointer's business.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use drumlin_proto::ids::{QueueKey, QueueOffset};
use parking_lot::{Mutex, RwLock};

use super::directory::{Directory, DirectoryFault, StoredBlock, StoredQueue};
use super::index::{Block, Capture, Index, Line, Place, QueueLines, Summary};
use super::page::{PAGE_BYTES, PageBuilder, PageFault, PageId, Slot, check_page, read_block};
use crate::disk::{Disk, DiskFile};

/// Pages of one file: 1 GiB.
const FILE_PAGES: u32 = 1 << 18;
/// Pages that go out in one write: 256 KiB.
const WRITE_PAGES: usize = 64;
/// Blocks read back from disk that stay in memory: at most 16 MiB of lines.
const CACHED_BLOCKS_MAX: usize = 4096;
/// Up to this many pages are all checked at start; of more, those of the tails.
const CHECKED_PAGES_MAX: usize = 1 << 14;
/// Lies in the index folder once a page turned out to be bad: the next start rebuilds.
const DAMAGE_MARK: &str = "damaged";

/// Why the index files cannot be used; the lines are to be rebuilt from the log.
#[derive(Debug, thiserror::Error)]
pub enum IndexDamage {
    #[error(transparent)]
    Directory(#[from] DirectoryFault),
    #[error("a page was found damaged before the last stop")]
    Marked,
    #[error("index files cannot be read")]
    Io(#[from] io::Error),
}

/// A set of page numbers.
#[derive(Clone, Debug, Default)]
struct PageSet {
    words: Vec<u64>,
    page_count: usize,
}

impl PageSet {
    fn of(directory: &Directory) -> Self {
        let mut pages = Self::default();
        for (_, block) in directory.blocks() {
            pages.insert(block.slot.page);
        }
        pages
    }

    fn locate(page: u32) -> (usize, u64) {
        let word = usize::try_from(page / 64).expect("32 bits fit a word");
        (word, 1 << (page % 64))
    }

    fn insert(&mut self, page: u32) {
        let (word, bit) = Self::locate(page);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.page_count += usize::from(self.words[word] & bit == 0);
        self.words[word] |= bit;
    }

    fn contains(&self, page: u32) -> bool {
        let (word, bit) = Self::locate(page);
        self.words.get(word).is_some_and(|bits| bits & bit != 0)
    }
}

type BlockKey = (QueueKey, QueueOffset);

/// Full blocks by owner and first offset, which never change: two halves, of which the one that was
/// filled earlier goes when the other is full.
#[derive(Debug, Default)]
struct Cache {
    young: HashMap<BlockKey, Arc<Vec<Line>>>,
    old: HashMap<BlockKey, Arc<Vec<Line>>>,
}

impl Cache {
    fn insert(&mut self, key: BlockKey, lines: Arc<Vec<Line>>) {
        if self.young.len() >= CACHED_BLOCKS_MAX / 2 {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, lines);
    }

    fn get(&mut self, key: BlockKey) -> Option<Arc<Vec<Line>>> {
        if let Some(lines) = self.young.get(&key) {
            return Some(Arc::clone(lines));
        }
        let lines = self.old.remove(&key)?;
        self.insert(key, Arc::clone(&lines));
        Some(lines)
    }
}

/// The index files of one era, for reading; shared by the index and the writer.
#[derive(Debug)]
pub(super) struct PageFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    era: u64,
    files: RwLock<BTreeMap<u32, Arc<dyn DiskFile>>>,
    cache: Mutex<Cache>,
}

impl PageFiles {
    fn new(disk: Arc<dyn Disk>, dir: &Path, era: u64) -> Self {
        let (files, cache) = (RwLock::default(), Mutex::default());
        Self { disk, dir: dir.to_owned(), era, files, cache }
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{:010}-{number:05}.idx", self.era))
    }

    fn file(&self, number: u32) -> io::Result<Arc<dyn DiskFile>> {
        if let Some(file) = self.files.read().get(&number) {
            return Ok(Arc::clone(file));
        }
        let file = self.disk.open(&self.path(number))?;
        self.files.write().insert(number, Arc::clone(&file));
        Ok(file)
    }

    fn file_or_new(&self, number: u32) -> io::Result<Arc<dyn DiskFile>> {
        match self.file(number) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = self.disk.create(&self.path(number))?;
                self.files.write().insert(number, Arc::clone(&file));
                Ok(file)
            }
            opened => opened,
        }
    }

    fn read_page(&self, page: u32) -> io::Result<Box<[u8; PAGE_BYTES]>> {
        let mut bytes = Box::new([0; PAGE_BYTES]);
        self.file(page / FILE_PAGES)?.read_at(&mut bytes[..], place_in_file(page))?;
        check_page(&bytes, PageId { era: self.era, page })
            .map_err(|fault| self.invalid(page, fault))?;
        Ok(bytes)
    }

    fn invalid(&self, page: u32, fault: PageFault) -> io::Error {
        let path = self.path(page / FILE_PAGES);
        let page = page % FILE_PAGES;
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: index page {page}: {fault}", path.display()),
        )
    }

    /// The lines of a full block, from memory or disk. A failure is remembered for the next start.
    pub(super) fn read(
        &self,
        queue: QueueKey,
        summary: &Summary,
        slot: Slot,
    ) -> io::Result<Arc<Vec<Line>>> {
        let key = (queue, summary.first_offset);
        if let Some(lines) = self.cache.lock().get(key) {
            return Ok(lines);
        }
        let read = self.read_page(slot.page).and_then(|page| {
            read_block(&page, slot.unit, queue, summary)
                .map_err(|fault| self.invalid(slot.page, fault))
        });
        match read {
            Ok(lines) => {
                let lines = Arc::new(lines);
                self.cache.lock().insert(key, Arc::clone(&lines));
                Ok(lines)
            }
            Err(error) => {
                self.mark_damaged();
                Err(error)
            }
        }
    }

    pub(super) fn remember(&self, queue: QueueKey, first: QueueOffset, lines: Arc<Vec<Line>>) {
        self.cache.lock().insert((queue, first), lines);
    }

    fn mark_damaged(&self) {
        let marked = self
            .disk
            .create(&self.dir.join(DAMAGE_MARK))
            .and_then(|_| self.disk.sync_dir(&self.dir));
        if let Err(error) = marked {
            tracing::warn!(%error, "the damaged index could not be marked for a rebuild");
        }
    }
}

fn place_in_file(page: u32) -> u64 {
    u64::from(page % FILE_PAGES) * PAGE_BYTES as u64
}

/// A block that has got a place.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) queue: QueueKey,
    pub(super) first_offset: QueueOffset,
    pub(super) lines: Arc<Vec<Line>>,
    pub(super) slot: Slot,
}

/// What was written of a capture; for [`BlockWriter::keep`], then [`Index::settle`].
#[derive(Debug)]
pub struct Written {
    /// For the checkpoint.
    pub directory: Vec<u8>,
    pub(super) files: Arc<PageFiles>,
    pub(super) placed: Vec<Placed>,
    pages: PageSet,
}

/// Writes dirty blocks, and knows which pages are free.
#[derive(Debug)]
pub struct BlockWriter {
    files: Arc<PageFiles>,
    /// Pages that the newest and the older checkpoint refer to.
    kept: [PageSet; 2],
}

impl BlockWriter {
    /// Removes all index files and begins anew; what the log holds is written with the next
    /// capture. An era is used once.
    pub fn begin(disk: Arc<dyn Disk>, dir: &Path, era: u64) -> io::Result<Self> {
        disk.create_dir(dir)?;
        for name in disk.list(dir)? {
            disk.remove(&dir.join(name))?;
        }
        disk.sync_dir(dir)?;
        let files = Arc::new(PageFiles::new(disk, dir, era));
        Ok(Self { files, kept: [PageSet::default(), PageSet::default()] })
    }

    /// Loads the lines of the newest checkpoint's directory; the older one's pages are spared.
    pub fn load(
        disk: Arc<dyn Disk>,
        dir: &Path,
        newest: &[u8],
        older: Option<&[u8]>,
    ) -> Result<(Self, Index), IndexDamage> {
        if disk.list(dir)?.iter().any(|name| name == DAMAGE_MARK) {
            return Err(IndexDamage::Marked);
        }
        let directory = Directory::decode(newest)?;
        let older = older.map(Directory::decode).transpose()?;
        let older = older.filter(|older| older.era == directory.era);
        let kept = [PageSet::of(&directory), older.as_ref().map(PageSet::of).unwrap_or_default()];
        let files = Arc::new(PageFiles::new(disk, dir, directory.era));
        let index = load_index(&files, &directory, kept[0].page_count)?;
        Ok((Self { files, kept }, index))
    }

    /// Writes what the capture holds beyond the kept checkpoints, and syncs it.
    ///
    /// Errors leave both kept checkpoints as they were; it may be tried again.
    pub fn write(&self, capture: &Capture, generation: u64) -> io::Result<Written> {
        let mut out = PageWriter::new(self, generation);
        let mut queues = Vec::with_capacity(capture.queues.len());
        for (key, lines) in &capture.queues {
            let mut blocks = Vec::with_capacity(lines.blocks.len() + 1);
            for block in lines.blocks.iter() {
                let slot = match &block.place {
                    Place::Disk(slot) => out.refer(*slot),
                    Place::Memory(lines) => out.place(*key, lines)?,
                };
                blocks.push(StoredBlock { summary: block.summary, slot });
            }
            let tail = Summary::of(&lines.tail);
            if let Some(summary) = tail {
                let slot = match lines.tail_slot {
                    Some(slot) => out.refer(slot),
                    None => out.place(*key, &lines.tail)?,
                };
                blocks.push(StoredBlock { summary, slot });
            }
            queues.push(StoredQueue { key: *key, blocks, has_tail: tail.is_some() });
        }
        let (placed, pages) = out.finish()?;
        let directory = Directory { era: self.files.era, floor: capture.floor, queues };
        let files = Arc::clone(&self.files);
        Ok(Written { directory: directory.encode(), files, placed, pages })
    }

    /// The checkpoint of `written` is durable now, and the older of the two before it is given up.
    pub fn keep(&mut self, written: &Written) {
        self.kept.swap(0, 1);
        self.kept[0] = written.pages.clone();
    }

    fn is_kept(&self, page: u32) -> bool {
        self.kept.iter().any(|pages| pages.contains(page))
    }
}

/// One pass over a capture: fills free pages in ascending order.
#[derive(Debug)]
struct PageWriter<'a> {
    writer: &'a BlockWriter,
    generation: u64,
    next_page: u32,
    /// Shared by blocks that are not full.
    open: Option<PageBuilder>,
    /// Adjacent pages of one file that wait, and the first one's number.
    waiting: Vec<u8>,
    waiting_first: u32,
    unsynced: BTreeMap<u32, Arc<dyn DiskFile>>,
    placed: Vec<Placed>,
    pages: PageSet,
}

impl<'a> PageWriter<'a> {
    fn new(writer: &'a BlockWriter, generation: u64) -> Self {
        Self {
            writer,
            generation,
            next_page: 0,
            open: None,
            waiting: Vec::new(),
            waiting_first: 0,
            unsynced: BTreeMap::new(),
            placed: Vec::new(),
            pages: PageSet::default(),
        }
    }

    /// Notes that a block that lies on disk already stays where it is.
    fn refer(&mut self, slot: Slot) -> Slot {
        assert!(self.writer.is_kept(slot.page), "page {} belongs to no checkpoint", slot.page);
        self.pages.insert(slot.page);
        slot
    }

    fn new_page(&mut self) -> io::Result<PageBuilder> {
        while self.writer.is_kept(self.next_page) {
            self.next_page += 1;
        }
        let page = self.next_page;
        self.next_page = page.checked_add(1).ok_or(io::ErrorKind::StorageFull)?;
        self.pages.insert(page);
        let id = PageId { era: self.writer.files.era, page };
        Ok(PageBuilder::new(id, self.generation))
    }

    fn place(&mut self, queue: QueueKey, lines: &Arc<Vec<Line>>) -> io::Result<Slot> {
        let first_offset = lines.first().expect("a block has lines").base_offset;
        let mut page = match self.open.take_if(|open| open.has_room(lines.len())) {
            Some(open) => open,
            None => self.new_page()?,
        };
        let slot = page.push(queue, lines);
        self.placed.push(Placed { queue, first_offset, lines: Arc::clone(lines), slot });
        match self.open.take() {
            None => self.open = Some(page),
            // The emptier of the two goes on filling up.
            Some(other) => {
                let page_is_fuller = page.filled_bytes() > other.filled_bytes();
                let (fuller, emptier) = if page_is_fuller { (page, other) } else { (other, page) };
                self.emit(fuller)?;
                self.open = Some(emptier);
            }
        }
        Ok(slot)
    }

    fn emit(&mut self, builder: PageBuilder) -> io::Result<()> {
        let page = builder.page();
        let waiting = self.waiting.len() / PAGE_BYTES;
        let is_next = u32::try_from(waiting).is_ok_and(|n| self.waiting_first + n == page);
        if !is_next || page.is_multiple_of(FILE_PAGES) || waiting >= WRITE_PAGES {
            self.write_waiting()?;
        }
        if self.waiting.is_empty() {
            self.waiting_first = page;
        }
        self.waiting.extend_from_slice(&builder.finish());
        Ok(())
    }

    fn write_waiting(&mut self) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let number = self.waiting_first / FILE_PAGES;
        let file = self.writer.files.file_or_new(number)?;
        file.write_at(&self.waiting, place_in_file(self.waiting_first))?;
        self.unsynced.insert(number, file);
        self.waiting.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<(Vec<Placed>, PageSet)> {
        if let Some(page) = self.open.take() {
            self.emit(page)?;
        }
        self.write_waiting()?;
        for file in self.unsynced.values() {
            file.sync()?;
        }
        if !self.unsynced.is_empty() {
            self.writer.files.disk.sync_dir(&self.writer.files.dir)?;
        }
        Ok((self.placed, self.pages))
    }
}

/// Reads the tails, and checks all pages that are read on the way, in the order of the disk.
fn load_index(
    files: &Arc<PageFiles>,
    directory: &Directory,
    page_count: usize,
) -> Result<Index, IndexDamage> {
    let check_all = page_count <= CHECKED_PAGES_MAX;
    let mut queues: BTreeMap<QueueKey, QueueLines> = BTreeMap::new();
    let mut wanted: Vec<(QueueKey, &StoredBlock, bool)> = Vec::new();
    for queue in &directory.queues {
        let full = queue.blocks.len() - usize::from(queue.has_tail && !queue.blocks.is_empty());
        let blocks = queue.blocks.iter().take(full);
        let blocks = blocks.map(|b| Block { summary: b.summary, place: Place::Disk(b.slot) });
        let lines = QueueLines { blocks: Arc::new(blocks.collect()), ..QueueLines::default() };
        queues.insert(queue.key, lines);
        let numbered = queue.blocks.iter().enumerate();
        wanted.extend(numbered.map(|(n, b)| (queue.key, b, n >= full)));
    }
    wanted.retain(|(_, _, is_tail)| check_all || *is_tail);
    wanted.sort_by_key(|(_, block, _)| (block.slot.page, block.slot.unit));
    for of_page in wanted.chunk_by(|a, b| a.1.slot.page == b.1.slot.page) {
        let page_number = of_page[0].1.slot.page;
        let page = files.read_page(page_number)?;
        for (key, block, is_tail) in of_page {
            let lines = read_block(&page, block.slot.unit, *key, &block.summary)
                .map_err(|fault| files.invalid(page_number, fault))?;
            if let Some(queue) = queues.get_mut(key).filter(|_| *is_tail) {
                queue.tail = Arc::new(lines);
                queue.tail_slot = Some(block.slot);
            }
        }
    }
    Ok(Index::from_parts(queues, directory.floor, Arc::clone(files)))
}

#[cfg(test)]
mod tests;
