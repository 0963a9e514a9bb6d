//! How a broker group of several nodes begins: who makes it, and how the others join.
//!
//! The data node with the lowest name makes the group's UUID once every planned member answers and
//! belongs to no group yet; it writes its own identity first, then gives the others theirs, then
//! makes the first membership. A crash anywhere in between is gone on from at its next start:
//! whatever was given is given again, equal. Everyone else waits, and says for whom. A node whose
//! directory is empty while the group runs is never taken in here: it may have forgotten votes.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drumlin_proto::ids::BrokerGroupName;
use drumlin_proto::native::peer_client::PeerClient;
use drumlin_proto::native::{AdoptRequest, AdoptResponse, ProbeRequest, ProbeResponse};
use futures::future::join_all;
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use uuid::Uuid;

use super::Replica;
use super::membership::{BrokerNode, Role};
use super::peer_service::Host;
use super::raft_types::Raft;
use super::wire::Caller;
use crate::config::Config;
use crate::data_dir::{Bootstrap, Claim, DataDir, DataDirError, EmptyDataDir, Identity};

/// Between two rounds of questions.
const ROUND_INTERVAL: Duration = Duration::from_millis(300);
/// How long one of them may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two reports of for whom this node waits.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
/// A member as the configuration plans it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) id: u64,
    pub(crate) node: BrokerNode,
}

/// The members of a group of several nodes at its first start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    cluster: String,
    broker_group: BrokerGroupName,
    own_name: String,
    /// Data nodes by name, then the witness; ids in this order, from 1.
    members: Vec<Planned>,
    /// For whom this node waits; empty: for nobody.
    waiting: watch::Sender<String>,
}

impl Plan {
    /// `None`: the node is a group by itself.
    pub(crate) fn of(config: &Config) -> Option<Self> {
        if config.replicas.len() < 2 {
            return None;
        }
        let mut nodes: Vec<_> = config.replicas.iter().map(|node| (node, Role::Data)).collect();
        nodes.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        nodes.extend(config.witness.iter().map(|witness| (witness, Role::Witness)));
        let members = (1..).zip(nodes).map(|(id, (node, role))| {
            let (name, address) = (node.name.clone(), node.address.clone());
            Planned { id, node: BrokerNode { name, address, role } }
        });
        Some(Self {
            cluster: config.cluster.clone(),
            broker_group: config.broker_group.clone(),
            own_name: config.node.clone(),
            members: members.collect(),
            waiting: watch::Sender::default(),
        })
    }

    /// Tells there, too, for whom this node waits.
    pub(crate) fn telling(self, waiting: watch::Sender<String>) -> Self {
        Self { waiting, ..self }
    }

    fn founder(&self) -> Option<&Planned> {
        self.members.first()
    }

    /// Whether this node makes the group.
    fn founds(&self) -> bool {
        self.founder().is_some_and(|founder| founder.node.name == self.own_name)
    }

    fn founder_awaited(&self) -> String {
        let name = self.founder().map_or("nobody", |founder| founder.node.name.as_str());
        format!("{name}, which makes the group")
    }

    /// For what a node waits that is empty although its group runs, as `link`'s member says.
    fn exists_already(&self, link: &Link<'_>, answer: &ProbeResponse) -> String {
        let own = self.members.iter().find(|planned| planned.node.name == self.own_name);
        let address = own.map_or("HOST:PORT", |own| own.node.address.as_str());
        let (group, name) = (&self.broker_group, &self.own_name);
        link.told(format!(
            "it runs as group {} already, and the data directory of this node is empty: run \
             `drumlin cluster add {group} {name}@{address}` to make this node a new member",
            answer.group_uuid
        ))
    }

    fn others(&self) -> impl Iterator<Item = &Planned> {
        self.members.iter().filter(|planned| planned.node.name != self.own_name)
    }

    fn links(&self) -> Vec<Link<'_>> {
        self.others().map(|planned| Link::new(self, planned)).collect()
    }

    /// The first membership.
    fn membership(&self) -> BTreeMap<u64, BrokerNode> {
        self.members.iter().map(|planned| (planned.id, planned.node.clone())).collect()
    }
}

