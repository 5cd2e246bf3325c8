//! Why something asked of a container was not done.

use super::{HookError, ResizeError};
use crate::agent_client::AgentError;
use crate::io::StreamsError;
use crate::resource::{CgroupError, CpusetError, ResourceError};
use crate::spec::SpecError;

/// Why something asked of a container was not done.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// There is no such container.
    #[error("container {0} does not exist")]
    NoContainer(String),
    /// There is no such process.
    #[error("process {0} does not exist")]
    NoProcess(String),
    /// The name is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The name is none.
    #[error("{0:?} is no name for a container or process")]
    Name(String),
    /// The process has exited, so it cannot be signalled.
    #[error("process already finished")]
    Finished,
    /// The process is not in the state for it.
    #[error("cannot {action} a process that is {status}")]
    Status {
        /// What was asked.
        action: &'static str,
        /// In what state it is.
        status: &'static str,
    },
    /// The spec asks for what cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The spec's list of CPUs or memory nodes cannot be read.
    #[error(transparent)]
    Cpuset(#[from] CpusetError),
    /// The host has no such CPUs or memory nodes, or gives the sandbox none of them.
    #[error("cannot run on the CPUs and memory nodes that linux.resources.cpu names")]
    Confine(#[source] CgroupError),
    /// Its files could not be laid out.
    #[error("cannot lay out the container's files")]
    Resource(#[from] ResourceError),
    /// A hook of its spec failed.
    #[error("a hook of the container's")]
    Hook(#[from] HookError),
    /// Its streams could not be opened.
    #[error(transparent)]
    Streams(#[from] StreamsError),
    /// The machine did not grow.
    #[error("cannot make the sandbox's machine as large as the limits ask for")]
    Resize(#[from] ResizeError),
    /// The agent refused or cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine has ended.
    #[error("the sandbox's machine has ended: {0}")]
    MachineEnded(String),
}
