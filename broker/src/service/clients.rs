//! Who is connected here: role and groups of each client, and when it was last heard.
//!
//! A registration decides whether leases are renewed and whom a server command may reach. It is
//! not replicated: a new leader learns of clients by their calls.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::ids::GroupName;
use drumlin_proto::native::AliveClient;
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
/// Consumer groups of one client; further ones are not remembered.
const GROUPS_MAX: usize = 64;
/// Consumer groups of all clients together: calls name groups that need not exist.
const ALL_GROUPS_MAX: usize = 4 * CLIENTS_MAX;

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
    /// Of its settings, if they came here.
    pub request_timeout: Option<Duration>,
    /// Broker groups whose leaders may hold leases of it, though it calls here.
    pub forwarded_to: BTreeSet<String>,
    last_heard: Instant,
    /// Counts it as connected while it is registered.
    counted: Arc<Vec<Connected>>,
}

/// More than this node keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooManyClients {
    #[error("{clients_max} clients are registered already")]
    Clients { clients_max: usize },
    #[error("clients of {groups_max} consumer groups are registered already")]
    Groups { groups_max: usize },
}

/// What one call tells of its client.
#[derive(Clone, Debug, Default)]
pub struct Sighting {
    /// `None`: keep what is known, a producer if nothing is.
    pub client_type: Option<ClientType>,
    pub group: Option<GroupName>,
    pub request_timeout: Option<Duration>,
}

/// The clients of one node.
#[derive(Debug, Default)]
pub struct Clients {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_key: HashMap<ClientKey, Registration>,
    /// Over all clients.
    group_count: usize,
}

