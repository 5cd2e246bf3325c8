//! Where containerd wants a stream: a FIFO, a file, or a program.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use tokio::net::unix::pipe;

use super::logger::{LoggerError, LoggerProgram};
use crate::apart::{Aside, opened};

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
    File(Aside<File>),
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
        let opened = match (!make).then(|| open_cached_fifo(&path)).flatten() {
            Some(fifo) => Ok((fifo, true)),
            None => {
                let opening = path.clone();
                opened(move || open_output(&opening, make)).await
            }
        };
        let sink = opened.and_then(|(file, is_fifo)| match is_fifo {
            true => pipe::Sender::from_file(file).map(Sink::Fifo),
            false => Ok(Sink::File(Aside::new(file))),
        });
        sink.map(Some).map_err(|source| open_error(&path, source))
    }

    /// Opens where input comes from. Only FIFOs can be waited for; `/dev/null` is as good as none.
    pub(super) async fn open_source(&self) -> Result<Option<Source>, LocationError> {
        let path = match self {
            Self::None => return Ok(None),
            Self::Path(path) if path == Path::new("/dev/null") => return Ok(None),
            Self::Path(path) => path.clone(),
            Self::File(_) => return Err(LocationError::Scheme { scheme: "file".to_owned() }),
            Self::Program(_) => return Err(LocationError::Scheme { scheme: "binary".to_owned() }),
        };
        let opening = path.clone();
        let source = opened(move || open_input(&opening)).await.and_then(|(reading, writing)| {
            Ok(Source { reading: pipe::Receiver::from_file(reading)?, writing })
        });
        source.map(Some).map_err(|source| open_error(&path, source))
    }
}

/// Opens the FIFO `path` to read from it, and then to keep it open for writing.
fn open_input(path: &Path) -> io::Result<(File, File)> {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK);
    let reading = options.read(true).open(path)?;
    if !reading.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no FIFO"));
    }
    // A reader is there, so this does not wait either.
    let writing = options.read(false).write(true).open(path)?;
    Ok((reading, writing))
}

/// Opens the FIFO `path` if that cannot wait, because the kernel knows the whole path already, as it does of
/// one that the engine has just made. A thread costs more than the rest of a stream.
fn open_cached_fifo(path: &Path) -> Option<File> {
    let open = |flags| {
        let flags = flags | OFlags::CLOEXEC;
        openat2(CWD, path, flags, Mode::empty(), ResolveFlags::CACHED).ok()
    };
    // Neither call asks the file system, and a FIFO is opened by the kernel alone.
    let found = open(OFlags::PATH)?;
    let kept = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let kind =
        FileType::from_raw_mode(statx(&found, "", kept, StatxFlags::TYPE).ok()?.stx_mode.into());
    let fifo =
        File::from((kind == FileType::Fifo).then(|| open(OFlags::RDWR | OFlags::NONBLOCK))??);
    // The name may have passed to another file meanwhile.
    fifo.metadata().ok()?.file_type().is_fifo().then_some(fifo)
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

    #[test]
    fn only_a_fifo_is_opened_where_the_event_loop_runs() {
        let folder = tempfile::tempdir().unwrap();
        let [fifo, file] = ["fifo", "file"].map(|name| folder.path().join(name));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(&file, "").unwrap();
        assert!(open_cached_fifo(&fifo).is_some());
        for other in
            [file.as_path(), folder.path(), &folder.path().join("missing"), Path::new("/dev/null")]
        {
            assert!(open_cached_fifo(other).is_none(), "{other:?}");
        }
    }

    #[tokio::test]
    async fn a_file_is_made_with_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.log");
        assert!(matches!(Location::File(path.clone()).open_sink().await, Ok(Some(Sink::File(_)))));
        assert!(path.exists());
    }
}
