//! Generates the messages and the service from `proto/agent.proto`; needs no protoc.
use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .include("proto")
        .inputs(["proto/agent.proto"])
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("agent.proto compiles");
    // A file, not an inline module: the generated code has inner attributes.
    std::fs::write(format!("{out}/generated.rs"), "pub mod agent;\npub mod agent_ttrpc;\n")
        .expect("OUT_DIR can be written");
}
