//! The machine's size follows the limits of the containers in it.
//!
//! ```text
//!   a limit rises, a container comes:  machine grows ──▶ guest takes it up ──▶ limit is set
//!   a limit falls, a container goes:   limit is set ──▶ machine shrinks, as far as the guest lets go
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use husk_control::{MachineRequest, MemorySize, Reply};
use slog::{Logger, info, warn};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::ContainerError;
use crate::agent_client::{AgentClient, AgentError};
use crate::error::chain;
use crate::machine::{Machine, MachineError};
use crate::resource::{Limits, Sizing, SizingRules};

/// How long the guest may take to take memory up.
const TAKE_UP: Duration = Duration::from_secs(30);

/// How long it is looked at what memory it gives back.
const GIVE_BACK: Duration = Duration::from_secs(30);

/// Why the machine did not grow.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// The machine's process could not.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The agent could not.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest did not take up what it was given.
    #[error(
        "the guest took up {present} of {wanted} MiB of memory within {seconds} s; \
         start it with more (machine.memory, or the annotation io.husk.memory) or lower the limit"
    )]
    Slow {
        /// MiB that it should have.
        wanted: u64,
        /// MiB that it has.
        present: u64,
        /// How long it was waited for.
        seconds: u64,
    },
}

/// What a machine was booted as, and by which rules it changes.
#[derive(Debug, Clone)]
pub struct SizePlan {
    /// The rules.
    pub rules: SizingRules,
    /// Its size at first.
    pub booted: Sizing,
}

/// The size of a sandbox's machine.
pub struct MachineSize {
    plan: SizePlan,
    room: Sizing,
    machine: Arc<Machine>,
    agent: AgentClient,
    log: Logger,
    /// Held during every change.
    state: Mutex<State>,
}

struct State {
    limits: HashMap<String, Limits>,
    now: Sizing,
    /// Looks at what the guest gives back.
    watch: Option<JoinHandle<()>>,
}

impl MachineSize {
    /// A machine that has just been booted; calls of `agent` let it run.
    pub(super) fn new(
        plan: SizePlan,
        machine: Arc<Machine>,
        agent: AgentClient,
        log: Logger,
    ) -> Self {
        let state = State { limits: HashMap::new(), now: plan.booted, watch: None };
        let room = plan.rules.room(plan.booted);
        Self { room, plan, machine, agent, log, state: Mutex::new(state) }
    }

    /// Counts a container from now on: the machine is as large as it needs it, then `create` runs.
    /// One that is not created does not count.
    pub async fn with_container<T>(
        &self,
        id: &str,
        limits: Limits,
        create: impl Future<Output = Result<T, ContainerError>>,
    ) -> Result<T, ContainerError> {
        // Not held while a container is created, which may wait for hooks.
        let grown = {
            let mut state = self.state.lock().await;
            state.limits.insert(id.to_owned(), limits);
            self.grow(&mut state).await
        };
        let created = match grown {
            Ok(()) => create.await,
            Err(error) => Err(error.into()),
        };
        if created.is_err() {
            self.remove_container(id).await;
        }
        created
    }

    /// Does not count a container any more.
    pub async fn remove_container(&self, id: &str) {
        let mut state = self.state.lock().await;
        state.limits.remove(id);
        // Without any the machine is about to end, and else its pod's first container is there.
        if !state.limits.is_empty() {
            self.shrink(&mut state).await;
        }
    }

    /// Changes a container's limits: `change` says how, and `apply` sets them in the guest.
    pub(super) async fn with_limits(
        &self,
        id: &str,
        change: impl FnOnce(&mut Limits),
        apply: impl Future<Output = Result<(), ContainerError>>,
    ) -> Result<(), ContainerError> {
        let mut state = self.state.lock().await;
        let before = state.limits.get(id).copied();
        let mut limits = before.unwrap_or_default();
        change(&mut limits);
        state.limits.insert(id.to_owned(), limits);
        let result = match self.grow(&mut state).await {
            Ok(()) => apply.await,
            Err(error) => Err(error.into()),
        };
        if result.is_err() {
            match before {
                Some(before) => state.limits.insert(id.to_owned(), before),
                None => state.limits.remove(id),
            };
        }
        self.shrink(&mut state).await;
        result
    }

    /// What the containers ask for, as far as there is room.
    fn wanted(&self, state: &State) -> Sizing {
        let asked = self.asked(state);
        Sizing {
            vcpus: asked.vcpus.min(self.room.vcpus),
            // What it was booted with cannot be taken away.
            memory_mib: asked.memory_mib.clamp(self.plan.booted.memory_mib, self.room.memory_mib),
        }
    }

    fn asked(&self, state: &State) -> Sizing {
        self.plan.rules.size(state.limits.values())
    }

