//! Why a sandbox could not be had.

use std::io;
use std::path::PathBuf;

use husk_configuration::ConfigurationError;

use crate::agent_client::AgentError;
use crate::machine::MachineError;
use crate::resource::network::NetworkError;
use crate::resource::{CgroupError, ResourceError};
use crate::state::RecordError;

/// Why a sandbox could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Nobody has said yet what the sandbox is to be.
    #[error("no sandbox has been created in this shim")]
    Unasked,
    /// The shim was told to end while the sandbox booted.
    #[error("the sandbox was given up while it booted")]
    GivenUp,
    /// The settings.
    #[error("Husk's configuration")]
    Configuration(#[from] ConfigurationError),
    /// A folder or file of the sandbox's.
    #[error("cannot make {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The shared folder, or files of the sandbox's own in it.
    #[error("cannot lay out the shared folder")]
    Share(#[from] ResourceError),
    /// The bundle that brings the sandbox about.
    #[error("the bundle's {path}")]
    Bundle {
        /// Which file of it.
        path: PathBuf,
        /// Why it cannot be used.
        #[source]
        source: io::Error,
    },
    /// The files that say what the sandbox is to be are not answered for.
    #[error("cannot read what the sandbox is made from")]
    Read(#[source] io::Error),
    /// No network namespace of its own.
    #[error(
        "the host's network cannot be a microVM's: start it with a network of its own \
         (without --net-host, --network host, hostNetwork: true)"
    )]
    HostNetwork,
    /// A network that is another container's.
    #[error(
        "the network namespace {path} belongs to another container, and a microVM cannot share \
         it: put the two into one pod"
    )]
    ForeignNetwork {
        /// The namespace.
        path: PathBuf,
    },
    /// The network namespace could not be looked into.
    #[error("cannot look into the sandbox's network")]
    Network(#[source] NetworkError),
    /// The cgroup of its processes.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// `/dev/kvm`.
    #[error("cannot open /dev/kvm; run `husk check` to see what this host lacks")]
    Kvm(#[source] io::Error),
    /// The machine or its file server.
    #[error("cannot start the sandbox")]
    Machine(#[source] MachineError),
    /// The machine ended before the agent was ready.
    #[error("the sandbox's machine ended before its agent was ready: {0}")]
    Ended(String),
    /// The agent did not call.
    #[error("the guest's agent did not call within {seconds} s (machine.start_timeout){console}")]
    Silent {
        /// How long it was awaited.
        seconds: u16,
        /// What the guest's console showed last.
        console: String,
    },
    /// The agent could not set up the sandbox.
    #[error("the guest's agent could not set up the sandbox")]
    Agent(#[source] AgentError),
}
