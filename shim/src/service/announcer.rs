//! What happens in the sandbox, as containerd's events.

use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskOOM, TaskStart};
use husk_runtime::container::{Happening, Observer};

use super::convert::timestamp;
use crate::publisher::Publisher;

/// Publishes happenings in the order in which they are told.
pub struct Announcer(Publisher);

impl Announcer {
    /// Through `publisher`.
    pub fn new(publisher: Publisher) -> Self {
        Self(publisher)
    }
}

impl Observer for Announcer {
    fn happened(&self, container_id: &str, exec_id: &str, pid: u32, happening: Happening) {
        let container_id = container_id.to_owned();
        match happening {
            Happening::Started if exec_id.is_empty() => {
                self.0.publish(TaskStart { container_id, pid, ..TaskStart::default() });
            }
            Happening::Started => self.0.publish(TaskExecStarted {
                container_id,
                exec_id: exec_id.to_owned(),
                pid,
                ..TaskExecStarted::default()
            }),
            Happening::OutOfMemory => {
                self.0.publish(TaskOOM { container_id, ..TaskOOM::default() });
            }
            Happening::Exited(exit) => {
                let id = if exec_id.is_empty() { &container_id } else { exec_id };
                self.0.publish(TaskExit {
                    id: id.to_owned(),
                    container_id,
                    pid,
                    exit_status: exit.status,
                    exited_at: Some(timestamp(exit.at)).into(),
                    ..TaskExit::default()
                });
            }
        }
    }
}
