//! Tells every nameserver what is here and who leads, and learns of the other broker groups.
//!
//! One stream per nameserver: hello, all topics, then heartbeats and what changed of the topics. A
//! change of role or topics is told at once. Knows nothing of what nameservers make of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::BrokerGroupName;
use drumlin_proto::native::register_request::{Heartbeat, Hello, Request, Topics};
use drumlin_proto::native::registry_client::RegistryClient;
use drumlin_proto::native::status::Code;
use drumlin_proto::native::{
    GroupRoute, RegisterRequest, RegisterResponse, Topic, TopicShare, TopicType,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Endpoint;

use crate::catalog;
use crate::command;
use crate::replica::{RaftStatus, Replica};

const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The first retry comes while nameservers still keep the address in their routes.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Messages that may wait for a nameserver; one that is further behind is begun anew.
const WAITING_MAX: usize = 16;
/// All topics of a cluster at its limits, with room.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// All topics at one version of the catalog, by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Announced {
    pub version: u64,
    pub topics: BTreeMap<String, Topic>,
}

/// Why a registration ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the address is not valid")]
    Address(#[source] tonic::transport::Error),
    #[error("not reachable: {}", root(.0))]
    Connect(#[source] tonic::transport::Error),
    #[error("refused: {0}")]
    Refused(String),
    #[error("the stream ended: {0}")]
    Ended(String),
    #[error("the nameserver does not keep up")]
    Stalled,
}

/// The innermost cause, which is the one that tells.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// What the sessions share: who this is, and what there is to tell.
#[derive(Clone, Debug)]
struct Told {
    hello: Hello,
    status: watch::Receiver<RaftStatus>,
    topics: watch::Receiver<Arc<Announced>>,
}

type Routes = Arc<Vec<GroupRoute>>;

/// The registrations of one broker, one per nameserver.
#[derive(Debug)]
pub struct Registration {
    others: watch::Receiver<Routes>,
    registered: watch::Receiver<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Registration {
    /// Registers with all nameservers (`host:port`) until stopped.
    pub fn start(
        hello: Hello,
        nameservers: &[String],
        replica: &Replica,
        stop: CancellationToken,
    ) -> Self {
        let (announce, topics) = watch::channel(Arc::new(announced(replica)));
        let status = replica.raft_status();
        let mut registration =
            Self::begin(Told { hello, status, topics }, nameservers, stop.clone());
        let watching = watch_catalog(replica.clone(), announce, stop);
        registration.tasks.push(tokio::spawn(watching));
        registration
    }

    fn begin(told: Told, nameservers: &[String], stop: CancellationToken) -> Self {
        let (others_sender, others) = watch::channel(Routes::default());
        let (registered_sender, registered) = watch::channel(nameservers.is_empty());
        let known = Arc::new(Known {
            by_nameserver: parking_lot::Mutex::new(vec![None; nameservers.len()]),
            others: others_sender,
            registered: registered_sender,
        });
        let session = |(at, nameserver): (usize, &String)| {
            let (told, known, stop) = (told.clone(), Arc::clone(&known), stop.clone());
            tokio::spawn(keep_registered(at, nameserver.clone(), told, known, stop))
        };
        let tasks = nameservers.iter().enumerate().map(session).collect();
        Self { others, registered, tasks }
    }

    /// The other broker groups: of each the newest term that any nameserver has told, also after
    /// all of them have gone.
    pub fn other_groups(&self) -> watch::Receiver<Arc<Vec<GroupRoute>>> {
        self.others.clone()
    }

    /// True from the first time that a nameserver took the registration; at once without any.
    pub fn registered(&self) -> watch::Receiver<bool> {
        self.registered.clone()
    }

    /// Waits until all sessions have ended; they do once the token is cancelled.
    pub async fn join(self) {
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a registration's task failed");
            }
        }
    }
}

/// What nameservers have told.
#[derive(Debug)]
struct Known {
    /// `None` while there is no session, or none that has heard of all brokers yet.
    by_nameserver: parking_lot::Mutex<Vec<Option<Vec<GroupRoute>>>>,
    others: watch::Sender<Routes>,
    registered: watch::Sender<bool>,
}

impl Known {
    fn learn(&self, nameserver: usize, groups: Option<Vec<GroupRoute>>) {
        let mut by_nameserver = self.by_nameserver.lock();
        if let Some(known) = by_nameserver.get_mut(nameserver) {
            *known = groups;
        }
        self.others.send_if_modified(|known| {
            let merged = merge(known, &by_nameserver);
            let changes = **known != merged;
            if changes {
                *known = Arc::new(merged);
            }
            changes
        });
    }
}

