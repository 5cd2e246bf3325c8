//! containerd's task service over a sandbox, and its sandbox service.

mod announcer;
mod convert;
mod lifecycle;
mod metrics;
mod pod;
mod sandbox;
mod sandbox_calls;
mod task;

pub use announcer::Announcer;
pub use lifecycle::TaskService;
pub use sandbox::SandboxService;
pub use sandbox_calls::SandboxHandle;
pub use task::Handle;
