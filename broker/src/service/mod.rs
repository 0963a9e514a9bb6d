//! TBD
pub mod rocketmq;
