//! `drumlin consume`: prints messages, from anywhere or as a member of a consumer group.

use clap::Args;

use crate::cli::Global;
use crate::failure::{Failure, Kind};
use crate::format::Format;
use crate::moment::Start;

#[derive(Debug, Args)]
pub(crate) struct Consume {
    topic: String,
    /// Receive as a member of this consumer group, and acknowledge what was printed
    #[arg(long, conflicts_with = "from")]
    group: Option<String>,
    /// earliest, latest, a time, or an offset in every queue [default: latest, with
    /// --exit-at-end earliest]
    #[arg(long, value_name = "WHERE", allow_hyphen_values = true)]
    from: Option<Start>,
    /// Exit after so many messages
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
    /// Exit where the topic ended when the command began
    #[arg(long)]
    exit_at_end: bool,
    /// Only messages with this tag: `a`, `a||b` or `*`
    #[arg(long, default_value = "*")]
    tag: String,
    /// kcat's tokens: %s body, %k key, %t topic, %p queue id, %o offset, %T time, %h properties,
    /// %S %K %R lengths; and %q queue, %i message id, %g tag
    #[arg(long, default_value = "%s\\n")]
    format: Format,
    /// JSON lines with everything
    #[arg(short = 'J', conflicts_with = "format")]
    json: bool,
}

impl Consume {
    pub(crate) fn run(&self, _global: &Global) -> Result<(), Failure> {
        Err(Failure::new(Kind::NotSupported, "not supported yet"))
    }
}
