//! The replicated state as a whole: pure, fed with committed entries.

/// Catalog, queues, groups and clock at one applied index.
#[derive(Clone, Debug, Default)]
pub struct State {}
