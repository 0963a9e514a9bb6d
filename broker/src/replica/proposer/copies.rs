//! How many nodes have an entry when it is acknowledged.

use openraft::async_runtime::WatchReceiver;
use tokio::sync::watch;

use crate::position::EntryIndex;
use crate::replica::gate::{GateView, Mode};
use crate::replica::membership::Role;
use crate::replica::raft_types::Raft;

/// Judges acknowledgements by the voters and the witness gate; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    raft: Raft,
    gate: watch::Receiver<GateView>,
}

/// What a quorum of the group's voters stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quorum {
    /// This node is the only voter.
    Lone,
    /// A witness may be part of it, which keeps no messages.
    Witnessed,
    /// Two copies at least.
    Copies,
}

impl Copies {
    pub(crate) fn new(raft: Raft, gate: watch::Receiver<GateView>) -> Self {
        Self { raft, gate }
    }

    fn quorum(&self) -> Quorum {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let is_witness =
            |id: u64| membership.get_node(&id).is_some_and(|node| node.role == Role::Witness);
        let mut voter_count = 0;
        for id in membership.voter_ids() {
            voter_count += 1;
            if is_witness(id) {
                return Quorum::Witnessed;
            }
        }
        if voter_count < 2 { Quorum::Lone } else { Quorum::Copies }
    }

    /// Whether what is proposed now may be expected to have two copies once it is acknowledged.
    pub(crate) fn two_are_possible(&self) -> bool {
        match self.quorum() {
            Quorum::Lone => false,
            Quorum::Witnessed => self.gate.borrow().mode == Mode::Paired,
            Quorum::Copies => true,
        }
    }

    /// Whether an acknowledgement of this entry, given now, means less than the copies that the
    /// group is there for. Never of a lone voter: it promises one.
    pub(crate) fn degraded(&self, index: EntryIndex) -> bool {
        match self.quorum() {
            Quorum::Lone | Quorum::Copies => false,
            Quorum::Witnessed => self.gate.borrow().matched_end <= index,
        }
    }
}
