//! `start`: prints where the shim of a sandbox listens, starting it if need be.
//!
//! The listening socket is made here and inherited by the shim, so that the address can be printed
//! at once: containerd's first request waits in the socket's queue while the shim comes up, and the
//! machine boots at the same time.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, bail};
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use husk_configuration::Configuration;
use husk_runtime::spec::sandbox_of;
use protobuf::Message;
use serde::Deserialize;

use crate::address::socket_path;
use crate::arguments::{Flags, StartOptions};
use crate::{daemon, options, records};

/// More than any daemon sends.
const LONGEST_INPUT: u64 = 10 << 20;

/// As much of a bundle's spec as decides about the sandbox.
#[derive(Debug, Default, Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// Prints the address of the shim for the bundle in the working folder.
pub fn start(flags: &Flags) -> anyhow::Result<()> {
    let input = read_input().context("standard input")?;
    let (options, protocol) = options(&input, flags)?;
    let sandbox = sandbox_id(Path::new("config.json"), &options.id)?;
    if sandbox != options.id {
        check(&options, &sandbox)?;
    }
    let address = options.socket_address(&sandbox);
    let path = socket_path(&address);
    // A container of a sandbox that is there already joins its shim.
    if UnixStream::connect(&path).is_err() {
        if sandbox != options.id {
            bail!("the shim of sandbox {sandbox} is gone; remove the sandbox and create it again");
        }
        let listener = listen(&path).with_context(|| format!("socket {}", path.display()))?;
        let started = daemon::spawn(&options, &address, &listener);
        let pid = started.inspect_err(|_| {
            let _ = std::fs::remove_file(&path);
        })?;
        // containerd 1.6 finds the shim by these after a restart of its own.
        std::fs::write("shim.pid", pid.to_string()).context("shim.pid")?;
    }
    std::fs::write("address", &address).context("address")?;
    let mut output = std::io::stdout();
    match protocol {
        Protocol::Plain => output.write_all(address.as_bytes())?,
        Protocol::Bootstrap => {
            let result = BootstrapResult {
                version: TASK_API_VERSION,
                address,
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            output.write_all(&result.write_to_bytes()?)?;
        }
    }
    output.flush()?;
    Ok(())
}

/// How the daemon wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// Before 2.3: the address as text, understood by all of them. (JSON would have 2.0 to 2.2 speak
    /// the newer version of the task API, but 1.7, which cannot, is not to be told from them.)
    Plain,
    /// A message for a message.
    Bootstrap,
}

fn read_input() -> std::io::Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(LONGEST_INPUT).read_to_end(&mut input)?;
    }
    Ok(input)
}

/// The options of the start, from the input if it is a bootstrap message for this very start (older
/// daemons send the runtime's options there, which may happen to look like one), else from the flags.
fn options(input: &[u8], flags: &Flags) -> anyhow::Result<(StartOptions, Protocol)> {
    let params = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
    match params {
        Some(params) => {
            let configuration = options::of_bootstrap(&params)?;
            let mut options = StartOptions { configuration, ..StartOptions::from(params) };
            options.debug |= flags.debug;
            Ok((options, Protocol::Bootstrap))
        }
        None => {
            let options = StartOptions {
                id: flags.id.clone(),
                namespace: flags.namespace.clone(),
                address: flags.address.clone(),
                publish_binary: flags.publish_binary.clone(),
                ttrpc_address: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
                debug: flags.debug,
                configuration: options::of_input(input)?,
                ..StartOptions::default()
            };
            Ok((options, Protocol::Plain))
        }
    }
}

/// The sandbox a bundle belongs to: its own, unless an annotation names another.
fn sandbox_id(config: &Path, id: &str) -> anyhow::Result<String> {
    let annotated: Annotated = match std::fs::read(config) {
        Ok(text) => serde_json::from_slice(&text).context("the bundle's config.json")?,
        Err(error) if error.kind() == ErrorKind::NotFound => Annotated::default(),
        Err(error) => return Err(error).context("the bundle's config.json"),
    };
    Ok(sandbox_of(&annotated.annotations).unwrap_or(id).to_owned())
}

/// Returns an error unless the container may join `sandbox`, which an annotation of its own names.
fn check(options: &StartOptions, sandbox: &str) -> anyhow::Result<()> {
    // CRI-O calls shims without a containerd, and writes the annotations of its containers itself.
    if options.address.is_empty() {
        return Ok(());
    }
    let settings = options.configuration.as_deref().map(Path::new);
    let by_annotation = match Configuration::load(settings) {
        Ok(configuration) => configuration.annotations.join,
        // The error in the settings is the sandbox's to report.
        Err(_) => false,
    };
    let (address, namespace) = (&options.address, &options.namespace);
    Ok(records::check(address, namespace, &options.id, sandbox, by_annotation)?)
}

/// Listens on `path`, which nobody answers at: what lies there is left from a shim that is gone.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: "a".to_owned(), namespace: "n".to_owned(), ..Flags::default() }
    }

    #[test]
    fn a_message_is_answered_by_a_message() {
        let params = BootstrapParams {
            instance_id: "a".to_owned(),
            namespace: "n".to_owned(),
            containerd_ttrpc_address: "/t".to_owned(),
            ..BootstrapParams::default()
        };
        let (options, protocol) = options(&params.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!((options.ttrpc_address.as_str(), protocol), ("/t", Protocol::Bootstrap));
    }

    #[test]
    fn anything_else_is_answered_by_the_address() {
        let other = BootstrapParams { instance_id: "type.url".to_owned(), ..Default::default() };
        for input in [&b""[..], b"rubbish", &other.write_to_bytes().unwrap()] {
            assert_eq!(options(input, &flags()).unwrap().1, Protocol::Plain);
        }
    }

    #[test]
    fn a_container_joins_the_sandbox_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        assert_eq!(sandbox_id(&config, "a").unwrap(), "a");
        std::fs::write(&config, r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"s"}}"#).unwrap();
        assert_eq!(sandbox_id(&config, "a").unwrap(), "s");
        std::fs::write(&config, r#"{"process":{}}"#).unwrap();
        assert_eq!(sandbox_id(&config, "a").unwrap(), "a");
    }

    #[test]
    fn a_socket_nobody_listens_on_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s/socket");
        drop(listen(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err());
        let _listener = listen(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
