//! Definitions of topics and consumer groups: made and changed by the catalog group's leader, asked
//! for by every other broker.
//!
//! While the catalog group does not answer, nothing is created or changed; what exists is used on.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drumlin_proto::forward::{
    Call, CarryError, FORWARDED_BY, Forwarder, IfLost, administration, carry,
};
use drumlin_proto::ids::{BrokerGroupName, GroupName, TopicId, TopicName};
use drumlin_proto::native::{self as api, status::Code};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::creations::PER_SECOND_MAX;
use super::native::Fault;
use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::level::SHARED_CATALOG_LEVEL;
use crate::command::{
    CatalogChange, Command, GroupId, GroupStart, Outcome, Refusal, Shares, TopicType,
};
use crate::copies::PENDING_MAX;
use crate::replica::{Applied, Item, ProposeError};
use crate::whereabouts::{Leader, Whereabouts};

/// How long a change may wait for its turn.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the catalog group's leader is looked for.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer waits until other broker groups know what it tells.
const COPIES_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a new definition may take from the catalog group to here.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a creation waits for the feature level of a group that has just begun.
const LEVEL_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two looks at the feature level.
const LEVEL_INTERVAL: Duration = Duration::from_millis(50);
/// Queues of one topic on one broker group: each costs memory for as long as the topic exists.
const QUEUE_COUNT_MAX: u16 = 1024;
/// Queues of a topic that names no number.
const QUEUE_COUNT_DEFAULT: u16 = 8;

/// What making definitions needs beside the replica.
#[derive(Debug, Default)]
pub struct Definitions {
    elsewhere: OnceLock<Elsewhere>,
    /// Of other broker groups' copies the version that they equal, as the leader of the catalog
    /// group was told.
    pub(crate) copies: watch::Sender<BTreeMap<BrokerGroupName, u64>>,
}

#[derive(Debug)]
struct Elsewhere {
    whereabouts: Whereabouts,
    forwarder: Forwarder,
}

impl Definitions {
    /// From now on this broker can ask others.
    pub fn attach(&self, whereabouts: Whereabouts) {
        let elsewhere = Elsewhere { whereabouts, forwarder: Forwarder::default() };
        assert!(self.elsewhere.set(elsewhere).is_ok(), "a broker starts once");
    }

    pub(crate) fn whereabouts(&self) -> Option<&Whereabouts> {
        self.elsewhere.get().map(|elsewhere| &elsewhere.whereabouts)
    }
}

/// A topic that a client asks for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) name: TopicName,
    pub(crate) kind: TopicType,
    pub(crate) shares: Shares,
    pub(crate) min_copies: u8,
}

impl Context {
    /// Whether this broker makes definitions: it leads the catalog group.
    pub(crate) fn makes_definitions(&self) -> bool {
        self.owns_catalog() && self.replica.raft_status().borrow().serving
    }

    pub(crate) fn owns_catalog(&self) -> bool {
        self.config.broker_group == self.config.catalog_group
    }

    /// The listener that other brokers are asked at where they have no internal one.
    fn listener(&self) -> &str {
        self.config.listeners.first().map_or("", |listener| &listener.name)
    }

    /// Sends a call to the leader of a broker group.
    pub(crate) async fn ask_group<Q, A, F>(
        &self,
        broker_group: &BrokerGroupName,
        mut call: Call,
        message: Q,
        send: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        call.set(FORWARDED_BY, &self.config.node);
        let nobody = || {
            let text = format!("broker group {broker_group} does not answer");
            Fault::new(Code::Unavailable, text)
        };
        let elsewhere = self.definitions.elsewhere.get().ok_or_else(nobody)?;
        let listener = self.listener();
        let find = |until: std::time::Instant| {
            let until = Instant::from_std(until);
            elsewhere.whereabouts.address_by(until, broker_group.as_str(), listener)
        };
        let until = call.hold_until(ASK_TIMEOUT);
        let forwarder = &elsewhere.forwarder;
        match carry(forwarder, &call, message, IfLost::Fail, until, find, send).await {
            Ok(response) => Ok(response.into_inner()),
            Err(CarryError::Nobody) => Err(nobody()),
            Err(CarryError::Failed(status)) => {
                let text = format!("broker group {broker_group}: {}", status.message());
                Err(Fault::new(Code::UnknownOutcome, text))
            }
        }
    }

    /// As [`Context::ask_group`], for what only the catalog group can do.
    pub(crate) async fn ask_catalog<Q, A, F>(
        &self,
        call: Call,
        message: Q,
        send: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<A, Fault>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let catalog_group = &self.config.catalog_group;
        self.ask_group(catalog_group, call, message, send).await.map_err(|fault| {
            let what = "topics and consumer groups cannot be created or changed now";
            Fault { message: format!("{}, the catalog: {what}", fault.message), ..fault }
        })
    }

