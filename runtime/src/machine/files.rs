//! The file server process.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use husk_control::{FilesConfig, FilesMessage, FilesRequest, VolumeRules};
use slog::{Logger, debug};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};

use super::client::{receive, send, watched};
use super::{Child, MachineError, NetworkNamespace, OomScore, Program, Role};

/// A file server; dropping ends it.
#[derive(Debug)]
pub struct FileServer {
    // Held open: the server ends when it closes.
    _socket: AsyncFd<OwnedFd>,
    pid: u32,
    oom_score: Option<OomScore>,
    kill: Arc<Notify>,
    end: watch::Receiver<Option<String>>,
}

impl FileServer {
    /// Starts a server of `folder` on `channels` and waits until it serves, at most for `limit`.
    pub async fn start(
        program: Program<'_>,
        folder: BorrowedFd<'_>,
        channels: &[OwnedFd],
        volumes: VolumeRules,
        limit: Duration,
        log: &Logger,
    ) -> Result<Self, MachineError> {
        let (child, socket) =
            Child::spawn(program, Role::Files, &NetworkNamespace::Inherited, log)?;
        let socket = watched(socket)?;
        let mut descriptors = vec![folder];
        descriptors.extend(channels.iter().map(std::os::fd::AsFd::as_fd));
        let config = FilesConfig {
            folder: 0,
            channels: (1..descriptors.len()).collect(),
            vhost_user: None,
            volumes: Some(volumes),
        };
        send(&socket, &FilesRequest::Serve(config), &descriptors).await?;
        let answer = tokio::time::timeout(limit, receive::<FilesMessage>(&socket)).await;
        match answer {
            Ok(Ok(Some(packet))) => match packet.message {
                FilesMessage::Serving => {}
                FilesMessage::Failed { error } => {
                    return Err(MachineError::Refused(format!("the file server failed: {error}")));
                }
            },
            Ok(Ok(None)) => return Err(MachineError::Ended(child.exited().await)),
            Ok(Err(error)) => return Err(MachineError::Control(error)),
            Err(_) => {
                let silence = format!(
                    "the file server does not serve after {limit:?} (machine.start_timeout)"
                );
                return Err(MachineError::Refused(silence));
            }
        }
        let pid = child.pid().as_raw().unsigned_abs();
        let kill = Arc::new(Notify::new());
        let oom_score = child.oom_score();
        let (told, end) = watch::channel(None);
        tokio::spawn(follow(child, Arc::clone(&kill), told, log.clone()));
        Ok(Self { _socket: socket, pid, oom_score, kill, end })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sets how soon the host's OOM killer takes the process.
    pub fn set_oom_score(&self, score: i32) -> io::Result<()> {
        self.oom_score.as_ref().map_or(Ok(()), |it| it.set(score))
    }

    /// Waits for its end and says how it came.
    pub async fn end(&self) -> String {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        ended.ok().and_then(|how| how.clone()).unwrap_or_default()
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.kill.notify_one();
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn follow(child: Child, kill: Arc<Notify>, told: watch::Sender<Option<String>>, log: Logger) {
    let how = child.life(kill).await;
    debug!(log, "file server ended"; "how" => &how);
    told.send_replace(Some(how));
}
