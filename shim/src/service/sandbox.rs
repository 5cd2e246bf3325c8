//! The state behind the sandbox service: a sandbox that is a client's from its creation to the shim's
//! end, whether there are containers in it or not.
//!
//! ```text
//!   None ──create──▶ Created ──start──▶ Ready ──stop, or the machine's end──▶ Ended
//!                       └──────────────────stop─────────────────────────────────▲
//! ```
//!
//! The machine boots from `create` on; `start` waits for it. `shutdown` ends the shim in any state.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use husk_runtime::machine::NetworkNamespace;
use husk_runtime::sandbox::Sandbox;
use slog::info;
use tokio::sync::watch;

use super::lifecycle::TaskService;
use super::pod::Pod;
use crate::boot::Booter;
use crate::error::ServiceError;
use crate::serve::{bundle_spec, request as bundle_request};

/// How a sandbox ends that nobody has told to.
const LOST: u32 = 255;

/// How long a sandbox may take to end if its client does not say.
const PATIENCE: Duration = Duration::from_secs(4);

/// What has become of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nobody has asked for one.
    None,
    /// Its machine boots.
    Created {
        /// Since when.
        at: SystemTime,
    },
    /// Containers can be made in it.
    Ready {
        /// When it was created.
        at: SystemTime,
        /// The machine process's.
        pid: u32,
    },
    /// Its machine is gone.
    Ended {
        /// When it was created.
        created: SystemTime,
        /// When it ended.
        at: SystemTime,
        /// 0 if it was told to.
        status: u32,
    },
}

/// The sandbox service of one shim.
pub struct SandboxService {
    booter: Arc<Booter>,
    tasks: Arc<TaskService>,
    state: watch::Sender<State>,
    told: AtomicBool,
}

impl SandboxService {
    /// Over the sandbox that `booter` boots and `tasks` uses.
    pub fn new(booter: Arc<Booter>, tasks: Arc<TaskService>) -> Self {
        let state = watch::Sender::new(State::None);
        Self { booter, tasks, state, told: AtomicBool::new(false) }
    }

    /// What has become of the sandbox `id`; an error unless it has been created here.
    pub(super) fn state(&self, id: &str) -> Result<State, ServiceError> {
        let state = *self.state.borrow();
        if state == State::None || id != self.booter.id() {
            return Err(ServiceError::NoSandbox(id.to_owned()));
        }
        Ok(state)
    }

    /// Begins to boot the sandbox.
    pub(super) fn create(&self, request: &CreateSandboxRequest) -> Result<(), ServiceError> {
        let id = &request.sandbox_id;
        if id != self.booter.id() {
            let reason = format!("this shim is that of {}, not of {id}", self.booter.id());
            return Err(ServiceError::Invalid(reason));
        }
        let network = request.netns_path.clone();
        let begun = match Pod::of(request)? {
            Some(pod) => self.booter.begin(move |blank| pod.request(blank, &network)),
            // Not of the CRI: what there is to say is in the bundle.
            None => {
                let config = Path::new(&request.bundle_path).join("config.json");
                self.booter.begin(move |blank| {
                    let mut wanted = bundle_request(blank, bundle_spec(&config)?)?;
                    if !network.is_empty() {
                        wanted.network = NetworkNamespace::At(network.into());
                    }
                    Ok(wanted)
                })
            }
        };
        if !begun {
            return Err(ServiceError::SandboxExists(id.clone()));
        }
        self.tasks.keep(id);
        self.state.send_replace(State::Created { at: SystemTime::now() });
        info!(self.tasks.log, "sandbox created"; "sandbox" => id);
        Ok(())
    }

    /// Waits for the sandbox's machine; its process id, and when the sandbox was created.
    pub(super) async fn start(
        self: Arc<Self>,
        id: String,
    ) -> Result<(u32, SystemTime), ServiceError> {
        let refused = |state| Err(ServiceError::SandboxState { action: "start", state });
        let at = match self.state(&id)? {
            State::Created { at } if !self.told.load(Ordering::Acquire) => at,
            State::Created { .. } => return refused("is being stopped"),
            State::Ready { .. } => return refused("has been started"),
            State::Ended { .. } => return refused("has ended"),
            State::None => return Err(ServiceError::NoSandbox(id)),
        };
        let sandbox = self.tasks.booted().await?;
        let pid = sandbox.pid();
        // Another start or a stop may have come first.
        let first = self.state.send_if_modified(|state| {
            let created = matches!(state, State::Created { .. });
            if created {
                *state = State::Ready { at, pid };
            }
            created
        });
        if !first {
            return refused("has been started or stopped meanwhile");
        }
        tokio::spawn(Arc::clone(&self).watch(sandbox));
        info!(self.tasks.log, "sandbox started"; "sandbox" => id);
        Ok((pid, at))
    }

    /// Notes the machine's end.
    async fn watch(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let end = sandbox.ended().await;
        info!(self.tasks.log, "the sandbox's machine has ended"; "reason" => end.reason);
        self.note_end();
    }

    fn note_end(&self) {
        let status = if self.told.load(Ordering::Acquire) { 0 } else { LOST };
        self.state.send_if_modified(|state| {
            let (State::Created { at: created } | State::Ready { at: created, .. }) = *state else {
                return false;
            };
            *state = State::Ended { created, at: SystemTime::now(), status };
            true
        });
    }

    /// Ends the sandbox with all that is in it, in order within `seconds`; the shim stays. Can be
    /// called again.
    pub(super) async fn stop(
        self: Arc<Self>,
        id: String,
        seconds: u32,
    ) -> Result<(), ServiceError> {
        if let State::Ended { .. } = self.state(&id)? {
            // The machine may have ended by itself: its files and mounts are still there.
            self.tasks.stop().await;
            return Ok(());
        }
        self.told.store(true, Ordering::Release);
        self.booter.give_up().await;
        if let Some(sandbox) = self.tasks.running() {
            let asked = Duration::from_secs(seconds.into());
            sandbox.stop_within(if seconds == 0 { PATIENCE } else { asked.min(PATIENCE) }).await;
        }
        self.note_end();
        info!(self.tasks.log, "sandbox stopped"; "sandbox" => id);
        Ok(())
    }

    /// Waits for the sandbox's end; how and when it came.
    pub(super) async fn wait(&self, id: &str) -> Result<(u32, SystemTime), ServiceError> {
        self.state(id)?;
        let mut state = self.state.subscribe();
        let ended = state.wait_for(|state| matches!(state, State::Ended { .. })).await;
        match ended.as_deref() {
            Ok(State::Ended { status, at, .. }) => Ok((*status, *at)),
            // The sender is ours and lives as long as we do.
            _ => Err(ServiceError::NoSandbox(id.to_owned())),
        }
    }

    /// The sandbox, if it runs.
    pub(super) fn running(
        &self,
        id: &str,
        action: &'static str,
    ) -> Result<Arc<Sandbox>, ServiceError> {
        let refused = |state| Err(ServiceError::SandboxState { action, state });
        match (self.state(id)?, self.tasks.running()) {
            (State::Ready { .. }, Some(sandbox)) => Ok(sandbox),
            (State::Ended { .. }, _) => refused("has ended"),
            _ => refused("has not been started"),
        }
    }

    /// Ends the sandbox, if there is one, and the shim.
    pub(super) async fn shut_down(self: Arc<Self>, id: String) -> Result<(), ServiceError> {
        if id != self.booter.id() {
            return Err(ServiceError::NoSandbox(id));
        }
        self.told.store(true, Ordering::Release);
        self.booter.give_up().await;
        self.tasks.finish().await;
        self.note_end();
        Ok(())
    }
}
