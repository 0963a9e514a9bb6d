//! Which records a consumer wants. Pure: sees a record's tag, knows no groups and no wire types.

pub mod tags;

pub use tags::{InvalidTags, TagFilter};
