//! Compiles the protos without a `protoc` binary (protox) and keeps their descriptors.
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "apache/rocketmq/v2/definition.proto",
        "apache/rocketmq/v2/service.proto",
        "apache/rocketmq/v2/admin.proto",
        "drumlin/v1/broker.proto",
        "drumlin/v1/admin.proto",
        "drumlin/v1/catalog.proto",
        "drumlin/v1/route.proto",
        "drumlin/v1/forward.proto",
        "drumlin/v1/peer.proto",
        "drumlin/v1/cluster.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(
        out.join("descriptors.bin"),
        protox::prost::Message::encode_to_vec(&descriptors),
    )?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
