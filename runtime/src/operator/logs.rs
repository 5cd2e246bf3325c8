//! The console of a sandbox's guest, on which its kernel and its agent log.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use super::find::{FindError, find};

/// Why there is no log to see.
#[derive(Debug, thiserror::Error)]
pub enum LogsError {
    /// There is no such sandbox, or more than one.
    #[error(transparent)]
    Find(#[from] FindError),
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
    let (_, folder) = find(root, namespace, id)?;
    let path = folder.join("console.log");
    File::open(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => LogsError::NoConsole,
        _ => read(&path, error),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::state::{ProcessRecord, Record, sandbox_folder};

    #[test]
    fn a_console_is_found_by_a_clear_name() {
        let root = tempfile::tempdir().unwrap();
        let own = ProcessRecord::of(std::process::id()).unwrap();
        for (namespace, id) in [("a", "first"), ("b", "first"), ("b", "firsthand"), ("b", "mute")] {
            let folder = sandbox_folder(root.path(), namespace, id);
            std::fs::create_dir_all(&folder).unwrap();
            let processes = vec![own];
            let record = Record { processes, socket: None, cgroups: Vec::new(), network: None };
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
