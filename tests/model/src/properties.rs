//! What must hold in every state, and what must be reached for that to mean anything.

use stateright::Property;

use crate::Model;
use crate::group::{Group, Role};
use crate::log::{DATA_NODES, Kind, Log, WITNESS};

pub const ACKED_STAYS: &str = "what was acknowledged is in the log of every later leader";
pub const ACKED_ON_DISK: &str = "what was acknowledged as two copies is on two disks";
pub const ONE_LEADER: &str = "a term has one leader";
pub const LOGS_MATCH: &str = "logs that agree on an entry's term agree up to it";
pub const PEER_READY: &str = "while a paired leader serves, no peer is behind the witness";
pub const SURVIVED: &str = "whoever is lost, the others elect, unless the lost one stood alone";

pub fn all() -> Vec<Property<Model>> {
    vec![
        Property::always(ACKED_STAYS, |_, group| acked_stays(group)),
        Property::always(ACKED_ON_DISK, |_, group| acked_on_disk(group)),
        Property::always(ONE_LEADER, |_, group: &Group| {
            group.leaders.iter().all(|nodes| nodes.count_ones() <= 1)
        }),
        Property::always(LOGS_MATCH, |_, group| logs_match(group)),
        Property::always(PEER_READY, |_, group| peer_ready(group)),
        Property::always(SURVIVED, |_, group| (0..=WITNESS).all(|lost| survived(group, lost))),
        Property::sometimes("a message is acknowledged", |model: &Model, group: &Group| {
            model.bounds.messages == 0 || !group.acks.is_empty()
        }),
        Property::sometimes("an ack means one copy", |model: &Model, group: &Group| {
            model.bounds.messages == 0 || group.acks.iter().any(|ack| !ack.two_copies)
        }),
        Property::sometimes("a second leader serves", |_, group: &Group| {
            let serves = |id: usize| group.data[id].term > 1 && group.committed_end(id) > 0;
            (0..DATA_NODES).any(|id| group.data[id].role == Role::Leader && serves(id))
        }),
        Property::sometimes(
            "a group that stood alone is paired again",
            |model: &Model, group: &Group| {
                let paired = |(_, entry): (u8, crate::log::Entry)| entry.kind == Kind::Paired;
                model.bounds.gates < 2 || group.witness.log.entries().any(paired)
            },
        ),
        Property::sometimes("a data node was replaced", |model: &Model, group: &Group| {
            let settled = |(_, entry): (u8, crate::log::Entry)| entry.kind == Kind::Settled;
            !model.bounds.replacement || group.data[2].disk.entries().any(settled)
        }),
    ]
}

fn acked_stays(group: &Group) -> bool {
    group.acks.iter().all(|ack| {
        let later = group.led.iter().skip(usize::from(ack.by) + 1).filter(|led| led.end() > 0);
        later.into_iter().all(|led| led.get(ack.index).term == ack.term)
    })
}

fn acked_on_disk(group: &Group) -> bool {
    group.acks.iter().filter(|ack| ack.two_copies).all(|ack| {
        let on_disk = |id: &usize| group.data[*id].disk.get(ack.index).term == ack.term;
        (0..DATA_NODES).filter(on_disk).count() >= 2
    })
}

fn logs_match(group: &Group) -> bool {
    let data = group.data.iter().flat_map(|node| [&node.log, &node.disk]);
    let logs: Vec<&Log> = data.chain([&group.witness.log]).collect();
    logs.iter().enumerate().all(|(at, log)| logs[..at].iter().all(|other| agree(log, other)))
}

fn agree(one: &Log, other: &Log) -> bool {
    let common_end = one.common_end(other);
    let both_end = one.end().min(other.end());
    (common_end + 1..=both_end).all(|index| one.get(index).term != other.get(index).term)
}

fn peer_ready(group: &Group) -> bool {
    (0..DATA_NODES).all(|leader| {
        let node = &group.data[leader];
        // A leader that was deposed and does not know it yet says nothing of its peer.
        let newest = group.led.iter().rposition(|led| led.end() > 0) == Some(node.term.into());
        let serves = newest && node.role == Role::Leader && group.committed_end(leader) > 0;
        if !serves || node.log.alone_at().is_some() {
            return true;
        }
        let mut peers = node.log.voters().other_data(leader);
        // While two are peers one of them is enough.
        peers.any(|peer| group.data[peer].disk.last() >= group.witness.log.last())
    })
}

/// Whether the others hold an election without the lost one. They have lost power too, so that
/// their disks count; but not once the membership changes, when a learner that is ahead and an old
/// tail that comes back can keep each other from it.
fn survived(group: &Group, lost: usize) -> bool {
    let changes = group.led.iter().any(|led| led.membership_at() > 0);
    let held = |id: usize| if changes { &group.data[id].log } else { &group.data[id].disk };
    let last_of =
        |id: usize| if id == WITNESS { group.witness.log.last() } else { held(id).last() };
    let elects = |candidate: usize| {
        let log = held(candidate);
        let votes = |id: &usize| *id != lost && last_of(*id) <= log.last();
        let votes = (0..=WITNESS).filter(votes).fold(0, |set, id| set | 1 << id);
        log.voters().contains(candidate) && log.voters().is_quorum(votes)
    };
    let mut survivors = (0..DATA_NODES).filter(|id| *id != lost);
    let stood_alone = lost != WITNESS && group.data[lost].disk.alone_at().is_some();
    stood_alone || survivors.any(elects)
}
