//! Where containerd wants a stream: a FIFO, a file, or a program.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::unix::pipe;

use super::logger::{LoggerError, LoggerProgram};
use crate::apart::alongside_within;

/// How long the opening of a file for output may take.
const OPEN: Duration = Duration::from_secs(30);

/// One end of a process's stream, as containerd names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// None: `/dev/null` in the guest.
    None,
    /// A FIFO, or whatever else is at that path.
    Path(PathBuf),
    /// A file to append to, made if it is not there (`file:///…`).
    File(PathBuf),
    /// A program that takes standard output and standard error (`binary:///…`).
    Program(LoggerProgram),
}

/// Why a stream's location cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LocationError {
    /// A kind that is not served.
    #[error(
        "streams of kind `{scheme}:` are not supported: use a FIFO, `file:///PATH` or \
         `binary:///PROGRAM`"
    )]
    Scheme {
        /// What stands before the colon.
        scheme: String,
    },
    /// A logger is named for a stream that it cannot have alone.
    #[error("cannot log this stream by a program alone: name the `binary://` for standard output")]
    Alone,
    /// The logger does not take the stream.
    #[error(transparent)]
    Logger(#[from] LoggerError),
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
    File(File),
    /// A pipe to a logger: without it the process's own stream is broken.
    Logger(pipe::Sender),
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
            "binary" => LoggerProgram::parse(rest)
                .map(Self::Program)
                .ok_or_else(|| LocationError::Scheme { scheme: text.to_owned() }),
            _ => Err(LocationError::Scheme { scheme: scheme.to_owned() }),
        }
    }

    /// Opens where output goes. A file may lie on a file system that answers late, or never.
    pub(super) async fn open_sink(&self) -> Result<Option<Sink>, LocationError> {
        let (path, make) = match self {
            Self::None => return Ok(None),
            Self::Path(path) => (path.clone(), false),
            Self::File(path) => (path.clone(), true),
            Self::Program(_) => return Err(LocationError::Alone),
        };
        let opening = path.clone();
        let opened = alongside_within(OPEN, move || open_output(&opening, make)).await;
        let opened = opened.and_then(|opened| opened);
        let sink = opened.and_then(|(file, is_fifo)| match is_fifo {
            true => pipe::Sender::from_file(file).map(Sink::Fifo),
            false => Ok(Sink::File(file)),
        });
        sink.map(Some).map_err(|source| open_error(&path, source))
    }

    /// Only FIFOs can be waited for; `/dev/null` is as good as none.
    pub(super) fn open_source(&self) -> Result<Option<Source>, LocationError> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Path(path) if path == Path::new("/dev/null") => return Ok(None),
            Self::Path(path) => path,
            Self::File(_) => return Err(LocationError::Scheme { scheme: "file".to_owned() }),
            Self::Program(_) => return Err(LocationError::Scheme { scheme: "binary".to_owned() }),
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

/// Opens `path` to write to it, and says whether it is a FIFO; a file is appended to, and made with its
/// folders if that is wanted. No open of a FIFO waits for a reader.
fn open_output(path: &Path, make: bool) -> io::Result<(File, bool)> {
    if !make && std::fs::metadata(path)?.file_type().is_fifo() {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        return Ok((options.open(path)?, true));
    }
    if make && let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let file = OpenOptions::new().append(true).create(make).mode(0o644).open(path)?;
    Ok((file, false))
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
        assert!(matches!(path("binary:///usr/bin/logger?id=1"), Location::Program(_)));
        for odd in ["unix:///run/x", "binary://logger"] {
            let error = Location::parse(odd).unwrap_err();
            assert!(error.to_string().contains("are not supported"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_missing_fifo_is_named() {
        let error = Location::Path("/nowhere/stdout".into()).open_sink().await.unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nowhere/stdout");
    }

    #[tokio::test]
    async fn a_file_is_made_with_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.log");
        assert!(matches!(Location::File(path.clone()).open_sink().await, Ok(Some(Sink::File(_)))));
        assert!(path.exists());
    }
}
