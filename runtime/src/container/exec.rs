//! Processes added to a container: known before they are started.
//!
//! ```text
//!   Added ──start──▶ Started ──delete──▶ Deleted
//!     └────────────────delete──────────────▲
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::watch;

use super::{ContainerError, Exit, Process};
use crate::io::StdioPaths;
use crate::lock::lock;

/// A process to be added to a container.
#[derive(Debug, Clone)]
pub struct ExecRequest {
    /// Its name, unique in the container.
    pub exec_id: String,
    /// What it is; translated already.
    pub spec: ProcessSpec,
    /// Where its streams go.
    pub stdio: StdioPaths,
}

#[derive(Debug, Clone)]
enum Stage {
    Added,
    Started(Arc<Process>),
    Deleted,
}

/// An added process. It has no process in the guest before its start, or if that failed.
#[derive(Debug)]
pub struct Exec {
    /// What was asked for.
    pub request: ExecRequest,
    stage: watch::Sender<Stage>,
    /// The size that its terminal is to have.
    size: Mutex<(u32, u32)>,
    /// Whether its standard input is to end with the clients'.
    input_closed: AtomicBool,
    pub(super) starting: tokio::sync::Mutex<()>,
}

impl Exec {
    pub(super) fn new(request: ExecRequest) -> Self {
        let size = Mutex::new(console_size(&request.spec));
        Self {
            request,
            stage: watch::Sender::new(Stage::Added),
            size,
            input_closed: AtomicBool::new(false),
            starting: tokio::sync::Mutex::default(),
        }
    }

    /// The process in the guest, once started.
    pub fn process(&self) -> Option<Arc<Process>> {
        match &*self.stage.borrow() {
            Stage::Started(process) => Some(Arc::clone(process)),
            Stage::Added | Stage::Deleted => None,
        }
    }

    /// Waits until it has been started and has ended; none if it is deleted before its start.
    pub async fn exited(&self) -> Option<Exit> {
        let mut stage = self.stage.subscribe();
        let stage = stage.wait_for(|stage| !matches!(stage, Stage::Added)).await.ok()?.clone();
        match stage {
            Stage::Started(process) => Some(process.exited().await),
            Stage::Added | Stage::Deleted => None,
        }
    }

    /// Sets the size of its terminal, or keeps it for the start. A client may ask while the process is
    /// being started, and has perhaps seen output of it already.
    pub async fn resize(&self, rows: u32, columns: u32) -> Result<(), ContainerError> {
        *lock(&self.size) = (rows, columns);
        match self.process() {
            Some(process) => process.resize(rows, columns).await,
            None => Ok(()),
        }
    }

    /// Ends its standard input once the clients have closed theirs, now or with the start: a client that
    /// has seen the process's first output can be faster than the agent's answer to the start.
    pub fn close_input(&self) {
        self.input_closed.store(true, Ordering::SeqCst);
        if let Some(process) = self.process() {
            process.close_input();
        }
    }

    pub(super) fn size(&self) -> (u32, u32) {
        *lock(&self.size)
    }

    /// Makes the process known, which was started with a terminal of `size`, and does what clients have
    /// asked for in the meantime.
    pub(super) async fn has_started(&self, process: &Arc<Process>, size: (u32, u32)) {
        self.stage.send_replace(Stage::Started(Arc::clone(process)));
        if self.input_closed.load(Ordering::SeqCst) {
            process.close_input();
        }
        let (rows, columns) = self.size();
        if (rows, columns) != size {
            // Refused if it has exited already, which its exit says better.
            let _ = process.resize(rows, columns).await;
        }
    }

    pub(super) fn deleted(&self) {
        self.stage.send_replace(Stage::Deleted);
    }
}

/// The rows and columns that `process` asks for; 0 leaves the kernel's default.
pub(super) fn console_size(process: &ProcessSpec) -> (u32, u32) {
    let size = process.console_size();
    let count = |characters| u32::try_from(characters).unwrap_or(0);
    size.map_or((0, 0), |size| (count(size.height()), count(size.width())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_terminal_begins_with_the_size_of_its_process_until_it_is_resized() {
        let process = serde_json::json!({
            "user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/", "terminal": true,
            "consoleSize": {"height": 57, "width": 123},
        });
        let spec: ProcessSpec = serde_json::from_value(process).unwrap();
        let request = ExecRequest { exec_id: "e".to_owned(), spec, stdio: StdioPaths::default() };
        let exec = Exec::new(request);
        assert_eq!(exec.size(), (57, 123));
        exec.resize(24, 80).await.unwrap();
        assert_eq!(exec.size(), (24, 80));
    }
}
