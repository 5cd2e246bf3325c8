//! The sandbox's network: what the engine lays into its namespace is what the guest gets, whenever
//! it comes.
//!
//! ```text
//!   namespace ──scan──▶ interfaces ──join with a tap──▶ device of the machine's
//!        │                                                     │ known by its hardware address
//!        └─changes (netlink)─▶ scan again                      ▼
//!                                   └──NetworkState──▶ agent: name, addresses, routes
//! ```
//!
//! It is looked at before the boot, before each container starts, and whenever netlink tells of a
//! change. An interface that cannot be carried is left out with a warning. Packet filter rules are
//! told with the rest; one that the guest cannot carry out keeps containers from starting.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use husk_agent_protocols::agent::{FilterRefusal, NetworkState};
use husk_agent_protocols::resolver::Carrier;
use husk_configuration::NetworkSettings;
use husk_control::{NetworkDevice, RateLimit, TokenBucket};
use nix::unistd::gettid;
use rtnetlink::LinkUnspec;
use slog::{Logger, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::{SandboxError, forward, resolver};
use crate::agent_client::AgentClient;
use crate::container::Follower;
use crate::error::chain;
use crate::lock::lock;
use crate::machine::{Machine, NetworkNamespace};
use crate::resource::network::{
    Filter, Found, Interface, Loopback, Namespace, NetworkError, Tap, Uncarried, redirect,
};

/// The kernel's path for frames.
const VHOST: &str = "/dev/vhost-net";

/// Milliseconds in which a limit's bucket fills: it holds what may pass in them.
const REFILL: u64 = 100;

/// Locally administered, and "HSK"; the rest numbers the devices of a machine.
const DEVICE_ADDRESS: [u8; 4] = [0x02, 0x48, 0x53, 0x4b];

/// The network of a sandbox.
pub(super) struct SandboxNetwork {
    namespace: Namespace,
    settings: NetworkSettings,
    queues: usize,
    carried: Mutex<Carried>,
    watch: std::sync::Mutex<Option<AbortHandle>>,
    forwarding: std::sync::Mutex<Option<AbortHandle>>,
    pub(super) log: Logger,
}

#[derive(Default)]
struct Carried {
    devices: Vec<Device>,
    told: NetworkState,
    /// The packet filter as `told`, with the names of its rules.
    filter: Filter,
    /// What the guest's kernel refused of it.
    refused: Vec<Uncarried>,
    warned: HashSet<String>,
    /// Names of interfaces that have someone else's ingress discipline.
    occupied: Vec<String>,
    made: u16,
}

/// An interface and the device that carries it.
struct Device {
    interface: Interface,
    address: [u8; 6],
    wire: NetworkDevice,
}

/// What a machine boots with.
#[derive(Default)]
pub(super) struct BootNetwork {
    pub(super) devices: Vec<NetworkDevice>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) state: NetworkState,
}

/// Refuses a namespace that a sandbox cannot have for its own.
pub(super) fn check_namespace(network: &NetworkNamespace) -> Result<(), SandboxError> {
    let path = match network {
        NetworkNamespace::New => return Ok(()),
        NetworkNamespace::Inherited => return Err(SandboxError::HostNetwork),
        NetworkNamespace::At(path) => path,
    };
    let of = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        let file = std::fs::metadata(path)
            .map_err(|source| SandboxError::Folder { path: path.to_path_buf(), source })?;
        Ok::<_, SandboxError>((file.dev(), file.ino()))
    };
    let own = PathBuf::from(format!("/proc/self/task/{}/ns/net", gettid()));
    if of(path)? == of(&own)? {
        return Err(SandboxError::HostNetwork);
    }
    // Engines hold namespaces of sandboxes by a mount; a process's is that of another container.
    let mut parts = path.components().skip(1).map(|part| part.as_os_str().to_string_lossy());
    if parts.next().as_deref() == Some("proc")
        && parts.next().is_some_and(|pid| pid.parse::<u32>().is_ok())
    {
        return Err(SandboxError::ForeignNetwork { path: path.clone() });
    }
    Ok(())
}

impl SandboxNetwork {
    /// Of the machine whose process is there already, and does not run its guest yet.
    pub(super) fn open(
        machine: &Machine,
        settings: &NetworkSettings,
        vcpus: u8,
        log: &Logger,
    ) -> Result<Self, NetworkError> {
        let namespace = Namespace::open(Path::new(&format!("/proc/{}/ns/net", machine.pid())))?;
        let queues = match settings.queues {
            0 => vcpus.clamp(1, 8),
            some => some,
        };
        Ok(Self {
            namespace,
            settings: settings.clone(),
            queues: usize::from(queues),
            carried: Mutex::default(),
            watch: std::sync::Mutex::default(),
            forwarding: std::sync::Mutex::default(),
            log: log.clone(),
        })
    }

