//! Message-signalled interrupts and notification addresses on KVM.
//!
//! A vector is raised with `KVM_SIGNAL_MSI`, which needs no entry in KVM's routing table: each
//! change of that table waits for all vCPUs (SRCU), and a guest programs its vectors while it boots.
//! Only a vector whose eventfd somebody asked for gets an entry and an irqfd.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{InterruptChips, MsiMessage, MsiVector, Wiring};

/// Pins of the IOAPIC; the numbers behind them are for vectors.
const IOAPIC_PINS: u32 = 24;
const MAX_VECTORS: usize = 1024;

/// KVM's side of [`Wiring`].
#[derive(Clone)]
pub struct KvmWiring {
    table: Arc<Table>,
}

struct Table {
    vm: Arc<VmFd>,
    chips: InterruptChips,
    /// By number; a place that is free is taken again.
    routes: Mutex<Vec<Option<Route>>>,
}

/// One vector's part of the table.
#[derive(Default)]
struct Route {
    message: Option<MsiMessage>,
    /// Raised while it went nowhere.
    pending: bool,
    irqfd: Irqfd,
}

/// Whether KVM listens to the vector's eventfd. While the vector goes nowhere it does not: what is
/// written to the eventfd stays in it, and KVM looks at it when it begins to listen.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Irqfd {
    /// Nobody has asked for the eventfd.
    #[default]
    Absent,
    /// Wanted as soon as the vector goes somewhere.
    Parked,
    /// KVM listens.
    Present,
}

struct KvmVector {
    table: Arc<Table>,
    index: usize,
    event: EventFd,
}

impl KvmWiring {
    /// The wiring of `vm`, whose interrupt controllers exist.
    pub fn new(vm: Arc<VmFd>, chips: InterruptChips) -> Self {
        Self { table: Arc::new(Table { vm, chips, routes: Mutex::new(Vec::new()) }) }
    }
}

impl Wiring for KvmWiring {
    fn vector(&self) -> io::Result<Box<dyn MsiVector>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut routes = self.table.lock();
        let index = routes.iter().position(Option::is_none).unwrap_or(routes.len());
        if index >= MAX_VECTORS {
            return Err(io::Error::other("too many interrupt vectors"));
        }
        if index == routes.len() {
            routes.push(None);
        }
        routes[index] = Some(Route::default());
        Ok(Box::new(KvmVector { table: self.table.clone(), index, event }))
    }

    fn notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.table.vm.register_ioevent(event, &address, NoDatamatch)?)
    }

    fn unnotify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.table.vm.unregister_ioevent(event, &address, NoDatamatch)?)
    }
}

impl MsiVector for KvmVector {
    fn trigger(&self) -> io::Result<()> {
        let mut routes = self.table.lock();
        let Some(route) = &mut routes[self.index] else { return Ok(()) };
        match route.message {
            Some(message) => {
                drop(routes);
                self.table.signal(message)
            }
            None => {
                route.pending = true;
                Ok(())
            }
        }
    }

    /// A failure to wire it is told by the next `route`.
    fn event(&self) -> &EventFd {
        let mut routes = self.table.lock();
        if let Some(route) = &mut routes[self.index]
            && route.irqfd == Irqfd::Absent
        {
            route.irqfd = Irqfd::Parked;
            if route.message.is_some() {
                // It stays parked if it fails, and the next `route` tries again.
                let _ = self.listen(&mut routes);
            }
        }
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.table.lock();
        let Some(route) = &mut routes[self.index] else { return Ok(()) };
        if route.message == message && route.irqfd != Irqfd::Parked {
            return Ok(());
        }
        route.message = message;
        let raise = message.is_some() && std::mem::take(&mut route.pending);
        match (route.irqfd, message) {
            (Irqfd::Present, None) => {
                route.irqfd = Irqfd::Parked;
                self.table.vm.unregister_irqfd(&self.event, gsi(self.index))?;
            }
            (Irqfd::Present, Some(_)) => self.table.update(&routes)?,
            (Irqfd::Parked, Some(_)) => self.listen(&mut routes)?,
            (Irqfd::Parked, None) | (Irqfd::Absent, _) => {}
        }
        drop(routes);
        match message {
            Some(message) if raise => self.table.signal(message),
            _ => Ok(()),
        }
    }
}

impl KvmVector {
    /// Has KVM listen to the eventfd of a vector that goes somewhere.
    fn listen(&self, routes: &mut [Option<Route>]) -> io::Result<()> {
        self.table.set_irqfd(routes, self.index, Irqfd::Present);
        // The route first: an eventfd that has been written to is raised as KVM begins to listen.
        let wired = self
            .table
            .update(routes)
            .and_then(|()| Ok(self.table.vm.register_irqfd(&self.event, gsi(self.index))?));
        if wired.is_err() {
            self.table.set_irqfd(routes, self.index, Irqfd::Parked);
        }
        wired
    }
}

impl Drop for KvmVector {
    fn drop(&mut self) {
        let mut routes = self.table.lock();
        let route = routes[self.index].take();
        if route.is_some_and(|route| route.irqfd == Irqfd::Present) {
            // KVM lets go of an eventfd that is closed, too; so both may fail without harm.
            let _ = self.table.vm.unregister_irqfd(&self.event, gsi(self.index));
            let _ = self.table.update(&routes);
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Route>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_irqfd(&self, routes: &mut [Option<Route>], index: usize, irqfd: Irqfd) {
        if let Some(Some(route)) = routes.get_mut(index) {
            route.irqfd = irqfd;
        }
    }

    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        let msi = kvm_msi {
            address_lo: message.address_low,
            address_hi: message.address_high,
            data: message.data,
            ..Default::default()
        };
        // The guest may have named a processor that does not exist: its interrupt is lost, as on
        // hardware (KVM answers 0 or EINVAL).
        match self.vm.signal_msi(msi) {
            Err(error) if error.errno() != libc::EINVAL => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Gives KVM the whole table: the pins as they were, and the vectors with an irqfd.
    fn update(&self, routes: &[Option<Route>]) -> io::Result<()> {
        let mut entries = Vec::new();
        let pins = if self.chips == InterruptChips::Pins { IOAPIC_PINS } else { 0 };
        for pin in 0..pins {
            if pin < 8 {
                entries.push(pin_entry(pin, KVM_IRQCHIP_PIC_MASTER, pin));
            } else if pin < 16 {
                entries.push(pin_entry(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8));
            }
            entries.push(pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
        }
        for (index, route) in routes.iter().enumerate() {
            if let Some(Route { message: Some(message), irqfd: Irqfd::Present, .. }) = route {
                entries.push(message_entry(gsi(index), *message));
            }
        }
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

fn gsi(index: usize) -> u32 {
    // At most MAX_VECTORS exist.
    IOAPIC_PINS + u32::try_from(index).unwrap_or(0)
}

fn pin_entry(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address_low;
    entry.u.msi.address_hi = message.address_high;
    entry.u.msi.data = message.data;
    entry
}
