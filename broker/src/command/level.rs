//! Feature levels: which release introduced which command.
//!
//! A group's level is replicated state. Above it nothing is proposed, so that no node meets a
//! command that it does not know while it rolls from one release to the next.

use super::Command;

/// Of a new group, and of groups that releases without levels made.
pub const FEATURE_LEVEL_MIN: u32 = 1;
/// What this release knows. Level 2: definitions over several broker groups, `min_copies`.
pub const FEATURE_LEVEL_MAX: u32 = if cfg!(test) { 3 } else { 2 };
/// From here on broker groups share definitions.
pub const SHARED_CATALOG_LEVEL: u32 = 2;

/// The level that introduced a command as it is encoded now.
pub fn needed(command: &Command) -> u32 {
    match command {
        Command::Catalog(_) => SHARED_CATALOG_LEVEL,
        #[cfg(test)]
        Command::Unreleased => FEATURE_LEVEL_MAX,
        // Raising it is how a release that does not know better learns that it must stop.
        Command::RaiseFeatureLevel { .. }
        | Command::CreateTopic { .. }
        | Command::DeleteTopic { .. }
        | Command::CreateGroup { .. }
        | Command::DeleteGroup { .. }
        | Command::CommitOffset { .. }
        | Command::Lease(_)
        | Command::Ack { .. }
        | Command::ChangeLease { .. }
        | Command::RenewLeases { .. }
        | Command::ReleaseClient { .. }
        | Command::Trim { .. } => FEATURE_LEVEL_MIN,
    }
}