    /// Joins what is there with devices for the boot.
    pub(super) async fn at_boot(&self) -> Result<BootNetwork, NetworkError> {
        let mut carried = self.carried.lock().await;
        let found = Found::scan(&self.namespace).await?;
        let mut boot = BootNetwork::default();
        for (device, descriptors) in self.attach_new(&mut carried, &found).await {
            boot.devices.push(device.wire.clone());
            boot.descriptors.extend(descriptors);
            carried.devices.push(device);
        }
        self.list_rules(&mut carried, &found)?;
        self.check_rules(&mut carried)?;
        carried.told = carried.state(&found);
        boot.state = carried.told.clone();
        Ok(boot)
    }

    /// Takes in what the guest's kernel refused of the network that it started with. Rules that it refused are an
    /// error, unless the operator accepts that.
    pub(super) async fn started(
        &self,
        refused: &[String],
        filter: &[FilterRefusal],
    ) -> Result<(), NetworkError> {
        self.warn_of(refused);
        let mut carried = self.carried.lock().await;
        carried.refused = carried.filter.refused(filter);
        self.check_rules(&mut carried)
    }

    /// Returns an error if there are rules in the namespace that the guest does not carry out, unless the operator
    /// accepts that.
    pub(super) async fn check(&self) -> Result<(), NetworkError> {
        self.check_rules(&mut *self.carried.lock().await)
    }

    fn check_rules(&self, carried: &mut Carried) -> Result<(), NetworkError> {
        let occupied = carried.occupied.iter().map(|name| Uncarried {
            what: format!("ingress queueing discipline of interface {name}"),
            reason: "a microVM's packets pass by traffic control".to_owned(),
        });
        let rules = carried.filter.uncarried.iter().chain(&carried.refused).cloned();
        let all: Vec<_> = occupied.chain(rules).collect();
        if self.settings.ignore_rules {
            for Uncarried { what, reason } in all {
                if carried.warned.insert(format!("{what} {reason}")) {
                    warn!(self.log, "network: rule ignored"; "rule" => what, "reason" => reason);
                }
            }
            return Ok(());
        }
        let count = all.len();
        let Some(Uncarried { what: rule, reason }) = all.into_iter().next() else {
            return Ok(());
        };
        let others = if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
        Err(NetworkError::NotCarriedOut { rule, others, reason })
    }

    /// Looks at the packet filter's rules, which the next state has.
    fn list_rules(&self, carried: &mut Carried, found: &Found) -> Result<(), NetworkError> {
        let told = &carried.told;
        // Where nothing is carried, nothing passes by.
        if carried.devices.is_empty() && told.nftables.is_empty() && told.xtables.is_empty() {
            carried.filter = Filter::default();
        } else {
            carried.filter = self.namespace.filter(&found.names(), &told.xtables)?;
        }
        Ok(())
    }

    /// Brings machine and guest up to what the namespace holds now.
    pub(super) async fn refresh(
        &self,
        machine: &Machine,
        agent: &AgentClient,
    ) -> Result<(), NetworkError> {
        let mut carried = self.carried.lock().await;
        let found = Found::scan(&self.namespace).await?;
        for (device, descriptors) in self.attach_new(&mut carried, &found).await {
            let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match machine.add_network(device.wire.clone(), &borrowed).await {
                Ok(()) => carried.devices.push(device),
                Err(error) => {
                    self.warn(&mut carried, &device.interface.name, &chain(&error));
                    redirect::part(self.namespace.netlink(), device.interface.index).await;
                }
            }
        }
        let gone = carried.take_gone(&found);
        let mut told = self.list_rules(&mut carried, &found);
        let state = carried.state(&found);
        if state != carried.told {
            match agent.update_network(&state).await {
                Ok((refused, filter)) => {
                    carried.told = state;
                    carried.refused = carried.filter.refused(&filter);
                    self.warn_of(&refused);
                }
                Err(error) => {
                    warn!(self.log, "network: the guest was not told"; "error" => chain(&error));
                    if (&state.nftables, &state.xtables)
                        != (&carried.told.nftables, &carried.told.xtables)
                    {
                        told = told.and(Err(NetworkError::RulesNotTold(Box::new(error))));
                    }
                }
            }
        }
        // The guest has let go of them.
        for device in gone {
            info!(self.log, "network: interface gone"; "interface" => &device.interface.name);
            redirect::part(self.namespace.netlink(), device.interface.index).await;
            if let Err(error) = machine.remove_network(&device.wire.id).await {
                let error = chain(&error);
                warn!(self.log, "network: device not removed"; "device" => device.wire.id,
                    "error" => error);
            }
        }
        told
    }

