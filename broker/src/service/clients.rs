//! Who is connected here: role, group and topics of each client, and when it was last heard.
//!
//! A registration decides whether leases are renewed and whom a server command may reach. It is
//! not replicated: a new leader learns of clients by their calls.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::{GroupName, TopicName};
use drumlin_proto::rocketmq::ClientType;
use md5::{Digest, Md5};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::command::ClientKey;
use crate::metrics::labels::Connected;

/// A client that was silent for so long is gone.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Clients registered at once; further ones are refused.
const CLIENTS_MAX: usize = 100_000;
/// Topics remembered of one client.
const TOPICS_MAX: usize = 1024;
/// Consumer groups remembered of one client.
const GROUPS_MAX: usize = 64;

/// Stable hash of a client id.
pub fn client_key(client_id: &str) -> ClientKey {
    let digest = Md5::digest(client_id.as_bytes());
    let mut first = [0; 8];
    for (to, from) in first.iter_mut().zip(digest.iter()) {
        *to = *from;
    }
    ClientKey(u64::from_le_bytes(first))
}

/// What is known of one client.
#[derive(Clone, Debug)]
pub struct Registration {
    pub client_id: String,
    pub client_type: ClientType,
    /// Consumer groups it took part in.
    pub groups: BTreeSet<GroupName>,
    /// Topics it declared or sent to.
    pub topics: BTreeSet<TopicName>,
    /// Of its settings, if they came here.
    pub request_timeout: Option<Duration>,
    last_heard: Instant,
    /// Counts it as connected while it is registered.
    counted: Arc<Vec<Connected>>,
}

/// More clients than this node keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{clients_max} clients are registered already")]
pub struct TooManyClients {
    pub clients_max: usize,
}

/// What one call tells of its client.
#[derive(Clone, Debug, Default)]
pub struct Sighting {
    /// `None`: keep what is known, a producer if nothing is.
    pub client_type: Option<ClientType>,
    pub group: Option<GroupName>,
    pub topics: Vec<TopicName>,
    pub request_timeout: Option<Duration>,
}

/// The clients of one node.
#[derive(Debug, Default)]
pub struct Clients {
    by_key: Mutex<HashMap<ClientKey, Registration>>,
}

impl Clients {
    /// Adds to what is known of a client, registering it if it is new. `count` is asked whenever
    /// its type or its groups change.
    pub fn register(
        &self,
        client_id: &str,
        sighting: Sighting,
        now: Instant,
        count: impl FnOnce(&Registration) -> Vec<Connected>,
    ) -> Result<(), TooManyClients> {
        let mut by_key = self.by_key.lock();
        let key = client_key(client_id);
        if !by_key.contains_key(&key) && by_key.len() >= CLIENTS_MAX {
            return Err(TooManyClients { clients_max: CLIENTS_MAX });
        }
        let mut changed = !by_key.contains_key(&key);
        let known = by_key.entry(key).or_insert_with(|| Registration {
            client_id: client_id.to_owned(),
            client_type: ClientType::Producer,
            groups: BTreeSet::new(),
            topics: BTreeSet::new(),
            request_timeout: None,
            last_heard: now,
            counted: Arc::default(),
        });
        known.last_heard = known.last_heard.max(now);
        if let Some(client_type) = sighting.client_type {
            changed |= known.client_type != client_type;
            known.client_type = client_type;
        }
        if let Some(group) = sighting.group
            && known.groups.len() < GROUPS_MAX
        {
            changed |= known.groups.insert(group);
        }
        if sighting.request_timeout.is_some() {
            known.request_timeout = sighting.request_timeout;
        }
        for topic in sighting.topics {
            if known.topics.len() < TOPICS_MAX {
                known.topics.insert(topic);
            }
        }
        if changed {
            known.counted = Arc::new(count(known));
        }
        Ok(())
    }

    /// Any call of a registered client keeps it alive.
    pub fn touch(&self, client_id: &str, now: Instant) {
        if let Some(known) = self.by_key.lock().get_mut(&client_key(client_id)) {
            known.last_heard = known.last_heard.max(now);
        }
    }

    pub fn get(&self, client_id: &str) -> Option<Registration> {
        self.by_key.lock().get(&client_key(client_id)).cloned()
    }

    /// Whether the client was heard within [`SILENCE_MAX`].
    pub fn is_alive(&self, key: ClientKey, now: Instant) -> bool {
        let by_key = self.by_key.lock();
        by_key.get(&key).is_some_and(|known| known.last_heard + SILENCE_MAX > now)
    }

    /// Forgets a client that is leaving; `None` if it was not known.
    pub fn remove(&self, client_id: &str) -> Option<Registration> {
        self.by_key.lock().remove(&client_key(client_id))
    }

    /// Forgets clients that were silent for too long and returns them.
    pub fn expire(&self, now: Instant) -> Vec<(ClientKey, Registration)> {
        let mut by_key = self.by_key.lock();
        by_key.extract_if(|_, known| known.last_heard + SILENCE_MAX <= now).collect()
    }

    pub fn count(&self) -> usize {
        self.by_key.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn consumer(group: &str) -> Sighting {
        Sighting {
            client_type: Some(ClientType::PushConsumer),
            group: Some(GroupName::parse(group).unwrap()),
            ..Sighting::default()
        }
    }

    #[test]
    fn silent_clients_expire_and_any_call_keeps_one_alive() {
        let clients = Clients::default();
        let start = Instant::now();
        clients.register("a", consumer("g"), start, |_| Vec::new()).unwrap();
        clients.register("b", consumer("g"), start, |_| Vec::new()).unwrap();
        let later = start + SILENCE_MAX / 2;
        clients.touch("a", later);
        clients.touch("unknown", later);
        assert_eq!(clients.count(), 2);
        let end = start + SILENCE_MAX;
        assert!(clients.is_alive(client_key("a"), end));
        assert!(!clients.is_alive(client_key("b"), end));
        let gone = clients.expire(end);
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].1.client_id, "b");
        assert!(clients.get("a").is_some());
        assert!(clients.get("b").is_none());
    }

    #[test]
    fn a_registration_collects_what_calls_tell() {
        let clients = Clients::default();
        let now = Instant::now();
        let mut counts = 0;
        let mut register = |sighting| {
            let count = |_: &Registration| {
                counts += 1;
                Vec::new()
            };
            clients.register("a", sighting, now, count).unwrap();
        };
        register(consumer("g1"));
        register(consumer("g2"));
        register(consumer("g2"));
        let topics = vec![TopicName::parse("t").unwrap()];
        register(Sighting { topics, ..Sighting::default() });
        assert_eq!(counts, 2, "asked only when type or groups change");
        let known = clients.get("a").unwrap();
        assert_eq!(known.client_type, ClientType::PushConsumer);
        assert_eq!(known.groups.len(), 2);
        assert_eq!(known.topics.len(), 1);
        assert_eq!(clients.remove("a").unwrap().client_id, "a");
        assert!(clients.remove("a").is_none());
    }

    #[test]
    fn client_keys_are_stable() {
        assert_eq!(client_key(""), ClientKey(0x04b2_008f_d98c_1dd4));
        assert_ne!(client_key("a"), client_key("b"));
    }
}
