//! `docker-compose.yml` and `conf/2m-2s`: what can be known without a container engine.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use drumlin_tests::node::binary;
use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const SERVICES: [&str; 6] =
    ["broker-a-0", "broker-a-1", "broker-b-0", "broker-b-1", "nameserver-0", "nameserver-1"];

fn compose_file() -> Result<Value> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("docker-compose.yml"))?;
    Ok(serde_saphyr::from_str(&text)?)
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array()
        .map(|items| items.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

fn drumlin(arguments: &[&str]) -> Result<std::process::Output> {
    let mut command = Command::new(binary());
    command.args(arguments);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DRUMLIN_") {
            command.env_remove(name);
        }
    }
    Ok(command.output()?)
}

/// One service and the configuration file that it mounts.
struct Service {
    name: String,
    compose: Value,
    role: String,
    /// On the host.
    config_path: String,
}

impl Service {
    fn all() -> Result<Vec<Self>> {
        let file = compose_file()?;
        let services = file["services"].as_object().context("services")?;
        services.iter().map(|(name, compose)| Self::read(name, compose)).collect()
    }

    fn read(name: &str, compose: &Value) -> Result<Self> {
        let command = texts(&compose["command"]);
        let [role, "-c", inside] = command[..] else {
            anyhow::bail!("{name}: {command:?} is not ROLE -c FILE");
        };
        let mounts = texts(&compose["volumes"]);
        let mounted = mounts.iter().find_map(|mount| {
            let (outside, rest) = mount.split_once(':')?;
            (rest == format!("{inside}:ro")).then_some(outside)
        });
        let mounted = mounted.with_context(|| format!("{name}: {inside} is not mounted"))?;
        let config_path = Path::new(ROOT).join(mounted).display().to_string();
        let role = role.to_owned();
        Ok(Self { name: name.into(), compose: compose.clone(), role, config_path })
    }

    /// Value of a key of the mounted file, as TOML shows it.
    fn key(&self, key: &str) -> Result<String> {
        let output =
            drumlin(&[&self.role, "-c", &self.config_path, "--print-config", "-o", "json"])?;
        let document: Value = serde_json::from_slice(&output.stdout)?;
        let keys = document["keys"].as_array().context("keys")?;
        let found = keys.iter().find(|row| row["key"] == key);
        let value = found.and_then(|row| row["value"].as_str());
        Ok(value.with_context(|| format!("{}: no {key}", self.name))?.trim_matches('"').to_owned())
    }

    /// Published ports as (host, container).
    fn ports(&self) -> Result<Vec<(String, String)>> {
        let port = |text: &str| {
            let (host, inside) = text.strip_prefix("127.0.0.1:")?.split_once(':')?;
            Some((host.to_owned(), inside.to_owned()))
        };
        let ports = texts(&self.compose["ports"]);
        ports
            .into_iter()
            .map(|text| port(text).with_context(|| format!("{}: {text} is open", self.name)))
            .collect()
    }
}

fn port_of(address: &str) -> &str {
    address.rsplit(':').next().unwrap_or_default()
}

#[test]
fn old_and_new_compose_read_the_file() -> Result<()> {
    let file = compose_file()?;
    let fields = file.as_object().context("an object")?;
    for (field, refused_by) in [("version", "the current Compose"), ("name", "Compose 1.29.2")] {
        assert!(!fields.contains_key(field), "{field}: {refused_by} complains");
    }
    let services = file["services"].as_object().context("services")?;
    assert_eq!(services.keys().map(String::as_str).collect::<Vec<_>>(), SERVICES);
    Ok(())
}

#[test]
fn every_service_is_locked_down_healthy_and_keeps_its_data() -> Result<()> {
    let file = compose_file()?;
    let volumes: BTreeSet<_> = file["volumes"].as_object().context("volumes")?.keys().collect();
    let mut data = BTreeSet::new();
    for service in Service::all()? {
        let Service { name, compose, .. } = &service;
        assert_eq!(compose["hostname"], *name);
        assert_eq!(compose["user"], "65532:65532", "{name}");
        assert_eq!(compose["read_only"], true, "{name}");
        assert_eq!(texts(&compose["cap_drop"]), ["ALL"], "{name}");
        let test = texts(&compose["healthcheck"]["test"]);
        assert_eq!(test, ["CMD", "/usr/local/bin/drumlin", "health", "--ready"], "{name}");
        let data_dir = service.key("node.data_dir")?;
        let mounts = texts(&compose["volumes"]);
        let volume = mounts.iter().find_map(|mount| mount.strip_suffix(&format!(":{data_dir}")));
        let volume = volume.with_context(|| format!("{name}: nothing at {data_dir}"))?.to_owned();
        assert!(volumes.contains(&volume), "{name}: {volume} is not declared");
        assert!(data.insert(volume), "{name} shares its data");
    }
    assert_eq!(data.len(), volumes.len());
    Ok(())
}

#[test]
fn every_mounted_configuration_is_sound_and_names_its_service() -> Result<()> {
    for service in Service::all()? {
        let Service { name, role, config_path, .. } = &service;
        let checked = drumlin(&[role, "-c", config_path, "--check-config"])?;
        ensure!(checked.status.success(), "{name}: {}", String::from_utf8_lossy(&checked.stderr));
        assert_eq!(service.key("node.name")?, *name);
        let internal = service.key("listeners.internal.bind")?;
        let advertised = service.key("listeners.internal.advertised")?;
        assert_eq!(advertised, format!("{name}:{}", port_of(&internal)));
    }
    Ok(())
}

#[test]
fn what_is_published_is_what_clients_are_told() -> Result<()> {
    let mut taken = BTreeSet::new();
    for service in Service::all()? {
        let name = &service.name;
        let ports = service.ports()?;
        for (host, _) in &ports {
            assert!(taken.insert(host.clone()), "{name}: port {host} is published twice");
        }
        let external = service.key("listeners.external.bind")?;
        let published = ports.iter().find(|(_, inside)| inside == port_of(&external));
        let (host, _) = published.with_context(|| format!("{name}: clients cannot get in"))?;
        assert_eq!(service.key("listeners.external.advertised")?, format!("localhost:{host}"));
        // `drumlin health` looks there by itself.
        let http = service.key("http.bind")?;
        assert_eq!(port_of(&http), if service.role == "broker" { "8082" } else { "9877" });
    }
    let wanted = ["8081", "8091", "8101", "8111", "9876", "9886", "8082", "8092", "8102", "8112"];
    assert_eq!(taken, wanted.into_iter().map(str::to_owned).collect());
    Ok(())
}

#[test]
fn each_group_has_its_witness_on_a_nameserver_of_its_own() -> Result<()> {
    for service in Service::all()?.iter().filter(|service| service.role == "broker") {
        let group = service.key("node.broker_group")?;
        let members = format!("[\"{group}-0@{group}-0:10912\", \"{group}-1@{group}-1:10912\"]");
        assert_eq!(service.key("replicas.nodes")?, members);
        assert_eq!(service.key("listeners.peers.advertised")?, format!("{}:10912", service.name));
        let host = if group == "broker-a" { "nameserver-0" } else { "nameserver-1" };
        assert_eq!(service.key("replicas.witness")?, format!("{host}@{host}:9876"));
        assert_eq!(service.key("cluster.catalog_group")?, "broker-a");
        let nameservers = service.key("nameservers.addresses")?;
        assert_eq!(nameservers, "[\"nameserver-0:9876\", \"nameserver-1:9876\"]");
    }
    Ok(())
}
