//! Receipt handles: what a client shows to finish or change a delivery. Pure.
//!
//! Text of the form `<broker group>.<hex>`: the name lets any process find the owner, the rest
//! names group, queue, record and lease, and a checksum. A handle grants nothing by itself, since
//! the lease it names must still hold when it is used, on whichever node leads then.

use drumlin_proto::ids::{BrokerGroupName, QueueId, QueueKey, QueueOffset, TopicId};
use drumlin_proto::route::HANDLE_SEPARATOR;

use crate::command::{GroupId, LeaseId};

const VERSION: u8 = 1;
/// Version, group, topic, queue, offset, lease.
const BODY_BYTES: usize = 1 + 4 + 4 + 2 + 8 + 8;
const BYTES: usize = BODY_BYTES + 4;

/// One delivery of one record to one consumer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) group: GroupId,
    pub(super) queue: QueueKey,
    pub(super) offset: QueueOffset,
    pub(super) lease: LeaseId,
}

/// Why a text is not a handle of this broker group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidHandle {
    #[error("the receipt handle cannot be decoded")]
    Undecodable,
    #[error("the receipt handle was given by another broker group")]
    Foreign,
}

impl Handle {
    pub(super) fn encode(&self, broker_group: &BrokerGroupName) -> String {
        let mut bytes = Vec::with_capacity(BYTES);
        bytes.push(VERSION);
        bytes.extend(self.group.0.to_be_bytes());
        bytes.extend(self.queue.topic.get().to_be_bytes());
        bytes.extend(self.queue.queue.get().to_be_bytes());
        bytes.extend(self.offset.get().to_be_bytes());
        bytes.extend(self.lease.0.to_be_bytes());
        bytes.extend(checksum(broker_group, &bytes).to_be_bytes());
        let mut text = String::with_capacity(broker_group.as_str().len() + 1 + 2 * BYTES);
        text.push_str(broker_group.as_str());
        text.push(HANDLE_SEPARATOR);
        for byte in bytes {
            text.push(digit(byte >> 4));
            text.push(digit(byte & 15));
        }
        text
    }

    pub(super) fn decode(
        text: &str,
        broker_group: &BrokerGroupName,
    ) -> Result<Self, InvalidHandle> {
        let (name, hex) = text.split_once(HANDLE_SEPARATOR).ok_or(InvalidHandle::Undecodable)?;
        if name != broker_group.as_str() {
            return Err(match BrokerGroupName::parse(name) {
                Ok(_) => InvalidHandle::Foreign,
                Err(_) => InvalidHandle::Undecodable,
            });
        }
        Self::from_hex(hex, broker_group).ok_or(InvalidHandle::Undecodable)
    }

    fn from_hex(hex: &str, broker_group: &BrokerGroupName) -> Option<Self> {
        if hex.len() != 2 * BYTES {
            return None;
        }
        let mut bytes = [0; BYTES];
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let [high, low] = pair.try_into().ok()?;
            *byte = value(high)? << 4 | value(low)?;
        }
        let (body, stored) = bytes.split_first_chunk::<BODY_BYTES>()?;
        if checksum(broker_group, body).to_be_bytes() != *stored {
            return None;
        }
        let (version, rest) = body.split_first()?;
        let (group, rest) = rest.split_first_chunk()?;
        let (topic, rest) = rest.split_first_chunk()?;
        let (queue, rest) = rest.split_first_chunk()?;
        let (offset, rest) = rest.split_first_chunk()?;
        let (lease, _) = rest.split_first_chunk()?;
        (*version == VERSION).then(|| Self {
            group: GroupId(u32::from_be_bytes(*group)),
            queue: QueueKey {
                topic: TopicId::new(u32::from_be_bytes(*topic)),
                queue: QueueId::new(u16::from_be_bytes(*queue)),
            },
            offset: QueueOffset::new(u64::from_be_bytes(*offset)),
            lease: LeaseId(u64::from_be_bytes(*lease)),
        })
    }
}

fn checksum(broker_group: &BrokerGroupName, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(broker_group.as_str().as_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn digit(half: u8) -> char {
    char::from(if half < 10 { b'0' + half } else { b'a' + (half - 10) })
}

/// Lower case only, so that each handle has one spelling.
fn value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> BrokerGroupName {
        BrokerGroupName::parse(text).unwrap()
    }

    fn any_handle() -> impl Strategy<Value = Handle> {
        any::<(u32, u32, u16, u64, u64)>().prop_map(|(group, topic, queue, offset, lease)| Handle {
            group: GroupId(group),
            queue: QueueKey { topic: TopicId::new(topic), queue: QueueId::new(queue) },
            offset: QueueOffset::new(offset),
            lease: LeaseId(lease),
        })
    }

    #[test]
    fn a_handle_keeps_its_spelling() {
        let handle = Handle {
            group: GroupId(1),
            queue: QueueKey { topic: TopicId::new(2), queue: QueueId::new(3) },
            offset: QueueOffset::new(4),
            lease: LeaseId(5),
        };
        let text = handle.encode(&name("broker-a"));
        let body = "010000000100000002000300000000000000040000000000000005";
        assert_eq!(text.strip_prefix("broker-a.").unwrap().get(..54), Some(body));
        assert_eq!(text.len(), 9 + 2 * BYTES);
        let route = drumlin_proto::route::broker_group_of_handle(&text);
        assert_eq!(route, Some(name("broker-a")));
    }

    #[test]
    fn handles_of_other_broker_groups_are_told_apart() {
        let handle = Handle {
            group: GroupId(1),
            queue: QueueKey { topic: TopicId::new(2), queue: QueueId::new(3) },
            offset: QueueOffset::new(4),
            lease: LeaseId(5),
        };
        let text = handle.encode(&name("a"));
        assert_eq!(Handle::decode(&text, &name("b")), Err(InvalidHandle::Foreign));
        let renamed = text.replacen("a.", "b.", 1);
        assert_eq!(Handle::decode(&renamed, &name("b")), Err(InvalidHandle::Undecodable));
    }

    proptest! {
        #[test]
        fn handles_survive_their_text(handle in any_handle()) {
            let group = name("broker-a");
            prop_assert_eq!(Handle::decode(&handle.encode(&group), &group), Ok(handle));
        }

        #[test]
        fn a_changed_character_is_never_accepted(
            handle in any_handle(),
            at in any::<prop::sample::Index>(),
            character in any::<char>(),
        ) {
            let group = name("broker-a");
            let text = handle.encode(&group);
            let mut changed: Vec<char> = text.chars().collect();
            changed[at.index(text.len())] = character;
            let changed: String = changed.into_iter().collect();
            prop_assume!(changed != text);
            prop_assert!(Handle::decode(&changed, &group).is_err());
        }

        #[test]
        fn cut_and_extended_handles_are_never_accepted(
            handle in any_handle(),
            kept in 0usize..80,
            more in "[0-9a-f.]{1,8}",
        ) {
            let group = name("broker-a");
            let text = handle.encode(&group);
            if let Some(cut) = text.get(..kept.min(text.len() - 1)) {
                prop_assert!(Handle::decode(cut, &group).is_err());
            }
            let longer = format!("{text}{more}");
            prop_assert!(Handle::decode(&longer, &group).is_err());
        }

        #[test]
        fn any_text_is_refused_without_a_panic(text in any::<String>(), hex in "[0-9a-f]{62}") {
            let group = name("broker-a");
            prop_assert!(Handle::decode(&text, &group).is_err());
            for rest in [text, hex] {
                let named = format!("broker-a.{rest}");
                prop_assert!(Handle::decode(&named, &group).is_err());
            }
        }
    }
}
