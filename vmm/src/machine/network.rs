//! The machine's network devices, which come and go.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use husk_control::{NetworkDevice, NetworkMetrics, Packet, PacketError, Request};
use slog::{Logger, info, o};

use super::plug::{Plug, PlugError, Plugged};
use crate::devices::virtio::net::{Net, NetConfig, NetError};

/// The longest name of a device.
const LONGEST_ID: usize = 64;

/// Why a network device cannot be had, or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The name.
    #[error("a network device's name has 1 to {LONGEST_ID} bytes, not {0}")]
    Id(usize),
    /// Twice the same name.
    #[error("there is a network device {0:?} already")]
    Taken(String),
    /// No such device.
    #[error("there is no network device {0:?}")]
    Unknown(String),
    /// The device.
    #[error("network device {id:?}")]
    Device {
        /// The device.
        id: String,
        /// What is wrong with it.
        source: NetError,
    },
    /// Its place.
    #[error("network device {id:?}")]
    Plug {
        /// The device.
        id: String,
        /// Why it has none.
        source: PlugError,
    },
    /// The tap or vhost-net.
    #[error("network device {id:?} does not take the change")]
    Change {
        /// The device.
        id: String,
        /// Why not.
        source: io::Error,
    },
}

/// A device asked for, with the descriptors that it names.
pub struct NetworkParts {
    device: NetworkDevice,
    taps: Vec<OwnedFd>,
    vhost: Vec<OwnedFd>,
}

impl NetworkParts {
    /// Takes the descriptors that came with the request.
    pub fn take(packet: &mut Packet<Request>, device: &NetworkDevice) -> Result<Self, PacketError> {
        let mut take = |positions: &[usize]| -> Result<Vec<OwnedFd>, PacketError> {
            positions.iter().map(|&position| packet.take(position)).collect()
        };
        let (taps, vhost) = (take(&device.queues)?, take(&device.vhost)?);
        Ok(Self { device: device.clone(), taps, vhost })
    }
}

struct Entry {
    id: String,
    net: Arc<Mutex<Net>>,
    plugged: Plugged,
}

/// The devices there are.
#[derive(Default)]
pub struct Networks {
    entries: RefCell<Vec<Entry>>,
}

impl Networks {
    /// Makes a device and plugs it in.
    pub fn add(
        &self,
        parts: NetworkParts,
        plug: &Plug,
        paused: bool,
        logger: &Logger,
    ) -> Result<(), NetworkError> {
        let NetworkParts { device, taps, vhost } = parts;
        let id = device.id;
        if id.is_empty() || id.len() > LONGEST_ID {
            return Err(NetworkError::Id(id.len()));
        }
        if self.entries.borrow().iter().any(|entry| entry.id == id) {
            return Err(NetworkError::Taken(id));
        }
        let NetworkDevice { mac, mtu, receive_limit, send_limit, .. } = device;
        let config = NetConfig { taps, vhost, mac, mtu, receive_limit, send_limit };
        let logger = logger.new(o!("device" => format!("net {id}")));
        let net = match Net::new(config, logger.clone()) {
            Ok(net) => Arc::new(Mutex::new(net)),
            Err(source) => return Err(NetworkError::Device { id, source }),
        };
        change(&id, lock(&net).set_paused(paused))?;
        let kernel = lock(&net).is_in_kernel();
        match plug.add(net.clone(), logger.clone()) {
            Ok(plugged) => {
                info!(logger, "net: plugged in"; "kernel" => kernel);
                self.entries.borrow_mut().push(Entry { id, net, plugged });
                Ok(())
            }
            Err(source) => Err(NetworkError::Plug { id, source }),
        }
    }

    /// Takes a device out.
    pub fn remove(&self, id: &str, plug: &Plug, logger: &Logger) -> Result<(), NetworkError> {
        let mut entries = self.entries.borrow_mut();
        let found = entries.iter().position(|entry| entry.id == id);
        let entry = entries.remove(found.ok_or_else(|| NetworkError::Unknown(id.to_owned()))?);
        plug.remove(&entry.plugged);
        info!(logger, "net: taken out"; "id" => id);
        Ok(())
    }

    /// Brings a device's link up or down and tells the guest.
    pub fn set_link(&self, id: &str, up: bool) -> Result<(), NetworkError> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.id == id);
        let entry = entry.ok_or_else(|| NetworkError::Unknown(id.to_owned()))?;
        // Not under the device's lock: the transport takes it to tell the guest.
        let news = change(id, lock(&entry.net).set_link(up))?;
        if news {
            entry.plugged.config_changed();
        }
        Ok(())
    }

    /// Stops the frames of all devices, or lets them go on.
    pub fn set_paused(&self, paused: bool) -> Result<(), NetworkError> {
        let entries = self.entries.borrow();
        entries.iter().try_for_each(|entry| change(&entry.id, lock(&entry.net).set_paused(paused)))
    }

    /// What has passed.
    pub fn metrics(&self) -> Vec<NetworkMetrics> {
        let entries = self.entries.borrow();
        let metrics = entries.iter().map(|entry| {
            let net = lock(&entry.net);
            let counters = net.counters();
            NetworkMetrics {
                id: entry.id.clone(),
                kernel: net.is_in_kernel(),
                received_packets: counters.received.packets,
                received_bytes: counters.received.bytes,
                received_drops: counters.received.drops,
                sent_packets: counters.sent.packets,
                sent_bytes: counters.sent.bytes,
                sent_drops: counters.sent.drops,
            }
        });
        metrics.collect()
    }
}

fn change<T>(id: &str, result: io::Result<T>) -> Result<T, NetworkError> {
    result.map_err(|source| NetworkError::Change { id: id.to_owned(), source })
}

/// A panic aborts the process in what we ship, so a poisoned lock is only seen in tests.
fn lock(net: &Mutex<Net>) -> MutexGuard<'_, Net> {
    net.lock().unwrap_or_else(PoisonError::into_inner)
}
