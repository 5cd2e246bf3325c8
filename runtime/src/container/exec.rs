//! Processes added to a container: known before they are started.
//!
//! ```text
//!   Added ──start──▶ Started ──delete──▶ Deleted
//!     └────────────────delete──────────────▲
//! ```

use std::sync::{Arc, Mutex};

use oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::watch;

use super::{Exit, Process};
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
    /// The size to give its terminal at the start.
    size: Mutex<(u32, u32)>,
    pub(super) starting: tokio::sync::Mutex<()>,
}

impl Exec {
    pub(super) fn new(request: ExecRequest) -> Self {
        Self {
            request,
            stage: watch::Sender::new(Stage::Added),
            size: Mutex::default(),
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

    /// Remembers the size of a terminal that is not there yet.
    pub fn remember_size(&self, rows: u32, columns: u32) {
        *lock(&self.size) = (rows, columns);
    }

    pub(super) fn size(&self) -> (u32, u32) {
        *lock(&self.size)
    }

    pub(super) fn has_started(&self, process: Arc<Process>) {
        self.stage.send_replace(Stage::Started(process));
    }

    pub(super) fn deleted(&self) {
        self.stage.send_replace(Stage::Deleted);
    }
}