    async fn change(&self, command: Command) -> Result<Outcome, ProposeError> {
        let deadline = Some(Instant::now() + CHANGE_TIMEOUT);
        match self.replica.propose(Item::Command(command), deadline).await? {
            Applied::Command(outcome) => Ok(outcome),
            Applied::Run { .. } => unreachable!("a command was proposed"),
        }
    }

    fn definition(&self, name: &TopicName) -> Option<Arc<Topic>> {
        self.replica.view().state.catalog().definition_by_name(name).cloned()
    }

    /// The queue list that a client asks for; of no broker group: of all of them. For a topic made
    /// on first use those that do not answer are left out.
    pub(crate) fn shares(
        &self,
        broker_groups: &[String],
        queue_count: u32,
        auto: bool,
    ) -> Result<Shares, Fault> {
        let queue_count = match queue_count {
            0 => QUEUE_COUNT_DEFAULT,
            count => checked_count(count)?,
        };
        let asked = !broker_groups.is_empty();
        let mut names = match asked {
            true => parse_groups(broker_groups)?,
            false => self.known_groups(),
        };
        names.sort_unstable();
        names.dedup();
        if auto {
            names.retain(|name| self.answers(name));
        } else {
            self.check_answers(&names, asked)?;
        }
        Ok(names.into_iter().map(|name| (name, queue_count)).collect())
    }

    fn known_groups(&self) -> Vec<BrokerGroupName> {
        let others = self.definitions.whereabouts().map(Whereabouts::other_groups);
        let others = others.into_iter().flatten();
        let mut names: Vec<_> =
            others.filter_map(|name| BrokerGroupName::parse(&name).ok()).collect();
        names.extend(self.replica.view().state.catalog().copied_to().cloned());
        names.push(self.config.broker_group.clone());
        names
    }

    fn answers(&self, name: &BrokerGroupName) -> bool {
        if *name == self.config.broker_group {
            return true;
        }
        let leads = |whereabouts: &Whereabouts| {
            let leader = whereabouts.leader(name.as_str(), self.listener());
            !matches!(leader, Leader::Unknown)
        };
        self.definitions.whereabouts().is_some_and(leads)
    }

    fn check_answers(&self, names: &[BrokerGroupName], asked: bool) -> Result<(), Fault> {
        let Some(silent) = names.iter().find(|name| !self.answers(name)) else { return Ok(()) };
        let known = self.known_groups().contains(silent);
        Err(match (known, asked) {
            (false, _) => Fault::invalid(format!("broker group {silent} is not known")),
            (true, true) => {
                let text = format!("broker group {silent} does not answer");
                Fault::new(Code::Unavailable, text)
            }
            (true, false) => {
                let text = format!(
                    "broker group {silent} does not answer: name the broker groups to leave it out"
                );
                Fault::new(Code::Unavailable, text)
            }
        })
    }

    /// Makes a topic; returns once every owner can take messages for it.
    pub(crate) async fn create_topic(&self, wanted: Wanted) -> Result<Arc<Topic>, ProposeFault> {
        let Wanted { name, kind, shares, min_copies } = wanted;
        let alone = shares.iter().all(|(group, _)| *group == self.config.broker_group);
        let simple = alone && min_copies == 1;
        if !simple {
            self.until_shared().await;
        }
        let command = if simple && self.replica.feature_level() < SHARED_CATALOG_LEVEL {
            Command::CreateTopic { name, kind, shares }
        } else {
            let topics_max = self.config.topics_max;
            let create = CatalogChange::CreateTopic { name, kind, shares, min_copies, topics_max };
            Command::Catalog(create)
        };
        match self.change(command).await? {
            Outcome::TopicCreated { topic } => Ok(self.until_active(topic).await?),
            outcome => unreachable!("{outcome:?} came of creating a topic"),
        }
    }

    /// The level of a new group rises once all its members have been heard of.
    async fn until_shared(&self) {
        let until = Instant::now() + LEVEL_TIMEOUT;
        while self.replica.feature_level() < SHARED_CATALOG_LEVEL && Instant::now() < until {
            sleep(LEVEL_INTERVAL).await;
        }
    }

    /// The topic of this name, once every owner can take messages for it.
    pub(crate) async fn existing_topic(&self, name: &TopicName) -> Result<Arc<Topic>, Fault> {
        let missing = || Fault::topic_not_found(name.as_str());
        let topic = self.definition(name).ok_or_else(missing)?;
        self.until_active(topic.id).await
    }

    async fn until_active(&self, id: TopicId) -> Result<Arc<Topic>, Fault> {
        let topic = self.until_settled(id).await?;
        let topic = topic.ok_or_else(|| {
            let text = "not every broker group stored the new topic in time: it was not created";
            Fault::new(Code::Unavailable, text)
        })?;
        self.until_copied(topic.owners(), topic.changed).await;
        Ok(topic)
    }

