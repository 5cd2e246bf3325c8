//! A sandbox by what a person calls it.

use std::io;
use std::path::{Path, PathBuf};

use super::list;
use crate::state::sandbox_folder;

/// Why no sandbox is meant.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// No such sandbox.
    #[error("there is no sandbox {0}; `husk ps` lists them")]
    None(String),
    /// More than one, in several namespaces.
    #[error("there are sandboxes {id} in the namespaces {namespaces}; choose by --namespace")]
    Several {
        /// Which.
        id: String,
        /// Where.
        namespaces: String,
    },
    /// The sandboxes cannot be listed.
    #[error("{path}")]
    List {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The sandbox `id`, whose name may be shortened if that is clear: its whole name and its folder.
pub fn find(
    root: &Path,
    namespace: Option<&str>,
    id: &str,
) -> Result<(String, PathBuf), FindError> {
    let mut found =
        list(root).map_err(|source| FindError::List { path: root.to_owned(), source })?;
    found.retain(|one| namespace.is_none_or(|name| one.namespace == name));
    if found.iter().any(|one| one.id == id) {
        found.retain(|one| one.id == id);
    } else {
        found.retain(|one| !id.is_empty() && one.id.starts_with(id));
    }
    match found.as_slice() {
        [] => Err(FindError::None(id.to_owned())),
        [one] => Ok((one.id.clone(), sandbox_folder(root, &one.namespace, &one.id))),
        several => {
            let names: Vec<_> = several.iter().map(|one| one.namespace.as_str()).collect();
            Err(FindError::Several { id: id.to_owned(), namespaces: names.join(", ") })
        }
    }
}
