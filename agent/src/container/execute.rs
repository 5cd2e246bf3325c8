//! The way of every process that the helper makes beside a container's init, an exec's or a shell's: from its
//! request to its first instruction, with all its streams and within a limit.

use std::path::Path;
use std::sync::Arc;

use nix::unistd::Uid;
use serde::Serialize;

use crate::container::error::{ContainerError, Tried};
use crate::container::helper::{Console, Helper, MAKE_LIMIT};
use crate::container::spec::SpecError;
use crate::init::reaper::Reaper;
use crate::process::{Links, Process, Stdio, Unborn};

/// A process to be made.
pub struct Making<'a, R> {
    /// The helper's role.
    pub role: &'static str,
    /// The helper's directory.
    pub directory: &'a Path,
    /// The request for the helper.
    pub request: R,
    /// Where the terminal comes from.
    pub console: Console,
    /// The terminal's owner.
    pub owner: Uid,
    /// The reaper that waits for the process.
    pub reaper: &'a Arc<Reaper>,
}

/// Makes a process and has it execute its command, once all its streams are joined. `at_exit` is for
/// [`Process::follow`]. A process whose making fails or takes too long is killed.
pub async fn execute<R: Serialize>(
    making: Making<'_, R>,
    (stdio, links): (Stdio, Links),
    at_exit: impl FnOnce() -> u64 + Send + 'static,
) -> Result<Arc<Process>, ContainerError> {
    let Making { role, directory, request, console, owner, reaper } = making;
    let request = serde_json::to_vec(&request).map_err(SpecError::Json)?;
    std::fs::write(directory.join(role).with_extension("json"), request)
        .tried("write the request")?;
    let made = async {
        let hold = reaper.hold();
        let mut helper = Helper::spawn(role, directory, stdio).tried("execute the helper")?;
        let pid = helper.pid().await?;
        let unborn = Unborn::new(pid);
        let exit = reaper.watch(pid);
        drop(hold);
        // The command runs only with all its streams.
        links.connected().await.tried("connect the streams")?;
        helper.go();
        helper.executed().await?;
        let master = console.master(owner).tried("receive the terminal")?;
        let relays = links.relay(master).tried("relay the streams")?;
        unborn.live();
        Ok(Process::follow(pid, relays, exit, at_exit))
    };
    let made = tokio::time::timeout(MAKE_LIMIT, made).await;
    made.unwrap_or_else(|_| Err(ContainerError::late(MAKE_LIMIT)))
}
