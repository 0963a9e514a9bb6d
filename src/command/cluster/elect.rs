//! `drumlin cluster elect --unsafe`: says what is given up, asks, and makes a stopped node a group.

use clap::Args;
use drumlin_broker::replica::elect::{Candidate, ElectError, Other};
use serde_json::json;

use crate::cli::{Global, Shape};
use crate::command::server::ConfigArgs;
use crate::command::topic;
use crate::config::{BrokerKeys, Loaded};
use crate::failure::{Failure, Kind, chain};
use crate::output;

#[derive(Debug, Args)]
pub(super) struct Elect {
    /// Groups elect by themselves whenever that is safe
    #[arg(long = "unsafe", required = true)]
    accepts_loss: bool,
    /// Of the stopped broker
    #[command(flatten)]
    config: ConfigArgs,
}

impl Elect {
    pub(super) fn run(&self, global: &Global) -> Result<(), Failure> {
        if self.config.answer_example::<BrokerKeys>("broker")? {
            return Ok(());
        }
        let loaded: Loaded<BrokerKeys> = self.config.load()?;
        // Whoever only wants to look at the configuration must not have elected anything.
        if self.config.answer(&loaded, global)? {
            return Ok(());
        }
        let config = loaded.keys.config();
        let (node, group) = (config.node.clone(), config.broker_group.to_string());
        crate::command::runtime()?.block_on(async {
            let candidate = Candidate::of(&config).await.map_err(|error| failure(&error))?;
            for line in given_up(&node, &group, &candidate) {
                anstream::eprintln!("{line}");
            }
            topic::confirm(global, &format!("make {node} broker group {group} by itself"))?;
            let lacking = candidate.lacking_count();
            let own_end = candidate.own_end();
            let uuid = candidate.elect().await.map_err(|error| failure(&error))?;
            if matches!(global.output, Shape::Json | Shape::Jsonl) {
                output::print_document(
                    "drumlin/cluster.elect/v1",
                    json!({
                        "node": node,
                        "broker_group": group,
                        "group_uuid": uuid.to_string(),
                        "lacking_entries": lacking,
                        "first_index_of_its_own": own_end,
                    }),
                )?;
            } else if !global.quiet {
                anstream::eprintln!("{node} is broker group {group}, {uuid}: start it now");
            }
            Ok(())
        })
    }
}

fn given_up(node: &str, group: &str, candidate: &Candidate) -> Vec<String> {
    let own = candidate.last.map_or_else(|| "nothing".to_owned(), |last| format!("entry {last}"));
    let mut lines = vec![format!("{node} holds broker group {group} up to {own}.")];
    lines.extend(candidate.others.iter().map(said));
    lines.push(match (candidate.lacking_count(), candidate.alone) {
        (Some(0), _) => "Nobody that answers has an entry that it lacks.".to_owned(),
        (Some(count), _) => format!(
            "GIVEN UP: {count} entries that others have and it lacks, acknowledged messages among \
             them perhaps."
        ),
        (None, true) => {
            "GIVEN UP: whatever was acknowledged since its leader went on alone; nobody \
                         answers who could say how much."
                .to_owned()
        }
        (None, false) => {
            "GIVEN UP: whatever was acknowledged without it; nobody answers who could \
                          say whether there is any, its own log knows of none."
                .to_owned()
        }
    });
    let own_end = candidate.own_end();
    lines.push(format!(
        "The other members will be refused. They come back with an empty data directory and \
         `drumlin cluster add`, the witness with `drumlin cluster replace-witness`. What only they \
         have is shown by `drumlin log orphans DIR --from-index {own_end}` in what was their data \
         directory: keep it aside."
    ));
    lines
}

fn said(other: &Other) -> String {
    let Other { name, address, is_witness, said, .. } = other;
    let witness = if *is_witness { "the witness at " } else { "" };
    match said {
        Ok(said) => {
            let last = said.appended_end.saturating_sub(1);
            format!("  {witness}{name} ({address}) is in term {} up to entry {last}.", said.term)
        }
        Err(why) => format!("  {witness}{name} ({address}) does not say: {why}."),
    }
}

fn failure(error: &ElectError) -> Failure {
    let kind = match error {
        ElectError::Empty
        | ElectError::AloneAlready
        | ElectError::NoVoter
        | ElectError::Led { .. }
        | ElectError::Heard { .. } => Kind::Precondition,
        ElectError::DataDir(_)
        | ElectError::Checkpoint(_)
        | ElectError::Restore(_)
        | ElectError::Io(_)
        | ElectError::Membership(_)
        | ElectError::Log(_) => Kind::Failed,
    };
    Failure::new(kind, format!("no election: {}", chain(error)))
}
