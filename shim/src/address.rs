//! Addresses: `unix://` and a path.

use std::path::{Path, PathBuf};

/// The path in an address; a bare path is one too.
pub fn socket_path(address: &str) -> PathBuf {
    Path::new(address.strip_prefix("unix://").unwrap_or(address)).to_path_buf()
}