    /// The topic without a change under way; `None` once it is gone.
    async fn until_settled(&self, id: TopicId) -> Result<Option<Arc<Topic>>, Fault> {
        let mut version = self.replica.catalog_version();
        let until = Instant::now() + PENDING_MAX + CHANGE_TIMEOUT;
        loop {
            version.mark_unchanged();
            let topic = self.replica.view().state.catalog().topic(id).cloned();
            if topic.as_ref().is_none_or(|topic| topic.next.is_none()) {
                return Ok(topic);
            }
            match timeout_at(until, version.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => {
                    let text = "the change is under way, but not complete on every broker group";
                    return Err(Fault::new(Code::UnknownOutcome, text));
                }
            }
        }
    }

    /// Waits a little until the copies of these broker groups are as new as a version.
    async fn until_copied<'a>(
        &self,
        broker_groups: impl Iterator<Item = &'a BrokerGroupName>,
        version: u64,
    ) {
        let own = &self.config.broker_group;
        let others: Vec<_> = broker_groups.filter(|name| *name != own).cloned().collect();
        let mut copies = self.definitions.copies.subscribe();
        let equal = copies.wait_for(|copies| {
            others.iter().all(|name| copies.get(name).is_some_and(|copied| *copied >= version))
        });
        if !others.is_empty() && timeout(COPIES_TIMEOUT, equal).await.is_err() {
            tracing::debug!(version, "answered before all broker groups know of it");
        }
    }

    /// Changes a topic; returns once the change is complete.
    pub(crate) async fn update_topic(
        &self,
        request: &api::UpdateTopicRequest,
    ) -> Result<Arc<Topic>, Fault> {
        let name = TopicName::parse(&request.name).map_err(Fault::invalid)?;
        let missing = || Fault::topic_not_found(name.as_str());
        let topic = self.definition(&name).ok_or_else(missing)?;
        let shares = grown(&topic.shares, &request.broker_groups, request.queue_count)?;
        let min_copies = match request.min_copies {
            0 => topic.min_copies,
            copies => checked_copies(copies)?,
        };
        if shares == topic.shares && min_copies == topic.min_copies {
            return Ok(topic);
        }
        if shares != topic.shares {
            let names: Vec<_> = shares.iter().map(|(name, _)| name.clone()).collect();
            self.check_answers(&names, true)?;
        }
        let (topic, version) = (topic.id, topic.version);
        let update =
            CatalogChange::UpdateTopic { topic, version, shares: shares.clone(), min_copies };
        self.change(Command::Catalog(update)).await?;
        let changed = self.until_settled(topic).await?.ok_or_else(missing)?;
        if changed.shares != shares {
            let text =
                "not every broker group stored the new queue list in time: it is not changed";
            return Err(Fault::new(Code::Unavailable, text));
        }
        self.until_copied(changed.owners(), changed.changed).await;
        Ok(changed)
    }

    pub(crate) async fn delete_topic(&self, name: &str) -> Result<(), Fault> {
        let parsed = TopicName::parse(name).map_err(Fault::invalid)?;
        let topic = self.definition(&parsed).ok_or_else(|| Fault::topic_not_found(name))?;
        self.change(Command::DeleteTopic { topic: topic.id }).await?;
        let version = self.replica.view().state.catalog().version();
        self.until_copied(topic.owners().filter(|name| self.answers(name)), version).await;
        Ok(())
    }

    fn group_id(&self, name: &GroupName) -> Option<GroupId> {
        self.replica.view().state.catalog().group_by_name(name).map(|group| group.id)
    }

    /// A consumer group begins to exist with its first use, anywhere. Answers once it is known here.
    pub(crate) async fn group_or_create(
        &self,
        name: &GroupName,
        deadline: Option<Instant>,
    ) -> Result<GroupId, Fault> {
        if let Some(id) = self.group_id(name) {
            return Ok(id);
        }
        let started = Instant::now();
        if !self.creations.groups.lock().take(started) {
            let text = format!("{PER_SECOND_MAX} consumer groups were created within a second");
            return Err(Fault::new(Code::Busy, text));
        }
        let created = match self.owns_catalog() {
            true => self.create_group(name).await,
            false => self.create_group_elsewhere(name, deadline).await,
        };
        self.metrics.group_created(created.is_ok(), started.elapsed());
        if created.is_ok() {
            tracing::info!(group = %name, "consumer group created on first use");
        }
        created
    }

    async fn create_group(&self, name: &GroupName) -> Result<GroupId, Fault> {
        let (name, start) = (name.clone(), GroupStart::Earliest);
        let command = if self.replica.feature_level() < SHARED_CATALOG_LEVEL {
            Command::CreateGroup { name, start }
        } else {
            let groups_max = self.config.groups_max;
            Command::Catalog(CatalogChange::CreateGroup { name, start, groups_max })
        };
        match self.change(command).await {
            Ok(Outcome::GroupCreated { group })
            | Err(ProposeError::Refused(Refusal::GroupExists(group))) => Ok(group),
            Ok(outcome) => unreachable!("{outcome:?} came of creating a group"),
            Err(error) => Err(error.into()),
        }
    }

    async fn create_group_elsewhere(
        &self,
        name: &GroupName,
        deadline: Option<Instant>,
    ) -> Result<GroupId, Fault> {
        let call = Call::new(MetadataMap::new(), deadline.map(Instant::into_std));
        let request = api::CreateGroupRequest { name: name.to_string() };
        let send =
            |channel, request| async move { administration(channel).create_group(request).await };
        let status = self.ask_catalog(call, request, send).await?.status.unwrap_or_default();
        if status.code() != Code::Ok {
            return Err(Fault::new(status.code(), status.message));
        }
        let mut version = self.replica.catalog_version();
        let arrival = Instant::now() + ARRIVAL_TIMEOUT;
        let until = deadline.map_or(arrival, |deadline| deadline.min(arrival));
        loop {
            version.mark_unchanged();
            if let Some(id) = self.group_id(name) {
                return Ok(id);
            }
            if !matches!(timeout_at(until, version.changed()).await, Ok(Ok(()))) {
                let text = format!("consumer group {name} was created, but is not known here yet");
                return Err(Fault::new(Code::Unavailable, text));
            }
        }
    }
}

