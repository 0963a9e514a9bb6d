//! The rules of the gate hold within small bounds, and each of them is needed.

use gate_model::Model;
use gate_model::properties;
use gate_model::rules::{Bounds, Without};
use stateright::{Checker, HasDiscoveries, Model as _};

const BOUNDS: Bounds = Bounds { terms: 2, messages: 1, crashes: 1, gates: 2, replacement: false };

/// Visits every state within the bounds.
fn holds(bounds: Bounds) {
    let model = Model { bounds, without: Without::Nothing };
    let checked = model.checker().threads(2).spawn_bfs().join();
    checked.assert_properties();
}

/// Stops at the first counterexample.
fn fails(without: Without, property: &'static str) {
    let model = Model { bounds: Bounds { messages: 0, ..BOUNDS }, without };
    let checker = model.checker().finish_when(HasDiscoveries::AnyOf([property].into()));
    let checked = checker.spawn_bfs().join();
    let path = checked.discovery(property);
    assert!(path.is_some(), "{without:?} is left out, and nobody notices");
}

#[test]
fn rules_hold_over_two_terms() {
    holds(BOUNDS);
}

#[test]
fn rules_hold_while_a_data_node_is_replaced() {
    holds(Bounds { messages: 0, crashes: 0, gates: 1, replacement: true, ..BOUNDS });
}

#[test]
fn paired_group_needs_the_leaders_own_synced_end() {
    fails(Without::OwnEndWhilePaired, properties::SURVIVED);
}

#[test]
fn gate_opens_only_when_alone_is_synced() {
    fails(Without::AloneSynced, properties::SURVIVED);
}

#[test]
fn closing_waits_for_the_leaders_own_term() {
    fails(Without::OwnTermBeforePaired, properties::SURVIVED);
}

#[test]
fn candidate_needs_a_synced_log() {
    fails(Without::CandidateSynced, properties::SURVIVED);
}
