//! Consumers, and what they have in common.

use drumlin_proto::native::{self, position};
use drumlin_proto::rocketmq::{FilterExpression, FilterType};

use crate::QueueOffset;

pub mod pull;
pub mod simple;

/// A place in every queue of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The oldest retained record.
    Earliest,
    /// Behind the newest readable record.
    Latest,
    /// The nearest end where the queue does not reach so far.
    Offset(QueueOffset),
    /// The first record stored at or after this time, ms since the epoch.
    TimeMs(i64),
}

impl At {
    /// The first record stored at or after a time.
    pub fn time(time: std::time::SystemTime) -> Self {
        let millis = |duration: std::time::Duration| i64::try_from(duration.as_millis());
        Self::TimeMs(match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(since) => millis(since).unwrap_or(i64::MAX),
            Err(before) => millis(before.duration()).map_or(i64::MIN, |ms| -ms),
        })
    }

    pub(crate) fn to_native(self) -> native::Position {
        let at = match self {
            Self::Earliest => position::At::Earliest(true),
            Self::Latest => position::At::Latest(true),
            Self::Offset(offset) => position::At::Offset(offset.get()),
            Self::TimeMs(time_ms) => position::At::TimeMs(time_ms),
        };
        native::Position { at: Some(at) }
    }
}

/// Which messages of a topic a consumer group wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    #[default]
    All,
    /// Tags with `||` between them.
    Tag(String),
    /// SQL92 over user properties.
    Sql(String),
}

impl Filter {
    pub fn tag(expression: impl Into<String>) -> Self {
        Self::Tag(expression.into())
    }

    pub fn sql(expression: impl Into<String>) -> Self {
        Self::Sql(expression.into())
    }

    fn to_wire(&self) -> FilterExpression {
        let (kind, expression) = match self {
            Self::All => (FilterType::Tag, "*"),
            Self::Tag(expression) => (FilterType::Tag, expression.as_str()),
            Self::Sql(expression) => (FilterType::Sql, expression.as_str()),
        };
        FilterExpression { r#type: kind.into(), expression: expression.into() }
    }
}