/// Why a topic was not made: `TopicExists` is for the caller to judge.
#[derive(Debug)]
pub(crate) enum ProposeFault {
    Propose(ProposeError),
    Fault(Fault),
}

impl From<ProposeError> for ProposeFault {
    fn from(error: ProposeError) -> Self {
        Self::Propose(error)
    }
}

impl From<Fault> for ProposeFault {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

pub(crate) fn checked_copies(min_copies: u32) -> Result<u8, Fault> {
    u8::try_from(min_copies)
        .ok()
        .filter(|copies| (1..=2).contains(copies))
        .ok_or_else(|| Fault::invalid("a topic asks for 1 or 2 copies"))
}

fn checked_count(queue_count: u32) -> Result<u16, Fault> {
    let count = u16::try_from(queue_count).ok().filter(|count| *count <= QUEUE_COUNT_MAX);
    count.ok_or_else(|| {
        Fault::invalid(format!("a topic has at most {QUEUE_COUNT_MAX} queues a group"))
    })
}

fn parse_groups(names: &[String]) -> Result<Vec<BrokerGroupName>, Fault> {
    names.iter().map(|name| BrokerGroupName::parse(name).map_err(Fault::invalid)).collect()
}

/// A queue list with the broker groups and the number of queues that are asked for; broker groups
/// that are new to it get as many queues as the largest of the others.
fn grown(shares: &Shares, broker_groups: &[String], queue_count: u32) -> Result<Shares, Fault> {
    let mut names = match broker_groups {
        [] => shares.iter().map(|(name, _)| name.clone()).collect(),
        named => parse_groups(named)?,
    };
    names.sort_unstable();
    names.dedup();
    let asked = match queue_count {
        0 => None,
        count => Some(checked_count(count)?),
    };
    let largest = shares.iter().map(|(_, count)| *count).max().unwrap_or(QUEUE_COUNT_DEFAULT);
    let share = |name: BrokerGroupName| {
        let known = shares.iter().find(|(known, _)| *known == name).map(|(_, count)| *count);
        let count = asked.unwrap_or_else(|| known.unwrap_or(largest));
        (name, count)
    };
    Ok(names.into_iter().map(share).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(text: &str) -> Shares {
        let share = |share: &str| {
            let (name, count) = share.split_once(':').unwrap();
            (BrokerGroupName::parse(name).unwrap(), count.parse().unwrap())
        };
        text.split(' ').map(share).collect()
    }

    #[test]
    fn queue_lists_grow_by_groups_and_by_queues() {
        let grow = |names: &[&str], count| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            grown(&shares("a:8 b:4"), &names, count).unwrap()
        };
        assert_eq!(grow(&[], 0), shares("a:8 b:4"));
        assert_eq!(grow(&["c", "a", "b", "a"], 0), shares("a:8 b:4 c:8"));
        assert_eq!(grow(&[], 16), shares("a:16 b:16"));
        assert_eq!(grow(&["a", "b", "c"], 9), shares("a:9 b:9 c:9"));
        assert!(grown(&shares("a:1"), &["no spaces".into()], 0).is_err());
        assert!(grown(&shares("a:1"), &[], 1025).is_err());
    }
}