/// Of each broker group the newest term told, and of one term the most live nodes, by name. What no
/// session tells of stays as it was known, and no term goes back.
fn merge(before: &[GroupRoute], told: &[Option<Vec<GroupRoute>>]) -> Vec<GroupRoute> {
    let mut newest: BTreeMap<&str, &GroupRoute> = BTreeMap::new();
    for group in told.iter().flatten().flatten() {
        let place = newest.entry(&group.broker_group).or_insert(group);
        if (group.term, group.nodes.len()) > (place.term, place.nodes.len()) {
            *place = group;
        }
    }
    for known in before {
        let place = newest.entry(&known.broker_group).or_insert(known);
        if known.group_uuid == place.group_uuid && known.term > place.term {
            *place = known;
        }
    }
    newest.into_values().cloned().collect()
}

async fn keep_registered(
    at: usize,
    nameserver: String,
    mut told: Told,
    known: Arc<Known>,
    stop: CancellationToken,
) {
    let mut pause = RETRY_MIN;
    let mut failures_count = 0_u64;
    loop {
        let mut accepted = false;
        let session = register(at, &nameserver, &mut told, &known, &mut accepted);
        // Stopping ends what a session listens to as well, and is no failure of it.
        let error = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            error = session => error,
        };
        known.learn(at, None);
        if accepted {
            (pause, failures_count) = (RETRY_MIN, 0);
        }
        // Told once per outage, not once per attempt.
        match &error {
            _ if failures_count > 0 => {}
            SessionError::Refused(_) => {
                tracing::error!(nameserver, %error, "the nameserver does not take this broker");
            }
            _ => tracing::warn!(nameserver, %error, "not registered, trying again"),
        }
        failures_count += 1;
        let jitter = pause.mul_f64(fastrand::f64() * 0.5);
        tokio::select! {
            () = tokio::time::sleep(pause / 2 + jitter) => {}
            () = stop.cancelled() => return,
        }
        pause = RETRY_MAX.min(pause * 2);
    }
}

/// One session, until it fails.
async fn register(
    at: usize,
    nameserver: &str,
    told: &mut Told,
    known: &Known,
    accepted: &mut bool,
) -> SessionError {
    let opened = open(nameserver, told).await;
    let (mut outbound, mut answers) = match opened {
        Ok(opened) => opened,
        Err(error) => return error,
    };
    let mut beat = tokio::time::interval(HEARTBEAT_INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    beat.reset();
    loop {
        // All arms are cancellation-safe: what they wait for is taken only when it is there.
        let sent = tokio::select! {
            _ = beat.tick() => outbound.heartbeat(told),
            changed = told.status.changed() => match changed {
                Ok(()) => outbound.heartbeat(told),
                Err(_) => return SessionError::Ended("the replica has ended".into()),
            },
            changed = told.topics.changed() => match changed {
                Ok(()) => outbound.topics(told, false),
                Err(_) => return SessionError::Ended("the replica has ended".into()),
            },
            answer = answers.message() => match answer {
                Ok(Some(answer)) => take(answer, at, nameserver, known, accepted, |resend| {
                    if resend { outbound.topics(told, true) } else { Ok(()) }
                }),
                Ok(None) => return SessionError::Ended("closed by the nameserver".into()),
                Err(error) => return SessionError::Ended(error.message().to_owned()),
            },
        };
        if let Err(error) = sent {
            return error;
        }
    }
}

fn take(
    answer: RegisterResponse,
    at: usize,
    nameserver: &str,
    known: &Known,
    accepted: &mut bool,
    resend: impl FnOnce(bool) -> Result<(), SessionError>,
) -> Result<(), SessionError> {
    let status = answer.status.unwrap_or_default();
    if status.code() != Code::Ok {
        return Err(SessionError::Refused(status.message));
    }
    if !std::mem::replace(accepted, true) {
        tracing::info!(nameserver, "registered");
    }
    known.registered.send_if_modified(|known| !std::mem::replace(known, true));
    if answer.settled {
        known.learn(at, Some(answer.groups));
    }
    resend(answer.resend_topics)
}

async fn open(
    nameserver: &str,
    told: &mut Told,
) -> Result<(Outbound, Streaming<RegisterResponse>), SessionError> {
    let endpoint = Endpoint::from_shared(format!("http://{nameserver}"))
        .map_err(SessionError::Address)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(3));
    let channel = endpoint.connect().await.map_err(SessionError::Connect)?;
    let (messages, stream) = mpsc::channel(WAITING_MAX);
    let mut outbound = Outbound { messages, topics: None, led_term: 0 };
    outbound.send(Request::Hello(told.hello.clone()))?;
    outbound.topics(told, true)?;
    outbound.heartbeat(told)?;
    let mut client = RegistryClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let answers = client.register(ReceiverStream::new(stream)).await;
    let answers = answers.map_err(|error| SessionError::Ended(error.message().to_owned()))?;
    Ok((outbound, answers.into_inner()))
}

