//! Keeps the other broker groups' copies of the catalog equal to it, and completes changes of queue
//! lists once every owner has stored them. Runs everywhere, works on the catalog group's leader.
//!
//! What a copy has is asked, never remembered over a change of leader on either side; a push that is
//! lost, repeated or late changes nothing, because a copy takes only what begins where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::forward::{Forwarder, INTERNAL_LISTENER, MESSAGE_BYTES_MAX};
use drumlin_proto::ids::{BrokerGroupName, TopicId};
use drumlin_proto::native::PushRequest;
use drumlin_proto::native::catalog_client::CatalogClient;
use drumlin_proto::native::status::Code;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::broker::Context;
use crate::catalog::Topic;
use crate::command::level::SHARED_CATALOG_LEVEL;
use crate::command::{self, CatalogChange, Command};
use crate::replica::{Item, ProposeError};
use crate::whereabouts::{Leader, Whereabouts};

/// A change of a queue list that not every owner has stored in this time is withdrawn.
pub(crate) const PENDING_MAX: Duration =
    Duration::from_millis(if cfg!(test) { 500 } else { 5_000 });
/// Between two questions to a broker group whose copy is equal: it may have been made anew.
const RECHECK_INTERVAL: Duration = Duration::from_secs(5);
const PUSH_TIMEOUT: Duration = Duration::from_secs(6);
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Between two looks at changes that wait for owners.
const TICK: Duration = Duration::from_millis(500);
/// Definitions in one push: far below the size of an entry.
const CHANGES_MAX: usize = 2_000;

/// Why a copy is not known to be equal.
#[derive(Debug, thiserror::Error)]
enum PushError {
    #[error("it has no leader that is known here")]
    NoLeader,
    #[error("{0}")]
    Call(String),
    #[error("{}: {message}", code.as_str_name())]
    Refused { code: Code, message: String },
    #[error(
        "its copy is at version {copy}, ahead of the catalog's {own}: the catalog lost changes; what \
         they defined is used on there, and nothing is pushed before the catalog is past them"
    )]
    Ahead { copy: u64, own: u64 },
    #[error("nothing can be proposed here: {0}")]
    Propose(#[from] ProposeError),
}

/// Watches over all copies until `stop`.
pub(crate) async fn keep_equal(
    context: Arc<Context>,
    whereabouts: Whereabouts,
    stop: CancellationToken,
) {
    if !context.owns_catalog() {
        return;
    }
    let forwarder = Arc::new(Forwarder::default());
    let mut known = BTreeSet::new();
    let mut copying = JoinSet::new();
    let mut completing = Completing { context: Arc::clone(&context), since: BTreeMap::new() };
    let mut told = context.definitions.copies.subscribe();
    let mut version = context.replica.catalog_version();
    let mut changes = whereabouts.changes();
    loop {
        for name in whereabouts.other_groups() {
            let Ok(name) = BrokerGroupName::parse(&name) else { continue };
            if known.insert(name.clone()) {
                let copy = Copy {
                    context: Arc::clone(&context),
                    whereabouts: whereabouts.clone(),
                    forwarder: Arc::clone(&forwarder),
                    broker_group: name,
                    told: None,
                };
                copying.spawn(copy.run(stop.clone()));
            }
        }
        if context.makes_definitions() {
            completing.complete().await;
        } else {
            completing.since.clear();
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = changes.changed() => if changed.is_none() { break },
            changed = told.changed() => if changed.is_err() { break },
            changed = version.changed() => if changed.is_err() { break },
            () = sleep(TICK) => {}
        }
    }
    while let Some(ended) = copying.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a task that pushes definitions failed");
        }
    }
}

/// Changes of queue lists on their way.
struct Completing {
    context: Arc<Context>,
    /// When this leader saw a definition of this version wait for owners.
    since: BTreeMap<(TopicId, u32), Instant>,
}

impl Completing {
    async fn complete(&mut self) {
        let pending: Vec<Arc<Topic>> = {
            let view = self.context.replica.view();
            let definitions = view.state.catalog().definitions();
            definitions.filter(|topic| topic.next.is_some()).cloned().collect()
        };
        let (now, before) = (Instant::now(), std::mem::take(&mut self.since));
        for topic in pending {
            let key = (topic.id, topic.version);
            let since = before.get(&key).copied().unwrap_or(now);
            self.since.insert(key, since);
            let (id, version) = key;
            let change = if self.is_stored_by_all(&topic) {
                CatalogChange::ActivateTopic { topic: id, version }
            } else if now - since > PENDING_MAX {
                let topic = topic.name.as_str();
                tracing::warn!(topic, "not every owner stored the new queue list: withdrawn");
                CatalogChange::WithdrawTopic { topic: id, version }
            } else {
                continue;
            };
            let change = propose(&self.context, change).await;
            if let Err(error) = change {
                tracing::warn!(topic = %topic.name, %error, "a queue list was not completed");
            }
        }
    }

    fn is_stored_by_all(&self, topic: &Topic) -> bool {
        let copies = self.context.definitions.copies.borrow();
        let stored = |owner: &BrokerGroupName| {
            *owner == self.context.config.broker_group
                || copies.get(owner).is_some_and(|copied| *copied >= topic.changed)
        };
        topic.owners().all(stored)
    }
}

