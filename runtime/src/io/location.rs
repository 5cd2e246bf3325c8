//! Where containerd wants a stream: a FIFO, or a file.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tokio::net::unix::pipe;

/// One end of a process's stream, as containerd names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// None: `/dev/null` in the guest.
    None,
    /// A FIFO, or whatever else is at that path.
    Path(PathBuf),
    /// A file to append to, made if it is not there (`file:///…`).
    File(PathBuf),
}

/// Why a stream's location cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LocationError {
    /// A kind that is not served.
    #[error("streams of kind `{scheme}:` are not supported yet: use a FIFO or `file://`")]
    Scheme {
        /// What stands before the colon.
        scheme: String,
    },
    /// It cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    Fifo(pipe::Sender),
    File(std::fs::File),
}

/// Where input comes from: the reading end, and the writing end that keeps it open.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) reading: pipe::Receiver,
    pub(super) writing: std::fs::File,
}

impl Location {
    /// Understands what containerd wrote: empty, a plain path, or a URI.
    pub fn parse(text: &str) -> Result<Self, LocationError> {
        if text.is_empty() {
            return Ok(Self::None);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Path(text.into()));
        };
        let path = rest.split('?').next().unwrap_or(rest);
        match scheme {
            "fifo" => Ok(Self::Path(path.into())),
            "file" => Ok(Self::File(path.into())),
            _ => Err(LocationError::Scheme { scheme: scheme.to_owned() }),
        }
    }

    pub(super) fn open_sink(&self) -> Result<Option<Sink>, LocationError> {
        match self {
            Self::None => Ok(None),
            Self::Path(path) if is_fifo(path)? => pipe::OpenOptions::new()
                .read_write(true)
                .open_sender(path)
                .map(|fifo| Some(Sink::Fifo(fifo)))
                .map_err(|source| open_error(path, source)),
            Self::Path(path) | Self::File(path) => {
                if matches!(self, Self::File(_))
                    && let Some(folder) = path.parent()
                {
                    std::fs::create_dir_all(folder).map_err(|source| open_error(folder, source))?;
                }
                OpenOptions::new()
                    .append(true)
                    .create(matches!(self, Self::File(_)))
                    .mode(0o644)
                    .open(path)
                    .map(|file| Some(Sink::File(file)))
                    .map_err(|source| open_error(path, source))
            }
        }
    }

    /// Only FIFOs can be waited for; `/dev/null` is as good as none.
    pub(super) fn open_source(&self) -> Result<Option<Source>, LocationError> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Path(path) if path == Path::new("/dev/null") => return Ok(None),
            Self::Path(path) => path,
            Self::File(_) => return Err(LocationError::Scheme { scheme: "file".to_owned() }),
        };
        let open = || {
            let reading = pipe::OpenOptions::new().open_receiver(path)?;
            // A reader is there, so this does not wait either.
            let writing =
                OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            Ok(Some(Source { reading, writing }))
        };
        open().map_err(|source| open_error(path, source))
    }
}

fn is_fifo(path: &Path) -> Result<bool, LocationError> {
    std::fs::metadata(path)
        .map(|metadata| metadata.file_type().is_fifo())
        .map_err(|source| open_error(path, source))
}

fn open_error(path: &Path, source: io::Error) -> LocationError {
    LocationError::Open { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let path = |text: &str| Location::parse(text).unwrap();
        assert_eq!(path(""), Location::None);
        assert_eq!(path("/run/x/stdin"), Location::Path("/run/x/stdin".into()));
        assert_eq!(path("fifo:///run/x"), Location::Path("/run/x".into()));
        assert_eq!(path("file:///var/log/x?maxsize=5"), Location::File("/var/log/x".into()));
        let error = Location::parse("binary:///usr/bin/logger?id=1").unwrap_err();
        assert!(error.to_string().contains("`binary:`"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_fifo_is_named() {
        let error = Location::Path("/nowhere/stdout".into()).open_sink().unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nowhere/stdout");
    }

    #[tokio::test]
    async fn a_file_is_made_with_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.log");
        assert!(matches!(Location::File(path.clone()).open_sink(), Ok(Some(Sink::File(_)))));
        assert!(path.exists());
    }
}
