//! The ttrpc contract between the runtime and the agent: see `proto/agent.proto`, which documents
//! every call and field.

pub mod resolver;

/// The host's vsock port that the agent dials when it is ready; the connection carries the service.
pub const AGENT_PORT: u32 = 1024;

/// Where the guest mounts the shared folder.
pub const SHARE_PATH: &str = "/run/husk/share";

/// The memory that the containers of a pod share, a tmpfs of the guest's.
pub const SHARED_MEMORY_PATH: &str = "/run/husk/shm";

/// Memory of the guest's that containers mount instead of the host's, each by its name in this folder.
pub const MEMORY_VOLUMES_PATH: &str = "/run/husk/memory";

/// As the path of a PID namespace: that of the sandbox's own container.
pub const SANDBOX_PID_NAMESPACE: &str = "/run/husk/pid";

#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction, rustdoc::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

pub use generated::{agent, agent_ttrpc};