async fn propose(context: &Context, change: CatalogChange) -> Result<(), ProposeError> {
    let deadline = Some(Instant::now() + PROPOSE_TIMEOUT);
    let item = Item::Command(Command::Catalog(change));
    context.replica.propose(item, deadline).await.map(drop)
}

/// The copy of one broker group.
struct Copy {
    context: Arc<Context>,
    whereabouts: Whereabouts,
    forwarder: Arc<Forwarder>,
    broker_group: BrokerGroupName,
    /// The version that it had when it last answered, while this node leads.
    told: Option<u64>,
}

impl Copy {
    async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep()).await;
    }

    /// Ends with the replica.
    async fn keep(&mut self) {
        let mut version = self.context.replica.catalog_version();
        let mut status = self.context.replica.raft_status();
        let mut changes = self.whereabouts.changes();
        let (mut pause, mut failures_count) = (PAUSE_MIN, 0_u64);
        loop {
            if status.wait_for(|status| status.serving).await.is_err() {
                return;
            }
            version.mark_unchanged();
            changes.mark_unchanged();
            match self.push().await {
                Ok(false) => (pause, failures_count) = (PAUSE_MIN, 0),
                Ok(true) => {
                    (pause, failures_count) = (PAUSE_MIN, 0);
                    tokio::select! {
                        changed = version.changed() => if changed.is_err() { return },
                        () = sleep(RECHECK_INTERVAL) => self.told = None,
                    }
                }
                Err(error) => {
                    self.told = None;
                    // Told once per outage, not once per attempt.
                    if failures_count == 0 {
                        let to = self.broker_group.as_str();
                        tracing::warn!(broker_group = to, %error, "definitions are not pushed");
                    }
                    failures_count += 1;
                    tokio::select! {
                        changed = changes.changed() => if changed.is_none() { return },
                        () = sleep(pause) => {}
                    }
                    pause = PAUSE_MAX.min(pause * 2);
                }
            }
        }
    }

    /// One exchange; true once the copy is equal.
    async fn push(&mut self) -> Result<bool, PushError> {
        let (own, registered, delta) = {
            let view = self.context.replica.view();
            let catalog = view.state.catalog();
            if view.state.feature_level() < SHARED_CATALOG_LEVEL {
                drop(view);
                // Nothing to be copied yet; looked at again with the next change.
                return Ok(true);
            }
            let own = catalog.version();
            let delta = catalog.delta(self.told.unwrap_or(own), CHANGES_MAX);
            (own, catalog.confirmed(&self.broker_group).is_some(), delta)
        };
        if !registered {
            // From now on deletions are kept until this broker group has them.
            self.confirm(0).await?;
        }
        let version = self.send(&delta).await?;
        if version > own {
            let own = self.context.replica.view().state.catalog().version();
            if version > own {
                return Err(PushError::Ahead { copy: version, own });
            }
        }
        self.told = Some(version);
        self.context.definitions.copies.send_if_modified(|copies| {
            copies.insert(self.broker_group.clone(), version) != Some(version)
        });
        if version < own {
            return Ok(false);
        }
        self.forget_deletions(version).await?;
        Ok(true)
    }

    async fn send(&self, delta: &command::CatalogDelta) -> Result<u64, PushError> {
        let name = self.broker_group.as_str();
        let config = &self.context.config;
        let fallback = config.listeners.first().map_or("", |listener| &listener.name);
        let leader = match self.whereabouts.leader(name, INTERNAL_LISTENER) {
            Leader::Unknown => self.whereabouts.leader(name, fallback),
            known => known,
        };
        let Leader::There { address, .. } = leader else { return Err(PushError::NoLeader) };
        let call = |status: tonic::Status| PushError::Call(status.message().to_owned());
        let channel = self.forwarder.channel(&address).map_err(call)?;
        let (command_version, delta) = command::encode_copy(delta);
        let request = PushRequest {
            cluster: config.cluster.clone(),
            catalog_group: config.catalog_group.to_string(),
            command_version: u32::from(command_version),
            delta: delta.into(),
        };
        let mut client = CatalogClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let answer = timeout(PUSH_TIMEOUT, client.push(request)).await;
        let answer = answer.map_err(|_| PushError::Call("no answer in time".into()))?;
        let answer = answer.map_err(call)?.into_inner();
        let status = answer.status.unwrap_or_default();
        match status.code() {
            Code::Ok => Ok(answer.version),
            code => Err(PushError::Refused { code, message: status.message }),
        }
    }

    /// Lets the catalog forget what this copy has forgotten too.
    async fn forget_deletions(&self, version: u64) -> Result<(), ProposeError> {
        let due = {
            let view = self.context.replica.view();
            let catalog = view.state.catalog();
            let confirmed = catalog.confirmed(&self.broker_group).unwrap_or(0);
            let oldest = catalog.oldest_deletion();
            oldest.is_some_and(|oldest| (confirmed + 1..=version).contains(&oldest))
        };
        if due { self.confirm(version).await } else { Ok(()) }
    }

    async fn confirm(&self, upto: u64) -> Result<(), ProposeError> {
        let broker_group = self.broker_group.clone();
        propose(&self.context, CatalogChange::Confirm { broker_group, upto }).await
    }
}
