//! Virtual processors: one thread each.
//!
//! ```text
//!              Run                    reset, triple fault, failure
//!   Paused ◀─────────▶ Running ────────────────────────────────────▶ Ended
//!      │      Pause       │                                            │
//!      └──────────────────┴──────────────────── Stop ──────────────────┴──▶ the thread returns
//! ```
//!
//! A thread starts as Paused. Commands come over a channel and are answered over another; a Running
//! vCPU is made to look by a signal whose handler sets `immediate_exit`, so that no command is
//! missed between the look and `KVM_RUN`.

mod cpuid;
mod exit;
mod handle;
mod kick;
mod setup;
mod state;
mod thread;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

pub use cpuid::guest_cpuid;
pub use handle::VcpuHandle;
pub use setup::{BootEntry, create_vcpu};
pub use state::{StateError, VcpuState};

use crate::bus::Bus;
use crate::machine::EndSignal;
use crate::vm::KvmError;

/// What all vCPUs of a machine share.
pub struct Shared {
    /// Devices behind ports.
    pub ports: Bus,
    /// Devices behind addresses.
    pub memory: Bus,
    /// Where an end is told.
    pub end: Arc<EndSignal>,
    /// Exits to user space so far.
    pub exits: AtomicU64,
    /// Held while port writes that KVM has put off are taken: all vCPUs share one ring.
    put_off: Mutex<()>,
}

impl Shared {
    /// Buses that are complete, and the signal of the machine's end.
    pub fn new(ports: Bus, memory: Bus, end: Arc<EndSignal>) -> Self {
        Self { ports, memory, end, exits: AtomicU64::new(0), put_off: Mutex::new(()) }
    }
}

/// Why a vCPU cannot be made or told something.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No thread, or no signal handler.
    #[error("a vCPU's thread could not be started")]
    Thread(#[source] std::io::Error),
    /// The thread is gone.
    #[error("a vCPU's thread has ended")]
    Gone,
    /// State could not be saved or restored.
    #[error("a vCPU's state")]
    State(#[from] StateError),
}
