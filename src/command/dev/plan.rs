//! Who is in the cluster of `drumlin dev --cluster`: names, ports, configuration files.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use crate::command::server;
use crate::config::{self, BrokerKeys, Given, Keys, NameserverKeys};
use crate::failure::{Failure, Kind};

/// From one node to the next.
const PORT_STEP: u16 = 10;
/// Free ports are looked for here, below those that systems give to outgoing connections: a child
/// that is started again must find its port free.
const FREE_PORTS: std::ops::Range<u16> = 12_000..32_000;
/// Sections that the plan sets, so that nobody else can.
const PLANNED: [&str; 6] =
    ["node", "listeners.external", "listeners.peers", "replicas", "http", "nameservers"];

/// Port of the first node of each kind; 0: any free one for every node.
#[derive(Clone, Copy, Debug)]
pub(super) struct BasePorts {
    pub(super) nameserver: u16,
    pub(super) broker: u16,
    pub(super) http: u16,
    pub(super) peer: u16,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kin {
    Nameserver,
    Broker { group: String, peer_port: u16 },
}

/// One process.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) kin: Kin,
    /// Where clients reach it.
    pub(super) port: u16,
    pub(super) http_port: u16,
    /// TOML that goes before what the user sets.
    preset: String,
}

impl Node {
    pub(super) fn is_nameserver(&self) -> bool {
        self.kin == Kin::Nameserver
    }

    /// The command that runs it.
    pub(super) fn command(&self) -> &'static str {
        if self.is_nameserver() { "nameserver" } else { "broker" }
    }

    pub(super) fn config_path(&self, root: &Path) -> PathBuf {
        root.join(format!("{}.toml", self.name))
    }

    /// What it writes to stderr.
    pub(super) fn log_path(&self, root: &Path) -> PathBuf {
        root.join(format!("{}.log", self.name))
    }

    /// Writes what the node is started with: the plan, the environment and `set` as one file, so
    /// that faults are told once and at once.
    pub(super) fn write_configuration(
        &self,
        root: &Path,
        set: &[(String, String)],
    ) -> Result<(), Failure> {
        let text = match self.kin {
            Kin::Nameserver => {
                self.configuration::<NameserverKeys>(BrokerKeys::TABLES, root, set)?
            }
            Kin::Broker { .. } => {
                self.configuration::<BrokerKeys>(NameserverKeys::TABLES, root, set)?
            }
        };
        let path = self.config_path(root);
        let failed = |error: std::io::Error| {
            Failure::new(Kind::Failed, format!("{} cannot be written: {error}", path.display()))
        };
        std::fs::create_dir_all(root).map_err(failed)?;
        std::fs::write(&path, text).map_err(failed)
    }

    fn configuration<K: Keys>(
        &self,
        others: &[&'static config::Table],
        root: &Path,
        set: &[(String, String)],
    ) -> Result<String, Failure> {
        let data_dir = root.join(&self.name).display().to_string();
        let preset = format!("[node]\nname = {:?}\ndata_dir = {data_dir:?}\n", self.name);
        let given = Given {
            preset: Some(("drumlin dev --cluster", preset + &self.preset)),
            files: Vec::new(),
            environment: server::environment(),
            flags: server::flags(set),
        };
        let loaded = config::load::<K>(&given, others)?;
        let taken =
            |value: &&config::Effective| value.is_given() && PLANNED.contains(&value.section);
        if let Some(value) = loaded.effective.iter().find(taken) {
            let (section, name, origin) = (value.section, value.name, &value.origin);
            let message =
                format!("{origin}: every node of the cluster has its own {section}.{name}");
            return Err(Failure::new(Kind::Usage, message));
        }
        Ok(format!(
            "# Written at every start of `drumlin dev --cluster`.\n\n{}",
            config::effective(&loaded)
        ))
    }
}

/// Two nameservers, then two broker groups of two nodes. The witness of group a is at
/// nameserver-0, that of b at nameserver-1: whichever process is lost, all groups go on.
pub(super) fn two_groups(base: &BasePorts) -> Result<Vec<Node>, Failure> {
    let mut ports = Ports::default();
    let mut nameservers = Vec::new();
    for nth in 0..2 {
        let name = format!("nameserver-{nth}");
        let port = ports.take(base.nameserver, nth, &name)?;
        let http_base = if base.nameserver == 0 { 0 } else { base.nameserver + 1 };
        let http_port = ports.take(http_base, nth, &name)?;
        let preset = format!(
            "[listeners.external]\nbind = \"127.0.0.1:{port}\"\n\
             [http]\nbind = \"127.0.0.1:{http_port}\"\n\
             [routes]\nauto_create = true\n"
        );
        nameservers.push(Node { name, kin: Kin::Nameserver, port, http_port, preset });
    }
    let mut brokers = Vec::new();
    for nth in 0..4 {
        let group = ["broker-a", "broker-b"][usize::from(nth / 2)].to_owned();
        let name = format!("{group}-{}", nth % 2);
        let port = ports.take(base.broker, nth, &name)?;
        let http_port = ports.take(base.http, nth, &name)?;
        let peer_port = ports.take(base.peer, nth, &name)?;
        let kin = Kin::Broker { group, peer_port };
        brokers.push(Node { name, kin, port, http_port, preset: String::new() });
    }
    for pair in brokers.chunks_mut(2) {
        let members: Vec<String> = pair.iter().filter_map(member).collect();
        for node in pair {
            node.preset = broker_preset(node, &members, &nameservers);
        }
    }
    nameservers.append(&mut brokers);
    Ok(nameservers)
}

