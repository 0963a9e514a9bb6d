//! How the copies of this node's broker group stand, as this node sees it: what operators, health and
//! metrics are told. Pure; facts and the time come in, a judgement goes out.

use std::collections::BTreeMap;
use std::time::Duration;

use drumlin_proto::native::StateResponse;
use tokio::time::Instant;

use crate::position::{EntryIndex, Term};
use crate::replica::Replica;
use crate::replica::gate::{GateView, Gone, Mode};
use crate::replica::membership::{BrokerNode, Role};
use crate::replica::peers::PeerState;

/// All that the judgement goes by.
#[derive(Clone, Debug)]
pub struct Facts {
    pub me: u64,
    pub own: StateResponse,
    /// By node id, with whether each votes.
    pub members: BTreeMap<u64, (BrokerNode, bool)>,
    pub peers: BTreeMap<u64, PeerState>,
    pub gate: GateView,
    pub term: Term,
    pub leader: Option<u64>,
    pub leads: bool,
    /// Whether the state of a member is equal to this node's, where that is known.
    pub digests: BTreeMap<u64, bool>,
    /// Why messages are refused.
    pub refusing: Option<String>,
    /// From here on a disk is worth a word.
    pub disk_warn_percent: u8,
}

/// How many disks hold what is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// The group has one data node, or none that is known yet.
    Single,
    /// Both data nodes.
    Paired,
    /// One of two.
    Alone,
    /// A majority of three or more data nodes.
    Majority,
}

/// One member.
#[derive(Clone, Debug)]
pub struct Standing {
    pub id: u64,
    pub node: BrokerNode,
    pub votes: bool,
    pub leads: bool,
    /// It answered when it was last asked; this node always does.
    pub is_reachable: bool,
    pub heard_ago: Option<Duration>,
    /// What it last said of itself.
    pub said: Option<StateResponse>,
    /// Entries and bytes behind the leader, and how much younger the leader's newest applied one is.
    pub lag_entries: Option<u64>,
    pub lag_bytes: Option<u64>,
    pub lag_ms: Option<u64>,
    /// Why the leader does not count on it.
    pub gone: Option<Gone>,
    pub is_equal: Option<bool>,
}

impl Standing {
    /// A witness that lost entries which it had answered, and perhaps votes: it counts no more.
    pub fn is_lost_witness(&self) -> bool {
        let says_so = self.said.as_ref().is_some_and(|said| said.fenced);
        self.node.role == Role::Witness && (self.gone == Some(Gone::Lost) || says_so)
    }
}

