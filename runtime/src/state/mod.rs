//! What is known of a sandbox outside its shim: its folder in `/run/husk` and the record in it, from
//! which another process can clear up if the shim is gone.

mod clear;
mod record;

pub use clear::{ClearError, Leftovers};
pub(crate) use record::stat;
pub use record::{ProcessRecord, Record, RecordError};

use std::path::{Path, PathBuf};

/// Under which every sandbox has its folder, by namespace and name.
pub const ROOT: &str = "/run/husk";

/// The folder of a sandbox.
pub fn sandbox_folder(root: &Path, namespace: &str, id: &str) -> PathBuf {
    root.join(namespace).join(id)
}