/// `name@host:port` of a broker's peer port.
fn member(node: &Node) -> Option<String> {
    match &node.kin {
        Kin::Broker { peer_port, .. } => Some(format!("{}@127.0.0.1:{peer_port}", node.name)),
        Kin::Nameserver => None,
    }
}

fn broker_preset(node: &Node, members: &[String], nameservers: &[Node]) -> String {
    let Kin::Broker { group, peer_port } = &node.kin else { return String::new() };
    let (port, http_port) = (node.port, node.http_port);
    let host = &nameservers[usize::from(group.ends_with("-b"))];
    let witness = format!("{}@127.0.0.1:{}", host.name, host.port);
    let addresses: Vec<_> = nameservers.iter().map(|n| format!("127.0.0.1:{}", n.port)).collect();
    format!(
        "broker_group = {group:?}\n\
         [cluster]\ncatalog_group = \"broker-a\"\n\
         [listeners.external]\nbind = \"127.0.0.1:{port}\"\n\
         [listeners.peers]\nbind = \"127.0.0.1:{peer_port}\"\n\
         [replicas]\nnodes = {members:?}\nwitness = {witness:?}\n\
         [http]\nbind = \"127.0.0.1:{http_port}\"\n\
         [nameservers]\naddresses = {addresses:?}\n\
         [topics]\nauto_create = true\n\
         [log]\nsegment_bytes = \"64MiB\"\nprepared_bytes = \"16MiB\"\n"
    )
}

/// Ports given out so far.
#[derive(Debug, Default)]
struct Ports {
    taken: Vec<u16>,
    /// How far the search for free ones has come.
    searched: u16,
}

impl Ports {
    /// The `nth` port from `base` on, or any free one if that is 0.
    fn take(&mut self, base: u16, nth: u16, node: &str) -> Result<u16, Failure> {
        if base == 0 {
            return self.free();
        }
        let port = base.checked_add(nth * PORT_STEP).ok_or_else(|| {
            Failure::new(Kind::Usage, format!("{base} leaves no port for {node}"))
        })?;
        if self.taken.contains(&port) {
            let message = format!("port {port} of {node} is another node's too");
            return Err(Failure::new(Kind::Usage, message));
        }
        if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            let message = format!("{node} cannot have port {port}: {error}");
            return Err(Failure::new(Kind::Failed, message)
                .hint("--nameserver-port, --broker-port, --http-port, --peer-port choose others"));
        }
        self.taken.push(port);
        Ok(port)
    }

    fn free(&mut self) -> Result<u16, Failure> {
        let count = u32::from(FREE_PORTS.end - FREE_PORTS.start);
        // Clusters that start together begin in different places.
        let start = std::process::id().wrapping_mul(97) % count;
        while u32::from(self.searched) < count {
            let offset = (start + u32::from(self.searched)) % count;
            self.searched += 1;
            let port = FREE_PORTS.start + u16::try_from(offset).expect("below the range's length");
            if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                self.taken.push(port);
                return Ok(port);
            }
        }
        Err(Failure::new(Kind::Failed, "no port is free"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any() -> Vec<Node> {
        let base = BasePorts { nameserver: 0, broker: 0, http: 0, peer: 0 };
        two_groups(&base).expect("ports are free")
    }

    #[test]
    fn every_node_is_sound_and_alone_in_its_name_and_ports() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let nodes = any();
        let names: Vec<_> = nodes.iter().map(|node| node.name.as_str()).collect();
        let wanted = [
            "nameserver-0",
            "nameserver-1",
            "broker-a-0",
            "broker-a-1",
            "broker-b-0",
            "broker-b-1",
        ];
        assert_eq!(names, wanted);
        let mut ports: Vec<_> = nodes.iter().flat_map(|node| [node.port, node.http_port]).collect();
        ports.extend(nodes.iter().filter_map(|node| match node.kin {
            Kin::Broker { peer_port, .. } => Some(peer_port),
            Kin::Nameserver => None,
        }));
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 16);
        for node in &nodes {
            node.write_configuration(root.path(), &[]).expect("a sound configuration");
        }
    }

    #[test]
    fn the_file_says_what_the_plan_says() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let set = [("log.segment_bytes".to_owned(), "128MiB".to_owned())];
        let nodes = any();
        let node = nodes.iter().find(|node| node.name == "broker-b-1").expect("planned");
        node.write_configuration(root.path(), &set).expect("a sound configuration");
        let given = Given { files: vec![node.config_path(root.path())], ..Given::default() };
        let loaded = config::load::<BrokerKeys>(&given, &[]).expect("it can be read back");
        let config = loaded.keys.config();
        assert_eq!(config.segment_bytes, 128 << 20);
        assert_eq!(
            (config.node.as_str(), config.broker_group.as_str()),
            ("broker-b-1", "broker-b")
        );
        assert_eq!(config.catalog_group.as_str(), "broker-a");
        assert_eq!(config.witness.expect("two nodes need one").name, "nameserver-1");
        let members: Vec<_> = config.replicas.iter().map(|node| node.name.as_str()).collect();
        assert_eq!(members, ["broker-b-0", "broker-b-1"]);
    }

    #[test]
    fn what_each_node_has_its_own_of_cannot_be_set() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let set = [("node.data_dir".to_owned(), "x".to_owned())];
        let failure = any()[2].write_configuration(root.path(), &set).expect_err("refused");
        assert_eq!(failure.kind, Kind::Usage);
    }

    #[test]
    fn the_next_node_is_ten_ports_higher() {
        let taken = any().iter().map(|node| node.port).max().expect("six nodes");
        let mut ports = Ports::default();
        let second = ports.take(taken - 10, 1, "b").expect("it is free");
        assert_eq!(second, taken);
        assert_eq!(ports.take(taken, 0, "c").expect_err("taken").kind, Kind::Usage);
    }
}
