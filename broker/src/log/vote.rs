//! The vote and the node-local facts: what stands in the two slots of `vote` and of `local`.

use std::io;

use super::slots::{BODY_BYTES, Found, SlotFile, Slots};
use super::storage::Storage;
use super::{OpenError, Vote};
use crate::position::{EntryIndex, Term};

static VOTE: SlotFile = SlotFile { name: "vote", magic: *b"DrumVote", version_max: VERSION };
static LOCAL: SlotFile =
    SlotFile { name: "local", magic: *b"DrumLocl", version_max: VERSION_FLAGS };

const VERSION: u32 = 1;
/// Of `local` with any of the flags.
const VERSION_FLAGS: u32 = 2;
const FLAG_DEFERRED: u8 = 1;
const FLAG_FENCED: u8 = 2;

/// What only this node knows of its log; never copied to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Local {
    /// The newest segment's incarnation when the mark was made.
    pub(super) incarnation: u64,
    /// Every entry below it was synced then, except where a later segment overrides it.
    pub(super) durable_end: EntryIndex,
    /// Sequence of the newest synced vote.
    pub(super) vote_sequence: u64,
    /// Which boot of the machine wrote it.
    pub(super) boot_id: [u8; 16],
    /// The log was closed behind its last entry.
    pub(super) clean: bool,
    /// Entries may count as kept here before they are synced.
    pub(super) deferred: bool,
    /// Entries that counted as kept here may be gone.
    pub(super) fenced: bool,
}

/// Loads the vote. `used`: there are signs that one was saved here.
pub(super) fn load_vote(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
    used: bool,
    local: Option<&Local>,
) -> Result<(Option<Vote>, Slots), OpenError> {
    Slots::settle(storage, &VOTE)?;
    let sequence_min = local.map_or(0, |facts| facts.vote_sequence);
    let invalid = |reason: &str| OpenError::State { file: VOTE.name, reason: reason.to_owned() };
    let (vote, sequence) = match Slots::load(storage, &VOTE, group_uuid)? {
        Found::Missing if used => return Err(invalid("it is missing in a used directory")),
        // A first vote that is torn was never answered.
        Found::Missing | Found::Empty | Found::FirstTorn if sequence_min == 0 => (None, None),
        Found::Missing | Found::Empty | Found::FirstTorn | Found::Invalid => {
            return Err(invalid("neither slot is valid"));
        }
        Found::Body(sequence, _) if sequence < sequence_min => {
            return Err(invalid("the newest vote is damaged"));
        }
        Found::Body(sequence, body) => (Some(decode_vote(&body)), Some(sequence)),
    };
    Ok((vote, Slots::open(storage, &VOTE, group_uuid, sequence)?))
}

/// Writes a vote over the older slot, without syncing it.
pub(super) fn write_vote(slots: &mut Slots, vote: Vote) -> io::Result<()> {
    let mut body = [0; 17];
    body[0..8].copy_from_slice(&vote.term.get().to_le_bytes());
    body[8..16].copy_from_slice(&vote.node.to_le_bytes());
    body[16] = u8::from(vote.committed);
    slots.write(VERSION, &body)
}

fn decode_vote(body: &[u8; BODY_BYTES]) -> Vote {
    Vote { term: Term::new(u64_at(body, 0)), node: u64_at(body, 8), committed: body[16] != 0 }
}

/// Loads the node-local facts; none if this directory was never opened.
pub(super) fn load_local(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
) -> Result<(Option<Local>, Slots), OpenError> {
    Slots::settle(storage, &LOCAL)?;
    let (local, sequence) = match Slots::load(storage, &LOCAL, group_uuid)? {
        Found::Missing | Found::Empty | Found::FirstTorn => (None, None),
        Found::Invalid => {
            let reason = "neither slot is valid".to_owned();
            return Err(OpenError::State { file: LOCAL.name, reason });
        }
        Found::Body(sequence, body) => (Some(decode_local(&body)), Some(sequence)),
    };
    Ok((local, Slots::open(storage, &LOCAL, group_uuid, sequence)?))
}

/// Reads the node-local facts without making the file.
pub(super) fn peek_local(
    storage: &dyn Storage,
    group_uuid: uuid::Uuid,
) -> io::Result<Option<Local>> {
    Ok(match Slots::load(storage, &LOCAL, group_uuid)? {
        Found::Missing | Found::Empty | Found::FirstTorn | Found::Invalid => None,
        Found::Body(_, body) => Some(decode_local(&body)),
    })
}

/// Reads the vote without making the file.
pub(super) fn peek_vote(storage: &dyn Storage, group_uuid: uuid::Uuid) -> io::Result<Option<Vote>> {
    Ok(match Slots::load(storage, &VOTE, group_uuid)? {
        Found::Missing | Found::Empty | Found::FirstTorn | Found::Invalid => None,
        Found::Body(_, body) => Some(decode_vote(&body)),
    })
}

pub(super) fn write_local(slots: &mut Slots, local: &Local) -> io::Result<()> {
    let mut body = [0; 42];
    body[0..8].copy_from_slice(&local.incarnation.to_le_bytes());
    body[8..16].copy_from_slice(&local.durable_end.get().to_le_bytes());
    body[16..24].copy_from_slice(&local.vote_sequence.to_le_bytes());
    body[24..40].copy_from_slice(&local.boot_id);
    body[40] = u8::from(local.clean);
    if local.deferred {
        body[41] |= FLAG_DEFERRED;
    }
    if local.fenced {
        body[41] |= FLAG_FENCED;
    }
    slots.write(if body[41] == 0 { VERSION } else { VERSION_FLAGS }, &body)
}

fn decode_local(body: &[u8; BODY_BYTES]) -> Local {
    let mut boot_id = [0; 16];
    boot_id.copy_from_slice(&body[24..40]);
    Local {
        incarnation: u64_at(body, 0),
        durable_end: EntryIndex::new(u64_at(body, 8)),
        vote_sequence: u64_at(body, 16),
        boot_id,
        clean: body[40] != 0,
        deferred: body[41] & FLAG_DEFERRED != 0,
        fenced: body[41] & FLAG_FENCED != 0,
    }
}

fn u64_at(body: &[u8; BODY_BYTES], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&body[at..at + 8]);
    u64::from_le_bytes(raw)
}
