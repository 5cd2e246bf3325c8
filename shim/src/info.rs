//! `-info`: what the runtime is, for containerd's introspection.

use std::io::{Read, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::features;

/// Prints the message containerd expects; the options it sends are given back.
pub fn print() -> anyhow::Result<()> {
    let mut input = Vec::new();
    std::io::stdin().lock().take(1 << 20).read_to_end(&mut input)?;
    let mut output = std::io::stdout();
    output.write_all(&runtime_info(&input)?.write_to_bytes()?)?;
    output.flush()?;
    Ok(())
}

fn runtime_info(input: &[u8]) -> anyhow::Result<RuntimeInfo> {
    let mut info = RuntimeInfo::new();
    "io.containerd.husk.v2".clone_into(&mut info.name);
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    info.version = Some(version).into();
    info.features = Some(features::message()).into();
    if !input.is_empty() {
        info.options = Some(Any::parse_from_bytes(input)?).into();
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_given_back() {
        let options = Any { type_url: "x".to_owned(), ..Any::default() };
        let info = runtime_info(&options.write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.options.unwrap(), options);
        assert_eq!(info.name, "io.containerd.husk.v2");
        // containerd refuses one without.
        assert!(info.features.unwrap().type_url.ends_with("features/Features"));
        assert!(runtime_info(b"").unwrap().options.is_none());
    }
}
