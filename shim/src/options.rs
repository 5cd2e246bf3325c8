//! Runtime options: what containerd's table of a runtime, Docker's, or `ctr --runtime-config-path` says.
//!
//! They come on standard input of `start`: bare, or from containerd 2.3 on in an extension of the bootstrap
//! message. A sandbox's are those of its first start; containers that join it have no say.

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use prost::Message as _;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;

/// How containerd names the message, with whatever comes before it. Others are another runtime's.
const TYPE: &str = "runtimeoptions.v1.Options";

/// `runtimeoptions.v1.Options`.
#[derive(Clone, PartialEq, prost::Message)]
struct Options {
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(string, tag = "3")]
    config_body: String,
}

/// Returns the path of the settings that the options name, if there are options in `input`, a bare message.
pub fn of_input(input: &[u8]) -> anyhow::Result<Option<String>> {
    // What is no message, or one of another kind, says nothing to Husk.
    Any::parse_from_bytes(input).map_or(Ok(None), |options| configuration(&options))
}

/// Returns the path of the settings that a bootstrap message's options name.
pub fn of_bootstrap(params: &BootstrapParams) -> anyhow::Result<Option<String>> {
    for extension in &params.extensions {
        if let Some(path) = extension.value.as_ref().map(configuration).transpose()?.flatten() {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

fn configuration(options: &Any) -> anyhow::Result<Option<String>> {
    if !options.type_url.ends_with(TYPE) {
        return Ok(None);
    }
    let Options { config_path, config_body } =
        Options::decode(options.value.as_slice()).context("the runtime's options")?;
    if !config_body.trim().is_empty() && config_path.is_empty() {
        bail!(
            "cannot take settings from the runtime's options themselves: write them to a husk.toml, and \
             name it there by ConfigPath"
        );
    }
    ensure!(
        config_path.is_empty() || config_path.starts_with('/'),
        "cannot use ConfigPath {config_path:?} of the runtime's options: name an absolute path"
    );
    Ok(Some(config_path).filter(|path| !path.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;

    fn any(kind: &str, config_path: &str, config_body: &str) -> Any {
        let (config_path, config_body) = (config_path.to_owned(), config_body.to_owned());
        let value = Options { config_path, config_body }.encode_to_vec();
        Any { type_url: kind.to_owned(), value, ..Any::default() }
    }

    fn of(any: &Any) -> anyhow::Result<Option<String>> {
        of_input(&any.write_to_bytes().unwrap())
    }

    #[test]
    fn options_name_the_settings() {
        let large = Some("/etc/husk/large.toml".to_owned());
        for kind in [TYPE, "types.googleapis.com/runtimeoptions.v1.Options"] {
            assert_eq!(of(&any(kind, "/etc/husk/large.toml", "")).unwrap(), large);
        }
        let mut params = BootstrapParams::default();
        for value in [any("other", "/x", ""), any(TYPE, "/etc/husk/large.toml", "a = 1")] {
            params.extensions.push(Extension { value: Some(value).into(), ..Extension::default() });
        }
        assert_eq!(of_bootstrap(&params).unwrap(), large);
        assert_eq!(of(&any(TYPE, "", "\n")).unwrap(), None);
        assert_eq!(of(&any("containerd.runc.v1.Options", "/x", "")).unwrap(), None);
        assert_eq!(of_input(b"").unwrap(), None);
        assert_eq!(of_input(b"rubbish").unwrap(), None);
        assert_eq!(of_bootstrap(&BootstrapParams::default()).unwrap(), None);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let body = of(&any(TYPE, "", "SystemdCgroup = true")).unwrap_err();
        assert!(body.to_string().contains("ConfigPath"), "{body}");
        let relative = of(&any(TYPE, "large.toml", "")).unwrap_err();
        assert!(relative.to_string().contains("\"large.toml\""), "{relative}");
        let broken = Any { type_url: TYPE.to_owned(), value: vec![0xff], ..Any::default() };
        assert!(of(&broken).is_err());
    }
}