    /// From now on, follows the namespace by itself.
    pub(super) fn follow(self: &Arc<Self>, machine: &Arc<Machine>, agent: &AgentClient) {
        let (network, machine) = (Arc::downgrade(self), Arc::clone(machine));
        let agent = agent.clone();
        let task = tokio::spawn(async move {
            loop {
                let Some(network) = network.upgrade() else { return };
                if !network.namespace.changed().await || machine.ended().is_some() {
                    return;
                }
                if let Err(error) = network.refresh(&machine, &agent).await {
                    warn!(network.log, "network: cannot follow"; "error" => chain(&error));
                }
                if let Err(error) = network.check().await {
                    warn!(network.log, "network: a rule is not carried out"; "error" => chain(&error));
                }
            }
        });
        *lock(&self.watch) = Some(task.abort_handle());
    }

    /// From now on, what is dialled at the namespace's loopback addresses reaches the guest's.
    pub(super) fn forward(&self, follower: Follower) {
        match Loopback::open(&self.namespace) {
            Ok(loopback) => {
                let task = tokio::spawn(forward::serve(loopback, follower));
                *lock(&self.forwarding) = Some(task.abort_handle());
            }
            Err(error) => {
                warn!(self.log, "network: no port forwarding"; "error" => %error);
            }
        }
    }

    /// From now on, the guest asks names of the name server that the engine runs in the namespace.
    pub(super) async fn resolve(self: &Arc<Self>, follower: &Follower) {
        let asked = forward::called_back(follower, |port| follower.agent.serve_resolver(port));
        match asked.await {
            Ok(stream) => {
                let task = tokio::spawn(resolver::serve(stream, Arc::downgrade(self)));
                *lock(&self.forwarding) = Some(task.abort_handle());
            }
            Err(error) => {
                warn!(self.log, "network: the engine cannot be asked names"; "error" => error);
            }
        }
    }

    /// Asks the engine's name server.
    pub(super) async fn ask(&self, carrier: Carrier, question: &[u8]) -> io::Result<Vec<u8>> {
        crate::resource::network::resolver::ask(&self.namespace, carrier, question).await
    }

    /// Says what the guest's kernel refused.
    pub(super) fn warn_of(&self, refused: &[String]) {
        for what in refused {
            warn!(self.log, "network: the guest refused"; "what" => what);
        }
    }

    /// Leaves the namespace as the engine made it. The machine has ended, and its taps with it.
    pub(super) async fn end(&self) {
        for task in [&self.watch, &self.forwarding] {
            if let Some(task) = lock(task).take() {
                task.abort();
            }
        }
        let mut carried = self.carried.lock().await;
        for device in carried.devices.drain(..) {
            redirect::part(self.namespace.netlink(), device.interface.index).await;
        }
    }

    async fn attach_new(
        &self,
        carried: &mut Carried,
        found: &Found,
    ) -> Vec<(Device, Vec<OwnedFd>)> {
        for (name, why) in &found.skipped {
            self.warn(carried, name, why);
        }
        carried.occupied.clear();
        let mut new = Vec::new();
        for interface in found.interfaces.iter().filter(|one| one.is_ready()) {
            if carried.devices.iter().any(|device| device.interface.index == interface.index) {
                continue;
            }
            match self.attach(carried.made, interface).await {
                Ok(device) => {
                    carried.made = carried.made.wrapping_add(1);
                    info!(self.log, "network: interface carried"; "interface" => &interface.name);
                    new.push(device);
                }
                Err(error) => {
                    if matches!(error, NetworkError::Occupied) {
                        carried.occupied.push(interface.name.clone());
                    }
                    self.warn(carried, &interface.name, &chain(&error));
                }
            }
        }
        new
    }

