//! The control loop.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use fuse_backend_rs::api::server::Server;
use husk_control::{FilesConfig, FilesMessage, FilesRequest, Packet, receive, send};
use slog::{Logger, info, warn};

use super::FilesError;
use super::courier::Channel;
use super::tree::Tree;
use super::vhost_user;
use crate::jail::FilesJail;
use crate::seccomp;

/// Serves what the control socket asks for, until it closes.
///
/// The serving threads go on when this returns: the caller ends the process.
pub fn run(control: OwnedFd, logger: &Logger) -> Result<(), FilesError> {
    raise_descriptor_limit().map_err(FilesError::SetUp)?;
    serve(control, None, logger)
}

/// The same in a jail, which is closed round the folder when that comes.
pub fn run_jailed(control: OwnedFd, jail: FilesJail, logger: &Logger) -> Result<(), FilesError> {
    serve(control, Some(jail), logger)
}

fn serve(control: OwnedFd, mut jail: Option<FilesJail>, logger: &Logger) -> Result<(), FilesError> {
    let mut serving = false;
    loop {
        let Some(packet) = receive::<FilesRequest>(&control)? else { return Ok(()) };
        let result = if serving {
            Err(FilesError::AlreadyServing)
        } else {
            start(packet, jail.take(), logger)
        };
        match result {
            Ok(()) => {
                serving = true;
                send(&control, &FilesMessage::Serving, &[])?;
            }
            Err(error) => {
                let message = FilesMessage::Failed { error: describe(&error) };
                send(&control, &message, &[])?;
                return Err(error);
            }
        }
    }
}

/// The error with its sources, in one line.
fn describe(error: &FilesError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn start(
    mut packet: Packet<FilesRequest>,
    jail: Option<FilesJail>,
    logger: &Logger,
) -> Result<(), FilesError> {
    let FilesRequest::Serve(FilesConfig { folder, channels, vhost_user, volumes }) =
        packet.message.clone();
    let folder = packet.take(folder)?;
    let channels = channels.into_iter().map(|at| packet.take(at)).collect::<Result<Vec<_>, _>>()?;
    let front_end = vhost_user.map(|at| packet.take(at)).transpose()?;
    if channels.is_empty() && front_end.is_none() {
        return Err(FilesError::NoBorder);
    }
    let descriptors = match jail {
        Some(jail) => {
            let immutable = volumes.as_ref().is_some_and(|rules| rules.immutable_flags);
            jail.with_immutable_flags(immutable).close(folder.as_fd())?
        }
        None => File::open("/proc/self/fd").map_err(FilesError::SetUp)?,
    };
    // Leaked, not counted: it is in use until the process ends.
    let volumes = volumes.as_ref().map(|rules| rules.folder.as_str());
    let tree: &'static Tree = Box::leak(Box::new(Tree::new(folder.as_fd(), descriptors, volumes)?));
    info!(logger, "files: serving"; "channels" => channels.len(),
        "vhost_user" => front_end.is_some());
    if !channels.is_empty() {
        let server: &'static Server<&'static Tree> = Box::leak(Box::new(Server::new(tree)));
        for (number, socket) in channels.into_iter().enumerate() {
            let logger = logger.clone();
            spawn(format!("files-{number}"), move || {
                // The channel is closed with this thread, so such a line comes once.
                if let Err(error) = serve_channel(socket, server, tree) {
                    warn!(logger, "files: channel closed"; "channel" => number,
                        "error" => describe(&error));
                }
            })?;
        }
    }
    if let Some(socket) = front_end {
        let logger = logger.clone();
        let device = vhost_user::Device::new(Arc::new(Server::new(tree)), tree);
        spawn("files-vhost".to_owned(), move || {
            let served = seccomp::narrow(seccomp::Thread::VhostUser)
                .map_err(FilesError::from)
                .and_then(|()| vhost_user::serve(socket, device));
            if let Err(error) = served {
                warn!(logger, "files: vhost-user ended"; "error" => describe(&error));
            }
        })?;
    }
    Ok(())
}

/// Serves `folder` on one channel, in the calling thread, until the channel closes. `volumes` is the folder
/// in it that has volumes.
pub fn serve_one(
    folder: BorrowedFd<'_>,
    channel: OwnedFd,
    volumes: Option<&str>,
) -> Result<(), FilesError> {
    let descriptors = File::open("/proc/self/fd").map_err(FilesError::SetUp)?;
    let tree = Tree::new(folder, descriptors, volumes)?;
    serve_channel(channel, &Server::new(&tree), &tree)
}

fn serve_channel<'a>(
    socket: OwnedFd,
    server: &'a Server<&'a Tree>,
    tree: &'a Tree,
) -> Result<(), FilesError> {
    seccomp::narrow(seccomp::Thread::Server)?;
    tree.prepare_thread().map_err(FilesError::SetUp)?;
    let mut channel = Channel::new(socket, server, tree).map_err(FilesError::SetUp)?;
    channel.serve().map_err(FilesError::Channel)
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<(), FilesError> {
    thread::Builder::new().name(name).spawn(body).map(drop).map_err(FilesError::SetUp)
}

/// Each file that the guest remembers holds a descriptor, so as many as the system allows.
fn raise_descriptor_limit() -> std::io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is written to, and is ours.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(limit.rlim_max);
    // Without the right to raise the hard limit, up to it.
    for count in [most, limit.rlim_max] {
        let wanted = libc::rlimit { rlim_cur: count, rlim_max: count };
        // SAFETY: `wanted` is only read.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &wanted) } == 0 {
            return Ok(());
        }
    }
    Err(std::io::Error::last_os_error())
}
