//! A sandbox: one machine with its file server and agent, and the containers in it.
//!
//! ```text
//!   Sandbox::create            each step owns its undo: dropping the parts made so far ends them
//!     folder    /run/husk/<namespace>/<id>, with `share`
//!     machine   process started, Listen(agent), Boot      ┐ at the same time
//!     network   what is in the machine's namespace joined with taps
//!     files     process started, Serve                    ┘
//!     agent     dials in ─▶ StartSandbox
//!         ▼
//!   Running ──stop──▶ Stopping: with containers left Shutdown to the agent and a little
//!         │                     patience; kill; folder removed ─▶ gone
//!         └──the machine ends by itself──▶ Lost: every process exits with 255
//! ```

mod boot;
mod clock;
mod cpusets;
mod create;
mod error;
mod etc;
mod forward;
mod network;
mod oom_scores;
mod resolver;
#[expect(clippy::module_inception, reason = "a sandbox is what the folder is about")]
mod sandbox;
#[cfg(test)]
pub(crate) mod tests;

pub use create::SandboxRequest;
pub use error::SandboxError;
pub use etc::EtcFiles;
pub use sandbox::Sandbox;
