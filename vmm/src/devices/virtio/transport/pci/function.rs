//! The PCI function.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slog::{Logger, debug, error, warn};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::capabilities::Capabilities;
use super::common::{Common, Effect};
use super::layout::{BAR_SIZE, MAX_QUEUES, NOTIFY, NOTIFY_MULTIPLIER, Part, find};
use super::msix::Msix;
use super::queue::QueueError;
use super::state::{STATE_VERSION, VirtioPciState};
use super::status::Phase;
use crate::bus::pci::{Bar, ConfigSpace, ConfigSpaceError, Identity, PciFunction};
use crate::devices::virtio::log_limit::LogLimit;
use crate::devices::virtio::state::{QueuePosition, RestoreError, check_version};
use crate::devices::virtio::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::vm::{LiveMemory, Wiring};

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x0040;
const REVISION: u8 = 1;
/// "Does not fit any other class": drivers go by vendor and device number.
const CLASS: u32 = 0xff_00_00;
const ISR_CONFIG: u8 = 2;

/// Why a device cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// More queues, or another type number, than PCI has room for.
    #[error("device has an impossible type or number of queues")]
    Device,
    /// The configuration space cannot be laid out.
    #[error("PCI configuration space")]
    Config(#[from] ConfigSpaceError),
    /// Interrupts or notifications cannot be had.
    #[error("wiring of interrupts and notifications")]
    Wiring(#[from] io::Error),
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    logger: Logger,
    log_limit: LogLimit,
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: LiveMemory,
    space: ConfigSpace,
    capabilities: Capabilities,
    common: Common,
    msix: Msix,
    wiring: Arc<dyn Wiring>,
    kicks: Vec<EventFd>,
    /// The BAR's address when KVM was last told where to listen for notifications.
    told: u64,
    /// KVM listens there.
    listening: bool,
    isr: u8,
    /// The device holds queues.
    active: bool,
    /// It has been taken off the bus.
    gone: bool,
}

impl VirtioPci {
    /// Puts `device` behind a BAR of [`BAR_SIZE`] bytes at `bar_address`, with an interrupt source
    /// for configuration changes and one per queue.
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: impl Into<LiveMemory>,
        wiring: Arc<dyn Wiring>,
        bar_address: u64,
        logger: Logger,
    ) -> Result<Self, TransportError> {
        let (kind, common) = {
            let device = lock(&device);
            let common = Common::new(device.features(), device.queue_sizes());
            (device.device_type(), common)
        };
        let kind = u16::try_from(kind).ok().filter(|&kind| kind < 0x40);
        let kind = kind.ok_or(TransportError::Device)?;
        let queues = common.queues.len();
        if queues > MAX_QUEUES {
            return Err(TransportError::Device);
        }
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind,
            revision: REVISION,
            class: CLASS,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        space.add_bar(Bar { index: 0, address: bar_address, size: BAR_SIZE })?;
        let capabilities = Capabilities::add(&mut space, queues + 1)?;
        let vectors = (0..=queues).map(|_| wiring.vector()).collect::<io::Result<Vec<_>>>()?;
        let new_kick = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = (0..queues).map(new_kick).collect::<io::Result<Vec<_>>>()?;
        let mut function = Self {
            logger,
            log_limit: LogLimit::default(),
            device,
            memory: memory.into(),
            space,
            capabilities,
            common,
            msix: Msix::new(vectors),
            wiring,
            kicks,
            told: bar_address,
            listening: false,
            isr: 0,
            active: false,
            gone: false,
        };
        function.listen_at(bar_address)?;
        Ok(function)
    }

    /// Has KVM listen for notifications at this address of the BAR, and nowhere else.
    fn listen_at(&mut self, bar_address: u64) -> io::Result<()> {
        self.stop_listening();
        self.told = bar_address;
        for (number, (address, kick)) in notifications(bar_address, &self.kicks).enumerate() {
            if let Err(error) = self.wiring.notify(address, kick) {
                for (address, kick) in notifications(bar_address, &self.kicks).take(number) {
                    // It has just been made.
                    let _ = self.wiring.unnotify(address, kick);
                }
                return Err(error);
            }
        }
        self.listening = true;
        Ok(())
    }

    fn stop_listening(&mut self) {
        if !std::mem::take(&mut self.listening) {
            return;
        }
        for (address, kick) in notifications(self.told, &self.kicks) {
            if let Err(error) = self.wiring.unnotify(address, kick) {
                error!(self.logger, "virtio: notification not unwired"; "error" => %error);
            }
        }
    }

    /// Follows the BAR. Where KVM cannot listen, because another function does, kicks arrive as
    /// writes of a vCPU's; only the guest loses by that.
    fn follow_bar(&mut self) {
        let address = self.space.bars().first().map(|bar| bar.address);
        if let Some(address) = address
            && self.told != address
            && let Err(error) = self.listen_at(address)
            && let Some(suppressed) = self.log_limit.allow()
        {
            debug!(self.logger, "virtio: no notifications by KVM"; "error" => %error,
                "suppressed" => suppressed);
        }
    }

    /// For one that has been taken off the bus: the device is reset, and nothing reaches it any more.
    pub fn unplug(&mut self) {
        self.gone = true;
        self.common.reset();
        if std::mem::take(&mut self.active) {
            lock(&self.device).reset();
        }
        self.stop_listening();
    }

    /// Device configuration has changed: tells the driver.
    pub fn config_changed(&mut self) {
        self.common.config_generation = self.common.config_generation.wrapping_add(1);
        self.interrupt_config();
    }

    /// Everything between guest and device. Save the device itself in the same pause.
    pub fn save(&self) -> VirtioPciState {
        let device = lock(&self.device);
        VirtioPciState {
            version: STATE_VERSION,
            device_type: device.device_type(),
            config: self.space.save(),
            common: self.common.clone(),
            msix: self.msix.save(),
            isr: self.isr,
            positions: device.positions(),
        }
    }

    /// Takes a saved state into a fresh transport. The device must have been restored before: it is
    /// activated here if it was active.
    pub fn restore(&mut self, state: &VirtioPciState) -> Result<(), RestoreError> {
        check_version(state.version, STATE_VERSION)?;
        if state.device_type != lock(&self.device).device_type() {
            return Err(RestoreError::Mismatch("kind of device"));
        }
        let sizes = |common: &Common| -> Vec<u16> {
            common.queues.iter().map(|queue| queue.max_size).collect()
        };
        if sizes(&state.common) != sizes(&self.common)
            || state.common.device_features != self.common.device_features
            || state.common.driver_features & !self.common.device_features != 0
        {
            return Err(RestoreError::Mismatch("queues or features"));
        }
        self.space.restore(&state.config)?;
        self.follow_bar();
        self.common = state.common.clone();
        self.isr = state.isr;
        self.msix.restore(&state.msix)?;
        if self.common.status.phase() == Phase::Live && !state.positions.is_empty() {
            self.activate(&state.positions).map_err(|error| match error {
                ActivationFailure::Device(error) => RestoreError::Activate(error),
                ActivationFailure::Queue(_) => RestoreError::Mismatch("place of a queue"),
            })?;
            // A kick on the way when the state was saved is lost; look at every queue once.
            for kick in &self.kicks {
                kick.write(1)?;
            }
        }
        // What could never have been saved so was not.
        if self.save() == *state {
            Ok(())
        } else {
            Err(RestoreError::Mismatch("it cannot have been saved so"))
        }
    }

    fn activate(&mut self, positions: &[QueuePosition]) -> Result<(), ActivationFailure> {
        let event_idx = self.common.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let memory = self.memory.now();
        let mut queues = Vec::with_capacity(self.common.queues.len());
        // A device finds its queues by their order, so none may be left out before the last one that
        // it needs; what a driver has set up behind that is of no use to it.
        let wanted = lock(&self.device).queues_needed(self.common.driver_features);
        for (index, registers) in self.common.queues.iter().enumerate().take(wanted) {
            if !registers.enabled {
                continue;
            }
            registers.check(&memory)?;
            let position = positions.get(queues.len()).copied().unwrap_or_default();
            queues.push(ActiveQueue {
                queue: registers.build(event_idx, position)?,
                kick: self.kicks[index].try_clone().map_err(ActivateError::Io)?,
                interrupt: self.msix.vector(registers.vector).map_err(ActivateError::Io)?,
            });
        }
        let got = queues.len();
        if got != wanted {
            return Err(ActivateError::Queues { got, wanted }.into());
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.common.driver_features,
            queues,
        };
        lock(&self.device).activate(activation)?;
        self.active = true;
        Ok(())
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let msix = &self.msix;
        let memory = self.memory.now();
        let effect = self.common.write(offset, data, &memory, |number| msix.accept(number));
        match effect {
            Effect::None => {}
            Effect::Reset => {
                self.isr = 0;
                if std::mem::take(&mut self.active) {
                    lock(&self.device).reset();
                }
            }
            Effect::Activate => {
                if let Err(error) = self.activate(&[]) {
                    // The guest may reset and try again as often as it likes.
                    if let Some(suppressed) = self.log_limit.allow() {
                        error!(self.logger, "virtio: activation failed"; "error" => %error,
                            "suppressed" => suppressed);
                    }
                    self.common.status.set_needs_reset();
                    self.interrupt_config();
                }
            }
            Effect::Refused(what) => {
                if let Some(suppressed) = self.log_limit.allow() {
                    debug!(self.logger, "virtio: write refused"; "what" => what,
                        "register" => offset, "suppressed" => suppressed);
                }
            }
        }
    }

    fn interrupt_config(&mut self) {
        self.isr |= ISR_CONFIG;
        if let Err(error) = self.msix.trigger(self.common.config_vector) {
            error!(self.logger, "virtio: cannot interrupt the guest"; "error" => %error);
        }
    }

    /// A vector could not be wired: the guest goes on without it, which it will notice.
    fn report_wiring(&mut self, result: io::Result<()>) {
        if let Err(error) = result
            && let Some(suppressed) = self.log_limit.allow()
        {
            warn!(self.logger, "virtio: interrupt not wired"; "error" => %error,
                "suppressed" => suppressed);
        }
    }

    fn kick(&mut self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            // A full counter means that the event is pending already.
            let _ = kick.write(1);
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: u8, data: &mut [u8]) {
        if self.capabilities.is_access_data(usize::from(offset), data.len())
            && let Some(target) = self.capabilities.access_target(&self.space, data.len())
        {
            return self.bar_read(0, target, data);
        }
        self.space.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8]) {
        if self.gone {
            return;
        }
        if self.capabilities.is_access_data(usize::from(offset), data.len()) {
            if let Some(target) = self.capabilities.access_target(&self.space, data.len()) {
                self.bar_write(0, target, data);
            }
            return;
        }
        self.space.write(offset, data);
        self.follow_bar();
        let control = self.space.word(self.capabilities.msix_control);
        let result = self.msix.set_control(control);
        self.report_wiring(result);
    }

    fn bars(&self) -> Vec<Bar> {
        self.space.bars()
    }

    fn bar_read(&mut self, index: u8, offset: u64, data: &mut [u8]) {
        if index != 0 {
            return data.fill(0xff);
        }
        match find(offset, data.len()) {
            Some((Part::Common, offset)) => self.common.read(offset, data),
            Some((Part::Isr, offset)) => {
                data.fill(0);
                if offset == 0
                    && let Some(first) = data.first_mut()
                {
                    // Reading acknowledges.
                    *first = std::mem::take(&mut self.isr);
                }
            }
            Some((Part::Device, offset)) => {
                data.fill(0);
                lock(&self.device).config_read(offset, data);
            }
            Some((Part::Notify, _)) => data.fill(0),
            Some((Part::Table, offset)) => self.msix.read_table(offset, data),
            Some((Part::Pending, offset)) => self.msix.read_pending(offset, data),
            None => data.fill(0),
        }
    }

    fn bar_write(&mut self, index: u8, offset: u64, data: &[u8]) {
        // A vCPU may have been on its way here while the function was taken away.
        if index != 0 || self.gone {
            return;
        }
        match find(offset, data.len()) {
            Some((Part::Common, offset)) => self.write_common(offset, data),
            Some((Part::Device, offset)) => lock(&self.device).config_write(offset, data),
            // Normally KVM takes these writes before they come here.
            Some((Part::Notify, offset)) => self.kick(offset),
            Some((Part::Table, offset)) => {
                let result = self.msix.write_table(offset, data);
                self.report_wiring(result);
            }
            Some((Part::Isr | Part::Pending, _)) | None => {}
        }
    }
}

/// The notification address of each queue.
fn notifications(bar_address: u64, kicks: &[EventFd]) -> impl Iterator<Item = (u64, &EventFd)> {
    let step = u64::from(NOTIFY_MULTIPLIER);
    (0..).zip(kicks).map(move |(queue, kick)| (bar_address + NOTIFY + queue * step, kick))
}

#[derive(Debug, thiserror::Error)]
enum ActivationFailure {
    #[error("queue: {0}")]
    Queue(#[from] QueueError),
    #[error("device: {0}")]
    Device(#[from] ActivateError),
}

fn lock<'a>(
    device: &'a Arc<Mutex<dyn VirtioDevice>>,
) -> MutexGuard<'a, dyn VirtioDevice + 'static> {
    // A device that panicked under its lock is reset or saved as it stands: nothing in it is
    // unsafe to touch, and the process normally aborts on panic anyway.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
