//! DeleteContainer: everything of a container goes, in the reverse order of its coming.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use husk_agent_protocols::SHARE_PATH;

use crate::apart::{alongside, within};
use crate::container::error::{ContainerError, Tried};
use crate::container::lifecycle::Container;

/// How long the host may take to write files back.
const SYNC_LIMIT: Duration = Duration::from_secs(3);

/// Removes `container`, whose init has exited or was never started, and writes its files back.
pub async fn delete(container: &Arc<Container>) -> Result<(), ContainerError> {
    container.begin_delete()?;
    clean(container).await?;
    // A host that does not answer keeps no container from being deleted.
    let _ = within(SYNC_LIMIT, async { alongside(sync).await? }).await;
    Ok(())
}

/// Has the host write the share's files back.
fn sync() -> io::Result<()> {
    // Not there in component tests; and a server without syncfs has nothing to write back.
    Ok(nix::unistd::syncfs(&File::open(SHARE_PATH)?)?)
}

/// Kills and removes whatever there is of `container`. What cannot be ended keeps nothing else from being
/// removed; the first error is the one to tell.
pub(super) async fn clean(container: &Container) -> Result<(), ContainerError> {
    let cgroup = container.cgroup();
    let killed = cgroup.kill().tried("kill the container's processes");
    let ended = match killed {
        Ok(()) => cgroup.emptied().await.tried("end the container's processes"),
        Err(error) => Err(error),
    };
    container.hang_up();
    container.lets_go().await;
    let ended = match ended {
        Ok(()) => cgroup.remove().await.tried("remove the cgroup"),
        Err(error) => Err(error),
    };
    ended.and(container.bundle().remove().tried("remove the bundle"))
}
