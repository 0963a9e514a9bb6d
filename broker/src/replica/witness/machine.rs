//! A witness's state machine: the last applied id and the membership, nothing else, and the file
//! that keeps both once the log behind them may go.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Buf, BufMut, TryGetError};
use futures::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::Mutex;
use uuid::Uuid;

use super::WitnessError;
use crate::disk::{Disk, RealDisk, read_file, replace_file};
use crate::position::{EntryId, EntryIndex, Term};
use crate::replica::membership;
use crate::replica::raft_types::{
    LogId, Outcomes, SnapshotMeta, StoredMembership, TypeConfig, entry_id, log_id,
};
use crate::replica::state_machine::Manifest;

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Manifest>;

const FILE: &str = "applied";
const MAGIC: [u8; 8] = *b"DrumWtns";
const VERSION: u16 = 1;

/// What has been applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) last: Option<EntryId>,
    pub(crate) membership: StoredMembership,
}

/// The file, and what it holds; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct AppliedFile {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    group_uuid: Uuid,
    kept: Mutex<Option<Applied>>,
}

impl AppliedFile {
    /// Reads what is there; nothing is there before the first trim.
    pub(crate) fn open(dir: &Path, group_uuid: Uuid) -> Result<Self, WitnessError> {
        let path = dir.join(FILE);
        let io = |error| WitnessError::Io { dir: dir.to_owned(), error };
        let kept = match read_file(&RealDisk, &path).map_err(io)? {
            None => None,
            Some(bytes) => {
                let damaged = |reason| WitnessError::Damaged { path, reason };
                Some(decode(&bytes, group_uuid).map_err(damaged)?)
            }
        };
        let (dir, kept) = (dir.to_owned(), Mutex::new(kept));
        Ok(Self { shared: Arc::new(Shared { dir, group_uuid, kept }) })
    }

    pub(crate) fn kept(&self) -> Option<Applied> {
        self.shared.kept.lock().clone()
    }

    /// Durable on return; never goes back. Blocks.
    fn keep(&self, applied: &Applied) -> io::Result<()> {
        let mut kept = self.shared.kept.lock();
        if kept.as_ref().is_some_and(|kept| kept.last >= applied.last) {
            return Ok(());
        }
        let bytes = encode(applied, self.shared.group_uuid);
        replace_file(&RealDisk as &dyn Disk, &self.shared.dir, FILE, &[&bytes])?;
        *kept = Some(applied.clone());
        Ok(())
    }

    async fn keep_apart(&self, applied: Applied) -> io::Result<()> {
        let file = self.clone();
        let keeping = tokio::task::spawn_blocking(move || file.keep(&applied));
        keeping.await.map_err(io::Error::other)?
    }
}

/// Little-endian: magic, version (u16), group UUID, last applied and the membership's id (each a
/// byte whether there is one, term and index as u64), the membership as its entries have it (count
/// of bytes as u32 before it), CRC-32 of all before.
fn encode(applied: &Applied, group_uuid: Uuid) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    out.put_slice(&MAGIC);
    out.put_u16_le(VERSION);
    out.put_slice(group_uuid.as_bytes());
    put_id(&mut out, applied.last);
    put_id(&mut out, applied.membership.log_id().as_ref().map(entry_id));
    let membership = membership::encode(applied.membership.membership());
    out.put_u32_le(u32::try_from(membership.len()).expect("a group has few members"));
    out.put_slice(&membership);
    let crc = crc32fast::hash(&out);
    out.put_u32_le(crc);
    out
}

fn put_id(out: &mut Vec<u8>, id: Option<EntryId>) {
    out.put_u8(u8::from(id.is_some()));
    let id = id.unwrap_or(EntryId { term: Term::ZERO, index: EntryIndex::ZERO });
    out.put_u64_le(id.term.get());
    out.put_u64_le(id.index.get());
}

fn decode(bytes: &[u8], group_uuid: Uuid) -> Result<Applied, String> {
    let short = |_: TryGetError| "it ends too early".to_owned();
    let (covered, crc) = bytes.split_last_chunk::<4>().ok_or("it ends too early")?;
    if u32::from_le_bytes(*crc) != crc32fast::hash(covered) {
        return Err("the checksum does not match".to_owned());
    }
    let mut fields = covered.strip_prefix(&MAGIC).ok_or("it is no file of a witness")?;
    let version = fields.try_get_u16_le().map_err(short)?;
    if version != VERSION {
        return Err(format!("version {version} is not known"));
    }
    let found = Uuid::from_u128(fields.try_get_u128().map_err(short)?);
    if found != group_uuid {
        return Err(format!("it belongs to group {found}"));
    }
    let last = take_id(&mut fields).map_err(short)?;
    let membership_at = take_id(&mut fields).map_err(short)?;
    let membership_bytes = fields.try_get_u32_le().map_err(short)?;
    if usize::try_from(membership_bytes) != Ok(fields.len()) {
        return Err("the membership has another length".to_owned());
    }
    let members = membership::decode(fields).map_err(|error| error.to_string())?;
    let membership = StoredMembership::new(membership_at.map(log_id), members);
    Ok(Applied { last, membership })
}

