//! Generates the server side of `proto/agent.proto`.

fn main() -> std::io::Result<()> {
    let proto = "../proto/agent.proto";
    println!("cargo::rerun-if-changed={proto}");
    tonic_prost_build::configure()
        .build_client(true)
        .build_transport(false)
        .compile_protos(&[proto], &["../proto"])
}