    /// Makes the machine as large as the containers need it; never smaller.
    async fn grow(&self, state: &mut State) -> Result<(), ResizeError> {
        let (asked, wanted) = (self.asked(state), self.wanted(state));
        if wanted.vcpus < asked.vcpus || wanted.memory_mib < asked.memory_mib {
            warn!(self.log, "limits ask for more than the machine can grow to \
                (machine.max_vcpus, machine.max_memory)";
                "vcpus" => asked.vcpus, "memory_mib" => asked.memory_mib,
                "most_vcpus" => self.room.vcpus, "most_memory_mib" => self.room.memory_mib);
        }
        if wanted.vcpus > state.now.vcpus {
            let count = wanted.vcpus;
            self.machine.request(MachineRequest::EnsureVcpus { count }, &[]).await?;
            self.agent.set_processors(count).await?;
            self.changed(state, Sizing { vcpus: count, ..state.now });
        }
        if wanted.memory_mib > state.now.memory_mib {
            let mib = wanted.memory_mib;
            // Whatever comes of it, that much is asked for until less is.
            let before = std::mem::replace(&mut state.now.memory_mib, mib);
            stop(&mut state.watch);
            if let Err(error) = self.agent.while_awake(self.take_up(mib)).await {
                if self.ask_memory(before).await.is_ok() {
                    state.now.memory_mib = before;
                }
                return Err(error);
            }
            self.changed(state, state.now);
        }
        Ok(())
    }

    /// Gives the guest memory and waits until it has taken it up.
    async fn take_up(&self, mib: u64) -> Result<(), ResizeError> {
        if self.ask_memory(mib).await?.added {
            self.agent.look_for_devices().await?;
        }
        let taken = self.machine.request(MachineRequest::AwaitMemory, &[]);
        match tokio::time::timeout(TAKE_UP, taken).await {
            Ok(taken) => memory(taken?).map(drop),
            Err(_) => {
                let size = self.ask_memory(mib).await?;
                let (wanted, present) = (size.requested_mib, size.present_mib);
                Err(ResizeError::Slow { wanted, present, seconds: TAKE_UP.as_secs() })
            }
        }
    }

    async fn ask_memory(&self, mib: u64) -> Result<MemorySize, ResizeError> {
        memory(self.machine.request(MachineRequest::ResizeMemory { mib }, &[]).await?)
    }

    /// Takes away what no container needs any more. What the guest does not let go of stays.
    async fn shrink(&self, state: &mut State) {
        let wanted = self.wanted(state);
        if wanted.vcpus < state.now.vcpus {
            match self.agent.set_processors(wanted.vcpus).await {
                Ok(()) => self.changed(state, Sizing { vcpus: wanted.vcpus, ..state.now }),
                Err(error) => {
                    warn!(self.log, "processors stay on line"; "error" => chain(&error));
                }
            }
        }
        if wanted.memory_mib < state.now.memory_mib {
            let asked = self.agent.while_awake(self.ask_memory(wanted.memory_mib)).await;
            stop(&mut state.watch);
            match asked {
                Ok(_) => {
                    self.changed(state, Sizing { memory_mib: wanted.memory_mib, ..state.now });
                    state.watch = Some(tokio::spawn(given_back(
                        Arc::clone(&self.machine),
                        wanted.memory_mib,
                        self.log.clone(),
                    )));
                }
                Err(error) => warn!(self.log, "memory stays"; "error" => chain(&error)),
            }
        }
    }

    fn changed(&self, state: &mut State, now: Sizing) {
        state.now = now;
        info!(self.log, "machine resized"; "vcpus" => now.vcpus, "memory_mib" => now.memory_mib);
    }
}

/// Whoever looked at what is given back does so no more: something else is asked for now.
fn stop(watch: &mut Option<JoinHandle<()>>) {
    if let Some(watch) = watch.take() {
        watch.abort();
    }
}

/// Says whether the guest has let go of memory.
async fn given_back(machine: Arc<Machine>, mib: u64, log: Logger) {
    let done = machine.request(MachineRequest::AwaitMemory, &[]);
    if tokio::time::timeout(GIVE_BACK, done).await.is_err()
        && let Ok(reply) = machine.request(MachineRequest::ResizeMemory { mib }, &[]).await
        && let Ok(size) = memory(reply)
    {
        info!(log, "the guest keeps memory that it could give back";
            "wanted_mib" => mib, "present_mib" => size.present_mib);
    }
}

fn memory(reply: Reply) -> Result<MemorySize, ResizeError> {
    match reply {
        Reply::Memory(size) => Ok(size),
        _ => Err(MachineError::WrongAnswer.into()),
    }
}
