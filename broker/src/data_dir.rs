//! The data directory as a whole: whose it is, that only one process uses it, what lies where.
//!
//! Owns the lock file and the identity file; what is inside the folders is others' business.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut};
use drumlin_proto::ids::BrokerGroupName;
use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

use crate::disk::{Disk, RealDisk, read_file, replace_file};

const LOCK: &str = "lock";
const IDENTITY: &str = "identity";
const LOG: &str = "log";
const INDEX: &str = "index";
const CHECKPOINT: &str = "checkpoint";
const FOLDERS: [&str; 3] = [LOG, INDEX, CHECKPOINT];

const MAGIC: [u8; 8] = *b"DrumIdnt";
const VERSION: u16 = 1;
/// With the succession behind the names.
const VERSION_SUCCEEDED: u16 = 2;
/// Of broker groups that one may succeed; bounds what a file can make us read.
const SUCCEEDED_MAX: usize = 64;

/// Whose data a directory holds. Never changes once written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster: String,
    pub broker_group: BrokerGroupName,
    /// Name of the node within the cluster.
    pub node: String,
    /// Of the broker group, made at its bootstrap or by an unsafe election.
    pub group_uuid: Uuid,
    /// What the group was called before each of its unsafe elections, oldest first. Its log and
    /// checkpoints are still keyed with the first.
    pub succeeds: Vec<Uuid>,
    /// Random, of this directory alone: a node that lost its disk is another member.
    pub directory_uuid: Uuid,
    /// Raft's name of this member.
    pub node_id: u64,
}

impl Identity {
    /// What log and checkpoints are keyed with: the group's UUID of its bootstrap.
    pub fn log_uuid(&self) -> Uuid {
        self.succeeds.first().copied().unwrap_or(self.group_uuid)
    }
}

/// Who the configuration says that this is.
#[derive(Clone, Debug)]
pub struct Claim {
    pub cluster: String,
    pub broker_group: BrokerGroupName,
    pub node: String,
}

/// What an empty directory gets besides the claim.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    pub group_uuid: Uuid,
    /// As in [`Identity`].
    pub succeeds: Vec<Uuid>,
    pub directory_uuid: Uuid,
    pub node_id: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("data directory {} cannot be used", dir.display())]
    Io {
        dir: PathBuf,
        #[source]
        error: io::Error,
    },
    #[error("data directory {} is in use by process {holder}", dir.display())]
    Locked { dir: PathBuf, holder: String },
    #[error("data directory {} belongs to {what} {found:?}, the configuration says {own:?}",
        dir.display())]
    OtherOwner { dir: PathBuf, what: &'static str, found: String, own: String },
    #[error("data directory {} holds data in {folder}/, but no file `{IDENTITY}`: restore it, or \
        start with an empty directory", dir.display())]
    IdentityMissing { dir: PathBuf, folder: &'static str },
    #[error("{} is damaged ({reason}): restore it, or start with an empty directory",
        path.display())]
    IdentityDamaged { path: PathBuf, reason: String },
}

/// What was found in a directory; it is locked either way.
#[derive(Debug)]
pub enum Found {
    Owned(DataDir),
    Empty(EmptyDataDir),
}

impl Found {
    /// An empty directory becomes this node's.
    pub fn or_claim(self, bootstrap: impl FnOnce() -> Bootstrap) -> Result<DataDir, DataDirError> {
        match self {
            Self::Owned(data_dir) => Ok(data_dir),
            Self::Empty(empty) => empty.claim(bootstrap()),
        }
    }
}

/// A locked directory that is nobody's yet.
#[derive(Debug)]
pub struct EmptyDataDir {
    root: PathBuf,
    claim: Claim,
    lock: File,
}

/// An open data directory. Others are locked out until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    identity: Identity,
    /// Whether the identity was written just now.
    is_new: bool,
    _lock: File,
}

impl EmptyDataDir {
    pub fn owner(&self) -> &Claim {
        &self.claim
    }

    /// Makes the directory this node's, durably. After an error it is as empty as before, or
    /// owned.
    pub fn claim(self, bootstrap: Bootstrap) -> Result<DataDir, DataDirError> {
        let disk = RealDisk;
        let io = |error| DataDirError::Io { dir: self.root.clone(), error };
        let identity = write_identity(&disk, &self.root, &self.claim, bootstrap).map_err(io)?;
        DataDir::of(self.root, identity, true, self.lock)
    }
}

