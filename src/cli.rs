//! What can be typed: the tree of commands and the flags that all of them know.

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::command::{
    bench, broker, cluster, completion, consume, dev, health, log, msg, nameserver, produce, topic,
};
use crate::config::parse_duration;
use crate::logging;

/// A replicated commitlog broker that speaks RocketMQ 5.
#[derive(Debug, Parser)]
#[command(name = "drumlin", version, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    /// Before the command; behind it the commands have their own
    #[arg(short = 'n', value_name = "ADDRS", hide = true)]
    pub(crate) short: Option<String>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Nameserver and broker in one process on loopback, for development; or a whole cluster
    Dev(dev::Dev),
    /// Run a broker
    Broker(broker::Broker),
    /// Run a nameserver
    Nameserver(nameserver::Nameserver),
    /// Ask a local node whether it is alive, or ready
    Health(health::Health),
    /// Create, list, describe and delete topics
    Topic(topic::Topic),
    /// Nodes, health and members of the cluster
    Cluster(cluster::Cluster),
    /// Send lines of stdin, or one body
    Produce(produce::Produce),
    /// Print the messages of a topic
    Consume(consume::Consume),
    /// Look up messages
    Msg(msg::Msg),
    /// Inspect the log of a stopped or running node
    Log(log::Log),
    /// Measure
    Bench(bench::Bench),
    /// Print a completion script for a shell
    Completion(completion::Completion),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Access points, brokers or nameservers, tried in turn
    /// [default: localhost:9876,localhost:9886,localhost:8081]
    #[arg(short, long, global = true, env = "DRUMLIN_ENDPOINT", value_name = "ADDRS")]
    pub(crate) endpoint: Option<String>,
    /// The same under RocketMQ's name, used if no endpoint is given; `-n` except in `consume`
    #[arg(long, global = true, env = "NAMESRV_ADDR", value_name = "ADDRS")]
    pub(crate) namesrv: Option<String>,
    #[arg(short, long, global = true, value_enum, default_value_t = Shape::Table)]
    pub(crate) output: Shape,
    /// No header line in tables and CSV
    #[arg(long, global = true)]
    pub(crate) no_headers: bool,
    /// How long to wait for an answer
    #[arg(long, global = true, default_value = "30s", value_parser = seconds)]
    pub(crate) timeout: Duration,
    /// Do not ask before something is lost
    #[arg(short, long, global = true)]
    pub(crate) yes: bool,
    /// No progress and no summaries on stderr
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// More on stderr; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto)]
    pub(crate) color: Color,
    /// Shape of log lines on stderr
    #[arg(long, global = true, value_enum, default_value_t = logging::Shape::Auto)]
    pub(crate) log_format: logging::Shape,
    /// error, warn, info, debug, trace, or `target=level,...`; over RUST_LOG
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
}

/// `-n` of `--namesrv`, which cannot be global because `consume -n` is a count.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct NamesrvShort {
    #[arg(short = 'n', value_name = "ADDRS", hide = true, global = true)]
    pub(crate) short: Option<String>,
}

const ENDPOINTS: &str = "localhost:9876,localhost:9886,localhost:8081";

impl Global {
    /// Access points to try, in turn.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        let given = self.endpoint.as_deref().or(self.namesrv.as_deref()).unwrap_or(ENDPOINTS);
        let trimmed = given.split([',', ';']).map(str::trim);
        trimmed.filter(|endpoint| !endpoint.is_empty()).map(str::to_owned).collect()
    }

    /// What was given as `-n` counts as `--namesrv`, over the environment.
    pub(crate) fn with(mut self, short: Option<&String>) -> Self {
        if let Some(namesrv) = short {
            self.namesrv = Some(namesrv.clone());
        }
        self
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    parse_duration(text, "s")
}

/// Shape of data on stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    Table,
    /// A table with every column
    Wide,
    Json,
    /// One line of JSON per row
    Jsonl,
    Csv,
    /// Names only
    Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

impl Color {
    pub(crate) fn apply(self) {
        let choice = match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::Always,
            Self::Never => anstream::ColorChoice::Never,
        };
        choice.write_global();
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parsed(line: &str) -> Cli {
        Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_command_parses() {
        for line in [
            "drumlin dev",
            "drumlin dev --data-dir d --nameserver-port 0 --broker-port 0 --http-port 0 -o json",
            "drumlin dev --cluster --data-dir d --peer-port 0 --set log.segment_bytes=1MiB",
            "drumlin broker -c a.toml -c b.toml --set log.segment_bytes=1MiB",
            "drumlin nameserver -c a.toml --check-config",
            "drumlin broker --print-config -o json",
            "drumlin health --ready --http 127.0.0.1:1",
            "drumlin topic create t --queues 8 --type fifo",
            "drumlin topic list -o wide",
            "drumlin topic offsets t --at -10m",
            "drumlin topic delete t --yes",
            "drumlin cluster health --wait --timeout 60s -o json",
            "drumlin cluster raft -o wide",
            "drumlin cluster add broker-a broker-a-2@host:10912",
            "drumlin cluster transfer broker-a --to broker-a-1",
            "drumlin cluster replace-witness broker-a --on nameserver-1 --yes",
            "drumlin cluster promote broker-a broker-a-1 --replaces 2",
            "drumlin cluster elect --unsafe -c a.toml --yes",
            "drumlin cluster upgrade broker-a --level 2",
            "drumlin produce t --body x --key k --tag g --property a=b --message-group o",
            "drumlin consume t --group g -n 3 --exit-at-end --tag a||b",
            "drumlin consume t --from -1h -J",
            "drumlin msg get --offset t/broker-a/0:12",
            "drumlin msg get --time t@-10m --body hex",
            "drumlin log verify data --deep",
            "drumlin log dump data --from-index 3 --max 5",
            "drumlin log stat data",
            "drumlin bench produce --size 1KiB --duration 2s --in-flight 64 --producers 2",
            "drumlin bench limits",
            "drumlin completion bash",
            "drumlin -e a:1,b:2 --timeout 3s topic list",
            "drumlin -n a:1;b:2 topic list",
            "drumlin topic list -n a:1;b:2",
        ] {
            parsed(line);
        }
    }

    #[test]
    fn an_endpoint_wins_over_a_nameserver() {
        let cli = parsed("drumlin -n n:1 -e a:1,b:2 topic list");
        let global = cli.global.with(cli.short.as_ref());
        assert_eq!(global.endpoints(), ["a:1", "b:2"]);
        let cli = parsed("drumlin -n n:1;m:2 topic list");
        let mut global = cli.global.with(cli.short.as_ref());
        global.endpoint = None;
        assert_eq!(global.endpoints(), ["n:1", "m:2"]);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for line in [
            "drumlin topic create t --queues 0",
            "drumlin topic create t --queues 8 --type odd",
            "drumlin msg get",
            "drumlin msg get --offset 1 --time t@@5",
            "drumlin broker --check-config --print-config",
            "drumlin produce t --property novalue",
            "drumlin consume t --from someday",
            "drumlin consume t --group g --from earliest",
            "drumlin --timeout 5 parsecs topic list",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
