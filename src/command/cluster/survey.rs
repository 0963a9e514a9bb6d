//! Asks every node that somebody knows of.

use drumlin_client::cluster::{Cluster as Api, Copies, GroupMember, GroupStanding, KnownGroup};
use futures::future::join_all;

use crate::command::access;
use crate::failure::Failure;

/// What all nodes that answered have said.
#[derive(Clone, Debug, Default)]
pub(super) struct Survey {
    pub(super) cluster: String,
    pub(super) groups: Vec<GroupSurvey>,
}

/// One broker group.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupSurvey {
    pub(super) known: KnownGroup,
    /// The leader's answer first, then that of the newest term.
    pub(super) answers: Vec<GroupStanding>,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) broker_group: String,
    pub(super) text: String,
}

pub(super) async fn take(api: &Api) -> Result<Survey, Failure> {
    let known = api.list_nodes().await.map_err(|error| access::failure(&error))?;
    let asked = known.groups.into_iter().map(|known| async move {
        let addresses = known.nodes.iter().filter_map(|node| node.address.as_ref());
        let asked = addresses.map(|address| async move {
            let answer = api.describe_group(&address.to_string()).await;
            // Told by the other nodes, which miss it too.
            answer.inspect_err(|error| tracing::debug!(%address, %error, "no answer")).ok()
        });
        let mut answers: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
        answers.sort_by_key(|answer| std::cmp::Reverse((answer.leads, answer.term)));
        GroupSurvey { known, answers }
    });
    Ok(Survey { cluster: known.cluster, groups: join_all(asked).await })
}

impl Survey {
    pub(super) fn problems(&self) -> Vec<Problem> {
        let of = |group: &GroupSurvey| {
            let broker_group = group.known.broker_group.clone();
            let problems = group.problems().into_iter();
            problems
                .map(move |text| Problem { broker_group: broker_group.clone(), text })
                .collect::<Vec<_>>()
        };
        let mut problems: Vec<_> = self.groups.iter().flat_map(of).collect();
        if self.groups.is_empty() {
            let text = "no broker has registered yet".to_owned();
            problems.push(Problem { broker_group: String::new(), text });
        }
        problems
    }
}

impl GroupSurvey {
    /// The leader's view, or else that of the node that has seen the newest term.
    pub(super) fn standing(&self) -> Option<&GroupStanding> {
        self.answers.first()
    }

    fn problems(&self) -> Vec<String> {
        match self.standing() {
            Some(standing) if standing.leads => standing.problems.clone(),
            Some(standing) => {
                let mut problems = standing.problems.clone();
                if standing.leader.is_empty() {
                    problems.insert(0, "it has no leader".into());
                } else if !problems.iter().any(|problem| problem.contains(&standing.leader)) {
                    let text = format!("its leader {} does not answer here", standing.leader);
                    problems.insert(0, text);
                }
                problems
            }
            None => vec!["none of its nodes answers".into()],
        }
    }

    /// Members with what each has said itself, where it could be asked, else what the leader heard.
    pub(super) fn members(&self) -> Vec<GroupMember> {
        let Some(standing) = self.standing() else { return Vec::new() };
        let own = |member: &GroupMember| {
            let answer = self.answers.iter().find(|answer| answer.node == member.node)?;
            answer.members.iter().find(|own| own.node == member.node)?.state.clone()
        };
        let members = standing.members.iter();
        members
            .map(|member| GroupMember {
                state: own(member).or_else(|| member.state.clone()),
                ..member.clone()
            })
            .collect()
    }

    /// Data nodes that vote, but for the one of this name or id.
    pub(super) fn data_voters_without(&self, text: &str) -> usize {
        let id: Option<u64> = text.parse().ok();
        let members = self.members();
        let data = members.iter().filter(|member| member.voter && !member.witness);
        data.filter(|member| member.node != text && Some(member.node_id) != id).count()
    }

    /// Acknowledged messages have fewer copies than they should.
    pub(super) fn is_degraded(&self) -> Option<bool> {
        let standing = self.standing().filter(|standing| standing.leads)?;
        Some(standing.copies() == Copies::Alone)
    }

    /// Where to ask for a change: the leader first.
    pub(super) fn addresses(&self) -> Vec<String> {
        let leader = self.standing().map(|standing| standing.leader.clone());
        let mut nodes: Vec<_> = self.known.nodes.iter().collect();
        nodes.sort_by_key(|node| leader.as_deref() != Some(node.node.as_str()));
        nodes.iter().filter_map(|node| node.address.as_ref().map(ToString::to_string)).collect()
    }
}

#[cfg(test)]
mod tests {
    use drumlin_client::cluster::KnownNode;

    use super::*;

    fn survey(answers: Vec<GroupStanding>) -> GroupSurvey {
        let known = KnownGroup { broker_group: "a".into(), ..KnownGroup::default() };
        GroupSurvey { known, answers }
    }

    #[test]
    fn a_group_that_nobody_speaks_for_is_a_problem() {
        let survey = Survey { cluster: "c".into(), groups: vec![survey(Vec::new())] };
        let problem =
            Problem { broker_group: "a".into(), text: "none of its nodes answers".into() };
        assert_eq!(survey.problems(), [problem]);
        assert_eq!(Survey::default().problems().len(), 1);
    }

    #[test]
    fn a_follower_alone_cannot_vouch_for_the_group() {
        let follower = GroupStanding { node: "a-1".into(), ..GroupStanding::default() };
        assert_eq!(survey(vec![follower.clone()]).problems(), ["it has no leader"]);
        let knows = GroupStanding { leader: "a-0".into(), ..follower };
        assert_eq!(survey(vec![knows.clone()]).problems().len(), 1);
        assert_eq!(survey(vec![knows]).is_degraded(), None);
    }

    #[test]
    fn changes_are_asked_of_the_leader_first() {
        let node = |name: &str| KnownNode {
            node: name.into(),
            leader: false,
            address: Some(drumlin_proto::native::Address { host: name.into(), port: 1 }),
        };
        let mut survey = survey(vec![GroupStanding {
            leader: "a-1".into(),
            leads: true,
            ..GroupStanding::default()
        }]);
        survey.known.nodes = vec![node("a-0"), node("a-1")];
        assert_eq!(survey.addresses(), ["a-1:1", "a-0:1"]);
    }
}
