//! Deliberate faults, to see that the tests catch them. Only in builds with `--cfg fault`, where the
//! environment variable `DRUMLIN_FAULT` picks one at start; in all others nothing is left of them.

/// What can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Entries count as synced before they are.
    AckBeforeSync,
    /// The witness is sent entries that the leader has not synced itself.
    WitnessFedUnsynced,
    /// The gate opens without an `alone` entry.
    GateWithoutAlone,
    /// The witness is sent everything at once.
    UngatedWitness,
    /// The witness does not keep its votes over a restart.
    WitnessKeepsNoVote,
    /// A leader that restarts goes on in its term.
    LeaderRestored,
    /// A cut tail comes back after a restart.
    TruncateInMemory,
    /// Consumers see entries that are not committed.
    ReadUncommitted,
}

/// Whether this process was started with the fault.
#[cfg(not(fault))]
pub const fn injected(_fault: Fault) -> bool {
    false
}

/// Whether this process was started with the fault.
///
/// Panics on an unknown name: a test that means another fault proves nothing.
#[cfg(fault)]
pub fn injected(fault: Fault) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<Fault>> = std::sync::OnceLock::new();
    let chosen =
        CHOSEN.get_or_init(|| std::env::var("DRUMLIN_FAULT").ok().map(|name| named(&name)));
    *chosen == Some(fault)
}

#[cfg(fault)]
fn named(name: &str) -> Fault {
    match name {
        "ack_before_sync" => Fault::AckBeforeSync,
        "witness_fed_unsynced" => Fault::WitnessFedUnsynced,
        "gate_without_alone" => Fault::GateWithoutAlone,
        "ungated_witness" => Fault::UngatedWitness,
        "witness_keeps_no_vote" => Fault::WitnessKeepsNoVote,
        "leader_restored" => Fault::LeaderRestored,
        "truncate_in_memory" => Fault::TruncateInMemory,
        "read_uncommitted" => Fault::ReadUncommitted,
        other => panic!("DRUMLIN_FAULT={other} is no fault of this build"),
    }
}
