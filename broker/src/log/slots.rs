//! A small file of two slots of 512 B, written alternately, so that a torn write leaves the other.
//! Knows nothing of what the slots hold.

use std::io;
use std::sync::Arc;

use super::storage::{Storage, StorageFile, read_full_at, write_all_at};

pub(super) const SLOT_BYTES: usize = 512;
/// Bytes of a slot that are its user's.
pub(super) const BODY_BYTES: usize = SLOT_BYTES - HEADER_BYTES;

const HEADER_BYTES: usize = 40;

/// One kind of slot file.
#[derive(Debug)]
pub(super) struct SlotFile {
    pub(super) name: &'static str,
    pub(super) magic: [u8; 8],
    /// The newest that is known; those before it are read too.
    pub(super) version_max: u32,
}

/// What two slots said.
#[derive(Debug)]
pub(super) enum Found {
    /// There is no such file.
    Missing,
    /// Never written to.
    Empty,
    /// The newest valid one, with its sequence.
    Body(u64, Box<[u8; BODY_BYTES]>),
    /// The first write ever did not get through: one slot is empty, the other not valid.
    FirstTorn,
    /// Both were written to, and neither is valid.
    Invalid,
}

/// An open slot file.
#[derive(Debug)]
pub(super) struct Slots {
    file: Arc<dyn StorageFile>,
    kind: &'static SlotFile,
    group_uuid: uuid::Uuid,
    sequence: u64,
}

impl Slots {
    /// Makes what a killed process wrote durable, or unreadable where that failed, before anything
    /// is built on it.
    pub(super) fn settle(storage: &dyn Storage, kind: &SlotFile) -> io::Result<()> {
        match storage.open(kind.name) {
            Ok(file) => {
                file.sync()?;
                file.drop_cache()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What the file holds.
    pub(super) fn load(
        storage: &dyn Storage,
        kind: &SlotFile,
        group_uuid: uuid::Uuid,
    ) -> io::Result<Found> {
        let file = match storage.open(kind.name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(error) => return Err(error),
        };
        let mut raw = [0; 2 * SLOT_BYTES];
        let read = read_full_at(file.as_ref(), &mut raw, 0)?;
        if read < raw.len() {
            return Ok(Found::Invalid);
        }
        let (first, second) = raw.split_at(SLOT_BYTES);
        let newest = [first, second]
            .into_iter()
            .filter_map(|slot| decode(slot, kind, group_uuid))
            .max_by_key(|(sequence, _)| *sequence);
        let empty = |slot: &[u8]| slot.iter().all(|byte| *byte == 0);
        Ok(match newest {
            Some((sequence, body)) => Found::Body(sequence, body),
            None if empty(&raw) => Found::Empty,
            None if empty(first) || empty(second) => Found::FirstTorn,
            None => Found::Invalid,
        })
    }

    /// Opens the file, or makes it durably; `sequence` is that of the newest valid slot.
    pub(super) fn open(
        storage: &dyn Storage,
        kind: &'static SlotFile,
        group_uuid: uuid::Uuid,
        sequence: Option<u64>,
    ) -> io::Result<Self> {
        let name = kind.name;
        let file = match storage.open(name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let temporary = format!("{name}.tmp");
                let file = storage.create(&temporary)?;
                write_all_at(file.as_ref(), &[0; 2 * SLOT_BYTES], 0)?;
                file.sync()?;
                storage.rename(&temporary, name)?;
                storage.sync_folder("")?;
                file
            }
            Err(error) => return Err(error),
        };
        Ok(Self { file, kind, group_uuid, sequence: sequence.unwrap_or(0) })
    }

    /// Sequence of the newest slot; 0 if there is none.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Overwrites the older slot. Nothing is durable before [`Slots::sync`] has returned.
    pub(super) fn write(&mut self, version: u32, body: &[u8]) -> io::Result<()> {
        assert!(body.len() <= BODY_BYTES, "{} bytes do not fit a slot", body.len());
        let sequence = self.sequence + 1;
        let mut slot = [0; SLOT_BYTES];
        slot[0..8].copy_from_slice(&self.kind.magic);
        slot[8..12].copy_from_slice(&version.to_le_bytes());
        slot[16..32].copy_from_slice(self.group_uuid.as_bytes());
        slot[32..40].copy_from_slice(&sequence.to_le_bytes());
        slot[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(body);
        let checksum = crc32fast::hash(&slot);
        slot[12..16].copy_from_slice(&checksum.to_le_bytes());
        let at = if sequence.is_multiple_of(2) { SLOT_BYTES as u64 } else { 0 };
        write_all_at(self.file.as_ref(), &slot, at)
    }

    /// Makes the slot just written the newest one.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.sync()?;
        self.sequence += 1;
        Ok(())
    }
}

fn decode(
    slot: &[u8],
    kind: &SlotFile,
    group_uuid: uuid::Uuid,
) -> Option<(u64, Box<[u8; BODY_BYTES]>)> {
    let mut copy: [u8; SLOT_BYTES] = slot.try_into().ok()?;
    let checksum = u32::from_le_bytes(copy[12..16].try_into().ok()?);
    copy[12..16].fill(0);
    let version = u32::from_le_bytes(copy[8..12].try_into().ok()?);
    let valid = copy[0..8] == kind.magic
        && (1..=kind.version_max).contains(&version)
        && copy[16..32] == *group_uuid.as_bytes()
        && crc32fast::hash(&copy) == checksum;
    if !valid {
        return None;
    }
    let sequence = u64::from_le_bytes(copy[32..40].try_into().ok()?);
    Some((sequence, Box::new(copy[HEADER_BYTES..].try_into().ok()?)))
}
