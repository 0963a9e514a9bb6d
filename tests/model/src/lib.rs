//! A model of the witness gate (ARCHITECTURE.md): every order of steps of a small group, within
//! bounds. The rules are restated here, apart from the broker's code.

use stateright::Property;

pub mod group;
pub mod log;
pub mod properties;
pub mod rules;

use group::{Group, Step};
use rules::{Bounds, Without};

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub bounds: Bounds,
    pub without: Without,
}

impl stateright::Model for Model {
    type State = Group;
    type Action = Step;

    fn init_states(&self) -> Vec<Group> {
        Group::first(self.bounds)
    }

    fn actions(&self, group: &Group, steps: &mut Vec<Step>) {
        steps.extend(group.steps(self.bounds, self.without));
    }

    fn next_state(&self, group: &Group, step: Step) -> Option<Group> {
        let mut next = group.clone();
        next.take(step);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
