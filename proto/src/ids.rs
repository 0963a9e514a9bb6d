//! Names and positions that appear on the wire: parsed once at the edge, valid everywhere else.

use std::fmt;
use std::sync::Arc;

/// Longest topic name, in characters.
pub const TOPIC_CHARS_MAX: usize = 127;
/// Longest name of a retry or dead-letter topic, in characters.
pub const DERIVED_TOPIC_CHARS_MAX: usize = 255;
/// Longest consumer group name, in characters.
pub const GROUP_CHARS_MAX: usize = 120;
/// Longest broker group name, in characters.
pub const BROKER_GROUP_CHARS_MAX: usize = 63;

const RETRY_PREFIX: &str = "%RETRY%";
const DEAD_LETTER_PREFIX: &str = "%DLQ%";
const RESERVED_TOPICS: [&str; 10] = [
    "TBW102",
    "SCHEDULE_TOPIC_XXXX",
    "BenchmarkTest",
    "RMQ_SYS_TRANS_HALF_TOPIC",
    "RMQ_SYS_TRACE_TOPIC",
    "RMQ_SYS_TRANS_OP_HALF_TOPIC",
    "TRANS_CHECK_MAX_TIME_TOPIC",
    "SELF_TEST_TOPIC",
    "OFFSET_MOVED_EVENT",
    "CHECKPOINT_TOPIC",
];

/// Why a text is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    #[error("a name must not be empty")]
    Empty,
    #[error("{chars} characters are more than the {chars_max} allowed")]
    TooLong { chars: usize, chars_max: usize },
    #[error("character {0:?} is not allowed")]
    Character(char),
    #[error("{0:?} is reserved")]
    Reserved(String),
}

fn check(text: &str, chars_max: usize, allowed: impl Fn(char) -> bool) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty);
    }
    let chars = text.chars().count();
    if chars > chars_max {
        return Err(InvalidName::TooLong { chars, chars_max });
    }
    match text.chars().find(|c| !allowed(*c)) {
        Some(c) => Err(InvalidName::Character(c)),
        None => Ok(()),
    }
}

fn name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '%' | '|' | '_' | '-')
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
    };
}

name!(
    /// Name of a topic, as RocketMQ allows them.
    TopicName
);
name!(
    /// Name of a consumer group.
    GroupName
);
name!(
    /// Name of a broker group, one Raft group with its commitlog.
    BrokerGroupName
);

impl TopicName {
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let derived = text.starts_with(RETRY_PREFIX) || text.starts_with(DEAD_LETTER_PREFIX);
        let chars_max = if derived { DERIVED_TOPIC_CHARS_MAX } else { TOPIC_CHARS_MAX };
        check(text, chars_max, name_char)?;
        if text.starts_with("rmq_sys_") || RESERVED_TOPICS.contains(&text) {
            return Err(InvalidName::Reserved(text.to_owned()));
        }
        Ok(Self(text.into()))
    }

    /// The dead-letter topic of a consumer group.
    pub fn dead_letter(group: &GroupName) -> Self {
        Self(format!("{DEAD_LETTER_PREFIX}{group}").into())
    }

    /// Whether it belongs to a consumer group (`%RETRY%…`, `%DLQ%…`), not to users.
    pub fn is_derived(&self) -> bool {
        self.0.starts_with(RETRY_PREFIX) || self.0.starts_with(DEAD_LETTER_PREFIX)
    }
}

