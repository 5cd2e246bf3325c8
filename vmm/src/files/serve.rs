//! The control loop.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use fuse_backend_rs::api::server::Server;
use husk_control::{FilesConfig, FilesMessage, FilesRequest, Packet, receive, send};
use slog::{Logger, info, warn};

use super::FilesError;
use super::courier::Channel;
use super::tree::Tree;
use super::vhost_user;

/// Serves what the control socket asks for, until it closes.
///
/// The serving threads go on when this returns: the caller ends the process.
pub fn run(control: OwnedFd, logger: &Logger) -> Result<(), FilesError> {
    let mut serving = false;
    loop {
        let Some(packet) = receive::<FilesRequest>(&control)? else { return Ok(()) };
        let result = if serving { Err(FilesError::AlreadyServing) } else { start(packet, logger) };
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

fn start(mut packet: Packet<FilesRequest>, logger: &Logger) -> Result<(), FilesError> {
    let FilesRequest::Serve(FilesConfig { folder, channels, vhost_user }) = packet.message.clone();
    let folder = packet.take(folder)?;
    let channels = channels.into_iter().map(|at| packet.take(at)).collect::<Result<Vec<_>, _>>()?;
    let front_end = vhost_user.map(|at| packet.take(at)).transpose()?;
    if channels.is_empty() && front_end.is_none() {
        return Err(FilesError::NoBorder);
    }
    raise_descriptor_limit().map_err(FilesError::SetUp)?;
    // Leaked, not counted: it is in use until the process ends.
    let tree: &'static Tree = Box::leak(Box::new(Tree::new(folder.as_fd())?));
    info!(logger, "files: serving"; "channels" => channels.len(),
        "vhost_user" => front_end.is_some());
    if !channels.is_empty() {
        let server: &'static Server<&'static Tree> = Box::leak(Box::new(Server::new(tree)));
        for (number, socket) in channels.into_iter().enumerate() {
            let logger = logger.clone();
            spawn(format!("files-{number}"), move || {
                let served = tree
                    .prepare_thread()
                    .and_then(|()| Channel::new(socket, server, tree)?.serve());
                // The channel is closed with this thread, so such a line comes once.
                if let Err(error) = served {
                    warn!(logger, "files: channel closed"; "channel" => number,
                        "error" => %error);
                }
            })?;
        }
    }
    if let Some(socket) = front_end {
        let logger = logger.clone();
        let device = vhost_user::Device::new(Arc::new(Server::new(tree)), tree);
        spawn("files-vhost".to_owned(), move || {
            if let Err(error) = vhost_user::serve(socket, device) {
                warn!(logger, "files: vhost-user ended"; "error" => %error);
            }
        })?;
    }
    Ok(())
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
