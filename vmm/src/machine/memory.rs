//! Memory that the guest is given and gives back while it runs.
//!
//! The device for it comes when it is needed first: each device on the bus costs the guest time at
//! its start.

use std::cell::{Cell, OnceCell};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_control::{MemorySize, Reply};
use slog::{Logger, info, o};

use super::BuildError;
use super::control::Control;
use super::plug::{Plug, Plugged};
use crate::devices::virtio::mem::{Mem, Watcher};
use crate::vm::KvmBlocks;

const MIB: u64 = 1 << 20;

/// Memory beyond what the guest was booted with.
pub(super) struct Growth {
    /// Until there is a device that takes them.
    blocks: Cell<Option<KvmBlocks>>,
    device: OnceCell<(Arc<Mutex<Mem>>, Plugged)>,
    control: Arc<Control>,
    boot_mib: u64,
    logger: Logger,
}

impl Growth {
    /// None yet; the guest was booted with `boot_mib`.
    pub(super) fn new(
        blocks: KvmBlocks,
        control: Arc<Control>,
        boot_mib: u64,
        logger: &Logger,
    ) -> Self {
        let logger = logger.new(o!("device" => "mem"));
        let blocks = Cell::new(Some(blocks));
        Self { blocks, device: OnceCell::new(), control, boot_mib, logger }
    }

    /// Asks the guest to have `mib` in all.
    pub(super) fn resize(&self, mib: u64, plug: &Plug) -> Result<MemorySize, BuildError> {
        let bytes = mib.saturating_sub(self.boot_mib).saturating_mul(MIB);
        if let Some((mem, plugged)) = self.device.get() {
            locked(mem).request(bytes);
            plugged.config_changed();
        } else if bytes > 0 {
            self.add(bytes, plug)?;
            return Ok(MemorySize { added: true, ..self.size() });
        }
        let size = self.size();
        info!(self.logger, "mem: the guest is asked"; "requested_mib" => size.requested_mib,
            "present_mib" => size.present_mib);
        Ok(size)
    }

    /// Puts the device onto the bus, with a first request for `bytes`.
    fn add(&self, bytes: u64, plug: &Plug) -> Result<(), BuildError> {
        let watcher = ControlWatcher { control: self.control.clone(), boot_mib: self.boot_mib };
        let Some(blocks) = self.blocks.take() else {
            return Err(BuildError::FixedMemory(self.boot_mib));
        };
        let range = blocks.range();
        let mut mem = Mem::new(range, Box::new(blocks), Box::new(watcher), self.logger.clone())?;
        mem.request(bytes);
        let mem = Arc::new(Mutex::new(mem));
        let plugged = plug.add(mem.clone(), self.logger.clone())?;
        // Nobody else sets it.
        let _ = self.device.set((mem, plugged));
        info!(self.logger, "mem: added"; "base" => range.base, "mib" => range.size() / MIB);
        Ok(())
    }

    /// Has the request `id` answered once the guest has what it is to have; `Some` if it has.
    pub(super) fn wait(&self, id: u64) -> Option<MemorySize> {
        match self.device.get() {
            Some((mem, _)) => {
                locked(mem).wait(id);
                None
            }
            None => Some(self.size()),
        }
    }

    /// How much the guest has, and is to have.
    pub(super) fn size(&self) -> MemorySize {
        let of = |read: fn(&Mem) -> u64| {
            self.boot_mib + self.device.get().map_or(0, |(mem, _)| read(&locked(mem)) / MIB)
        };
        MemorySize {
            requested_mib: of(Mem::requested),
            present_mib: of(Mem::present),
            added: false,
        }
    }
}

/// Answers the request that waits for the guest.
struct ControlWatcher {
    control: Arc<Control>,
    boot_mib: u64,
}

impl Watcher for ControlWatcher {
    fn reached(&mut self, request: u64, result: Result<u64, &'static str>) {
        let answer = result.map(|bytes| {
            let mib = self.boot_mib + bytes / MIB;
            Reply::Memory(MemorySize { requested_mib: mib, present_mib: mib, added: false })
        });
        self.control.reply(request, answer.map_err(str::to_owned), &[]);
    }
}

/// A panic aborts the process in what we ship, so a poisoned lock is only seen in tests.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
