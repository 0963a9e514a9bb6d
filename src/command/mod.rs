//! The commands, one file each.

use crate::cli::{Cli, Command};
use crate::failure::{Failure, Kind};

mod access;
pub(crate) mod bench;
pub(crate) mod broker;
pub(crate) mod cluster;
pub(crate) mod completion;
pub(crate) mod consume;
pub(crate) mod dev;
pub(crate) mod health;
pub(crate) mod log;
pub(crate) mod msg;
pub(crate) mod nameserver;
pub(crate) mod produce;
mod server;
pub(crate) mod topic;

pub(crate) fn run(cli: Cli) -> Result<(), Failure> {
    let global = cli.global.with(cli.short.as_ref());
    match cli.command {
        Command::Dev(dev) => dev.run(&global),
        Command::Broker(broker) => broker.run(&global),
        Command::Nameserver(nameserver) => nameserver.run(&global),
        Command::Health(health) => health.run(&global),
        Command::Topic(topic) => topic.run(&global),
        Command::Cluster(cluster) => cluster.run(&global),
        Command::Produce(produce) => produce.run(&global),
        Command::Consume(consume) => consume.run(&global),
        Command::Msg(msg) => msg.run(&global),
        Command::Log(log) => log.run(&global),
        Command::Bench(bench) => bench.run(&global),
        Command::Completion(completion) => completion.run(),
    }
}

/// The runtime of one command.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Kind::Failed, format!("cannot start threads: {error}")))
}
