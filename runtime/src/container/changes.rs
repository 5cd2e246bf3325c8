//! Tells the guest of changes that the host makes on volumes.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_agent_protocols::SHARE_PATH;
use husk_agent_protocols::agent::volume_change::Kind;
use husk_agent_protocols::agent::{RepeatChangesRequest, VolumeChange};
use husk_control::REPEAT_ATTRIBUTE;

use crate::agent_client::{AgentClient, AgentError};
use crate::machine::watched_fd;
use crate::resource::{Change, ChangeKind, Changes, VOLUMES};

/// The time from a change until the guest is told, in which others of the same work are collected, and
/// between two calls at least.
const COLLECT: Duration = Duration::from_millis(50);

/// Begins to tell the guest of changes, if there is something to watch and nobody does yet.
pub(super) fn tell(changes: Arc<Changes>, agent: &AgentClient) {
    let Some(events) = changes.follow() else { return };
    let agent = agent.clone();
    tokio::spawn(async move {
        // Without it programs in the guest hear less.
        let _ = follow(&changes, events, &agent).await;
    });
}

/// Tells the guest of all changes until it cannot be reached.
async fn follow(changes: &Changes, events: OwnedFd, agent: &AgentClient) -> std::io::Result<()> {
    let events = watched_fd(events)?;
    loop {
        let mut ready = events.readable().await?;
        tokio::time::sleep(COLLECT).await;
        ready.clear_ready();
        let changed = changes.read()?;
        if changed.is_empty() {
            continue;
        }
        let mut request = RepeatChangesRequest::new();
        REPEAT_ATTRIBUTE.clone_into(&mut request.attribute);
        request.changes = changed.into_iter().map(as_request).collect();
        if let Err(AgentError::Lost(_)) = agent.repeat_changes(&request).await {
            return Ok(());
        }
    }
}

fn as_request(change: Change) -> VolumeChange {
    let volume = Path::new(SHARE_PATH).join(VOLUMES).join(change.volume);
    let (kind, before) = match change.kind {
        ChangeKind::Content => (Kind::CONTENT, Vec::new()),
        ChangeKind::Attributes => (Kind::ATTRIBUTES, Vec::new()),
        ChangeKind::Created => (Kind::CREATED, Vec::new()),
        ChangeKind::Removed => (Kind::REMOVED, Vec::new()),
        ChangeKind::Renamed(before) => (Kind::RENAMED, before),
    };
    VolumeChange {
        volume: volume.to_string_lossy().into_owned(),
        kind: kind.into(),
        name: change.name,
        before,
        is_folder: change.is_folder,
        ..Default::default()
    }
}
