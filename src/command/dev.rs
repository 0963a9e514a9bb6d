//! `drumlin dev`: nameserver and broker in one process on loopback, or with `--cluster` a whole set
//! of processes.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use drumlin_broker::broker::Broker;
use drumlin_nameserver::Nameserver;
use serde_json::json;

use super::broker::Run;
use super::server;
use crate::cli::{Global, Shape};
use crate::config::{self, BrokerKeys, Given, Keys, Loaded, NameserverKeys};
use crate::failure::{Failure, Kind};
use crate::{logging, output};

mod children;
mod plan;

#[derive(Debug, Args)]
pub(crate) struct Dev {
    /// Two nameservers and two broker groups of two nodes, each a process of its own. Of every
    /// port, the next node has it 10 higher; HTTP of a nameserver is one above its port
    #[arg(long)]
    cluster: bool,
    /// Where everything is kept
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 9876)]
    nameserver_port: u16,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 8081)]
    broker_port: u16,
    /// 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 8082)]
    http_port: u16,
    /// Between brokers of a cluster; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 10912, requires = "cluster")]
    peer_port: u16,
    /// One key of the broker or the nameserver
    #[arg(long, value_name = "SECTION.KEY=VALUE", value_parser = server::setting)]
    set: Vec<(String, String)>,
}

/// Where the two can be reached.
struct Bound {
    nameserver: SocketAddr,
    broker: SocketAddr,
    http: SocketAddr,
}

