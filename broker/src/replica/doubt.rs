//! What this node had answered as synced and has no more. It cannot know that by itself where its
//! whole directory went back to an older copy; but the leader remembers what was answered in its
//! term, and says so with its heartbeats.
//!
//! A data node votes and campaigns again once its log reaches as far as it had, or has taken an
//! entry of a later leader, whose log has all that was committed before; after a restart it is told
//! again, for as long as that leader lives. A witness does not: what it forgot may be a vote, so it
//! must be replaced.

use tokio::sync::watch;

use super::membership::Role;
use crate::log::Log;
use crate::position::{EntryIndex, Term};

/// What a leader of that term was answered; exclusive end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owed {
    pub(crate) term: Term,
    pub(crate) end: EntryIndex,
}

/// Whether this node's own log is in doubt.
#[derive(Debug)]
pub(crate) struct Doubt {
    role: Role,
    log: Log,
    owed: watch::Sender<Option<Owed>>,
}

impl Doubt {
    pub(crate) fn new(role: Role, log: Log) -> Self {
        Self { role, log, owed: watch::Sender::new(None) }
    }

    fn log_end(&self) -> EntryIndex {
        self.log.last().map_or(EntryIndex::ZERO, |id| id.index.next())
    }

    /// Whether the log does not reach as far as that.
    pub(crate) fn is_short(&self, owed: Owed) -> bool {
        self.log_end() < owed.end
    }

    /// The log was found to be short.
    pub(crate) fn raise(&self, owed: Owed) {
        let is_news = self.owed.send_if_modified(|known| {
            let is_news = known.is_none_or(|known| known.term < owed.term);
            if is_news {
                let end = known.map_or(owed.end, |known| known.end.max(owed.end));
                *known = Some(Owed { end, ..owed });
            }
            is_news
        });
        if !is_news {
            return;
        }
        let Owed { term, end } = owed;
        let own_end = self.log_end();
        match self.role {
            Role::Data => tracing::error!(%term, %end, %own_end,
                "this node lost entries that it had answered as synced: it neither votes nor \
                 campaigns until it has them again"),
            Role::Witness => tracing::error!(%term, %end, %own_end,
                "this witness lost entries that it had answered as synced, and perhaps votes: it \
                 takes part no more; replace it, `drumlin cluster replace-witness`"),
        }
    }

    /// A leader's request was taken. Once its log reaches into a later term, a data node owes
    /// nothing to the leader before; that this one is there is not enough: it may go before it has
    /// given anything.
    pub(crate) fn taken(&self) {
        if self.role == Role::Witness || self.owed.borrow().is_none() {
            return;
        }
        let Some(last) = self.log.last() else { return };
        self.owed.send_if_modified(|owed| owed.take_if(|owed| owed.term < last.term).is_some());
    }

    /// Why this node may not vote now; `None`: it may.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        let owed = *self.owed.borrow();
        match (self.role, owed) {
            (_, None) => None,
            (Role::Data, Some(owed)) => self.is_short(owed).then_some(
                "this member lost entries that it had answered as synced, and does not have them \
                 again yet",
            ),
            (Role::Witness, Some(_)) => Some(
                "this witness lost entries that it had answered as synced: replace it, `drumlin \
                 cluster replace-witness`",
            ),
        }
    }

    /// What was found to be owed.
    pub(crate) fn owed(&self) -> watch::Receiver<Option<Owed>> {
        self.owed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::entry::{Entry, EntryKind};
    use crate::log::LogOptions;
    use crate::position::EntryId;

    fn owed(term: u64, end: u64) -> Owed {
        Owed { term: Term::new(term), end: EntryIndex::new(end) }
    }

    fn append(log: &Log, term: u64, indexes: std::ops::Range<u64>) {
        let entry = |index| Entry {
            id: EntryId { term: Term::new(term), index: EntryIndex::new(index) },
            kind: EntryKind::Blank,
            clock_ms: 0,
            item_count: 0,
            payload_crc: 0,
            payload: Bytes::new(),
        };
        log.append(indexes.map(entry).collect(), Box::new(|_| {})).unwrap();
    }

    /// Lacks what it had answered in term 5: entries 3 to 9.
    fn short(role: Role) -> (tempfile::TempDir, Log, Doubt) {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions {
            segment_bytes: 1 << 20,
            prepared_bytes: 0,
            reserve_bytes: 4096,
            ..LogOptions::new(uuid::Uuid::from_u128(7))
        };
        let (log, _) = Log::open(dir.path(), options, None).unwrap();
        append(&log, 5, 0..3);
        let doubt = Doubt::new(role, log.clone());
        assert!(doubt.is_short(owed(5, 10)));
        doubt.raise(owed(5, 10));
        (dir, log, doubt)
    }

    #[test]
    fn data_node_votes_again_once_it_has_what_it_had() {
        let (_dir, log, doubt) = short(Role::Data);
        append(&log, 5, 3..9);
        doubt.taken();
        assert!(doubt.reason().is_some(), "one is missing");
        append(&log, 5, 9..10);
        assert_eq!(doubt.reason(), None);
    }

    /// It may end there before it has given anything, and what was committed must not depend on it.
    #[test]
    fn later_leader_ends_a_doubt_by_entries_of_its_term_only() {
        let (_dir, log, doubt) = short(Role::Data);
        append(&log, 5, 3..6);
        doubt.taken();
        assert!(doubt.reason().is_some(), "of the leader before");
        append(&log, 6, 6..7);
        doubt.taken();
        assert_eq!(doubt.reason(), None);
    }

    #[test]
    fn loss_under_a_later_leader_does_not_hide_the_one_before() {
        let (_dir, log, doubt) = short(Role::Data);
        doubt.raise(owed(6, 4));
        append(&log, 5, 3..4);
        doubt.taken();
        assert!(doubt.reason().is_some());
    }

    #[test]
    fn witness_stays_in_doubt() {
        let (_dir, log, doubt) = short(Role::Witness);
        append(&log, 6, 3..20);
        doubt.taken();
        assert!(doubt.reason().is_some_and(|reason| reason.contains("replace-witness")));
    }
}
