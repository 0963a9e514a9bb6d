//! `drumlin cluster`: who is there, how the copies stand, and changes of members.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use drumlin_client::cluster::{Change, Cluster as Api, GroupMember};
use drumlin_client::{Client, Code};
use serde_json::json;
use tokio::time::Instant;

use self::survey::{GroupSurvey, Survey};
use super::{access, topic};
use crate::cli::{Global, NamesrvShort};
use crate::config::nearest;
use crate::failure::{Failure, Kind};

mod elect;
mod report;
mod survey;

/// Between two looks of `health --wait`.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// For a group that is electing when it is asked for a change.
const LEADER_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct Cluster {
    #[command(flatten)]
    short: NamesrvShort,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the nodes and what they do
    List,
    /// Show how the copies of every broker group stand; exit 1 if something is wrong
    Health {
        /// Ask again until nothing is wrong, at most for --timeout
        #[arg(long)]
        wait: bool,
    },
    /// Show how far the log of every node has come
    Raft,
    /// Take a node into a broker group as a learner, under a new member id
    Add {
        group: String,
        /// Its name and peer port
        #[arg(value_name = "NODE@HOST:PORT", value_parser = member)]
        node: (String, String),
    },
    /// Make a learner that has caught up a voter
    Promote {
        group: String,
        /// Name, or member id
        node: String,
        /// Takes this one out in the same change [default: the voter of the same name]
        #[arg(long, value_name = "NODE")]
        replaces: Option<String>,
    },
    /// Take a node out of a broker group
    Remove {
        group: String,
        /// Name, or member id
        node: String,
    },
    /// Move leadership to another data node
    Transfer {
        group: String,
        /// [default: whichever is in step]
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
    },
    /// Move the witness of a broker group to another nameserver
    ReplaceWitness {
        group: String,
        /// The address may be left out where the broker's configuration has it
        #[arg(long, value_name = "NAMESERVER[@HOST:PORT]")]
        on: String,
    },
    /// Make a stopped data node a broker group by itself, although others may know more
    Elect(elect::Elect),
    /// Let broker groups use what a newer release brings, once all their nodes run it
    Upgrade {
        /// [default: every broker group]
        group: Option<String>,
        /// [default: the highest that all its nodes know]
        #[arg(long)]
        level: Option<u32>,
    },
}

fn member(text: &str) -> Result<(String, String), String> {
    match text.split_once('@') {
        Some((name, address)) if !name.is_empty() && address.contains(':') => {
            Ok((name.into(), address.into()))
        }
        Some(_) | None => Err("write NODE@HOST:PORT".into()),
    }
}

impl Cluster {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        let global = global.clone().with(self.short.short.as_ref());
        if let Action::Elect(elect) = &self.action {
            return elect.run(&global);
        }
        super::runtime()?.block_on(async {
            let client = access::connect(&global).await?;
            let ran = self.action.run(&client, &global).await;
            access::close(&client).await;
            ran
        })
    }
}

impl Action {
    async fn run(&self, client: &Client, global: &Global) -> Result<(), Failure> {
        let api = client.cluster();
        match self {
            Self::List => report::list(&look(&api, global).await?, global),
            Self::Health { wait } => health(&api, *wait, global).await,
            Self::Raft => report::raft(&look(&api, global).await?, global),
            Self::Upgrade { group, level } => {
                upgrade(&api, group.as_deref(), level.unwrap_or(0), global).await
            }
            Self::Elect(elect) => elect.run(global),
            Self::Add { .. }
            | Self::Promote { .. }
            | Self::Remove { .. }
            | Self::Transfer { .. }
            | Self::ReplaceWitness { .. } => {
                let Some((group, change)) = self.change() else { return Ok(()) };
                let survey = look(&api, global).await?;
                let group = found(&survey, group)?;
                if let Change::Remove { node } = &change {
                    known_member(group, node)?;
                }
                let name = &group.known.broker_group;
                if let Some(loss) = loss(group, &change) {
                    topic::confirm(global, &loss)?;
                }
                let done = make(&api, group, &change).await?;
                told(name, done, global)
            }
        }
    }

    /// The change that is asked for, and of which broker group.
    fn change(&self) -> Option<(&str, Change)> {
        let (group, change) = match self {
            Self::Add { group, node: (node, address) } => {
                (group, Change::Add { node: node.clone(), address: address.clone() })
            }
            Self::Promote { group, node, replaces } => {
                let replaces = replaces.clone().unwrap_or_default();
                (group, Change::Promote { node: node.clone(), replaces })
            }
            Self::Remove { group, node } => (group, Change::Remove { node: node.clone() }),
            Self::Transfer { group, to } => {
                (group, Change::Transfer { node: to.clone().unwrap_or_default() })
            }
            Self::ReplaceWitness { group, on } => {
                let (node, address) = on.split_once('@').unwrap_or((on, ""));
                (group, Change::ReplaceWitness { node: node.into(), address: address.into() })
            }
            Self::List
            | Self::Health { .. }
            | Self::Raft
            | Self::Elect(_)
            | Self::Upgrade { .. } => return None,
        };
        Some((group, change))
    }
}

