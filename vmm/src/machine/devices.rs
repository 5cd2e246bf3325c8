//! The machine's devices, and how they get onto its buses.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use slog::{Logger, o};
use vmm_sys_util::eventfd::EventFd;

use super::plug::{Plug, Plugged};
use super::{BuildError, EndSignal};
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::bus::pci::{ConfigPorts, HostBridge, PciBus, PciWindow};
use crate::devices::legacy::{I8042, LimitedLog, PvPanic, Serial};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::Fs;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::vcpu::Shared;
use crate::vm::{KvmError, LiveMemory, Vm};

/// The buses while they are being filled.
pub(super) struct Devices {
    ports: Bus,
    memory: Bus,
    pci: Arc<PciBus>,
}

impl Devices {
    /// What every machine has: a host bridge, a reset line, a way to tell of a panic.
    pub(super) fn new(end: &Arc<EndSignal>) -> Result<Self, BuildError> {
        let pci = Arc::new(PciBus::new(layout::BAR_WINDOW, layout::BAR_WINDOW_SIZE)?);
        pci.add(Arc::new(Mutex::new(HostBridge::new())))?;
        let panic = PvPanic::new(pci.allocate(PvPanic::BAR_SIZE)?, end.clone())?;
        pci.add(Arc::new(Mutex::new(panic)))?;
        let mut ports = Bus::new();
        let controller = Arc::new(Mutex::new(I8042::new(end.clone())));
        ports.insert(I8042::BASE, I8042::LENGTH, controller)?;
        Ok(Self { ports, memory: Bus::new(), pci })
    }

    /// A serial console into a log.
    pub(super) fn add_serial(
        &mut self,
        vm: &Vm,
        log: LimitedLog,
    ) -> Result<Arc<Mutex<Serial>>, BuildError> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        vm.fd()
            .register_irqfd(&line, Serial::LINE)
            .map_err(KvmError::call("wire the console's interrupt"))?;
        let serial = Arc::new(Mutex::new(Serial::new(line, log)));
        self.ports.insert(Serial::BASE, Serial::LENGTH, serial.clone())?;
        Ok(serial)
    }

    /// Where virtio devices are plugged in.
    pub(super) fn plug(&self, vm: &Vm, memory: LiveMemory) -> Plug {
        Plug::new(memory, Arc::new(vm.wiring()), self.pci.clone())
    }

    /// The buses as the vCPUs use them.
    pub(super) fn finish(mut self, vm: &Vm, end: Arc<EndSignal>) -> Result<Shared, BuildError> {
        let ports = Arc::new(Mutex::new(ConfigPorts::new(self.pci.clone())));
        self.ports.insert(ConfigPorts::BASE, ConfigPorts::LENGTH, ports)?;
        // The address register's every write is followed by an access of the data port.
        vm.coalesce_ports(ConfigPorts::BASE, ConfigPorts::ADDRESS_LENGTH)?;
        // A guest may move BARs; where memory is, its accesses do not come here.
        let below = u64::from(layout::IOAPIC);
        self.memory.insert(0, below, Arc::new(Mutex::new(PciWindow::new(self.pci, 0))))?;
        Ok(Shared::new(self.ports, self.memory, end))
    }
}

/// The virtio devices a machine is built with.
pub(super) struct Virtio<'a> {
    plug: &'a Plug,
    logger: &'a Logger,
}

impl<'a> Virtio<'a> {
    /// Devices go into `plug`.
    pub(super) fn new(plug: &'a Plug, logger: &'a Logger) -> Self {
        Self { plug, logger }
    }

    /// Entropy.
    pub(super) fn add_rng(&mut self) -> Result<(), BuildError> {
        let logger = self.named("rng");
        let rng = Rng::new(logger.clone())?;
        self.add(Arc::new(Mutex::new(rng)), logger).map(drop)
    }

    /// Streams to and from the shim.
    pub(super) fn add_vsock(&mut self, vsock: Arc<Mutex<Vsock>>) -> Result<(), BuildError> {
        let logger = self.named("vsock");
        self.add(vsock, logger).map(drop)
    }

    /// A shared folder.
    pub(super) fn add_fs(
        &mut self,
        tag: &str,
        channels: Vec<OwnedFd>,
    ) -> Result<Arc<Mutex<Fs>>, BuildError> {
        let logger = self.named("fs");
        let fs = Arc::new(Mutex::new(Fs::new(tag, channels, logger.clone())?));
        self.add(fs.clone(), logger)?;
        Ok(fs)
    }

    fn named(&self, name: &'static str) -> Logger {
        self.logger.new(o!("device" => name))
    }

    fn add<D>(&mut self, device: Arc<Mutex<D>>, logger: Logger) -> Result<Plugged, BuildError>
    where
        D: VirtioDevice + MutEventSubscriber + 'static,
    {
        Ok(self.plug.add(device, logger)?)
    }
}