fn take_id(fields: &mut &[u8]) -> Result<Option<EntryId>, TryGetError> {
    let present = fields.try_get_u8()? != 0;
    let term = Term::new(fields.try_get_u64_le()?);
    let index = EntryIndex::new(fields.try_get_u64_le()?);
    Ok(present.then_some(EntryId { term, index }))
}

/// The write side. What is applied after the last [`AppliedFile::keep`] is in the log still.
#[derive(Debug)]
pub(crate) struct Machine {
    applied: Applied,
    file: AppliedFile,
}

impl Machine {
    pub(crate) fn new(file: AppliedFile) -> Self {
        Self { applied: file.kept().unwrap_or_default(), file }
    }
}

fn snapshot(applied: Applied) -> Snapshot {
    let meta =
        SnapshotMeta { last_log_id: applied.last.map(log_id), last_membership: applied.membership };
    Snapshot { meta, snapshot: Manifest }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Manifest;
    type SnapshotBuilder = AppliedNow;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied.last.map(log_id), self.applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            self.applied.last = Some(entry_id(&entry.log_id));
            if let EntryPayload::Membership(members) = entry.payload {
                self.applied.membership = StoredMembership::new(Some(entry.log_id), members);
            }
            if let Some(responder) = responder {
                responder.send(Outcomes::default());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> AppliedNow {
        AppliedNow { applied: self.applied.clone(), file: self.file.clone() }
    }

    /// What lies behind it is gone from the log right after: it is durable on return.
    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _: Manifest) -> io::Result<()> {
        let last = meta.last_log_id.as_ref().map(entry_id);
        if last <= self.applied.last {
            return Ok(());
        }
        let applied = Applied { last, membership: meta.last_membership.clone() };
        self.file.keep_apart(applied.clone()).await?;
        self.applied = applied;
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        Ok(self.file.kept().map(snapshot))
    }
}

/// What was applied when it was asked for.
#[derive(Debug)]
pub(crate) struct AppliedNow {
    applied: Applied,
    file: AppliedFile,
}

impl RaftSnapshotBuilder<TypeConfig> for AppliedNow {
    type SnapshotData = Manifest;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        self.file.keep_apart(self.applied.clone()).await?;
        Ok(snapshot(self.applied.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::replica::membership::{BrokerNode, Role};
    use crate::replica::raft_types::Membership;

    fn applied() -> Applied {
        let node = |name: &str, role| BrokerNode {
            name: name.to_owned(),
            address: format!("{name}:1"),
            role,
        };
        let nodes = BTreeMap::from([
            (1, node("a", Role::Data)),
            (2, node("b", Role::Data)),
            (3, node("w", Role::Witness)),
        ]);
        let members = Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes).unwrap();
        let at = EntryId { term: Term::new(1), index: EntryIndex::new(0) };
        Applied {
            last: Some(EntryId { term: Term::new(4), index: EntryIndex::new(900) }),
            membership: StoredMembership::new(Some(log_id(at)), members),
        }
    }

    #[test]
    fn comes_back_as_it_was() {
        let uuid = Uuid::from_u128(7);
        assert_eq!(decode(&encode(&applied(), uuid), uuid), Ok(applied()));
        let nothing = Applied::default();
        assert_eq!(decode(&encode(&nothing, uuid), uuid), Ok(nothing));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let uuid = Uuid::from_u128(7);
        let good = encode(&applied(), uuid);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad, uuid).is_err(), "bit {bit}");
        }
        for end in 0..good.len() {
            assert!(decode(&good[..end], uuid).is_err(), "cut at {end}");
        }
        let other = decode(&good, Uuid::from_u128(8)).unwrap_err();
        assert!(other.starts_with("it belongs to group"), "{other}");
    }

    #[test]
    fn what_is_kept_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = Uuid::from_u128(7);
        let file = AppliedFile::open(dir.path(), uuid).unwrap();
        assert_eq!(file.kept(), None);
        file.keep(&applied()).unwrap();
        file.keep(&Applied::default()).unwrap();
        let again = AppliedFile::open(dir.path(), uuid).unwrap();
        assert_eq!(again.kept(), Some(applied()));
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = Uuid::from_u128(7);
        AppliedFile::open(dir.path(), uuid).unwrap().keep(&applied()).unwrap();
        std::fs::write(dir.path().join(FILE), b"DrumWtns").unwrap();
        let error = AppliedFile::open(dir.path(), uuid).unwrap_err().to_string();
        assert!(error.contains("/applied is damaged"), "{error}");
    }
}