/// The way to a planned member while it may belong to no group yet.
struct Link<'a> {
    plan: &'a Plan,
    planned: &'a Planned,
    channel: Result<Channel, String>,
}

impl<'a> Link<'a> {
    fn new(plan: &'a Plan, planned: &'a Planned) -> Self {
        let channel = connect(&planned.node.address);
        Self { plan, planned, channel }
    }

    /// Why it cannot be waited for silently: name, address and reason.
    fn told(&self, reason: impl std::fmt::Display) -> String {
        let BrokerNode { name, address, .. } = &self.planned.node;
        format!("{name} at {address} ({reason})")
    }

    /// Errors: for what this node waits, or what somebody has to do.
    async fn probe(&self) -> Result<ProbeResponse, String> {
        let channel = self.channel.as_ref().map_err(|reason| self.told(reason))?;
        let (cluster, broker_group) = (&self.plan.cluster, &self.plan.broker_group);
        let probed = ask_who(channel, cluster, broker_group, &self.planned.node.name).await;
        probed.map_err(|reason| self.told(reason))
    }

    async fn adopt(&self, identity: &Identity) -> Result<(), String> {
        let channel = self.channel.as_ref().map_err(|reason| self.told(reason))?;
        // Of the first membership, which none of them has yet.
        let request = adopt_request(identity, self.planned.id, &self.planned.node, Vec::new());
        let request = introduced(&self.plan.cluster, &self.plan.broker_group, request)
            .map_err(|reason| self.told(reason))?;
        let answer = PeerClient::new(channel.clone()).adopt(request).await;
        answer.map(drop).map_err(|status| self.told(reason_of(&status)))
    }
}

/// Connects when it is first used.
fn connect(address: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|e| e.to_string())?;
    Ok(endpoint
        .connect_timeout(CALL_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .tcp_nodelay(true)
        .connect_lazy())
}

fn introduced<T>(
    cluster: &str,
    broker_group: &BrokerGroupName,
    request: T,
) -> Result<Request<T>, String> {
    let mut request = Request::new(request);
    let caller = Caller {
        cluster: cluster.to_owned(),
        broker_group: broker_group.to_string(),
        group_uuid: None,
        from: 0,
        to: 0,
    };
    caller.write(request.metadata_mut()).map_err(|error| error.to_string())?;
    Ok(request)
}

fn reason_of(status: &Status) -> String {
    match status.code() {
        tonic::Code::Unavailable => "does not answer".to_owned(),
        tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => "does not answer in time".into(),
        _ => status.message().to_owned(),
    }
}

/// Who answers, if that is the node that is meant.
async fn ask_who(
    channel: &Channel,
    cluster: &str,
    broker_group: &BrokerGroupName,
    name: &str,
) -> Result<ProbeResponse, String> {
    let request = introduced(cluster, broker_group, ProbeRequest {})?;
    let answer = PeerClient::new(channel.clone()).probe(request).await;
    let answer = answer.map_err(|status| reason_of(&status))?.into_inner();
    let expected = [
        ("cluster", cluster, answer.cluster.as_str()),
        ("broker group", broker_group.as_str(), answer.broker_group.as_str()),
        ("node", name, answer.node.as_str()),
    ];
    for (what, expected, told) in expected {
        if expected != told {
            return Err(format!("its {what} is {told:?}, expected {expected:?}"));
        }
    }
    Ok(answer)
}

/// Who `node` is, as it says itself.
///
/// Errors: why that is not known, or that it is another one.
pub(crate) async fn probe(identity: &Identity, node: &BrokerNode) -> Result<ProbeResponse, String> {
    let channel = connect(&node.address)?;
    ask_who(&channel, &identity.cluster, &identity.broker_group, &node.name).await
}