impl Dev {
    pub(crate) fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.cluster {
            return self.run_cluster(global);
        }
        let nameserver: Loaded<NameserverKeys> =
            config::load(&self.given(self.nameserver_preset()), BrokerKeys::TABLES)?;
        let broker: Loaded<BrokerKeys> =
            config::load(&self.given(self.broker_preset()), NameserverKeys::TABLES)?;
        logging::start(global, &broker.keys.node.name, "info,openraft=error")?;
        server::log_start("nameserver", &nameserver);
        server::log_start("broker", &broker);
        super::runtime()?.block_on(self.serve(&nameserver.keys, &broker.keys, global))
    }

    fn run_cluster(&self, global: &Global) -> Result<(), Failure> {
        let ports = plan::BasePorts {
            nameserver: self.nameserver_port,
            broker: self.broker_port,
            http: self.http_port,
            peer: self.peer_port,
        };
        let nodes = plan::two_groups(&ports)?;
        for node in &nodes {
            node.write_configuration(&self.data_dir, &self.set)?;
        }
        logging::start(global, "dev", "info")?;
        super::runtime()?.block_on(children::run(&self.data_dir, nodes, global))
    }

    /// Keys of the other role are none of this one's, so both may be set.
    fn given(&self, preset: String) -> Given {
        Given {
            preset: Some(("drumlin dev", preset)),
            files: Vec::new(),
            environment: server::environment(),
            flags: server::flags(&self.set),
        }
    }

    fn nameserver_preset(&self) -> String {
        let data_dir = self.data_dir.join("nameserver").display().to_string();
        format!(
            "[node]\ndata_dir = {data_dir:?}\n\
             [listeners.external]\nbind = \"127.0.0.1:{}\"\n\
             [http]\nbind = \"off\"\n\
             [routes]\nauto_create = true\n",
            self.nameserver_port
        )
    }

    fn broker_preset(&self) -> String {
        let data_dir = self.data_dir.join("broker").display().to_string();
        format!(
            "[node]\ndata_dir = {data_dir:?}\n\
             [listeners.external]\nbind = \"127.0.0.1:{}\"\n\
             [http]\nbind = \"127.0.0.1:{}\"\n\
             [topics]\nauto_create = true\n\
             [log]\nsegment_bytes = \"64MiB\"\n",
            self.broker_port, self.http_port
        )
    }

    async fn serve(
        &self,
        nameserver: &NameserverKeys,
        broker: &BrokerKeys,
        global: &Global,
    ) -> Result<(), Failure> {
        let nameserver = Nameserver::start(nameserver.config())
            .await
            .map_err(|error| super::nameserver::start_failure(&error))?;
        let nameserver_address = first(&nameserver.addresses());
        let mut config = broker.config();
        config.nameservers = vec![nameserver_address.to_string()];
        let broker = match Broker::start(config).await {
            Ok(broker) => broker,
            Err(error) => {
                nameserver.shutdown().await;
                return Err(super::broker::start_failure(&error));
            }
        };
        let bound = Bound {
            nameserver: nameserver_address,
            broker: first(&broker.addresses()),
            http: broker.http_address().unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0))),
        };
        tracing::info!(
            nameserver = %bound.nameserver,
            broker = %bound.broker,
            http = %bound.http,
            data_dir = %self.data_dir.display(),
            "started"
        );
        self.announce(&bound, global)?;
        let ended = super::broker::run_until_stopped(&broker).await;
        broker.shutdown().await;
        nameserver.shutdown().await;
        tracing::info!("stopped");
        match ended? {
            Run::Stopped => Ok(()),
            Run::Restart => Err(Failure::new(Kind::Failed, "the broker must be started again")),
        }
    }

    fn announce(&self, bound: &Bound, global: &Global) -> std::io::Result<()> {
        match global.output {
            Shape::Json | Shape::Jsonl => output::print_document(
                "drumlin/dev/v1",
                json!({
                    "nameserver": bound.nameserver.to_string(),
                    "broker": bound.broker.to_string(),
                    "http": bound.http.to_string(),
                    "data_dir": self.data_dir.display().to_string(),
                    "pid": std::process::id(),
                    "version": env!("CARGO_PKG_VERSION"),
                }),
            ),
            Shape::Table | Shape::Wide | Shape::Csv | Shape::Name => {
                let mut out = std::io::stdout().lock();
                out.write_all(self.banner(bound).as_bytes())?;
                out.flush()
            }
        }
    }

    /// What to paste next.
    fn banner(&self, bound: &Bound) -> String {
        let Bound { nameserver, broker, http } = bound;
        // Where the CLI looks by itself.
        let endpoint = match broker.port() {
            8081 => String::new(),
            port => format!(" -e localhost:{port}"),
        };
        format!(
            "Drumlin {version} is ready; data in {data_dir}\n\n\
             \x20 clients     localhost:{broker}   or through the nameserver, localhost:{nameserver}\n\
             \x20 health      http://localhost:{http}/readyz\n\
             \x20 metrics     http://localhost:{http}/metrics\n\n\
             Topics are created on first use. Try, in another terminal:\n\n\
             \x20 echo hello | drumlin{endpoint} produce greetings\n\
             \x20 drumlin{endpoint} consume greetings --from earliest --exit-at-end\n\n\
             Or with Python, after pip install rocketmq-python-client:\n\n\
             \x20 from rocketmq import ClientConfiguration, Credentials, Message, Producer\n\
             \x20 config = ClientConfiguration(\"localhost:{broker}\", Credentials())\n\
             \x20 producer = Producer(config, (\"greetings\",))\n\
             \x20 producer.startup()\n\
             \x20 message = Message()\n\
             \x20 message.topic, message.body = \"greetings\", b\"hello\"\n\
             \x20 print(producer.send(message).message_id)\n\
             \x20 producer.shutdown()\n\n\
             Ctrl-C stops it.\n",
            version = env!("CARGO_PKG_VERSION"),
            data_dir = self.data_dir.display(),
            broker = broker.port(),
            nameserver = nameserver.port(),
            http = http.port(),
        )
    }
}

/// Both have the listener that their configuration names, so there is a first.
fn first(addresses: &[SocketAddr]) -> SocketAddr {
    *addresses.first().expect("every configuration has the listener `external`")
}
