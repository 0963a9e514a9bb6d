//! How a command fails: one shape on stderr, one exit code.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};

/// What went wrong, as scripts tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Failed,
    NotSupported,
    Usage,
    Config,
    TopicNotFound,
    QueueNotFound,
    MessageNotFound,
    GroupNotFound,
    MemberNotFound,
    Connect,
    Timeout,
    NotReady,
    Exists,
    NotConfirmed,
    Precondition,
    Partly,
    Corrupt,
    /// Whoever read our output has seen enough: no fault.
    ClosedPipe,
}

impl Kind {
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::Failed => "E0001",
            Self::NotSupported => "E0002",
            Self::ClosedPipe => "E0000",
            Self::Usage => "E0201",
            Self::Config => "E0202",
            Self::TopicNotFound => "E0301",
            Self::QueueNotFound => "E0302",
            Self::MessageNotFound => "E0303",
            Self::GroupNotFound => "E0304",
            Self::MemberNotFound => "E0305",
            Self::Connect => "E0401",
            Self::Timeout => "E0402",
            Self::NotReady => "E0403",
            Self::Exists => "E0601",
            Self::NotConfirmed => "E0602",
            Self::Precondition => "E0603",
            Self::Partly => "E0701",
            Self::Corrupt => "E0801",
        }
    }

    pub(crate) fn exit(self) -> u8 {
        match self {
            Self::ClosedPipe => 0,
            Self::Failed | Self::NotSupported | Self::NotReady => 1,
            Self::Usage | Self::Config => 2,
            Self::TopicNotFound
            | Self::QueueNotFound
            | Self::MessageNotFound
            | Self::GroupNotFound
            | Self::MemberNotFound => 3,
            Self::Connect | Self::Timeout => 4,
            Self::Exists | Self::NotConfirmed | Self::Precondition => 6,
            Self::Partly => 7,
            Self::Corrupt => 8,
        }
    }
}

/// Why a command did not succeed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    /// One line each, below the message.
    pub(crate) details: Vec<String>,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), details: Vec::new(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn details(mut self, details: impl IntoIterator<Item = impl Display>) -> Self {
        self.details.extend(details.into_iter().map(|detail| detail.to_string()));
        self
    }

    /// Writes it to stderr.
    pub(crate) fn report(&self) -> ExitCode {
        if self.kind != Kind::ClosedPipe {
            let style = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
            let code = self.kind.code();
            anstream::eprintln!("{style}error[{code}]{style:#}: {}", self.message);
            for detail in &self.details {
                anstream::eprintln!("  {detail}");
            }
            if let Some(hint) = &self.hint {
                anstream::eprintln!("  hint: {hint}");
            }
        }
        ExitCode::from(self.kind.exit())
    }
}

/// Of our own output, and of files that the command was told to read.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::new(Kind::ClosedPipe, "the output was closed"),
            _ => Self::new(Kind::Failed, error.to_string()),
        }
    }
}

impl From<crate::config::Faults> for Failure {
    fn from(faults: crate::config::Faults) -> Self {
        Self::new(Kind::Config, faults.to_string()).details(&faults.0)
    }
}

/// An error with all its causes on one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_no_error() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(failure.kind.exit(), 0);
    }

    #[test]
    fn causes_are_told_once() {
        let cause = io::Error::other("no route");
        assert_eq!(chain(&io::Error::other(cause)), "no route");
    }
}
