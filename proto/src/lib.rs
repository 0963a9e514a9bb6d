//! The contract: RocketMQ's and our own gRPC APIs, names and ids that every crate shares, the record
//! format that the SDK builds and the broker stores unchanged, and how calls are sent on.

pub mod forward;
pub mod ids;
pub mod record;
pub mod route;

/// `apache.rocketmq.v2`, as official RocketMQ 5 clients speak it.
#[allow(missing_debug_implementations, reason = "generated code")]
pub mod rocketmq {
    #![allow(clippy::all, unreachable_pub, reason = "generated code")]
    tonic::include_proto!("apache.rocketmq.v2");
}

/// `drumlin.v1`: the native API, administration, routes and registration.
#[allow(missing_debug_implementations, reason = "generated code")]
pub mod native {
    #![allow(clippy::all, unreachable_pub, reason = "generated code")]
    tonic::include_proto!("drumlin.v1");
}

/// The compiled `FileDescriptorSet` of both packages, encoded.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
