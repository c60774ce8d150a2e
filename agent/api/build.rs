//! Generates the types, clients and servers of kubelet's own APIs from `proto/`, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    for file in [
        "deviceplugin.proto",
        "podresources.proto",
        "pods.proto",
        "core.proto",
    ] {
        let files = protox::compile([file], ["proto"])?;
        // The other sides are the stand-in kubelet's, in the tests.
        tonic_prost_build::configure()
            .build_client(true)
            .build_server(true)
            .compile_fds(files)?;
    }
    Ok(())
}
