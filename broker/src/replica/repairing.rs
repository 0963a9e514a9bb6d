//! Mends a log that is damaged where it had been durable, with the entries of other data nodes,
//! before Raft starts: until then this node neither votes nor campaigns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drumlin_proto::native::EntriesRequest;
use tokio::time::Instant;
use tonic::Request;

use super::membership::{self, BrokerNode, Role};
use super::network;
use super::wire::{self, Caller};
use crate::data_dir::Identity;
use crate::entry::Entry;
use crate::log::repair::{self, Damage, RepairError};
use crate::log::{CheckpointMark, OpenError};
use crate::position::EntryIndex;

/// Between two rounds of questions.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const REPORT_INTERVAL: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a repair works with.
#[derive(Debug)]
pub(crate) struct Repairing {
    identity: Identity,
    log_dir: PathBuf,
    mark: Option<CheckpointMark>,
    /// The other data nodes, by Raft id.
    others: BTreeMap<u64, BrokerNode>,
    /// Addresses by name that win over those of the members.
    addresses: BTreeMap<String, String>,
    quarantine_bytes_max: u64,
}

/// Why the entries of one node do not help.
#[derive(Debug, thiserror::Error)]
enum HelpError {
    #[error("its address is not known")]
    Address,
    #[error(transparent)]
    Call(#[from] tonic::Status),
    #[error("it cannot be dialled")]
    Dial(#[from] tonic::transport::Error),
    #[error("it does not answer")]
    Silent(#[from] tokio::time::error::Elapsed),
    #[error("what it sends cannot be used")]
    Wire(#[from] wire::WireError),
    #[error("it has nothing behind entry {0}")]
    Short(EntryIndex),
    #[error("a name cannot be sent")]
    Caller(#[from] wire::CallerError),
}

impl Repairing {
    /// `membership`: as the newest checkpoint has it; without one the configured names are the
    /// members, numbered as a bootstrap numbers them.
    pub(crate) fn new(
        identity: Identity,
        log_dir: &Path,
        checkpoint: Option<(CheckpointMark, &[u8])>,
        mut configured: Vec<(String, String)>,
        addresses: BTreeMap<String, String>,
        quarantine_bytes_max: u64,
    ) -> Self {
        let members = checkpoint.and_then(|(_, bytes)| membership::decode(bytes).ok());
        let mut others: BTreeMap<u64, BrokerNode> = match members {
            Some(members) => members.nodes().map(|(id, node)| (*id, node.clone())).collect(),
            None => {
                configured.sort();
                let node = |(name, address)| BrokerNode { name, address, role: Role::Data };
                (1..).zip(configured.into_iter().map(node)).collect()
            }
        };
        others.retain(|id, node| node.role == Role::Data && *id != identity.node_id);
        Self {
            identity,
            log_dir: log_dir.to_owned(),
            mark: checkpoint.map(|(mark, _)| mark),
            others,
            addresses,
            quarantine_bytes_max,
        }
    }

    /// Mends what made an open fail; returns once it may be tried again. Waits for other nodes as
    /// long as there are any.
    ///
    /// Errors: the damage, where nobody can help, or where it is not of a kind that can be mended.
    pub(crate) async fn mend(&self, error: OpenError) -> Result<(), OpenError> {
        let OpenError::Corrupt { segment, index, .. } = &error else { return Err(error) };
        if self.others.is_empty() {
            return Err(error);
        }
        let found = {
            let (dir, segment, mark) = (self.log_dir.clone(), segment.clone(), self.mark);
            let group_uuid = self.identity.log_uuid();
            let finding = move || repair::find(&dir, group_uuid, &segment, mark.as_ref());
            tokio::task::spawn_blocking(finding).await.map_err(std::io::Error::other)??
        };
        let Some(damage) = found else {
            tracing::error!(segment, %index, "the damage is not inside the segment");
            return Err(error);
        };
        let names: Vec<&str> = self.others.values().map(|node| node.name.as_str()).collect();
        tracing::error!(
            segment,
            at = damage.at,
            from = %damage.from,
            end = %damage.end,
            others = names.join(", "),
            "entries that had been durable are damaged; they are asked for"
        );
        let mut reported_at = Instant::now();
        loop {
            for (id, node) in &self.others {
                match self.mend_from(*id, node, &damage).await {
                    Ok(()) => return Ok(()),
                    Err(reason) if reported_at.elapsed() >= REPORT_INTERVAL => {
                        tracing::warn!(member = node.name, reason, "still waits to mend the log");
                        reported_at = Instant::now();
                    }
                    Err(reason) => tracing::debug!(member = node.name, reason, "no help"),
                }
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn mend_from(&self, id: u64, node: &BrokerNode, damage: &Damage) -> Result<(), String> {
        let entries = self.fetch(id, node, damage.from, damage.end).await;
        let entries = entries.map_err(|error| chain(&error))?;
        let (dir, damage) = (self.log_dir.clone(), damage.clone());
        let (group_uuid, max) = (self.identity.log_uuid(), self.quarantine_bytes_max);
        let count = entries.len();
        let mending = move || repair::mend(&dir, group_uuid, &damage, &entries, max);
        let mended = tokio::task::spawn_blocking(mending).await.map_err(|e| e.to_string())?;
        mended.map_err(|error: RepairError| chain(&error))?;
        tracing::warn!(member = node.name, count, "the log is mended with another node's entries");
        Ok(())
    }

    /// Entries of a range, which the other node has applied.
    async fn fetch(
        &self,
        id: u64,
        node: &BrokerNode,
        from: EntryIndex,
        end: EntryIndex,
    ) -> Result<Vec<Entry>, HelpError> {
        let address = self.addresses.get(&node.name).unwrap_or(&node.address);
        if address.is_empty() {
            return Err(HelpError::Address);
        }
        let mut client = network::client(network::endpoint(address)?.connect_lazy());
        let caller = Caller {
            cluster: self.identity.cluster.clone(),
            broker_group: self.identity.broker_group.to_string(),
            group_uuid: Some(self.identity.group_uuid),
            from: self.identity.node_id,
            to: id,
        };
        let mut entries = Vec::new();
        let mut next = from;
        while next < end {
            let mut request =
                Request::new(EntriesRequest { from_index: next.get(), end_index: end.get() });
            caller.write(request.metadata_mut())?;
            let answer = tokio::time::timeout(ANSWER_TIMEOUT, client.entries(request)).await??;
            let answer = answer.into_inner().entries;
            if answer.is_empty() {
                return Err(HelpError::Short(next));
            }
            for entry in answer {
                entries.push(wire::entry_from_wire(entry, Role::Data)?);
                next = next.next();
            }
        }
        Ok(entries)
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
