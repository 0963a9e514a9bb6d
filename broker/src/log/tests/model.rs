//! Random work with power losses anywhere, compared with a `Vec`.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::super::faulty::{Fault, Keep};
use super::driver::Driver;

#[derive(Clone, Debug)]
enum Action {
    Append { count: u64, bytes: usize },
    Step,
    Cut { count: usize },
    Vote,
    Checkpoint,
    Trim,
    Reopen,
    Crash { after: u64, keep: Keep, during_start: Option<u64> },
    Kill { after: u64 },
}

fn action() -> impl Strategy<Value = Action> {
    let keep = prop_oneof![
        1 => Just(Keep::Nothing),
        1 => Just(Keep::Everything),
        4 => any::<u64>().prop_map(Keep::Some),
    ];
    let bytes = prop_oneof![
        3 => 0usize..200,
        2 => 200usize..3_000,
        1 => 3_000usize..20_000,
    ];
    prop_oneof![
        8 => (1u64..5, bytes).prop_map(|(count, bytes)| Action::Append { count, bytes }),
        4 => Just(Action::Step),
        2 => (1usize..12).prop_map(|count| Action::Cut { count }),
        1 => Just(Action::Vote),
        1 => Just(Action::Checkpoint),
        1 => Just(Action::Trim),
        1 => Just(Action::Reopen),
        3 => (0u64..30, keep, proptest::option::of(0u64..12)).prop_map(
            |(after, keep, during_start)| Action::Crash { after, keep, during_start }
        ),
        2 => (0u64..30).prop_map(|after| Action::Kill { after }),
    ]
}

fn run(actions: Vec<Action>) {
    let mut driver = Driver::new();
    for action in actions {
        match action {
            Action::Append { count, bytes } => driver.append(count, bytes),
            Action::Step => assert!(driver.step()),
            Action::Cut { count } => driver.cut(count),
            Action::Vote => driver.vote(),
            Action::Checkpoint => driver.checkpoint(),
            Action::Trim => driver.trim(),
            Action::Reopen => driver = driver.reopen(),
            Action::Crash { after, keep, during_start } => {
                driver.disk.fail_at(after + 1, Fault::PowerLoss);
                assert!(driver.step() || !driver.disk.is_powered());
                driver = driver.crash(keep, during_start);
            }
            Action::Kill { after } => {
                driver.disk.fail_at(after + 1, Fault::PowerLoss);
                assert!(driver.step() || !driver.disk.is_powered());
                driver = driver.kill();
            }
        }
        driver.check();
    }
}

#[test]
fn the_log_is_what_was_appended_over_any_power_loss() {
    let long = std::env::var_os("DRUMLIN_LONG").is_some();
    let config = ProptestConfig {
        cases: if long { 20_000 } else { 150 },
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let actions = proptest::collection::vec(action(), 1..60);
    runner
        .run(&actions, |actions| {
            run(actions);
            Ok(())
        })
        .unwrap();
}