impl DataDir {
    /// Creates the directory if need be, locks it, and checks whose it is.
    pub fn open(root: &Path, claim: &Claim) -> Result<Found, DataDirError> {
        let disk = RealDisk;
        let io = |error| DataDirError::Io { dir: root.to_owned(), error };
        disk.create_dir(root).map_err(io)?;
        let lock = lock(root)?;
        let root = root.to_owned();
        match read_identity(&disk, &root)? {
            Some(identity) => {
                check_claim(&root, &identity, claim)?;
                Ok(Found::Owned(Self::of(root, identity, false, lock)?))
            }
            None => Ok(Found::Empty(EmptyDataDir { root, claim: claim.clone(), lock })),
        }
    }

    fn of(
        root: PathBuf,
        identity: Identity,
        is_new: bool,
        lock: File,
    ) -> Result<Self, DataDirError> {
        let disk = RealDisk;
        let io = |error| DataDirError::Io { dir: root.clone(), error };
        for folder in FOLDERS {
            disk.create_dir(&root.join(folder)).map_err(io)?;
        }
        disk.sync_dir(&root).map_err(io)?;
        Ok(Self { root, identity, is_new, _lock: lock })
    }

    /// The same data under a new group UUID, which succeeds the one it had; durable on return.
    pub fn succeed(self, group_uuid: Uuid) -> Result<Self, DataDirError> {
        let io = |error| DataDirError::Io { dir: self.root.clone(), error };
        let mut identity = self.identity.clone();
        identity.succeeds.push(identity.group_uuid);
        identity.group_uuid = group_uuid;
        let bytes = encode(&identity).map_err(io)?;
        replace_file(&RealDisk, &self.root, IDENTITY, &[&bytes]).map_err(io)?;
        Ok(Self { identity, ..self })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn is_new(&self) -> bool {
        self.is_new
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn log_dir(&self) -> PathBuf {
        self.root.join(LOG)
    }

    pub fn index_dir(&self) -> PathBuf {
        self.root.join(INDEX)
    }

    pub fn checkpoint_dir(&self) -> PathBuf {
        self.root.join(CHECKPOINT)
    }
}

/// The kernel lets go of the lock when the process ends, however it ends; the number in the file is
/// for people only.
pub(crate) fn lock(root: &Path) -> Result<File, DataDirError> {
    let io = |error| DataDirError::Io { dir: root.to_owned(), error };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(root.join(LOCK)).map_err(io)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // Its holder may be about to write it, so what cannot be read is just not known.
            let read = file.read_to_string(&mut holder);
            let holder = match (read, holder.trim()) {
                (Ok(_), pid) if !pid.is_empty() => pid.to_owned(),
                (Ok(_) | Err(_), _) => "unknown".to_owned(),
            };
            return Err(DataDirError::Locked { dir: root.to_owned(), holder });
        }
        Err(errno) => return Err(io(errno.into())),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(io)?;
    Ok(file)
}

/// The identity of a data directory; `None` if it holds neither one nor any data.
pub fn read_identity(disk: &dyn Disk, root: &Path) -> Result<Option<Identity>, DataDirError> {
    let io = |error| DataDirError::Io { dir: root.to_owned(), error };
    let path = root.join(IDENTITY);
    if let Some(bytes) = read_file(disk, &path).map_err(io)? {
        let damaged = |reason| DataDirError::IdentityDamaged { path, reason };
        return decode(&bytes).map(Some).map_err(damaged);
    }
    for folder in FOLDERS {
        if !disk.list(&root.join(folder)).map_err(io)?.is_empty() {
            return Err(DataDirError::IdentityMissing { dir: root.to_owned(), folder });
        }
    }
    Ok(None)
}

pub(crate) fn write_identity(
    disk: &dyn Disk,
    root: &Path,
    claim: &Claim,
    bootstrap: Bootstrap,
) -> io::Result<Identity> {
    let identity = Identity {
        cluster: claim.cluster.clone(),
        broker_group: claim.broker_group.clone(),
        node: claim.node.clone(),
        group_uuid: bootstrap.group_uuid,
        succeeds: bootstrap.succeeds,
        directory_uuid: bootstrap.directory_uuid,
        node_id: bootstrap.node_id,
    };
    replace_file(disk, root, IDENTITY, &[&encode(&identity)?])?;
    Ok(identity)
}

fn check_claim(root: &Path, identity: &Identity, claim: &Claim) -> Result<(), DataDirError> {
    let pairs = [
        ("cluster", identity.cluster.as_str(), claim.cluster.as_str()),
        ("broker group", identity.broker_group.as_str(), claim.broker_group.as_str()),
        ("node", identity.node.as_str(), claim.node.as_str()),
    ];
    match pairs.into_iter().find(|(_, found, own)| found != own) {
        None => Ok(()),
        Some((what, found, own)) => Err(DataDirError::OtherOwner {
            dir: root.to_owned(),
            what,
            found: found.to_owned(),
            own: own.to_owned(),
        }),
    }
}

fn encode(identity: &Identity) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.put_slice(&MAGIC);
    let succeeds = !identity.succeeds.is_empty();
    bytes.put_u16_le(if succeeds { VERSION_SUCCEEDED } else { VERSION });
    bytes.put_bytes(0, 6);
    bytes.put_slice(identity.group_uuid.as_bytes());
    bytes.put_slice(identity.directory_uuid.as_bytes());
    bytes.put_u64_le(identity.node_id);
    for name in [&identity.cluster, identity.broker_group.as_str(), &identity.node] {
        let name_bytes = u16::try_from(name.len()).map_err(io::Error::other)?;
        bytes.put_u16_le(name_bytes);
        bytes.put_slice(name.as_bytes());
    }
    if succeeds {
        let count = u16::try_from(identity.succeeds.len()).map_err(io::Error::other)?;
        if usize::from(count) > SUCCEEDED_MAX {
            return Err(io::Error::other("the group succeeds too many others"));
        }
        bytes.put_u16_le(count);
        identity.succeeds.iter().for_each(|uuid| bytes.put_slice(uuid.as_bytes()));
    }
    let crc = crc32fast::hash(&bytes);
    bytes.put_u32_le(crc);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Identity, String> {
    let short = |_| "it ends too early".to_owned();
    let (mut fields, mut crc) = bytes
        .split_last_chunk::<4>()
        .map_or_else(|| (bytes, [0; 4].as_slice()), |(fields, crc)| (fields, crc.as_slice()));
    fields = fields.strip_prefix(&MAGIC).ok_or("it is no identity file")?;
    let version = fields.try_get_u16_le().map_err(short)?;
    if ![VERSION, VERSION_SUCCEEDED].contains(&version) {
        return Err(format!("version {version} is not known"));
    }
    if crc.try_get_u32_le().map_err(short)? != crc32fast::hash(&bytes[..bytes.len() - 4]) {
        return Err("the checksum does not match".to_owned());
    }
    fields.try_get_uint_le(6).map_err(short)?;
    let group_uuid = Uuid::from_u128(fields.try_get_u128().map_err(short)?);
    let directory_uuid = Uuid::from_u128(fields.try_get_u128().map_err(short)?);
    let node_id = fields.try_get_u64_le().map_err(short)?;
    let mut name = || {
        let name_bytes = usize::from(fields.try_get_u16_le().map_err(short)?);
        let (name, rest) = fields.split_at_checked(name_bytes).ok_or("it ends too early")?;
        fields = rest;
        String::from_utf8(name.to_vec()).map_err(|error| error.to_string())
    };
    let (cluster, broker_group, node) = (name()?, name()?, name()?);
    let broker_group = BrokerGroupName::parse(&broker_group).map_err(|error| error.to_string())?;
    let mut succeeds = Vec::new();
    if version == VERSION_SUCCEEDED {
        let count = usize::from(fields.try_get_u16_le().map_err(short)?);
        if count > SUCCEEDED_MAX {
            return Err(format!("it succeeds {count} others"));
        }
        for _ in 0..count {
            succeeds.push(Uuid::from_u128(fields.try_get_u128().map_err(short)?));
        }
    }
    Ok(Identity { cluster, broker_group, node, group_uuid, succeeds, directory_uuid, node_id })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn claim() -> Claim {
        Claim {
            cluster: "east".into(),
            broker_group: BrokerGroupName::parse("broker-a").unwrap(),
            node: "broker-a-0".into(),
        }
    }

    fn bootstrap() -> Bootstrap {
        let group_uuid = Uuid::from_u128(0x0102_0304);
        let directory_uuid = Uuid::from_u128(5);
        Bootstrap { group_uuid, succeeds: Vec::new(), directory_uuid, node_id: 9 }
    }

    fn never() -> Bootstrap {
        panic!("the directory has an identity already")
    }

    fn open(root: &Path) -> Result<DataDir, DataDirError> {
        DataDir::open(root, &claim())?.or_claim(bootstrap)
    }

    #[test]
    fn a_new_directory_is_private_and_keeps_its_identity() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("deep").join("data");
        let first = open(&root).unwrap();
        assert!(first.is_new());
        let identity = first.identity().clone();
        drop(first);
        let again = DataDir::open(&root, &claim()).unwrap().or_claim(never).unwrap();
        assert!(!again.is_new());
        assert_eq!(again.identity(), &identity);
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o777, 0o700);
        for folder in FOLDERS {
            assert!(root.join(folder).is_dir());
        }
    }

    #[test]
    fn a_second_opening_is_refused_and_names_the_holder() {
        let root = tempfile::tempdir().unwrap();
        let first = open(root.path()).unwrap();
        let error = open(root.path()).unwrap_err();
        let pid = std::process::id();
        assert!(error.to_string().ends_with(&format!("is in use by process {pid}")), "{error}");
        drop(first);
        open(root.path()).unwrap();
    }

    #[test]
    fn another_cluster_group_or_node_is_refused_with_both_names() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path()).unwrap());
        let changes: [fn(&mut Claim); 3] = [
            |claim| claim.cluster = "west".into(),
            |claim| claim.broker_group = BrokerGroupName::parse("broker-b").unwrap(),
            |claim| claim.node = "broker-a-1".into(),
        ];
        let expected = [
            r#"belongs to cluster "east", the configuration says "west""#,
            r#"belongs to broker group "broker-a", the configuration says "broker-b""#,
            r#"belongs to node "broker-a-0", the configuration says "broker-a-1""#,
        ];
        for (change, expected) in changes.into_iter().zip(expected) {
            let mut other = claim();
            change(&mut other);
            let error = DataDir::open(root.path(), &other).unwrap_err();
            assert!(error.to_string().ends_with(expected), "{error}");
        }
    }

    #[test]
    fn data_without_identity_is_refused() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path()).unwrap());
        fs::remove_file(root.path().join(IDENTITY)).unwrap();
        fs::write(root.path().join(LOG).join("segment"), b"entries").unwrap();
        let error = open(root.path()).unwrap_err();
        assert!(matches!(error, DataDirError::IdentityMissing { folder: "log", .. }), "{error}");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_of_the_identity_is_refused() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path()).unwrap());
        let path = root.path().join(IDENTITY);
        let good = fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
        for bytes in 0..good.len() {
            fs::write(&path, &good[..bytes]).unwrap();
            let error = DataDir::open(root.path(), &claim()).unwrap_err();
            assert!(matches!(error, DataDirError::IdentityDamaged { .. }), "{bytes}: {error}");
        }
    }

    #[test]
    fn published_identity_bytes_do_not_change() {
        let disk = crate::disk::faulty::FaultyDisk::default();
        let written = write_identity(&disk, Path::new("/data"), &claim(), bootstrap()).unwrap();
        let hex: String =
            encode(&written).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = concat!(
            "4472756d49646e74010000000000000000000000000000000000000001020304",
            "0000000000000000000000000000000509000000000000000400656173740800",
            "62726f6b65722d610a0062726f6b65722d612d30f8b1b5a2",
        );
        assert_eq!(hex, golden, "add a version instead");
    }

    #[test]
    fn an_empty_directory_stays_empty_until_it_is_claimed() {
        let root = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let found = DataDir::open(root.path(), &claim()).unwrap();
            assert!(matches!(found, Found::Empty(_)), "{found:?}");
            assert!(matches!(
                DataDir::open(root.path(), &claim()),
                Err(DataDirError::Locked { .. })
            ));
        }
    }

    #[test]
    fn a_group_that_succeeds_others_keeps_the_key_of_its_log() {
        let root = tempfile::tempdir().unwrap();
        let old = open(root.path()).unwrap();
        let first = old.identity().group_uuid;
        let second = old.succeed(Uuid::from_u128(20)).unwrap();
        assert_eq!(second.identity().succeeds, [first]);
        let third = second.succeed(Uuid::from_u128(30)).unwrap();
        drop(third);
        let again = DataDir::open(root.path(), &claim()).unwrap().or_claim(never).unwrap();
        assert_eq!(again.identity().group_uuid, Uuid::from_u128(30));
        assert_eq!(again.identity().succeeds, [first, Uuid::from_u128(20)]);
        assert_eq!(again.identity().log_uuid(), first);
        let good = fs::read(root.path().join(IDENTITY)).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_crash_while_the_identity_is_written_leaves_an_empty_directory_or_all_of_it() {
        use crate::disk::faulty::FaultyDisk;
        let mut random = fastrand::Rng::with_seed(3);
        for after in 0..6 {
            let disk = FaultyDisk::default();
            disk.fail_after(after, io::ErrorKind::Other);
            let root = Path::new("/data");
            let written = write_identity(&disk, root, &claim(), bootstrap());
            for _ in 0..20 {
                let found = read_identity(&disk.crash(&mut random), root).unwrap();
                assert!(found.is_some() || written.is_err(), "change {after} failed");
                assert!(found.is_none_or(|identity| identity.node_id == 9));
            }
        }
    }
}
