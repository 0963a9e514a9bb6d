//! The edges: wire to valid values and back. They hold no second copy of what the state knows.

pub mod admin;
pub mod catalog;
pub mod clients;
pub mod cluster;
pub mod creations;
pub mod definitions;
pub mod http;
pub mod native;
pub mod rocketmq;
pub mod routes;