/// What cannot be taken back, as the question to the user has it.
fn loss(group: &GroupSurvey, change: &Change) -> Option<String> {
    let name = &group.known.broker_group;
    match change {
        Change::Remove { node } => {
            let left = match group.data_voters_without(node) {
                1 => ", which is then one node without a second copy or a fail-over",
                _ => "",
            };
            Some(format!(
                "take {node} out of broker group {name}{left}; it can come back only as a new \
                 member"
            ))
        }
        Change::ReplaceWitness { node, .. } => Some(format!(
            "give broker group {name} a witness at {node} in the place of the one that it has"
        )),
        Change::Add { .. }
        | Change::Promote { .. }
        | Change::Transfer { .. }
        | Change::RaiseFeatureLevel { .. } => None,
    }
}

async fn look(api: &Api, global: &Global) -> Result<Survey, Failure> {
    match tokio::time::timeout(global.timeout, survey::take(api)).await {
        Ok(survey) => survey,
        Err(_) => Err(access::timeout(global)),
    }
}

async fn health(api: &Api, wait: bool, global: &Global) -> Result<(), Failure> {
    let deadline = Instant::now() + global.timeout;
    loop {
        let survey = look(api, global).await;
        let is_well = survey.as_ref().is_ok_and(|survey| survey.problems().is_empty());
        if is_well || !wait || Instant::now() + LOOK_INTERVAL > deadline {
            return report::health(&survey?, global);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn found<'a>(survey: &'a Survey, name: &str) -> Result<&'a GroupSurvey, Failure> {
    let mut groups = survey.groups.iter();
    groups.find(|group| group.known.broker_group == name).ok_or_else(|| {
        let names = survey.groups.iter().map(|group| group.known.broker_group.as_str());
        let near = nearest(name, names);
        Failure::new(Kind::GroupNotFound, format!("broker group {name:?} is not known"))
            .details(near.map(|near| format!("did you mean {near:?}?")))
    })
}

/// Exit code 3 where there is nothing to take out, so that a script may do it again.
fn known_member(group: &GroupSurvey, text: &str) -> Result<(), Failure> {
    let members = group.members();
    let is_meant = |member: &GroupMember| {
        member.node == text || text.parse().is_ok_and(|id: u64| id == member.node_id)
    };
    // Nobody has said who is in it: the leader will.
    if members.is_empty() || members.iter().any(is_meant) {
        return Ok(());
    }
    let name = &group.known.broker_group;
    let names: Vec<_> = members.iter().map(|member| member.node.as_str()).collect();
    let reason = format!("{text:?} is no member of broker group {name}");
    Err(Failure::new(Kind::MemberNotFound, reason)
        .details([format!("its members are {}", names.join(", "))]))
}

/// Asks the leader, or whoever turns out to be it.
async fn make(api: &Api, group: &GroupSurvey, change: &Change) -> Result<String, Failure> {
    let name = &group.known.broker_group;
    let unknown = format!("no node of broker group {name} can be reached");
    let mut failure = Failure::new(Kind::Connect, unknown);
    let deadline = Instant::now() + LEADER_PATIENCE;
    loop {
        for address in group.addresses() {
            match api.change(&address, change.clone()).await {
                Ok(done) => return Ok(done),
                Err(error) if matches!(error.code(), Code::NotLeader | Code::Unavailable) => {
                    failure = access::failure(&error);
                }
                Err(error) => return Err(access::failure(&error)),
            }
        }
        if Instant::now() + LOOK_INTERVAL > deadline {
            return Err(failure);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn upgrade(
    api: &Api,
    group: Option<&str>,
    level: u32,
    global: &Global,
) -> Result<(), Failure> {
    let survey = look(api, global).await?;
    let groups = match group {
        Some(name) => vec![found(&survey, name)?],
        None => survey.groups.iter().collect(),
    };
    let mut failures = BTreeMap::new();
    for group in &groups {
        let name = group.known.broker_group.as_str();
        match make(api, group, &Change::RaiseFeatureLevel { level }).await {
            Ok(done) => told(name, done, global)?,
            Err(failure) => drop(failures.insert(name, failure)),
        }
    }
    let count = failures.len();
    match failures.pop_first() {
        None => Ok(()),
        Some((_, failure)) if groups.len() == 1 => Err(failure),
        Some((name, failure)) => {
            let rest =
                failures.iter().map(|(name, failure)| format!("{name}: {}", failure.message));
            let first = format!("{name}: {}", failure.message);
            let kind = if count == groups.len() { failure.kind } else { Kind::Partly };
            let text = format!("{count} of {} broker groups were not upgraded", groups.len());
            Err(Failure::new(kind, text).details(std::iter::once(first).chain(rest)))
        }
    }
}

fn told(group: &str, done: String, global: &Global) -> Result<(), Failure> {
    let data = json!({"name": group, "broker_group": group, "done": done});
    topic::done("drumlin/cluster.change/v1", data, global, || format!("{group}: {done}"))
}
