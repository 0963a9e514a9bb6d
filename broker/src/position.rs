//! Positions that never leave a broker. Crossing from one to another is a named function.

use std::fmt;

macro_rules! position {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(u64);

        impl $name {
            pub const ZERO: Self = Self(0);

            /// For codecs; elsewhere positions come from positions.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// For codecs and counters.
            pub const fn get(self) -> u64 {
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

position!(
    /// Byte position in the commitlog: the sum of the padded frames before it, so the same on all
    /// replicas although their segments differ. Never sent to a client.
    LogOffset
);
position!(
    /// Raft index of a log entry, from 0.
    EntryIndex
);
position!(
    /// Raft term.
    Term
);

impl LogOffset {
    /// The position `bytes` further on.
    pub fn advance(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }

    /// Bytes from `start` up to `self`; `None` if `start` lies behind.
    pub fn bytes_since(self, start: Self) -> Option<u64> {
        self.0.checked_sub(start.0)
    }
}

impl EntryIndex {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// Identity of an entry: two logs that hold the same id agree on everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId {
    pub term: Term,
    pub index: EntryIndex,
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.index, self.term)
    }
}
