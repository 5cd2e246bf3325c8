//! DeleteContainer: everything of a container goes, in the reverse order of its coming.

use std::fs::File;
use std::sync::Arc;

use husk_agent_protocols::SHARE_PATH;

use crate::container::error::{ContainerError, Tried};
use crate::container::lifecycle::Container;

/// Removes `container`, whose init has exited or was never started, and writes its files back.
pub async fn delete(container: &Arc<Container>) -> Result<(), ContainerError> {
    container.begin_delete()?;
    clean(container).await?;
    // Not there in component tests; and a server without syncfs has nothing to write back.
    if let Ok(share) = File::open(SHARE_PATH) {
        let _ = nix::unistd::syncfs(&share);
    }
    Ok(())
}

/// Kills and removes whatever there is of `container`.
pub(super) async fn clean(container: &Container) -> Result<(), ContainerError> {
    let cgroup = container.cgroup();
    cgroup.kill().tried("kill the container's processes")?;
    cgroup.emptied().await.tried("end the container's processes")?;
    container.hang_up();
    container.lets_go();
    cgroup.remove().await.tried("remove the cgroup")?;
    container.bundle().remove().tried("remove the bundle")
}
