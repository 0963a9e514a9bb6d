use std::path::Path;
use std::time::Duration;

use super::fault::{Fault, Origin};
use super::key::Key;
use super::*;

fn file(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("broker.toml");
    std::fs::write(&path, text).expect("the temporary directory is writable");
    path
}

fn broker_from(text: &str) -> Result<Loaded<BrokerKeys>, Faults> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let given = Given { files: vec![file(directory.path(), text)], ..Given::default() };
    load(&given, &[])
}

fn broker_with(environment: &[(&str, &str)]) -> Result<Loaded<BrokerKeys>, Faults> {
    let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    load(&Given { environment, ..Given::default() }, &[])
}

/// `path message` of every fault.
fn told(faults: Faults) -> Vec<String> {
    faults.0.iter().map(|fault| format!("{} {}", fault.path, fault.message)).collect()
}

fn only_fault(text: &str) -> Fault {
    let Faults(mut faults) = broker_from(text).expect_err("faulty");
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults.remove(0)
}

#[test]
fn without_anything_given_the_defaults_hold() {
    let loaded: Loaded<BrokerKeys> = load(&Given::default(), &[]).expect("defaults are valid");
    let config = loaded.keys.config();
    assert_eq!(config.segment_bytes, 1 << 30);
    assert_eq!(config.retention, Duration::from_hours(72));
    assert_eq!(config.retention_bytes_max, None);
    assert!(!config.auto_create_topics);
    assert_eq!(config.catalog_group, config.broker_group);
    assert!(loaded.effective.iter().all(|value| value.origin == Origin::Default));
    load::<NameserverKeys>(&Given::default(), &[]).expect("defaults are valid");
}

#[test]
fn later_files_win_then_the_environment_then_flags() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let first = directory.path().join("first.toml");
    let second = directory.path().join("second.toml");
    std::fs::write(&first, "[log]\nsegment_bytes = \"2MiB\"\nprepared_bytes = 0\n").expect("write");
    std::fs::write(&second, "[log]\nsegment_bytes = \"4MiB\"\n[node]\nname = \"n\"\n")
        .expect("write");
    let mut given = Given { files: vec![first, second.clone()], ..Given::default() };
    let segment = |given: &Given| {
        let loaded: Loaded<BrokerKeys> = load(given, &[]).expect("valid");
        let value = loaded.effective.iter().find(|v| v.name == "segment_bytes");
        (loaded.keys.log.segment_bytes.0, value.map(|v| v.origin.clone()))
    };

    assert_eq!(segment(&given), (4 << 20, Some(Origin::File { path: second, line: Some(2) })));

    let variable = "DRUMLIN_LOG_SEGMENT_BYTES".to_owned();
    given.environment = vec![(variable.clone(), "8MiB".into())];
    assert_eq!(segment(&given), (8 << 20, Some(Origin::Variable(variable))));

    let path = "log.segment_bytes".to_owned();
    given.flags = vec![Flag { flag: "--set", path, value: "16MiB".into() }];
    assert_eq!(segment(&given), (16 << 20, Some(Origin::Flag("--set"))));
}

#[test]
fn every_fault_is_told_in_one_run() {
    let faults = broker_from(
        "[log]\nsegment_bytes = \"12 parsecs\"\nsegmentbytes = 5\n\
         [disk]\nwarn_percent = 95\n[http]\nbind = \"0.0.0.0:8082\"\n",
    )
    .expect_err("four faults");
    let told = told(faults);
    assert_eq!(told.len(), 4, "{told:#?}");
    assert!(told[0].contains("did you mean log.segment_bytes?"), "{told:#?}");
    assert!(told[1].starts_with("log.segment_bytes \"parsecs\" is no unit"), "{told:#?}");
    assert!(told[2].starts_with("http.bind is 0.0.0.0:8082, not a loopback"), "{told:#?}");
    assert!(told[3].starts_with("disk.warn_percent is 95, more than"), "{told:#?}");
}

