//! Generates the messages of the shim's protocols from proto/ with protox: no protoc is needed.

use std::io::Result;

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let files = [
        "ttrpc.proto",
        "task.proto",
        "events.proto",
        "forward.proto",
        "options.proto",
        "metrics_v1.proto",
        "metrics_v2.proto",
        "pod.proto",
    ];
    let set = protox::compile(files, ["proto"]).map_err(std::io::Error::other)?;
    // Ordered maps: smaller in the shim than hashing ones.
    prost_build::Config::new().btree_map(["."]).compile_fds(set)
}
