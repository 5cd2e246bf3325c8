//! containerd's task service over a sandbox.

mod announcer;
mod convert;
mod lifecycle;
mod metrics;
mod task;

pub use announcer::Announcer;
pub use lifecycle::TaskService;
pub use task::Handle;