#[test]
fn a_fault_names_file_and_line() {
    let fault = only_fault("[node]\n\n# a comment\nnam = \"x\"\n");
    assert!(matches!(&fault.origin, Origin::File { line: Some(4), .. }), "{fault:?}");
    assert_eq!(fault.message, "is no key; did you mean node.name?");
}

#[test]
fn a_file_that_is_no_toml_is_told_with_its_place() {
    let fault = only_fault("[node]\nname = \n");
    assert!(fault.message.starts_with("is no TOML"), "{fault:?}");
    assert!(fault.message.contains("line 2"), "{fault:?}");
}

#[test]
fn a_missing_file_is_a_fault() {
    let given = Given { files: vec!["/nonexistent/broker.toml".into()], ..Given::default() };
    let Faults(faults) = load::<BrokerKeys>(&given, &[]).expect_err("no such file");
    assert!(faults[0].message.starts_with("cannot be read"), "{faults:?}");
}

#[test]
fn a_section_written_as_a_key_is_refused() {
    assert_eq!(only_fault("log = 5\n").message, "is a section, not a key");
}

#[test]
fn a_variable_with_our_prefix_must_name_a_key() {
    let faults = broker_with(&[("DRUMLIN_LOG_SEGMENTS_BYTES", "1"), ("PATH", "/bin")])
        .expect_err("no such key");
    assert_eq!(told(faults), [" names no key; did you mean DRUMLIN_LOG_SEGMENT_BYTES?"]);
    broker_with(&[("DRUMLIN_ENDPOINT", "localhost:1")]).expect("the CLI's own variable");
}

#[test]
fn a_variable_of_the_other_role_is_allowed_where_both_run() {
    let environment = vec![("DRUMLIN_ROUTES_MODE".to_owned(), "via-endpoint".to_owned())];
    let given = Given { environment, ..Given::default() };
    load::<BrokerKeys>(&given, &[]).expect_err("no key of a broker");
    load::<BrokerKeys>(&given, NameserverKeys::TABLES).expect("a key of the nameserver");
    let loaded: Loaded<NameserverKeys> = load(&given, BrokerKeys::TABLES).expect("valid");
    assert_eq!(loaded.keys.routes.mode, drumlin_nameserver::RouteMode::ViaEndpoint);
}

#[test]
fn lists_come_from_files_and_from_variables() {
    let expected = ["a:9876", "b:9886"];
    let from_file = broker_from("[nameservers]\naddresses = [\"a:9876\", \"b:9886\"]\n");
    assert_eq!(from_file.expect("valid").keys.config().nameservers, expected);
    let from_variable = broker_with(&[("DRUMLIN_NAMESERVERS_ADDRESSES", "a:9876, b:9886")]);
    assert_eq!(from_variable.expect("valid").keys.config().nameservers, expected);
}

#[test]
fn bare_numbers_are_in_the_unit_of_their_key() {
    let keys = broker_from("[retention]\nretention_hours = 5\n[raft]\nheartbeat_interval = 70\n")
        .expect("valid")
        .keys;
    assert_eq!(keys.retention.retention_hours, Duration::from_hours(5));
    assert_eq!(keys.raft.heartbeat_interval, Duration::from_millis(70));
}

#[test]
fn sizes_and_durations_take_units() {
    let size = |text| value::Bytes::parse_text(text).map(|bytes| bytes.0);
    assert_eq!(size("64MiB"), Ok(64 << 20));
    assert_eq!(size("1_000 kB"), Ok(1_000_000));
    assert_eq!(size("7"), Ok(7));
    assert!(size("-1").is_err());
    assert!(size("1.5GiB").is_err());
    assert!(size("99999999999TiB").is_err());
    let duration = |text| value::parse_duration(text, "s");
    assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
    assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
    assert_eq!(duration("7d"), Ok(Duration::from_hours(168)));
    assert!(duration("10 fortnights").is_err());
}

#[test]
fn a_value_outside_of_its_limits_is_refused() {
    let fault = only_fault("[log]\nsegment_bytes = \"4KiB\"\nprepared_bytes = 0\n");
    assert_eq!(fault.message, "is \"4KiB\", less than the 1MiB that it must be at least");
    let fault = only_fault("[disk]\nwarn_percent = 85\nrefuse_percent = 101\n");
    assert_eq!(fault.message, "is 101, more than the 100 that it may be at most");
}