/// What makes `node` the member `id` of the group of `identity`.
fn adopt_request(
    identity: &Identity,
    id: u64,
    node: &BrokerNode,
    member_ids: Vec<u64>,
) -> AdoptRequest {
    AdoptRequest {
        cluster: identity.cluster.clone(),
        broker_group: identity.broker_group.to_string(),
        group_uuid: identity.group_uuid.to_string(),
        node_id: id,
        node: node.name.clone(),
        witness: node.role == Role::Witness,
        succeeds: identity.succeeds.iter().map(Uuid::to_string).collect(),
        member_ids,
    }
}

/// Makes the empty node at `node.address` the member `id` of the group of `identity`, which has
/// `member_ids` by now.
///
/// Errors: why it is not.
pub(crate) async fn adopt(
    identity: &Identity,
    id: u64,
    node: &BrokerNode,
    member_ids: Vec<u64>,
) -> Result<(), String> {
    let request = adopt_request(identity, id, node, member_ids);
    let request = introduced(&identity.cluster, &identity.broker_group, request)?;
    let answer = PeerClient::new(connect(&node.address)?).adopt(request).await;
    answer.map(drop).map_err(|status| reason_of(&status))
}

/// Says for whom this node waits: soon after it changed, but not more often than every so many
/// seconds; and to whoever looks, at any time.
#[derive(Debug)]
struct Report {
    last: Option<(Instant, String)>,
    waiting: watch::Sender<String>,
}

impl Report {
    fn new(waiting: watch::Sender<String>) -> Self {
        Self { last: None, waiting }
    }

    fn waiting(&mut self, waiting_for: &str) {
        let now = Instant::now();
        self.waiting.send_if_modified(|told| {
            let changes = told != waiting_for;
            if changes {
                waiting_for.clone_into(told);
            }
            changes
        });
        let due = self.last.as_ref().is_none_or(|(at, told)| {
            let since = now.duration_since(*at);
            since >= REPORT_INTERVAL || (told != waiting_for && since >= REPORT_INTERVAL / 5)
        });
        if due {
            tracing::info!(waiting_for, "this node has no part in its broker group yet");
            self.last = Some((now, waiting_for.to_owned()));
        }
    }
}

/// Answers who this node is, and takes what it is made to be, once.
#[derive(Debug)]
pub(crate) struct Door {
    claim: Claim,
    /// Tells one start of an empty node from another.
    directory_uuid: Uuid,
    behind: Mutex<Behind>,
    owner: watch::Sender<Option<Identity>>,
    /// Once the node runs as a member.
    replica: OnceLock<Replica>,
    /// Told when an empty node is not empty any more, or cannot be claimed.
    decided: Notify,
}

#[derive(Debug)]
enum Behind {
    Empty(EmptyDataDir),
    /// Until somebody takes it.
    Claimed(DataDir),
    Failed(DataDirError),
    Taken,
}

impl Door {
    pub(crate) fn of_empty(empty: EmptyDataDir) -> Self {
        Self {
            claim: empty.owner().clone(),
            directory_uuid: Uuid::new_v4(),
            behind: Mutex::new(Behind::Empty(empty)),
            owner: watch::Sender::new(None),
            replica: OnceLock::new(),
            decided: Notify::new(),
        }
    }

    pub(crate) fn of_member(identity: &Identity) -> Self {
        Self {
            claim: Claim {
                cluster: identity.cluster.clone(),
                broker_group: identity.broker_group.clone(),
                node: identity.node.clone(),
            },
            directory_uuid: identity.directory_uuid,
            behind: Mutex::new(Behind::Taken),
            owner: watch::Sender::new(Some(identity.clone())),
            replica: OnceLock::new(),
            decided: Notify::new(),
        }
    }

    /// The node behind it runs as a member from now on.
    pub(crate) fn enter(&self, replica: Replica) {
        // A door is of one run of a node, which has one replica.
        self.replica.set(replica).ok();
    }

