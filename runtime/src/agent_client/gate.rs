//! Whether the agent's processors run: they stand still while every container is paused.
//!
//! ```text
//!            every container paused, no call under way
//!   running ───────────────────────────────────────────▶ still
//!      ▲                       a call                       │
//!      └────────────────────────────────────────────────────┘
//! ```

use std::sync::Arc;

use husk_control::MachineRequest;
use tokio::sync::Mutex;

use crate::machine::Machine;

/// What a call leaves behind when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// What was before: it only looked.
    Unchanged,
    /// Processes may have something to do or to tell: the processors go on.
    Going,
    /// Every container is paused now.
    Still,
}

/// One machine's gate.
#[derive(Debug)]
pub(crate) struct Gate {
    machine: Arc<Machine>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    calls: usize,
    all_paused: bool,
    still: bool,
}

impl Gate {
    pub(super) fn new(machine: Arc<Machine>) -> Self {
        Self { machine, state: Mutex::default() }
    }

    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Before a call: the processors run until the [`Inside`] is left.
    pub(super) async fn enter(self: &Arc<Self>) -> Inside {
        let mut state = self.state.lock().await;
        state.calls += 1;
        let inside = Inside(Some(Arc::clone(self)));
        // One that cannot go on has ended, which the call itself will tell.
        if state.still && self.machine.request(MachineRequest::Resume, &[]).await.is_ok() {
            state.still = false;
        }
        inside
    }

    async fn leave(&self, after: After) {
        let mut state = self.state.lock().await;
        state.calls -= 1;
        match after {
            After::Unchanged => {}
            After::Going => state.all_paused = false,
            After::Still => state.all_paused = true,
        }
        if state.all_paused && state.calls == 0 && !state.still {
            state.still = self.machine.request(MachineRequest::Pause, &[]).await.is_ok();
        }
    }
}

/// A call under way.
pub(crate) struct Inside(Option<Arc<Gate>>);

impl Inside {
    pub(super) async fn leave(mut self, after: After) {
        if let Some(gate) = self.0.take() {
            gate.leave(after).await;
        }
    }
}

/// A call that was given up.
impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(gate) = self.0.take() {
            tokio::spawn(async move { gate.leave(After::Unchanged).await });
        }
    }
}