/// The whole group.
#[derive(Clone, Debug)]
pub struct GroupStanding {
    pub copies: Copies,
    /// Alone, and about to be paired.
    pub is_closing: bool,
    /// Name of the leader.
    pub leader: Option<String>,
    /// Data nodes by name, then the witness.
    pub members: Vec<Standing>,
    /// What all members know at least, of those that were heard.
    pub feature_level_max: u32,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

/// What is known at this moment.
pub fn facts(replica: &Replica, disk_warn_percent: u8) -> Facts {
    let status = *replica.raft_status().borrow();
    let me = replica.identity().node_id;
    Facts {
        me,
        own: replica.own_state(),
        members: replica.members(),
        peers: replica.peers().borrow().as_ref().clone(),
        gate: replica.gate().borrow().clone(),
        term: status.term,
        leader: status.leader,
        leads: status.leader == Some(me),
        digests: replica.equal_states(),
        refusing: replica.runs_refused(),
        disk_warn_percent,
    }
}

/// Judges.
pub fn judge(facts: &Facts, now: Instant) -> GroupStanding {
    let mut members: Vec<Standing> = facts
        .members
        .iter()
        .map(|(id, (node, votes))| member(facts, *id, node, *votes, now))
        .collect();
    members.sort_by(|a, b| {
        let key = |member: &Standing| member.node.role == Role::Witness;
        (key(a), &a.node.name).cmp(&(key(b), &b.node.name))
    });
    let leader = facts.leader.and_then(|id| facts.members.get(&id));
    let leader = leader.map(|(node, _)| node.name.clone());
    let levels = members.iter().filter_map(|member| member.said.as_ref());
    // A witness takes any entry, whatever is in it.
    let levels = levels.filter(|said| !said.witness).map(|said| said.feature_level_max);
    let feature_level_max = levels.min().unwrap_or_default();
    let copies = copies(facts);
    let is_closing = copies == Copies::Alone && facts.gate.closing;
    let mut standing = GroupStanding {
        copies,
        is_closing,
        leader,
        members,
        feature_level_max,
        problems: Vec::new(),
    };
    standing.problems = problems(facts, &standing);
    standing
}

fn copies(facts: &Facts) -> Copies {
    let data = facts.members.values().filter(|(node, votes)| *votes && node.role == Role::Data);
    let has_witness = facts.members.values().any(|(node, _)| node.role == Role::Witness);
    match (data.count(), has_witness, facts.gate.mode) {
        (0 | 1, _, _) => Copies::Single,
        (_, true, Mode::Paired) => Copies::Paired,
        (_, true, Mode::Alone { .. }) => Copies::Alone,
        (_, false, _) => Copies::Majority,
    }
}

fn member(facts: &Facts, id: u64, node: &BrokerNode, votes: bool, now: Instant) -> Standing {
    let leads = facts.leader == Some(id);
    if id == facts.me {
        return Standing {
            id,
            node: node.clone(),
            votes,
            leads,
            is_reachable: true,
            heard_ago: Some(Duration::ZERO),
            said: Some(facts.own.clone()),
            lag_entries: facts.leads.then_some(0),
            lag_bytes: facts.leads.then_some(0),
            lag_ms: facts.leads.then_some(0),
            gone: None,
            is_equal: None,
        };
    }
    let peer = facts.peers.get(&id);
    let matched_end = matched_end(facts, id, node, peer);
    let lag_entries = matched_end.map(|end| facts.own.appended_end.saturating_sub(end.get()));
    let (lag_bytes, lag_ms) = match (lag_entries, peer) {
        (Some(0), _) => (Some(0), Some(0)),
        // A witness keeps no payload and applies nothing.
        (Some(_), Some(PeerState { state, .. })) if node.role == Role::Data => (
            Some(facts.own.durable_end_bytes.saturating_sub(state.durable_end_bytes)),
            Some(facts.own.applied_clock_ms.saturating_sub(state.applied_clock_ms)),
        ),
        _ => (None, None),
    };
    Standing {
        id,
        node: node.clone(),
        votes,
        leads,
        is_reachable: peer.is_some_and(|peer| peer.fresh),
        heard_ago: peer.map(|peer| now.saturating_duration_since(peer.heard_at)),
        said: peer.map(|peer| peer.state.clone()),
        lag_entries,
        lag_bytes,
        lag_ms,
        gone: facts.gate.gone.get(&id).copied().filter(|_| facts.leads),
        is_equal: facts.digests.get(&id).copied(),
    }
}

/// The gate knows it to the entry; what a member says of itself is up to a second old.
fn matched_end(
    facts: &Facts,
    id: u64,
    node: &BrokerNode,
    peer: Option<&PeerState>,
) -> Option<EntryIndex> {
    if !facts.leads {
        return None;
    }
    let voters =
        facts.members.iter().filter(|(_, (node, votes))| *votes && node.role == Role::Data);
    let others: Vec<u64> = voters.map(|(id, _)| *id).filter(|id| *id != facts.me).collect();
    let told = peer.map(|peer| EntryIndex::new(peer.state.durable_end));
    match (others.as_slice() == [id], node.role, told) {
        // Zero until the peer has answered in this term.
        (true, Role::Data, told) => {
            Some(facts.gate.matched_end.max(told.unwrap_or(EntryIndex::ZERO)))
        }
        (_, _, told) => told,
    }
}

fn problems(facts: &Facts, standing: &GroupStanding) -> Vec<String> {
    let mut problems = Vec::new();
    if standing.leader.is_none() {
        problems.push("it has no leader".to_owned());
    }
    if standing.copies == Copies::Alone {
        let closing = if standing.is_closing { ", about to be paired" } else { "" };
        let text = "alone: what is acknowledged has one copy (DEGRADED)";
        problems.push(format!("{text}{closing}"));
    }
    problems.extend(flush_problem(standing));
    problems.extend(fence_problem(standing));
    for member in &standing.members {
        let name = match member.node.role {
            Role::Data => member.node.name.clone(),
            Role::Witness => format!("the witness at {}", member.node.name),
        };
        problems.extend(member_problem(facts, member).map(|problem| format!("{name} {problem}")));
    }
    if let Some(reason) = &facts.refusing {
        problems.push(format!("messages are refused: {reason}"));
    }
    problems
}

/// What an acknowledgement means must not depend on who leads.
fn flush_problem(standing: &GroupStanding) -> Option<String> {
    let data = standing.members.iter().filter(|member| member.node.role == Role::Data);
    let said = data.filter_map(|member| Some((&member.node.name, member.said.as_ref()?)));
    let (deferring, syncing): (Vec<_>, Vec<_>) = said.partition(|(_, said)| said.defers_syncs);
    let names = |of: Vec<(&String, &StateResponse)>| {
        of.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
    };
    let differs = !deferring.is_empty() && !syncing.is_empty();
    differs.then(|| {
        let (deferring, syncing) = (names(deferring), names(syncing));
        format!("log.flush is async on {deferring} and sync on {syncing}: set it alike")
    })
}

/// Nobody who could give the others what they lack is left.
fn fence_problem(standing: &GroupStanding) -> Option<String> {
    let mut voters =
        standing.members.iter().filter(|member| member.votes && member.node.role == Role::Data);
    let fenced = |member: &Standing| member.said.as_ref().is_some_and(|said| said.fenced);
    (standing.leader.is_none() && voters.all(fenced)).then(|| {
        "every data node may have lost acknowledged entries: decide which one goes on with \
         `drumlin cluster elect --unsafe`"
            .to_owned()
    })
}

/// The worst that can be said of a member.
fn member_problem(facts: &Facts, member: &Standing) -> Option<String> {
    if member.is_equal == Some(false) {
        return Some(format!("has another state than {}: run `drumlin log diff`", facts.own.node));
    }
    if member.is_lost_witness() {
        let text = "lost entries that it had answered and counts no more: replace it, `drumlin \
            cluster replace-witness`";
        return Some(text.into());
    }
    if !member.is_reachable {
        return Some("does not answer".into());
    }
    let said = member.said.as_ref()?;
    if said.seed_all_bytes > 0 {
        let (done, all) = (said.seed_done_bytes, said.seed_all_bytes);
        return Some(format!("is being seeded anew: {done} of {all} bytes"));
    }
    match member.gone {
        _ if said.fenced => {
            return Some(
                "may have lost acknowledged entries: it neither votes nor leads until a leader has \
                 given them to it"
                    .into(),
            );
        }
        _ if said.disk_full => return Some("has a full disk".into()),
        Some(Gone::Lost) => {
            return Some("lost entries that it had answered and is brought in line again".into());
        }
        Some(Gone::Stopping) => return Some("is stopping".into()),
        Some(Gone::DiskFull) => return Some("has a full disk".into()),
        Some(Gone::Refuses) => return Some("takes no connections".into()),
        Some(Gone::Silent) => return Some("takes no entries".into()),
        None => {}
    }
    let percent = said.disk_percent;
    let fills = member.node.role == Role::Data && percent >= u32::from(facts.disk_warn_percent);
    fills.then(|| format!("has a disk that is {percent} % full"))
}

/// Entries that the leader had committed when it was last heard and that are not applied here; `None`
/// while that is not known.
pub fn entries_to_apply(facts: &Facts) -> Option<u64> {
    let leader = facts.leader?;
    if leader == facts.me {
        return Some(0);
    }
    let heard = facts.peers.get(&leader).filter(|peer| peer.fresh)?;
    Some(heard.state.committed_end.saturating_sub(facts.own.applied_end))
}

/// A word for it.
pub fn gone_name(gone: Gone) -> &'static str {
    match gone {
        Gone::Refuses => "refuses",
        Gone::Stopping => "stopping",
        Gone::DiskFull => "disk full",
        Gone::Lost => "lost",
        Gone::Silent => "silent",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, role: Role) -> BrokerNode {
        BrokerNode { name: name.into(), address: format!("{name}:10912"), role }
    }

