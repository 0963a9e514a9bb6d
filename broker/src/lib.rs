//! The broker: a commitlog that is the log of a Raft group, and the queues, groups and edges on it.

pub mod broker;
pub mod catalog;
pub mod command;
pub mod config;
mod copies;
pub mod copies_since;
pub mod data_dir;
pub mod disk;
pub mod entry;
pub mod fault;
mod feature_level;
pub mod filter;
#[cfg(test)]
mod free_ports;
pub mod group;
pub mod item;
pub mod log;
pub mod metrics;
pub mod position;
pub mod queue;
pub mod registration;
pub mod replica;
pub mod retention;
pub mod seed;
pub mod service;
pub mod standing;
mod upkeep;
pub mod whereabouts;
