//! The small files of a re-seed's folder: whose files are gathered, and that all of them are there.

use bytes::{Buf, BufMut};
use uuid::Uuid;

use super::Receiver;
use crate::log::Vote;
use crate::log::staged::StagedLog;
use crate::position::{EntryId, EntryIndex, LogOffset, Term};

/// From whom the folder's files are.
pub(super) const SOURCE_FILE: &str = "source";
/// All files are there, checked and synced.
pub(super) const COMPLETE_FILE: &str = "complete";
/// The node's own files are gone, those of the folder take their place.
pub(super) const CLEARED_FILE: &str = "cleared";

const MAGIC: [u8; 8] = *b"DrumSeed";
const VERSION: u16 = 1;

/// What a complete re-seed says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) receiver: Receiver,
    /// Raft id of the member that gave the files.
    pub(super) donor: u64,
    /// What the node had voted when the files became complete: that of the donor's leadership.
    pub(super) vote: Vote,
    pub(super) staged: StagedLog,
}

impl Mark {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = begin(self.receiver, self.donor);
        bytes.put_u64_le(self.vote.term.get());
        bytes.put_u64_le(self.vote.node);
        bytes.put_u64_le(self.staged.first.get());
        bytes.put_u64_le(self.staged.last.term.get());
        bytes.put_u64_le(self.staged.last.index.get());
        bytes.put_u64_le(self.staged.end.get());
        bytes.put_u64_le(self.staged.incarnation);
        finish(bytes)
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (receiver, donor, mut fields) = open(bytes)?;
        let mut word = || fields.try_get_u64_le().map_err(|_| "it ends too early".to_owned());
        let vote = Vote { term: Term::new(word()?), node: word()?, committed: true };
        let first = EntryIndex::new(word()?);
        let last = EntryId { term: Term::new(word()?), index: EntryIndex::new(word()?) };
        let (end, incarnation) = (LogOffset::new(word()?), word()?);
        Ok(Self { receiver, donor, vote, staged: StagedLog { first, last, end, incarnation } })
    }
}

/// From whom files are gathered.
pub(super) fn encode_source(receiver: Receiver, donor: u64) -> Vec<u8> {
    finish(begin(receiver, donor))
}

pub(super) fn decode_source(bytes: &[u8]) -> Result<(Receiver, u64), String> {
    open(bytes).map(|(receiver, donor, _)| (receiver, donor))
}

fn begin(receiver: Receiver, donor: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    bytes.put_slice(&MAGIC);
    bytes.put_u16_le(VERSION);
    bytes.put_bytes(0, 6);
    bytes.put_slice(receiver.group_uuid.as_bytes());
    bytes.put_slice(receiver.directory_uuid.as_bytes());
    bytes.put_u64_le(donor);
    bytes
}

fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&bytes);
    bytes.put_u32_le(crc);
    bytes
}

fn open(bytes: &[u8]) -> Result<(Receiver, u64, &[u8]), String> {
    let short = |_| "it ends too early".to_owned();
    let (checked, crc) = bytes.split_last_chunk::<4>().ok_or("it ends too early")?;
    let mut fields = checked.strip_prefix(&MAGIC).ok_or("it is no file of a re-seed")?;
    if u32::from_le_bytes(*crc) != crc32fast::hash(checked) {
        return Err("the checksum does not match".to_owned());
    }
    let version = fields.try_get_u16_le().map_err(short)?;
    if version != VERSION {
        return Err(format!("version {version} is not known"));
    }
    fields.try_get_uint_le(6).map_err(short)?;
    let group_uuid = Uuid::from_u128(fields.try_get_u128().map_err(short)?);
    let directory_uuid = Uuid::from_u128(fields.try_get_u128().map_err(short)?);
    let donor = fields.try_get_u64_le().map_err(short)?;
    Ok((Receiver { group_uuid, directory_uuid }, donor, fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_comes_back_and_no_flipped_bit_passes() {
        let mark = Mark {
            receiver: Receiver {
                group_uuid: Uuid::from_u128(3),
                directory_uuid: Uuid::from_u128(4),
            },
            donor: 2,
            vote: Vote { term: Term::new(7), node: 2, committed: true },
            staged: StagedLog {
                first: EntryIndex::new(100),
                last: EntryId { term: Term::new(7), index: EntryIndex::new(250) },
                end: LogOffset::new(9000),
                incarnation: 12,
            },
        };
        let good = mark.encode();
        assert_eq!(Mark::decode(&good), Ok(mark));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Mark::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