    /// Who this is.
    fn introduction(&self) -> ProbeResponse {
        let owner = self.owner.borrow();
        let owner = owner.as_ref();
        ProbeResponse {
            cluster: self.claim.cluster.clone(),
            broker_group: self.claim.broker_group.to_string(),
            node: self.claim.node.clone(),
            directory_uuid: self.directory_uuid.to_string(),
            group_uuid: owner.map(|owner| owner.group_uuid.to_string()).unwrap_or_default(),
            node_id: owner.map_or(0, |owner| owner.node_id),
            initialised: self.replica.get().is_some_and(|replica| !replica.members().is_empty()),
        }
    }

    /// Makes this node a member, durably; nothing new for one that is the same member already.
    async fn be_adopted(&self, request: AdoptRequest) -> Result<AdoptResponse, Status> {
        let bootstrap = self.wanted(&request)?;
        let answer = AdoptResponse { directory_uuid: self.directory_uuid.to_string() };
        let mut behind = self.behind.lock().await;
        if let Some(owner) = self.owner.borrow().as_ref() {
            let (group_uuid, node_id) = (owner.group_uuid, owner.node_id);
            if (group_uuid, node_id) == (bootstrap.group_uuid, bootstrap.node_id) {
                return Ok(answer);
            }
            return Err(Status::failed_precondition(format!(
                "is member {node_id} of group {group_uuid} already: an empty data directory can \
                 be made another member"
            )));
        }
        self.claim(&mut behind, bootstrap).await.map_err(Status::internal)?;
        Ok(answer)
    }

    fn wanted(&self, request: &AdoptRequest) -> Result<Bootstrap, Status> {
        let pairs = [
            ("cluster", request.cluster.as_str(), self.claim.cluster.as_str()),
            ("broker group", request.broker_group.as_str(), self.claim.broker_group.as_str()),
            ("node", request.node.as_str(), self.claim.node.as_str()),
        ];
        for (what, asked, own) in pairs {
            if asked != own {
                let reason = format!("this is {what} {own:?}, not {asked:?}");
                return Err(Status::failed_precondition(reason));
            }
        }
        if request.witness || request.node_id == 0 {
            return Err(Status::failed_precondition("this is a data node with an id"));
        }
        let uuid = |text: &str| {
            Uuid::parse_str(text).map_err(|_| Status::invalid_argument("a UUID is invalid"))
        };
        let succeeds: Result<_, _> = request.succeeds.iter().map(|text| uuid(text)).collect();
        Ok(Bootstrap {
            group_uuid: uuid(&request.group_uuid)?,
            succeeds: succeeds?,
            directory_uuid: self.directory_uuid,
            node_id: request.node_id,
        })
    }

    /// Errors: why the directory cannot be claimed; whoever waits for it hears it too.
    async fn claim(&self, behind: &mut Behind, bootstrap: Bootstrap) -> Result<(), String> {
        let empty = match std::mem::replace(behind, Behind::Taken) {
            Behind::Empty(empty) => empty,
            other => {
                *behind = other;
                return Err("the data directory cannot be claimed any more".into());
            }
        };
        // Files are synced here, in the time of a call: short, but not for the runtime's threads.
        let claimed = tokio::task::spawn_blocking(move || empty.claim(bootstrap)).await;
        let told = match claimed.expect("claiming a directory does not panic") {
            Ok(data_dir) => {
                self.owner.send_replace(Some(data_dir.identity().clone()));
                *behind = Behind::Claimed(data_dir);
                Ok(())
            }
            Err(error) => {
                let told = Err(error.to_string());
                *behind = Behind::Failed(error);
                told
            }
        };
        self.decided.notify_one();
        told
    }

    /// Waits until the node is a member, and hands its directory over, once.
    async fn claimed(&self) -> Result<DataDir, DataDirError> {
        loop {
            let mut behind = self.behind.lock().await;
            match std::mem::replace(&mut *behind, Behind::Taken) {
                Behind::Claimed(data_dir) => return Ok(data_dir),
                Behind::Failed(error) => return Err(error),
                other => *behind = other,
            }
            drop(behind);
            self.decided.notified().await;
        }
    }
}

