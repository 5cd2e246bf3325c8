//! The console of a sandbox's guest, on which its kernel and its agent log.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::list;
use crate::state::sandbox_folder;

/// Why there is no log to see.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
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
    /// It has no console.
    #[error(
        "the sandbox has no console: start it with `guest.console = true` in husk.toml, or with the \
         annotation io.husk.console=true"
    )]
    NoConsole,
    /// The log cannot be read.
    #[error("{path}")]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Opens the console's log of sandbox `id`, whose name may be shortened if that is clear.
pub fn console(root: &Path, namespace: Option<&str>, id: &str) -> Result<File, LogsError> {
    let read = |path: &Path, source| LogsError::Read { path: path.to_owned(), source };
    let mut found = list(root).map_err(|source| read(root, source))?;
    found.retain(|one| namespace.is_none_or(|name| one.namespace == name));
    if found.iter().any(|one| one.id == id) {
        found.retain(|one| one.id == id);
    } else {
        found.retain(|one| !id.is_empty() && one.id.starts_with(id));
    }
    let one = match found.as_slice() {
        [] => return Err(LogsError::None(id.to_owned())),
        [one] => one,
        several => {
            let names: Vec<_> = several.iter().map(|one| one.namespace.as_str()).collect();
            return Err(LogsError::Several { id: id.to_owned(), namespaces: names.join(", ") });
        }
    };
    let path = sandbox_folder(root, &one.namespace, &one.id).join("console.log");
    File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LogsError::NoConsole,
        _ => read(&path, error),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::state::{ProcessRecord, Record};

    #[test]
    fn a_console_is_found_by_a_clear_name() {
        let root = tempfile::tempdir().unwrap();
        let own = ProcessRecord::of(std::process::id()).unwrap();
        for (namespace, id) in [("a", "first"), ("b", "first"), ("b", "firsthand"), ("b", "mute")] {
            let folder = sandbox_folder(root.path(), namespace, id);
            std::fs::create_dir_all(&folder).unwrap();
            let record = Record { processes: vec![own], socket: None, cgroups: Vec::new() };
            record.write(&folder).unwrap();
            if id != "mute" {
                std::fs::write(folder.join("console.log"), format!("{namespace}/{id}")).unwrap();
            }
        }
        let text = |namespace, id| -> Result<String, String> {
            let mut text = String::new();
            let file = console(root.path(), namespace, id).map_err(|error| error.to_string())?;
            { file }.read_to_string(&mut text).unwrap();
            Ok(text)
        };
        assert_eq!(text(Some("b"), "first").unwrap(), "b/first");
        assert_eq!(text(None, "firsth").unwrap(), "b/firsthand");
        assert!(text(None, "first").unwrap_err().contains("namespaces a, b"));
        assert!(text(None, "none").unwrap_err().contains("husk ps"));
        assert!(text(None, "mute").unwrap_err().contains("guest.console"));
    }
}
