//! The rules of the gate, each of which a variant can leave out; and how much is explored.

/// What is left out of the rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Without {
    Nothing,
    /// Paired: the witness is fed what the leader has not synced itself.
    OwnEndWhilePaired,
    /// The gate opens when `alone` is appended, not when it is synced.
    AloneSynced,
    /// Closing does not wait for the first entry of the leader's own term.
    OwnTermBeforePaired,
    /// A candidate asks for votes with a log that it has not synced.
    CandidateSynced,
}

/// Bounds of an exploration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The first one has a leader already.
    pub terms: u8,
    pub messages: u8,
    pub crashes: u8,
    /// Gate entries.
    pub gates: u8,
    /// Whether a data node may be replaced.
    pub replacement: bool,
}
