//! The one binary: servers, and the tools of operators and developers.

use std::process::ExitCode;

use clap::Parser;

mod cli;
mod command;
mod config;
mod failure;
mod format;
mod logging;
mod moment;
mod output;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli.global.color.apply();
    match command::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