/// What goes to one nameserver.
struct Outbound {
    messages: mpsc::Sender<RegisterRequest>,
    /// What that nameserver was told last.
    topics: Option<Arc<Announced>>,
    /// Newest that had a leader: one that only a candidate has seen must not hide the leader.
    led_term: u64,
}

impl Outbound {
    fn send(&self, request: Request) -> Result<(), SessionError> {
        let message = RegisterRequest { request: Some(request) };
        self.messages.try_send(message).map_err(|_| SessionError::Stalled)
    }

    fn heartbeat(&mut self, told: &mut Told) -> Result<(), SessionError> {
        let status = *told.status.borrow_and_update();
        let topics_version = self.topics.as_ref().map_or(0, |topics| topics.version);
        if status.leader.is_some() {
            self.led_term = self.led_term.max(status.term.get());
        }
        let (term, leader) = (self.led_term, status.serving);
        self.send(Request::Heartbeat(Heartbeat { term, leader, topics_version }))
    }

    fn topics(&mut self, told: &mut Told, full: bool) -> Result<(), SessionError> {
        let now = Arc::clone(&told.topics.borrow_and_update());
        let message = match self.topics.as_ref().filter(|_| !full) {
            Some(before) => delta(before, &now),
            None => Topics {
                full: true,
                version: now.version,
                changed: now.topics.values().cloned().collect(),
                deleted: Vec::new(),
            },
        };
        self.topics = Some(now);
        self.send(Request::Topics(message))
    }
}

/// What changed from one version of the topics to another.
fn delta(before: &Announced, now: &Announced) -> Topics {
    let changed = now.topics.iter().filter(|(name, topic)| before.topics.get(*name) != Some(topic));
    let deleted = before.topics.keys().filter(|name| !now.topics.contains_key(*name));
    Topics {
        full: false,
        version: now.version,
        changed: changed.map(|(_, topic)| topic.clone()).collect(),
        deleted: deleted.cloned().collect(),
    }
}

/// The definition of a topic on the wire.
pub fn wire_topic(topic: &catalog::Topic) -> Topic {
    let kind = match topic.kind {
        command::TopicType::Normal => TopicType::Normal,
        command::TopicType::Fifo => TopicType::Fifo,
        command::TopicType::Mixed => TopicType::Mixed,
    };
    let share = |(broker_group, queue_count): &(BrokerGroupName, u16)| TopicShare {
        broker_group: broker_group.to_string(),
        queue_count: u32::from(*queue_count),
    };
    Topic {
        name: topic.name.to_string(),
        topic_id: topic.id.get(),
        r#type: kind.into(),
        shares: topic.shares.iter().map(share).collect(),
        version: u64::from(topic.version),
        created_ms: i64::try_from(topic.created_ms).unwrap_or(i64::MAX),
        min_copies: u32::from(topic.min_copies),
        next_shares: topic.next.iter().flatten().map(share).collect(),
    }
}

fn announced(replica: &Replica) -> Announced {
    let (version, topics) = {
        let view = replica.view();
        let catalog = view.state.catalog();
        // Cloning the handles is short; the texts are made after the view is given back.
        (catalog.version(), catalog.topics().cloned().collect::<Vec<_>>())
    };
    let topics = topics.iter().map(|topic| (topic.name.to_string(), wire_topic(topic))).collect();
    Announced { version, topics }
}

/// Announces the topics whenever the catalog has changed.
async fn watch_catalog(
    replica: Replica,
    announce: watch::Sender<Arc<Announced>>,
    stop: CancellationToken,
) {
    let mut readable = replica.readable_end();
    loop {
        let version = replica.view().state.catalog().version();
        if version != announce.borrow().version {
            announce.send_replace(Arc::new(announced(&replica)));
        }
        tokio::select! {
            changed = readable.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests;
