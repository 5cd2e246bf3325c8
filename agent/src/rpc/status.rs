//! The one place where errors get their gRPC code.

use ttrpc::{Code, Error, get_status};

use crate::container::ContainerError;
use crate::machine::MachineError;
use crate::network::ForwardError;
use crate::process::SignalError;
use crate::sandbox::StartError;

/// Longer texts are cut: they go to the host.
const TEXT_LIMIT: usize = 4096;

/// An error as the wire has it.
pub fn status(code: Code, text: impl ToString) -> Error {
    let mut text = text.to_string();
    text.truncate(text.floor_char_boundary(TEXT_LIMIT));
    Error::RpcStatus(get_status(code, text))
}

impl From<ContainerError> for Error {
    fn from(error: ContainerError) -> Self {
        let code = match &error {
            ContainerError::NotFound(_) | ContainerError::Signal(SignalError::Exited) => {
                Code::NOT_FOUND
            }
            ContainerError::Exists(_) => Code::ALREADY_EXISTS,
            ContainerError::State { .. } => Code::FAILED_PRECONDITION,
            ContainerError::Id(_)
            | ContainerError::Spec(_)
            | ContainerError::Signal(SignalError::Unknown(_)) => Code::INVALID_ARGUMENT,
            // What runc's users see as "unknown": the container's fault or the kernel's.
            ContainerError::Command(_)
            | ContainerError::Helper(_)
            | ContainerError::Signal(SignalError::Kernel(_))
            | ContainerError::System { .. } => Code::UNKNOWN,
        };
        status(code, error)
    }
}

impl From<MachineError> for Error {
    fn from(error: MachineError) -> Self {
        let code = match &error {
            MachineError::NoProcessor => Code::INVALID_ARGUMENT,
            MachineError::Room { .. } => Code::FAILED_PRECONDITION,
            MachineError::Read { .. } | MachineError::Refused { .. } => Code::INTERNAL,
        };
        status(code, error)
    }
}

impl From<ForwardError> for Error {
    fn from(error: ForwardError) -> Self {
        let code = match &error {
            ForwardError::Refused { .. } => Code::NOT_FOUND,
            ForwardError::Host(_) => Code::UNAVAILABLE,
        };
        status(code, error)
    }
}

impl From<StartError> for Error {
    fn from(error: StartError) -> Self {
        let code = match &error {
            StartError::Twice => Code::FAILED_PRECONDITION,
            StartError::Parameter { .. } => Code::INVALID_ARGUMENT,
            StartError::Mount(_) | StartError::System { .. } => Code::INTERNAL,
        };
        status(code, error)
    }
}