    fn said(id: u64, end: u64) -> StateResponse {
        StateResponse {
            node_id: id,
            appended_end: end,
            durable_end: end,
            applied_clock_ms: 1_000 + end,
            durable_end_bytes: end * 8,
            feature_level_max: 2,
            disk_percent: 10,
            witness: id == 3,
            ..StateResponse::default()
        }
    }

    /// Node 1 leads with its log up to 100; node 2 and the witness have 90.
    fn facts(now: Instant) -> Facts {
        let peer = |id| (id, PeerState { state: said(id, 90), heard_at: now, fresh: true });
        Facts {
            me: 1,
            own: said(1, 100),
            members: BTreeMap::from([
                (1, (node("a-0", Role::Data), true)),
                (2, (node("a-1", Role::Data), true)),
                (3, (node("ns-0", Role::Witness), true)),
            ]),
            peers: BTreeMap::from([peer(2), peer(3)]),
            gate: GateView { matched_end: EntryIndex::new(98), ..GateView::default() },
            term: Term::new(4),
            leader: Some(1),
            leads: true,
            digests: BTreeMap::from([(2, true)]),
            refusing: None,
            disk_warn_percent: 85,
        }
    }

    #[test]
    fn a_pair_with_its_witness_has_no_problem() {
        let now = Instant::now();
        let standing = judge(&facts(now), now);
        assert_eq!(standing.problems, Vec::<String>::new());
        assert_eq!((standing.copies, standing.leader.as_deref()), (Copies::Paired, Some("a-0")));
        let names: Vec<_> = standing.members.iter().map(|m| m.node.name.as_str()).collect();
        assert_eq!(names, ["a-0", "a-1", "ns-0"]);
        // The peer by the gate, the witness by what it said.
        let lags = standing.members.iter().map(|m| (m.lag_entries, m.lag_bytes, m.lag_ms));
        let wanted =
            [(Some(0), Some(0), Some(0)), (Some(2), Some(80), Some(10)), (Some(10), None, None)];
        assert_eq!(lags.collect::<Vec<_>>(), wanted);
        assert_eq!(standing.feature_level_max, 2);
    }

