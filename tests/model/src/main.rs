//! Explores what it is told, for the long tier and by hand:
//! `gate-model [--without RULE] [--terms N] [--messages N] [--crashes N] [--gates N]
//! [--replacement] [--threads N] [--depth-first]`. Fails if a property does not hold.

use std::process::ExitCode;
use std::time::Instant;

use gate_model::Model;
use gate_model::rules::{Bounds, Without};
use stateright::{Checker, Expectation, Model as _};

fn number(arguments: &[String], key: &str, default: u8) -> Result<u8, String> {
    let at = arguments.iter().position(|argument| argument == key);
    let Some(at) = at else { return Ok(default) };
    let value = arguments.get(at + 1).ok_or(format!("{key} needs a number"))?;
    value.parse().map_err(|_| format!("{key} {value} is no small number"))
}

fn model(arguments: &[String]) -> Result<Model, String> {
    let at = arguments.iter().position(|argument| argument == "--without");
    let without = match at.map(|at| arguments.get(at + 1).map(String::as_str)) {
        None => Without::Nothing,
        Some(Some("own-end-while-paired")) => Without::OwnEndWhilePaired,
        Some(Some("alone-synced")) => Without::AloneSynced,
        Some(Some("own-term-before-paired")) => Without::OwnTermBeforePaired,
        Some(Some("candidate-synced")) => Without::CandidateSynced,
        Some(other) => return Err(format!("there is no rule {}", other.unwrap_or("without name"))),
    };
    let bounds = Bounds {
        terms: number(arguments, "--terms", 2)?,
        messages: number(arguments, "--messages", 1)?,
        crashes: number(arguments, "--crashes", 1)?,
        gates: number(arguments, "--gates", 2)?,
        replacement: arguments.iter().any(|argument| argument == "--replacement"),
    };
    Ok(Model { bounds, without })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (model, threads) = match (model(&arguments), number(&arguments, "--threads", 2)) {
        (Ok(model), Ok(threads)) => (model, threads),
        (Err(error), _) | (_, Err(error)) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let began = Instant::now();
    let builder = model.checker().threads(usize::from(threads));
    if arguments.iter().any(|argument| argument == "--depth-first") {
        report(&model, &builder.spawn_dfs().join(), began)
    } else {
        report(&model, &builder.spawn_bfs().join(), began)
    }
}

fn report(model: &Model, checked: &impl Checker<Model>, began: Instant) -> ExitCode {
    let (unique, depth) = (checked.unique_state_count(), checked.max_depth());
    println!("{model:?}: {unique} states, depth {depth}, {} s", began.elapsed().as_secs());
    let found = checked.discoveries();
    let mut holds = true;
    for property in model.properties() {
        match (property.expectation, found.get(property.name)) {
            (Expectation::Always, Some(path)) => {
                holds = false;
                let path = path.clone().into_vec();
                println!("fails after {} steps: {}", path.len() - 1, property.name);
                for (state, step) in path {
                    println!("  {state:?}");
                    if let Some(step) = step {
                        println!("{step:?}");
                    }
                }
            }
            (Expectation::Always, None) => println!("holds: {}", property.name),
            (_, Some(_)) => println!("reached: {}", property.name),
            (_, None) => {
                holds = false;
                println!("never reached: {}", property.name);
            }
        }
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
