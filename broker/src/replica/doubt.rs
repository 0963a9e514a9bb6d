//! What this node had answered as synced and has no more. It cannot know that by itself where its
//! whole directory went back to an older copy; but the leader remembers what was answered in its
//! term, and says so with its heartbeats.
//!
//! A data node votes and campaigns again once its log reaches as far as it had; after a restart it is
//! told again, for as long as that leader lives. A witness does not: what it forgot may be a vote,
//! so it must be replaced.

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
                *known = Some(owed);
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

    /// A leader of this term is here: what was owed to an older one counts no more for a data node,
    /// whose log this leader brings in line.
    pub(crate) fn begin_term(&self, term: Term) {
        if self.role == Role::Data {
            self.owed.send_if_modified(|owed| owed.take_if(|owed| owed.term < term).is_some());
        }
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