impl Known {
    fn forget(&mut self, client: &Registration) {
        self.group_count -= client.groups.len();
    }
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
        let mut all = self.known.lock();
        let Known { by_key, group_count } = &mut *all;
        let key = client_key(client_id);
        if !by_key.contains_key(&key) && by_key.len() >= CLIENTS_MAX {
            return Err(TooManyClients::Clients { clients_max: CLIENTS_MAX });
        }
        let mut changed = !by_key.contains_key(&key);
        let known = by_key.entry(key).or_insert_with(|| Registration {
            client_id: client_id.to_owned(),
            client_type: ClientType::Producer,
            groups: BTreeSet::new(),
            request_timeout: None,
            forwarded_to: BTreeSet::new(),
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
            && !known.groups.contains(&group)
        {
            if *group_count >= ALL_GROUPS_MAX {
                return Err(TooManyClients::Groups { groups_max: ALL_GROUPS_MAX });
            }
            *group_count += 1;
            changed |= known.groups.insert(group);
        }
        if sighting.request_timeout.is_some() {
            known.request_timeout = sighting.request_timeout;
        }
        if changed {
            known.counted = Arc::new(count(known));
        }
        Ok(())
    }

    /// Any call of a registered client keeps it alive.
    pub fn touch(&self, client_id: &str, now: Instant) {
        if let Some(known) = self.known.lock().by_key.get_mut(&client_key(client_id)) {
            known.last_heard = known.last_heard.max(now);
        }
    }

    /// A call of a registered client that takes leases went to this broker group's leader.
    pub fn note_forwarded(&self, client_id: &str, broker_group: &str) {
        if let Some(known) = self.known.lock().by_key.get_mut(&client_key(client_id))
            && !known.forwarded_to.contains(broker_group)
        {
            known.forwarded_to.insert(broker_group.to_owned());
        }
    }

    /// Clients whose leases other leaders may hold, by those leaders' broker groups.
    pub fn forwarded(&self) -> BTreeMap<String, Vec<AliveClient>> {
        let mut forwarded: BTreeMap<String, Vec<AliveClient>> = BTreeMap::new();
        let all = self.known.lock();
        for known in all.by_key.values() {
            for broker_group in &known.forwarded_to {
                forwarded.entry(broker_group.clone()).or_default().push(AliveClient {
                    client_id: known.client_id.clone(),
                    client_type: known.client_type.into(),
                    consumer_groups: known.groups.iter().map(ToString::to_string).collect(),
                });
            }
        }
        forwarded
    }

    pub fn get(&self, client_id: &str) -> Option<Registration> {
        self.known.lock().by_key.get(&client_key(client_id)).cloned()
    }

    /// Whether the client was heard within [`SILENCE_MAX`].
    pub fn is_alive(&self, key: ClientKey, now: Instant) -> bool {
        let all = self.known.lock();
        all.by_key.get(&key).is_some_and(|known| known.last_heard + SILENCE_MAX > now)
    }

    /// Forgets a client that is leaving; `None` if it was not known.
    pub fn remove(&self, client_id: &str) -> Option<Registration> {
        let mut all = self.known.lock();
        let client = all.by_key.remove(&client_key(client_id))?;
        all.forget(&client);
        Some(client)
    }

    /// Forgets clients that were silent for too long and returns them.
    pub fn expire(&self, now: Instant) -> Vec<(ClientKey, Registration)> {
        let mut all = self.known.lock();
        let silent = |known: &Registration| known.last_heard + SILENCE_MAX <= now;
        let gone: Vec<_> = all.by_key.extract_if(|_, known| silent(known)).collect();
        gone.iter().for_each(|(_, client)| all.forget(client));
        gone
    }

    pub fn count(&self) -> usize {
        self.known.lock().by_key.len()
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
        register(Sighting::default());
        assert_eq!(counts, 2, "asked only when type or groups change");
        let known = clients.get("a").unwrap();
        assert_eq!(known.client_type, ClientType::PushConsumer);
        assert_eq!(known.groups.len(), 2);
        assert_eq!(clients.remove("a").unwrap().client_id, "a");
        assert!(clients.remove("a").is_none());
    }

    #[test]
    fn group_names_are_bounded_over_all_clients_and_freed_with_them() {
        let clients = Clients::default();
        let now = Instant::now();
        let register = |client: &str, group: &str| {
            clients.register(client, consumer(group), now, |_| Vec::new())
        };
        register("a", "g1").unwrap();
        register("a", "g1").unwrap();
        register("b", "g1").unwrap();
        assert_eq!(clients.known.lock().group_count, 2);
        clients.known.lock().group_count = ALL_GROUPS_MAX;
        let full = Err(TooManyClients::Groups { groups_max: ALL_GROUPS_MAX });
        assert_eq!(register("b", "g2"), full);
        register("b", "g1").unwrap();
        clients.remove("a").unwrap();
        register("b", "g2").unwrap();
        assert_eq!(clients.expire(now + SILENCE_MAX).len(), 1);
        assert_eq!(clients.known.lock().group_count, ALL_GROUPS_MAX - 2);
    }

    #[test]
    fn clients_are_beaten_for_where_their_calls_went() {
        let clients = Clients::default();
        let now = Instant::now();
        clients.note_forwarded("a", "b-0");
        clients.register("a", consumer("g"), now, |_| Vec::new()).unwrap();
        clients.register("b", consumer("g"), now, |_| Vec::new()).unwrap();
        clients.note_forwarded("a", "b-0");
        clients.note_forwarded("a", "b-1");
        let forwarded = clients.forwarded();
        assert_eq!(forwarded.keys().collect::<Vec<_>>(), ["b-0", "b-1"]);
        assert_eq!(forwarded["b-0"][0].client_id, "a");
        assert_eq!(forwarded["b-0"][0].consumer_groups, ["g"]);
        clients.expire(now + SILENCE_MAX);
        assert!(clients.forwarded().is_empty());
    }

    #[test]
    fn client_keys_are_stable() {
        assert_eq!(client_key(""), ClientKey(0x04b2_008f_d98c_1dd4));
        assert_ne!(client_key("a"), client_key("b"));
    }
}