    #[test]
    fn nodes_that_defer_their_syncs_and_others_are_told_apart() {
        let now = Instant::now();
        let mut facts = facts(now);
        facts.peers.get_mut(&2).expect("there").state.defers_syncs = true;
        let problems = judge(&facts, now).problems;
        assert_eq!(problems, ["log.flush is async on a-1 and sync on a-0: set it alike"]);
        facts.own.defers_syncs = true;
        assert!(judge(&facts, now).problems.is_empty(), "the witness has no such setting");
    }

    #[test]
    fn lost_witness_is_to_be_replaced_whoever_says_so() {
        let now = Instant::now();
        let mut facts = facts(now);
        let problem = |facts: &Facts| {
            let problems = judge(facts, now).problems;
            assert_eq!(problems.len(), 1, "{problems:?}");
            problems.concat()
        };
        facts.peers.get_mut(&3).expect("there").state.fenced = true;
        assert!(problem(&facts).contains("replace-witness"), "it says so itself");
        facts.peers.remove(&3);
        assert_eq!(problem(&facts), "the witness at ns-0 does not answer");
        facts.gate.gone = BTreeMap::from([(3, Gone::Lost)]);
        assert!(problem(&facts).contains("replace-witness"), "the leader has found out");
    }

    #[test]
    fn nodes_that_lost_their_power_are_problems_and_all_of_them_a_decision() {
        let now = Instant::now();
        let mut facts = facts(now);
        facts.own.fenced = true;
        let problems = judge(&facts, now).problems;
        assert!(problems[0].starts_with("a-0 may have lost"), "{problems:?}");
        assert_eq!(problems.len(), 1);
        facts.peers.get_mut(&2).expect("there").state.fenced = true;
        (facts.leader, facts.leads) = (None, false);
        let problems = judge(&facts, now).problems;
        assert!(problems.iter().any(|problem| problem.contains("elect --unsafe")), "{problems:?}");
    }

    #[test]
    fn alone_is_a_problem_and_names_the_peer() {
        let now = Instant::now();
        let mut facts = facts(now);
        facts.gate.mode = Mode::Alone { at: EntryIndex::new(95) };
        facts.gate.gone = BTreeMap::from([(2, Gone::Refuses)]);
        facts.peers.get_mut(&2).expect("there").fresh = false;
        let standing = judge(&facts, now);
        assert_eq!(standing.copies, Copies::Alone);
        assert!(standing.problems[0].contains("DEGRADED"), "{:?}", standing.problems);
        assert_eq!(standing.problems[1], "a-1 does not answer");
    }

    #[test]
    fn a_witness_that_is_gone_and_a_state_that_differs_are_problems() {
        let now = Instant::now();
        let mut facts = facts(now);
        facts.peers.remove(&3);
        facts.digests.insert(2, false);
        let problems = judge(&facts, now).problems;
        assert!(problems[0].starts_with("a-1 has another state"), "{problems:?}");
        assert_eq!(problems[1], "the witness at ns-0 does not answer");
    }

    #[test]
    fn a_follower_knows_no_lag() {
        let now = Instant::now();
        let follower = Facts { me: 2, leads: false, ..facts(now) };
        let standing = judge(&follower, now);
        assert!(standing.members.iter().all(|member| member.lag_entries.is_none()));
        let nobody = Facts { leader: None, ..follower };
        assert_eq!(judge(&nobody, now).problems[0], "it has no leader");
    }

    #[test]
    fn groups_without_a_witness_are_never_alone() {
        let now = Instant::now();
        let mut facts = facts(now);
        facts.members.remove(&3);
        facts.gate.mode = Mode::Alone { at: EntryIndex::new(1) };
        assert_eq!(judge(&facts, now).copies, Copies::Majority);
        facts.members.remove(&2);
        assert_eq!(judge(&facts, now).copies, Copies::Single);
    }
}