    async fn attach(
        &self,
        number: u16,
        interface: &Interface,
    ) -> Result<(Device, Vec<OwnedFd>), NetworkError> {
        let netlink = self.namespace.netlink();
        let tap = Tap::create(&self.namespace, interface.index, self.queues)?;
        let message = LinkUnspec::new_with_name(&tap.name).mtu(interface.mtu).up().build();
        let up = netlink.link().set(message).execute().await;
        up.map_err(NetworkError::netlink("cannot set the tap up"))?;
        let index = Found::index_of(&self.namespace, &tap.name).await?;
        redirect::join(netlink, interface.index, index).await?;
        let settings = &self.settings;
        let receive_limit = limit(settings.receive_rate.bytes(), settings.receive_packets);
        let send_limit = limit(settings.send_rate.bytes(), settings.send_packets);
        let mut descriptors = tap.queues;
        if settings.vhost && receive_limit.is_none() && send_limit.is_none() {
            let vhost = (0..self.queues)
                .map(|_| OpenOptions::new().read(true).write(true).open(VHOST).map(OwnedFd::from))
                .collect::<Result<Vec<_>, _>>();
            // Without the module, user space does it.
            descriptors.extend(vhost.unwrap_or_default());
        }
        let [high, low] = number.to_be_bytes();
        let [a, b, c, d] = DEVICE_ADDRESS;
        let address = [a, b, c, d, high, low];
        let wire = NetworkDevice {
            id: format!("net{number}"),
            queues: (0..self.queues).collect(),
            vhost: (self.queues..descriptors.len()).collect(),
            mac: address,
            // The guest sets it, and may have to set it higher later.
            mtu: None,
            receive_limit,
            send_limit,
        };
        Ok((Device { interface: interface.clone(), address, wire }, descriptors))
    }

    /// Once for each interface and reason.
    fn warn(&self, carried: &mut Carried, name: &str, why: &str) {
        if carried.warned.insert(format!("{name} {why}")) {
            warn!(self.log, "network: interface not carried"; "interface" => name, "reason" => why);
        }
    }
}

impl Carried {
    fn state(&mut self, found: &Found) -> NetworkState {
        for device in &mut self.devices {
            let index = device.interface.index;
            if let Some(now) = found.interfaces.iter().find(|one| one.index == index) {
                device.interface.clone_from(now);
            }
        }
        let devices: Vec<_> =
            self.devices.iter().map(|device| (&device.interface, device.address)).collect();
        let mut state = found.state(&devices);
        state.nftables.clone_from(&self.filter.nftables);
        state.xtables.clone_from(&self.filter.xtables);
        state
    }

    /// Those whose interface is gone.
    fn take_gone(&mut self, found: &Found) -> Vec<Device> {
        let there =
            |device: &Device| found.interfaces.iter().any(|i| i.index == device.interface.index);
        let (stay, gone) = self.devices.drain(..).partition(there);
        self.devices = stay;
        gone
    }
}

impl BootNetwork {
    /// The devices with their descriptors counted from `first`.
    pub(super) fn devices_from(&self, first: usize) -> Vec<NetworkDevice> {
        let mut next = first;
        let mut devices = self.devices.clone();
        for device in &mut devices {
            for descriptor in device.queues.iter_mut().chain(&mut device.vhost) {
                *descriptor = next;
                next += 1;
            }
        }
        devices
    }
}

fn limit(bytes: u64, packets: u32) -> Option<RateLimit> {
    let bucket = |rate: u64| {
        let size = (rate / (1000 / REFILL)).max(1);
        (rate > 0).then_some(TokenBucket { size, burst: 0, refill_ms: REFILL })
    };
    let limit = RateLimit { bytes: bucket(bytes), packets: bucket(packets.into()) };
    (limit != RateLimit::default()).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_fill_a_bucket_ten_times_a_second() {
        assert_eq!(limit(0, 0), None);
        let both = limit(1 << 20, 500).unwrap();
        let bytes = both.bytes.unwrap();
        assert_eq!((bytes.size, bytes.refill_ms), ((1 << 20) / 10, 100));
        assert_eq!(both.packets.unwrap().size, 50);
        assert_eq!(limit(0, 3).unwrap().packets.unwrap().size, 1);
    }

    #[test]
    fn the_hosts_and_other_containers_namespaces_are_refused() {
        let refused = |network| check_namespace(&network).unwrap_err().to_string();
        assert!(refused(NetworkNamespace::Inherited).contains("host's network"));
        let own = NetworkNamespace::At("/proc/self/ns/net".into());
        assert!(refused(own).contains("host's network"));
        check_namespace(&NetworkNamespace::New).unwrap();
    }

    #[test]
    fn descriptors_are_counted_on() {
        let device = NetworkDevice {
            id: "a".into(),
            queues: vec![0, 1],
            vhost: vec![2, 3],
            mac: [0; 6],
            mtu: None,
            receive_limit: None,
            send_limit: None,
        };
        let devices = vec![device.clone(), NetworkDevice { vhost: Vec::new(), ..device }];
        let boot = BootNetwork { devices, ..BootNetwork::default() };
        let counted = boot.devices_from(7);
        assert_eq!((&counted[0].queues, &counted[0].vhost), (&vec![7, 8], &vec![9, 10]));
        assert_eq!(counted[1].queues, [11, 12]);
    }
}
