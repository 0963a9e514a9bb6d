//! A log short enough to be copied: what is in it, and who votes by it.

use std::fmt;
use std::hash::{Hash, Hasher};

/// Data nodes 0 and 1 begin; 2 takes the place of one of them.
pub const DATA_NODES: usize = 3;
/// Where the witness stands among the nodes.
pub const WITNESS: usize = DATA_NODES;
const ENTRIES_MAX: usize = 14;

/// What an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Never in a log.
    None,
    /// First of a term.
    Blank,
    Message,
    Alone,
    Paired,
    /// Data node 2 is to take the place of this one; both sets vote.
    Joint {
        out: usize,
    },
    /// The new set votes by itself.
    Settled,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub term: u8,
    pub kind: Kind,
}

impl Entry {
    /// Term in the low four bits.
    fn pack(self) -> u8 {
        let kind = match self.kind {
            Kind::None => 0,
            Kind::Blank => 1,
            Kind::Message => 2,
            Kind::Alone => 3,
            Kind::Paired => 4,
            Kind::Settled => 5,
            Kind::Joint { out: 0 } => 6,
            Kind::Joint { .. } => 7,
        };
        self.term | kind << 4
    }

    fn unpack(raw: u8) -> Self {
        let kind = match raw >> 4 {
            0 => Kind::None,
            1 => Kind::Blank,
            2 => Kind::Message,
            3 => Kind::Alone,
            4 => Kind::Paired,
            5 => Kind::Settled,
            6 => Kind::Joint { out: 0 },
            _ => Kind::Joint { out: 1 },
        };
        Self { term: raw & 15, kind }
    }
}

/// A set of nodes, a bit each.
pub type Nodes = u8;

const fn bit(node: usize) -> Nodes {
    1 << node
}

/// Who votes: one set, or two while the membership changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Voters {
    pub old: Nodes,
    pub new: Nodes,
}

impl Voters {
    pub fn is_joint(self) -> bool {
        self.old != self.new
    }

    pub fn contains(self, node: usize) -> bool {
        (self.old | self.new) & bit(node) != 0
    }

    /// Whether these are a majority of both sets.
    pub fn is_quorum(self, nodes: Nodes) -> bool {
        let majority = |set: Nodes| (set & nodes).count_ones() * 2 > set.count_ones();
        majority(self.old) && majority(self.new)
    }

    /// The data voters of either set but one.
    pub fn other_data(self, but: usize) -> impl Iterator<Item = usize> {
        (0..DATA_NODES).filter(move |node| *node != but && self.contains(*node))
    }
}

/// Entries from index 1 on. Ends are counts of entries, so the end 3 covers indexes 1 to 3.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Log {
    count: u8,
    packed: [u8; ENTRIES_MAX],
}

impl Hash for Log {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut raw = [0; 16];
        raw[..ENTRIES_MAX].copy_from_slice(&self.packed);
        hasher.write_u128(u128::from_le_bytes(raw));
    }
}

impl Log {
    pub const EMPTY: Self = Self { count: 0, packed: [0; ENTRIES_MAX] };

    pub fn end(&self) -> u8 {
        self.count
    }

    pub fn get(&self, index: u8) -> Entry {
        if index == 0 || index > self.count {
            return Entry { term: 0, kind: Kind::None };
        }
        Entry::unpack(self.packed[usize::from(index) - 1])
    }

    pub fn push(&mut self, entry: Entry) {
        self.packed[usize::from(self.count)] = entry.pack();
        self.count += 1;
    }

    pub fn cut(&mut self, end: u8) {
        while self.count > end {
            self.count -= 1;
            self.packed[usize::from(self.count)] = 0;
        }
    }

    pub fn upto(&self, end: u8) -> Self {
        let mut prefix = *self;
        prefix.cut(end);
        prefix
    }

    /// End of what both have. Logs that agree on an entry's term agree on all before it, which is
    /// checked as a property of its own.
    pub fn common_end(&self, other: &Self) -> u8 {
        let both = self.packed.iter().zip(&other.packed);
        let same = both.take_while(|(own, other)| own == other && **own != 0).count();
        u8::try_from(same).expect("a log is short")
    }

    /// What voters compare: term and index of the last entry.
    pub fn last(&self) -> (u8, u8) {
        (self.get(self.count).term, self.count)
    }

    pub fn entries(&self) -> impl DoubleEndedIterator<Item = (u8, Entry)> {
        (1..=self.count).map(|index| (index, self.get(index)))
    }

    /// Index of the last gate entry if that says `alone`.
    pub fn alone_at(&self) -> Option<u8> {
        let gates = |kind| matches!(kind, Kind::Alone | Kind::Paired);
        let (index, last) = self.entries().rev().find(|(_, entry)| gates(entry.kind))?;
        (last.kind == Kind::Alone).then_some(index)
    }

    /// Index of the first entry of a term.
    pub fn first_of(&self, term: u8) -> Option<u8> {
        self.entries().find(|(_, entry)| entry.term == term).map(|(index, _)| index)
    }

    /// Index of the membership entry in force; 0: the first membership.
    pub fn membership_at(&self) -> u8 {
        let changes = |kind| matches!(kind, Kind::Joint { .. } | Kind::Settled);
        let last = self.entries().rev().find(|(_, entry)| changes(entry.kind));
        last.map_or(0, |(index, _)| index)
    }

    /// Who votes by this log, committed or not.
    pub fn voters(&self) -> Voters {
        let first = bit(0) | bit(1) | bit(WITNESS);
        let mut voters = Voters { old: first, new: first };
        for (_, entry) in self.entries() {
            match entry.kind {
                Kind::Joint { out } => voters.new = first & !bit(out) | bit(2),
                Kind::Settled => voters.old = voters.new,
                Kind::None | Kind::Blank | Kind::Message | Kind::Alone | Kind::Paired => {}
            }
        }
        voters
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (index, entry) in self.entries() {
            let gap = if index > 1 { " " } else { "" };
            write!(f, "{gap}{}.{:?}", entry.term, entry.kind)?;
        }
        f.write_str("]")
    }
}
