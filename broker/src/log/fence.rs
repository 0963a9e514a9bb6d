//! Whether a log that is opened may lack entries that had counted as kept by this node: its syncs were
//! deferred, and the machine, or the disk, was gone before they were made up for. Such a node must
//! not vote, nor lead, until another one has given it all of it again.

use std::io;

use super::vote::Local;

/// Which boot of the machine this is.
pub(super) fn boot_id() -> io::Result<uuid::Uuid> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    uuid::Uuid::parse_str(text.trim()).map_err(io::Error::other)
}

/// What a start finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found<'a> {
    /// The node-local facts of the last run, if there are any.
    pub(super) before: Option<&'a Local>,
    /// There are entries, or a vote.
    pub(super) used: bool,
    /// Of this boot of the machine.
    pub(super) boot_id: [u8; 16],
    /// Syncs are deferred from now on.
    pub(super) defers: bool,
}

/// Whether the log is fenced. It stays so, whatever happens to the process, until that is lifted.
pub(super) fn is_fenced(found: Found<'_>) -> bool {
    match found.before {
        // What was written outlives the process, but not the machine.
        Some(before) => {
            let lost_power = !before.clean && before.boot_id != found.boot_id;
            before.fenced || (before.deferred && lost_power)
        }
        // Nobody knows how it was written.
        None => found.used && found.defers,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(before: Local) -> bool {
        let boot_id = [2; 16];
        is_fenced(Found { before: Some(&before), used: true, boot_id, defers: true })
    }

    fn cut_off() -> Local {
        Local { boot_id: [1; 16], deferred: true, ..Local::default() }
    }

    #[test]
    fn loss_of_power_before_a_deferred_sync_fences() {
        assert!(after(cut_off()));
    }

    #[test]
    fn kill_of_the_process_does_not() {
        assert!(!after(Local { boot_id: [2; 16], ..cut_off() }));
    }

    #[test]
    fn orderly_end_does_not() {
        assert!(!after(Local { clean: true, ..cut_off() }));
    }

    #[test]
    fn log_whose_every_entry_was_synced_is_not_fenced() {
        assert!(!after(Local { deferred: false, ..cut_off() }));
    }

    #[test]
    fn fence_outlives_orderly_ends_and_a_change_of_the_configuration() {
        let before = Local { clean: true, deferred: false, fenced: true, ..cut_off() };
        assert!(after(before));
        assert!(after(Local { boot_id: [2; 16], ..before }));
    }

    #[test]
    fn lost_facts_fence_a_used_log_where_syncs_are_deferred() {
        let found = Found { before: None, used: true, boot_id: [2; 16], defers: true };
        assert!(is_fenced(found));
        assert!(!is_fenced(Found { used: false, ..found }));
        assert!(!is_fenced(Found { defers: false, ..found }));
    }
}
