//! Where is topic T? Brokers register here; clients ask here, and may send everything else here
//! too.
//!
//! `route_table` decides, `directory` gives it a clock and wakes; `registry`, `service`, `routes`
//! and `admin` are the edges over it, `forward` and `telemetry` carry calls on to brokers.

mod admin;
mod clients;
mod cluster;
pub mod config;
mod directory;
mod forward;
mod http;
mod lookup;
mod memory;
mod metrics;
pub mod nameserver;
mod official_admin;
mod registry;
pub mod route_table;
mod routes;
mod service;
mod shared;
mod telemetry;

pub use config::{Config, ListenerConfig, RouteMode};
pub use nameserver::{Nameserver, StartError};
