//! Membership entries as bytes: our own layout, so that no type of openraft lies on disk.
//!
//! All little-endian: kind (u16) 1, version (u16) 1, configuration count (u32); per configuration
//! its voter count (u32) and their ids (u64 each); node count (u32); per node its id (u64), role
//! (u8), name and address, each as byte count (u16) and UTF-8.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::raft_types::Membership;

const KIND: u16 = 1;
const VERSION: u16 = 1;
/// Far above any group; bounds what a corrupt count can make us read.
const COUNT_MAX: u32 = 1024;

/// What a member does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Keeps the log and the state; may lead.
    #[default]
    Data = 1,
    /// Votes, keeps headers only, never leads.
    Witness = 2,
}

/// One member of the broker group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BrokerNode {
    /// Unique within the cluster.
    pub name: String,
    /// `host:port` where other members reach it; empty while it is alone.
    pub address: String,
    pub role: Role,
}

/// Why bytes are not a membership.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipBytesError {
    #[error("membership is cut short")]
    Short,
    #[error("membership has kind {kind} and version {version}, which are not supported")]
    Unsupported { kind: u16, version: u16 },
    #[error("{field} is invalid in the membership")]
    Field { field: &'static str },
}

/// The bytes of a membership.
pub(crate) fn encode(membership: &Membership) -> Bytes {
    let mut out = BytesMut::with_capacity(256);
    out.put_u16_le(KIND);
    out.put_u16_le(VERSION);
    put_count(&mut out, membership.get_joint_config().len());
    for config in membership.get_joint_config() {
        put_count(&mut out, config.len());
        for id in config {
            out.put_u64_le(*id);
        }
    }
    put_count(&mut out, membership.nodes().count());
    for (id, node) in membership.nodes() {
        out.put_u64_le(*id);
        out.put_u8(node.role as u8);
        put_text(&mut out, &node.name);
        put_text(&mut out, &node.address);
    }
    out.freeze()
}

/// The membership in `bytes`.
pub(crate) fn decode(mut bytes: &[u8]) -> Result<Membership, MembershipBytesError> {
    let kind = take_u16(&mut bytes)?;
    let version = take_u16(&mut bytes)?;
    if (kind, version) != (KIND, VERSION) {
        return Err(MembershipBytesError::Unsupported { kind, version });
    }
    let mut configs = Vec::new();
    for _ in 0..take_count(&mut bytes)? {
        let mut voters = BTreeSet::new();
        for _ in 0..take_count(&mut bytes)? {
            voters.insert(take_u64(&mut bytes)?);
        }
        configs.push(voters);
    }
    let mut nodes = BTreeMap::new();
    for _ in 0..take_count(&mut bytes)? {
        let id = take_u64(&mut bytes)?;
        let role = match take_u8(&mut bytes)? {
            1 => Role::Data,
            2 => Role::Witness,
            _ => return Err(MembershipBytesError::Field { field: "role" }),
        };
        let name = take_text(&mut bytes)?;
        let address = take_text(&mut bytes)?;
        nodes.insert(id, BrokerNode { name, address, role });
    }
    if !bytes.is_empty() {
        return Err(MembershipBytesError::Field { field: "end" });
    }
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|_| MembershipBytesError::Field { field: "voters" })
}

fn put_count(out: &mut BytesMut, count: usize) {
    out.put_u32_le(u32::try_from(count).expect("a group has few members"));
}

fn put_text(out: &mut BytesMut, text: &str) {
    out.put_u16_le(u16::try_from(text.len()).expect("names and addresses are short"));
    out.put_slice(text.as_bytes());
}

fn take_u8(bytes: &mut &[u8]) -> Result<u8, MembershipBytesError> {
    bytes.try_get_u8().map_err(|_| MembershipBytesError::Short)
}

fn take_u16(bytes: &mut &[u8]) -> Result<u16, MembershipBytesError> {
    bytes.try_get_u16_le().map_err(|_| MembershipBytesError::Short)
}

fn take_u64(bytes: &mut &[u8]) -> Result<u64, MembershipBytesError> {
    bytes.try_get_u64_le().map_err(|_| MembershipBytesError::Short)
}

fn take_count(bytes: &mut &[u8]) -> Result<u32, MembershipBytesError> {
    let count = bytes.try_get_u32_le().map_err(|_| MembershipBytesError::Short)?;
    if count > COUNT_MAX {
        return Err(MembershipBytesError::Field { field: "count" });
    }
    Ok(count)
}

fn take_text(bytes: &mut &[u8]) -> Result<String, MembershipBytesError> {
    let text_bytes = usize::from(take_u16(bytes)?);
    let (text, rest) = bytes.split_at_checked(text_bytes).ok_or(MembershipBytesError::Short)?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).map_err(|_| MembershipBytesError::Field { field: "text" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joint() -> Membership {
        let node = |name: &str, role| BrokerNode {
            name: name.into(),
            address: format!("{name}:10912"),
            role,
        };
        let nodes = BTreeMap::from([
            (1, node("broker-a-0", Role::Data)),
            (2, node("broker-a-1", Role::Data)),
            (3, node("nameserver-0", Role::Witness)),
        ]);
        Membership::new(vec![BTreeSet::from([1]), BTreeSet::from([1, 2])], nodes).unwrap()
    }

    #[test]
    fn comes_back_as_it_was() {
        assert_eq!(decode(&encode(&joint())), Ok(joint()));
        assert_eq!(decode(&encode(&Membership::default())), Ok(Membership::default()));
    }

    #[test]
    fn every_cut_and_every_unknown_version_is_refused() {
        let bytes = encode(&joint());
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        let mut newer = bytes.to_vec();
        newer[2] = 2;
        assert_eq!(decode(&newer), Err(MembershipBytesError::Unsupported { kind: 1, version: 2 }));
    }

    #[test]
    fn single_voter_keeps_its_bytes() {
        let nodes = BTreeMap::from([(
            7,
            BrokerNode { name: "n".into(), address: String::new(), role: Role::Data },
        )]);
        let membership = Membership::new(vec![BTreeSet::from([7])], nodes).unwrap();
        let golden = [
            1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0,
            0, 0, 0, 1, 1, 0, b'n', 0, 0,
        ];
        assert_eq!(encode(&membership).as_ref(), golden);
    }
}
