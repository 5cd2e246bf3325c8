//! The one place where errors get their gRPC code, the same as containerd's own shim gives.

use containerd_shim_protos::ttrpc::{self, Code, get_status};
use husk_configuration::ConfigurationError;
use husk_runtime::agent_client::AgentError;
pub use husk_runtime::chain;
use husk_runtime::container::{ContainerError, ResizeError};
use husk_runtime::io::{LocationError, StreamsError};
use husk_runtime::resource::ResourceError;
use husk_runtime::sandbox::SandboxError;

/// Why a request of containerd's was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Something asked of a container.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The sandbox could not be had; the text is that of its whole chain.
    #[error("{text}")]
    Sandbox {
        /// What to answer.
        code: Code,
        /// For the person at the terminal.
        text: String,
    },
    /// There is no sandbox of that name.
    #[error("sandbox {0} does not exist")]
    NoSandbox(String),
    /// There is one already.
    #[error("sandbox {0} already exists")]
    SandboxExists(String),
    /// What is asked of a sandbox does not fit its state.
    #[error("cannot {action} a sandbox that {state}")]
    SandboxState {
        /// What was asked.
        action: &'static str,
        /// What it is.
        state: &'static str,
    },
    /// A request that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A request that is not served.
    #[error("{0} is not implemented yet")]
    Unimplemented(&'static str),
}

impl ServiceError {
    fn code(&self) -> Code {
        match self {
            Self::Container(error) => container_code(error),
            Self::Sandbox { code, .. } => *code,
            Self::NoSandbox(_) => Code::NOT_FOUND,
            Self::SandboxExists(_) => Code::ALREADY_EXISTS,
            Self::SandboxState { .. } => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
        }
    }
}

impl From<&SandboxError> for ServiceError {
    fn from(error: &SandboxError) -> Self {
        Self::Sandbox { code: sandbox_code(error), text: chain(error) }
    }
}

impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        Self::RpcStatus(get_status(error.code(), chain(&error)))
    }
}

fn container_code(error: &ContainerError) -> Code {
    match error {
        ContainerError::NoContainer(_)
        | ContainerError::NoProcess(_)
        | ContainerError::Finished => Code::NOT_FOUND,
        ContainerError::Exists(_) => Code::ALREADY_EXISTS,
        ContainerError::Name(_)
        | ContainerError::Spec(_)
        | ContainerError::Cpuset(_)
        | ContainerError::Confine(_) => Code::INVALID_ARGUMENT,
        ContainerError::Status { .. } => Code::FAILED_PRECONDITION,
        ContainerError::Resource(error) => match error {
            ResourceError::Source { .. }
            | ResourceError::Kind { .. }
            | ResourceError::Options(_)
            | ResourceError::OutsideTarget(_) => Code::INVALID_ARGUMENT,
            ResourceError::Place { .. }
            | ResourceError::Mount { .. }
            | ResourceError::Thread(_) => Code::INTERNAL,
        },
        ContainerError::Streams(StreamsError::Location {
            source: LocationError::Scheme { .. } | LocationError::Alone,
            ..
        }) => Code::UNIMPLEMENTED,
        ContainerError::Streams(_) | ContainerError::Hook(_) => Code::INTERNAL,
        ContainerError::Resize(error) => match error {
            ResizeError::Agent(error) => agent_code(error),
            ResizeError::Machine(_) => Code::INTERNAL,
            ResizeError::Slow { .. } => Code::RESOURCE_EXHAUSTED,
        },
        ContainerError::Agent(error) => agent_code(error),
        ContainerError::MachineEnded(_) => Code::UNAVAILABLE,
    }
}

fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => *code,
        AgentError::Silent => Code::DEADLINE_EXCEEDED,
        AgentError::Lost(_) => Code::UNAVAILABLE,
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::Configuration(
            ConfigurationError::UnknownAnnotation { .. }
            | ConfigurationError::ForbiddenAnnotation { .. },
        ) => Code::INVALID_ARGUMENT,
        SandboxError::Bundle { .. }
        | SandboxError::HostNetwork
        | SandboxError::ForeignNetwork { .. } => Code::INVALID_ARGUMENT,
        SandboxError::Unasked
        | SandboxError::GivenUp
        | SandboxError::Configuration(_)
        | SandboxError::Kvm(_) => Code::FAILED_PRECONDITION,
        SandboxError::Folder { .. }
        | SandboxError::Share(_)
        | SandboxError::Record(_)
        | SandboxError::Cgroup(_)
        | SandboxError::Network(_) => Code::INTERNAL,
        SandboxError::Machine(_) | SandboxError::Ended(_) => Code::UNAVAILABLE,
        SandboxError::Silent { .. } | SandboxError::Read(_) => Code::DEADLINE_EXCEEDED,
        SandboxError::Agent(error) => agent_code(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: ServiceError) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code.enum_value().unwrap(), status.message),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn codes_are_those_of_containerds_own_shim() {
        let (code, text) = status(ContainerError::Finished.into());
        assert_eq!((code, text.as_str()), (Code::NOT_FOUND, "process already finished"));
        let (code, _) = status(ContainerError::NoProcess("x".to_owned()).into());
        assert_eq!(code, Code::NOT_FOUND);
        let (code, _) = status(ContainerError::Exists("x".to_owned()).into());
        assert_eq!(code, Code::ALREADY_EXISTS);
        let (code, text) = status(ServiceError::Unimplemented("Checkpoint"));
        assert_eq!(code, Code::UNIMPLEMENTED);
        assert_eq!(text, "Checkpoint is not implemented yet");
    }

    #[test]
    fn the_agents_code_goes_through() {
        let refused =
            AgentError::Refused { code: Code::INVALID_ARGUMENT, message: "no".to_owned() };
        let (code, text) = status(ContainerError::Agent(refused).into());
        assert_eq!((code, text.as_str()), (Code::INVALID_ARGUMENT, "no"));
    }

    #[test]
    fn causes_follow_their_consequences() {
        let source = std::io::Error::other("because");
        let error = SandboxError::Kvm(source);
        let (code, text) = status(ServiceError::from(&error));
        assert_eq!(code, Code::FAILED_PRECONDITION);
        assert!(text.ends_with("what this host lacks: because"), "{text}");
    }
}
