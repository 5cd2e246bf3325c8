//! Refusals, by field.

/// Why a spec cannot be carried out in a machine.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It is no OCI runtime spec.
    #[error("the container's OCI spec is not understood")]
    Json(#[source] serde_json::Error),
    /// A field that must be there is not.
    #[error("the OCI spec has no {0}")]
    Missing(&'static str),
    /// A field asks for what Husk cannot give.
    #[error("{field} is not supported: {reason}")]
    Refused {
        /// Its name in the spec, with positions.
        field: String,
        /// Why, and what to do instead.
        reason: String,
    },
    /// The source of a bind mount cannot be looked at.
    #[error("{field}: cannot use {path}")]
    Source {
        /// Its name in the spec.
        field: String,
        /// The path on the host.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A refusal of `field`.
pub(super) fn refused(field: impl Into<String>, reason: impl Into<String>) -> SpecError {
    SpecError::Refused { field: field.into(), reason: reason.into() }
}

/// Refuses `field` if it asks for something.
pub(super) fn refuse_if(asked: bool, field: &str, reason: &str) -> Result<(), SpecError> {
    if asked { Err(refused(field, reason)) } else { Ok(()) }
}