impl GroupName {
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        check(text, GROUP_CHARS_MAX, name_char)?;
        if text.starts_with("CID_RMQ_SYS_") {
            return Err(InvalidName::Reserved(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl BrokerGroupName {
    /// Letters, digits, `-` and `_`, because it becomes part of file and host names.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        check(text, BROKER_GROUP_CHARS_MAX, |c| {
            c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
        })?;
        Ok(Self(text.into()))
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($raw:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name($raw);

        impl $name {
            pub const fn new(raw: $raw) -> Self {
                Self(raw)
            }

            pub const fn get(self) -> $raw {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// Identity of a topic in the log; never reused, so that a re-created topic is a new one.
    TopicId(u32)
);
number!(
    /// Number of a queue within a topic on one broker group, from 0.
    QueueId(u16)
);
number!(
    /// Position of a record in its queue: dense, from 0, never reused.
    QueueOffset(u64)
);

impl QueueOffset {
    pub const ZERO: Self = Self(0);

    /// The offset `records` further on.
    pub fn advance(self, records: u64) -> Self {
        Self(self.0 + records)
    }

    /// Records from `self` (inclusive) up to `end` (exclusive); 0 if `end` lies before.
    pub fn count_to(self, end: Self) -> u64 {
        end.0.saturating_sub(self.0)
    }
}

/// One queue of one topic on this broker group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueKey {
    pub topic: TopicId,
    pub queue: QueueId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topic_names_are_what_rocketmq_allows() {
        for name in ["orders", "a", "A-b_c|d%e", "%RETRY%g", "%DLQ%g", &"t".repeat(127)] {
            assert_eq!(TopicName::parse(name).map(|n| n.to_string()), Ok(name.to_owned()));
        }
        assert_eq!(TopicName::parse(""), Err(InvalidName::Empty));
        for (name, c) in [("a b", ' '), ("a/b", '/'), ("caf\u{e9}", '\u{e9}'), ("a\n", '\n')] {
            assert_eq!(TopicName::parse(name), Err(InvalidName::Character(c)));
        }
    }

    #[test]
    fn longest_names_pass_and_one_more_is_refused() {
        let too_long = |chars_max| InvalidName::TooLong { chars: chars_max + 1, chars_max };
        let name = |chars| "x".repeat(chars);
        assert_eq!(TopicName::parse(&name(128)), Err(too_long(TOPIC_CHARS_MAX)));
        assert!(GroupName::parse(&name(120)).is_ok());
        assert_eq!(GroupName::parse(&name(121)), Err(too_long(GROUP_CHARS_MAX)));
        assert!(BrokerGroupName::parse(&name(63)).is_ok());
        assert_eq!(BrokerGroupName::parse(&name(64)), Err(too_long(BROKER_GROUP_CHARS_MAX)));
        let derived = |chars: usize| format!("%DLQ%{}", name(chars - 5));
        assert!(TopicName::parse(&derived(255)).is_ok());
        let refused = TopicName::parse(&derived(256));
        assert_eq!(refused, Err(too_long(DERIVED_TOPIC_CHARS_MAX)));
    }

    #[test]
    fn reserved_names_are_refused() {
        for name in ["TBW102", "SCHEDULE_TOPIC_XXXX", "rmq_sys_anything"] {
            assert_eq!(TopicName::parse(name), Err(InvalidName::Reserved(name.to_owned())));
        }
        let name = "CID_RMQ_SYS_x";
        assert_eq!(GroupName::parse(name), Err(InvalidName::Reserved(name.to_owned())));
    }

    #[test]
    fn broker_groups_can_be_part_of_file_names() {
        for name in ["a/b", "a.b", "a|b", "a%b", ".."] {
            assert!(matches!(BrokerGroupName::parse(name), Err(InvalidName::Character(_))));
        }
    }

    #[test]
    fn dead_letter_topic_of_the_longest_group_is_a_valid_topic() {
        let group = GroupName::parse(&"g".repeat(GROUP_CHARS_MAX)).unwrap();
        let topic = TopicName::dead_letter(&group);
        assert_eq!(TopicName::parse(topic.as_str()), Ok(topic.clone()));
        assert!(topic.is_derived());
        assert!(!TopicName::parse("orders").unwrap().is_derived());
    }

    #[test]
    fn offsets_count_forward_only() {
        let offset = QueueOffset::new(5);
        assert_eq!(offset.count_to(offset.advance(3)), 3);
        assert_eq!(offset.advance(3).count_to(offset), 0);
    }
}