#[tonic::async_trait]
impl Host for Door {
    async fn probe(&self, _: &str) -> Result<ProbeResponse, Status> {
        Ok(self.introduction())
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<AdoptResponse, Status> {
        self.be_adopted(request).await
    }
}

/// Waits until the empty node behind `door` is made a member: by itself if it founds the group, or
/// by another.
pub(crate) async fn join(plan: &Plan, door: &Arc<Door>) -> Result<DataDir, DataDirError> {
    tokio::select! {
        claimed = door.claimed() => claimed,
        () = assemble(plan, door) => door.claimed().await,
    }
}

/// Founds the group once all others are there and empty; never returns on another node. Errors are
/// the door's to tell.
async fn assemble(plan: &Plan, door: &Door) {
    let links = plan.links();
    let mut report = Report::new(plan.waiting.clone());
    loop {
        let answers = join_all(links.iter().map(Link::probe)).await;
        let told: Vec<_> = links.iter().zip(answers).collect();
        let runs = |(link, answer): &(&Link<'_>, Result<ProbeResponse, String>)| {
            let answer = answer.as_ref().ok().filter(|answer| answer.initialised)?;
            Some(plan.exists_already(link, answer))
        };
        let mut waiting: Vec<_> = match told.iter().find_map(runs) {
            // Nothing else matters then.
            Some(exists) => vec![exists],
            None => {
                told.into_iter().filter_map(|(link, answer)| obstacle(plan, link, answer)).collect()
            }
        };
        if plan.founds() && waiting.is_empty() {
            return found(door).await;
        }
        if waiting.is_empty() {
            waiting.push(plan.founder_awaited());
        }
        report.waiting(&waiting.join(", "));
        tokio::time::sleep(ROUND_INTERVAL).await;
    }
}

/// What a member's answer keeps this node, which is empty, from, where no group runs yet.
fn obstacle(plan: &Plan, link: &Link<'_>, answer: Result<ProbeResponse, String>) -> Option<String> {
    match answer {
        Ok(answer) if !answer.group_uuid.is_empty() && plan.founds() => Some(link.told(format!(
            "it was made a member of group {}, which this node knows nothing of: empty its data \
             directory too, or restore this node's",
            answer.group_uuid
        ))),
        Ok(_) => None,
        // Only the founder needs all of them.
        Err(reason) => plan.founds().then_some(reason),
    }
}

/// Makes the group's UUID, with this node as its first member.
async fn found(door: &Door) {
    let mut behind = door.behind.lock().await;
    if door.owner.borrow().is_some() {
        return;
    }
    let group_uuid = Uuid::now_v7();
    let directory_uuid = door.directory_uuid;
    let bootstrap = Bootstrap { group_uuid, succeeds: Vec::new(), directory_uuid, node_id: 1 };
    if door.claim(&mut behind, bootstrap).await.is_ok() {
        tracing::info!(%group_uuid, "made a broker group");
    }
}

/// Goes on with a group whose log is empty: its founder makes all planned members and then the
/// first membership, the others say for whom they wait. Returns once there is a membership.
///
/// Errors: Raft has stopped.
pub(crate) async fn complete(plan: &Plan, identity: &Identity, raft: &Raft) -> Result<(), String> {
    let founds = plan.founds() && plan.founder().is_some_and(|own| own.id == identity.node_id);
    let links = plan.links();
    let mut report = Report::new(plan.waiting.clone());
    while !raft.is_initialized().await.map_err(|fatal| fatal.to_string())? {
        if founds {
            let adopted = join_all(links.iter().map(|link| link.adopt(identity))).await;
            let waiting: Vec<_> = adopted.into_iter().filter_map(Result::err).collect();
            if waiting.is_empty() {
                raft.initialize(plan.membership()).await.map_err(|error| error.to_string())?;
                tracing::info!(group_uuid = %identity.group_uuid, "the broker group is complete");
                return Ok(());
            }
            report.waiting(&waiting.join(", "));
        } else {
            report.waiting(&plan.founder_awaited());
        }
        tokio::time::sleep(ROUND_INTERVAL).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
