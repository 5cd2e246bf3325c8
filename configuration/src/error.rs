//! Errors, worded for the person at the terminal.

use std::path::PathBuf;

/// Why there is no usable configuration. Every text names the file, the key and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// A file of settings, or the folder of drop-ins, cannot be read.
    #[error("{}: cannot read the settings; {remedy}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        remedy: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file is no TOML.
    #[error("{}: line {line}: {message}; correct the line (see https://toml.io)", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The parser's words.
        message: String,
    },
    /// A key nobody knows.
    #[error("{origin}: unknown key {key}; {remedy}")]
    UnknownKey {
        /// The file.
        origin: String,
        /// The key, with its section.
        key: String,
        /// The nearest known key, or all of them.
        remedy: String,
    },
    /// A value of the wrong type or out of range.
    #[error("{origin}: {key} = {value}: expected {expected}")]
    Value {
        /// The file or annotation.
        origin: String,
        /// The key, with its section.
        key: &'static str,
        /// What stands there.
        value: String,
        /// What should, with an example.
        expected: String,
    },
    /// An annotation `io.husk.…` nobody knows.
    #[error("unknown annotation {name}; {remedy}")]
    UnknownAnnotation {
        /// The annotation.
        name: String,
        /// The nearest known one, or all of them.
        remedy: String,
    },
    /// An annotation the operator does not allow.
    #[error(
        "annotation {name} is not allowed on this host; remove it, or add \"{short}\" to \
         annotations.allow in {origin}"
    )]
    ForbiddenAnnotation {
        /// The annotation.
        name: String,
        /// Its name without `io.husk.`.
        short: String,
        /// The file of settings.
        origin: String,
    },
    /// A file that a setting names cannot be used.
    #[error("{key} ({origin}): cannot use {}; {remedy}", path.display())]
    Resource {
        /// The key, with its section.
        key: &'static str,
        /// Where it was set.
        origin: String,
        /// What it names.
        path: PathBuf,
        /// What to do about it.
        remedy: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}
