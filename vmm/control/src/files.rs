//! What the shim and `husk-vmm files` say to each other.

use serde::{Deserialize, Serialize};

use crate::machine::Descriptor;

/// What the shim asks of a file server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FilesRequest {
    /// Serve the folder until the control socket closes. Only once.
    Serve(FilesConfig),
}

/// What is served, and to whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesConfig {
    /// The shared folder, opened as a directory.
    pub folder: Descriptor,
    /// The server's ends of the courier channels; one thread serves each. Empty with `vhost_user`.
    pub channels: Vec<Descriptor>,
    /// A listening UNIX stream socket to which a vhost-user front end connects.
    pub vhost_user: Option<Descriptor>,
    /// What of the folder the guest may do more with.
    pub volumes: Option<VolumeRules>,
}

/// The part of the shared folder that belongs to the host: its volumes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRules {
    /// Name of the folder whose entries are volumes.
    pub folder: String,
    /// Whether the guest may make files on volumes immutable and append-only.
    pub immutable_flags: bool,
}

/// What a file server says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FilesMessage {
    /// The channels are being served.
    Serving,
    /// It cannot serve; the process is about to end.
    Failed {
        /// Why, for the person at the terminal.
        error: String,
    },
}