#[test]
fn an_open_address_needs_permission_and_is_warned_of() {
    let open = "[listeners.external]\nbind = \"0.0.0.0:8081\"\nadvertised = \"host:8081\"\n";
    assert!(only_fault(open).message.contains("needs listeners.allow_insecure = true"));
    let allowed = format!("{open}[listeners]\nallow_insecure = true\n");
    let loaded = broker_from(&allowed).expect("allowed");
    assert_eq!(loaded.warnings.len(), 1);
    let advertised = loaded.keys.config().listeners[0].advertised.clone();
    assert_eq!(advertised, Some(("host".to_owned(), 8081)));
}

#[test]
fn an_address_that_nobody_can_dial_is_not_advertised() {
    let allow = "[listeners]\nallow_insecure = true\n[listeners.external]\n";
    let fault = only_fault(&format!("{allow}bind = \"0.0.0.0:8081\"\n"));
    assert!(fault.message.contains("set listeners.external.advertised too"), "{fault:?}");
    let fault =
        only_fault(&format!("{allow}bind = \"0.0.0.0:8081\"\nadvertised = \"0.0.0.0:8081\"\n"));
    assert_eq!(fault.path, "listeners.external.advertised");
}

#[test]
fn two_listeners_on_one_port_clash() {
    let fault = only_fault("[listeners.internal]\nbind = \"127.0.0.1:8081\"\n");
    assert_eq!(fault.message, "is 127.0.0.1:8081, which clashes with listeners.external.bind");
}

#[test]
fn raft_times_must_fit_each_other() {
    let fault = only_fault("[raft]\nelection_timeout_min = \"1s\"\n");
    assert_eq!(fault.path, "raft.election_timeout_min");
    let fault = only_fault("[raft]\nheartbeat_interval = \"300ms\"\n");
    assert_eq!(fault.path, "raft.heartbeat_interval");
}

fn all_keys<K: Keys>() -> impl Iterator<Item = &'static Key> {
    K::TABLES.iter().flat_map(|table| table.keys)
}

#[test]
fn names_in_the_environment_are_unique() {
    for mut names in [
        all_keys::<BrokerKeys>().map(Key::variable).collect::<Vec<_>>(),
        all_keys::<NameserverKeys>().map(Key::variable).collect::<Vec<_>>(),
    ] {
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}

/// `BLESS_CONF=1 cargo test` writes them anew.
#[test]
fn the_committed_files_are_those_of_the_tables() {
    let conf = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf");
    for (name, text) in [
        ("broker.toml", document::<BrokerKeys>("broker")),
        ("nameserver.toml", document::<NameserverKeys>("nameserver")),
    ] {
        let path = conf.join(name);
        if std::env::var_os("BLESS_CONF").is_some() {
            std::fs::write(&path, &text).expect("conf/ is writable");
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == text, "{} is outdated: run with BLESS_CONF=1", path.display());
    }
}

#[test]
fn the_generated_files_hold_the_defaults() {
    let uncommented: String = document::<BrokerKeys>("broker")
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.contains(" = ") && !rest.contains("--set") => rest.to_owned(),
            _ => line.to_owned(),
        })
        .map(|line| line + "\n")
        .collect();
    let loaded = broker_from(&uncommented).expect("defaults are valid");
    let defaults: Loaded<BrokerKeys> = load(&Given::default(), &[]).expect("valid");
    for (written, default) in loaded.effective.iter().zip(&defaults.effective) {
        assert!(matches!(written.origin, Origin::File { line: Some(_), .. }), "{written:?}");
        assert_eq!(written.shown, default.shown);
    }
}

#[test]
fn what_is_in_force_can_be_read_back() {
    let loaded = broker_from("[log]\nsegment_bytes = 123457536\n").expect("valid");
    let again = broker_from(&effective(&loaded)).expect("valid");
    for (first, second) in loaded.effective.iter().zip(&again.effective) {
        assert_eq!(first.shown, second.shown, "{}.{}", first.section, first.name);
    }
}
