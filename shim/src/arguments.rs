//! The arguments of a run by containerd: the command line, and from containerd 2.3 on a message on
//! standard input.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, LogLevel};
use sha2::{Digest, Sha256};

/// Folder of the sockets, unless containerd names another.
const SOCKET_FOLDER: &str = "/run/containerd/s";

/// The command line, as every shim v2 understands it.
#[derive(Debug, Default)]
pub struct Flags {
    /// Whether to log in detail.
    pub debug: bool,
    /// containerd's namespace of the container.
    pub namespace: String,
    /// Id of the container or sandbox.
    pub id: String,
    /// Address that the shim listens on.
    pub socket: String,
    /// Folder of the bundle; empty if it is the working folder.
    pub bundle: String,
    /// Address of containerd's own socket.
    pub address: String,
    /// Path of the program that publishes events.
    pub publish_binary: String,
    /// Path of the settings; empty for the host's.
    pub configuration: String,
    /// `start` or `delete`; empty to serve.
    pub action: String,
    /// Whether to print the version and end.
    pub version: bool,
    /// Whether to print what the runtime is and end.
    pub info: bool,
}

impl Flags {
    /// Reads the command line, without the program's name.
    pub fn parse(arguments: &[OsString]) -> anyhow::Result<Self> {
        let mut flags = Self::default();
        let (mut short, mut long) = (false, false);
        let rest: Vec<String> = go_flag::parse_args(arguments, |set| {
            set.add_flag("debug", &mut flags.debug);
            set.add_flag("v", &mut short);
            set.add_flag("version", &mut long);
            set.add_flag("namespace", &mut flags.namespace);
            set.add_flag("id", &mut flags.id);
            set.add_flag("socket", &mut flags.socket);
            set.add_flag("bundle", &mut flags.bundle);
            set.add_flag("address", &mut flags.address);
            set.add_flag("publish-binary", &mut flags.publish_binary);
            set.add_flag("info", &mut flags.info);
            set.add_flag("config", &mut flags.configuration);
        })?;
        flags.version = short || long;
        flags.action = rest.into_iter().next().unwrap_or_default();
        Ok(flags)
    }
}

/// The options of a start, from whichever of the two ways containerd took.
#[derive(Debug, Default)]
pub struct StartOptions {
    /// Id of the container or sandbox.
    pub id: String,
    /// Path of the program that publishes events.
    pub publish_binary: String,
    /// Address of containerd's own socket.
    pub address: String,
    /// Address of containerd's socket for events.
    pub ttrpc_address: String,
    /// containerd's namespace of the container.
    pub namespace: String,
    /// Whether to log in detail.
    pub debug: bool,
    /// Folder of the sockets; `None` for `/run/containerd/s`.
    pub socket_folder: Option<String>,
    /// Path of the settings; `None` for the host's.
    pub configuration: Option<String>,
}

impl StartOptions {
    /// Returns the address of the shim of `sandbox`. The same containerd, namespace and sandbox always
    /// have the same one: it is how containers find the shim that they join.
    pub fn socket_address(&self, sandbox: &str) -> String {
        let folder = self.socket_folder.as_deref().unwrap_or(SOCKET_FOLDER);
        let name = Path::new(&self.address).join(&self.namespace).join(sandbox);
        let digest = Sha256::digest(name.as_os_str().as_encoded_bytes());
        let mut address = format!("unix://{}/", folder.trim_end_matches('/'));
        for byte in digest {
            // Writing to a string cannot fail.
            let _ = write!(address, "{byte:02x}");
        }
        address
    }
}

impl From<BootstrapParams> for StartOptions {
    fn from(params: BootstrapParams) -> Self {
        Self {
            debug: params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32,
            id: params.instance_id,
            publish_binary: params.containerd_binary,
            address: params.containerd_grpc_address,
            ttrpc_address: params.containerd_ttrpc_address,
            namespace: params.namespace,
            socket_folder: params.socket_dir.filter(|folder| !folder.is_empty()),
            configuration: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Flags> {
        Flags::parse(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn flags_are_go_flags() {
        let line = "-namespace n --id=a -debug -address /a -publish-binary /b -bundle /c delete x";
        let flags = parse(line).unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("n", "a"));
        assert_eq!((flags.address.as_str(), flags.publish_binary.as_str()), ("/a", "/b"));
        assert_eq!((flags.bundle.as_str(), flags.action.as_str()), ("/c", "delete"));
        assert!(flags.debug && !flags.version && !flags.info);
        assert!(parse("-v").unwrap().version && parse("-version").unwrap().version);
        assert!(parse("-teapot").unwrap_err().to_string().contains("teapot"));
    }

    /// Shims that an earlier version has started are found by it.
    #[test]
    fn an_address_stays_the_same() {
        let mut options = StartOptions {
            address: "/run/containerd/containerd.sock".to_owned(),
            namespace: "default".to_owned(),
            ..StartOptions::default()
        };
        let name = "0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0";
        assert_eq!(options.socket_address("123"), format!("unix:///run/containerd/s/{name}"));
        options.socket_folder = Some("/run/other/".to_owned());
        assert_eq!(options.socket_address("123"), format!("unix:///run/other/{name}"));
    }

    #[test]
    fn a_message_says_how_much_to_log() {
        let debug = |level: LogLevel| {
            let params = BootstrapParams { log_level: level.into(), ..Default::default() };
            StartOptions::from(params).debug
        };
        assert!(debug(LogLevel::LOG_LEVEL_DEBUG) && !debug(LogLevel::LOG_LEVEL_INFO));
    }
}
