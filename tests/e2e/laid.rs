//! Networks that several rows share, with the containers in them.

use husk_tests::containerd::{Run, Runtime};
use husk_tests::network::{Network, ip};
use husk_tests::task::Task;
use serde_json::json;

use crate::network::{Bridge, bridge_name, bridge_plugin, bridged, inside, sleeping, subnet};
use crate::shared::Shared;

/// Two containers on one bridge, the first with a published port and with servers on ports 80 and 7.
pub struct Bridged {
    /// The first one.
    pub task: Task,
    /// The second one.
    pub client: Task,
    /// The first one's network.
    pub network: Network,
    _other: Network,
    _bridge: Bridge,
}

/// The case that names the bridge and the addresses of [`BRIDGED`].
pub const ON_A_BRIDGE: u8 = 1;

/// For rows that look at their traffic only.
pub static BRIDGED: Shared<Bridged> = Shared::new(|runtime| {
    let bridge = Bridge(bridge_name(ON_A_BRIDGE, runtime));
    let network = Network::new()?;
    let mapped = json!({"type": "portmap", "snat": true, "name": bridge.0,
        "runtimeConfig": {"portMappings": [
            {"hostPort": port(runtime), "containerPort": 80, "protocol": "tcp"}]},
        "capabilities": {"portMappings": true}});
    network.lay("eth0", json!([bridge_plugin(ON_A_BRIDGE, runtime, 1500), mapped]))?;
    let other = Network::new()?;
    other.lay("eth0", bridge_plugin(ON_A_BRIDGE, runtime, 1500))?;
    let line = "nc -ll -p 80 -e cat & exec nc -ll -p 7 -e cat";
    let task = Task::start(inside(&network, Run::shell(runtime, line)))?;
    let client = sleeping(&other, runtime)?;
    Ok(Bridged { task, client, network, _other: other, _bridge: bridge })
});

/// The host's port that stands for port 80 of [`BRIDGED`].
pub fn port(runtime: Runtime) -> u16 {
    8000 + runtime as u16
}

/// A container with two interfaces, on bridges of different MTUs.
pub struct Two {
    /// The container.
    pub task: Task,
    /// Network of the container.
    pub network: Network,
    _bridges: [Bridge; 2],
}

/// The cases that name the bridges of [`TWO`], and their MTUs, by their interfaces.
pub const ON_TWO_BRIDGES: [(&str, u8, u32); 2] = [("eth0", 19, 1280), ("net1", 21, 9000)];

/// For rows that look at their traffic only.
pub static TWO: Shared<Two> = Shared::new(|runtime| {
    let [(_, one, one_mtu), (_, other, other_mtu)] = ON_TWO_BRIDGES;
    let (network, first) = bridged(one, runtime, one_mtu)?;
    let mut second = bridge_plugin(other, runtime, other_mtu);
    second["ipam"]["routes"] = json!([{"dst": "192.168.77.0/24"}]);
    let bridge = Bridge(bridge_name(other, runtime));
    network.lay("net1", second)?;
    let task = sleeping(&network, runtime)?;
    Ok(Two { task, network, _bridges: [first, bridge] })
});

/// Two containers with an interface of each kind over a parent of that kind.
pub struct Siblings {
    /// The containers.
    pub tasks: [Task; 2],
    /// Their networks.
    pub networks: Vec<Network>,
    _parents: Vec<Bridge>,
}

/// The cases that name the parents, by the interfaces over them.
pub const OVER_PARENTS: [(&str, u8); 2] = [("eth0", 6), ("net1", 7)];

/// For rows that look at their traffic only.
pub static SIBLINGS: Shared<Siblings> = Shared::new(|runtime| {
    let plugins = [
        json!({"type": "macvlan", "mode": "bridge", "mtu": 9000}),
        json!({"type": "ipvlan", "mode": "l2"}),
    ];
    let (mut parents, networks) = (Vec::new(), vec![Network::new()?, Network::new()?]);
    for ((interface, case), plugin) in OVER_PARENTS.into_iter().zip(plugins) {
        let parent = format!("{}par{case}", runtime.name());
        let peer = format!("{parent}x");
        let veth = ["link", "add", &parent, "mtu", "9000", "type", "veth", "peer", "name", &peer];
        ip(&veth)?;
        parents.push(Bridge(parent.clone()));
        ip(&["link", "set", &parent, "up"])?;
        ip(&["link", "set", &peer, "mtu", "9000", "up"])?;
        for (host, network) in (2..).zip(&networks) {
            let mut plugin = plugin.clone();
            plugin["master"] = json!(parent);
            plugin["ipam"] = json!({"type": "static",
                "addresses": [{"address": format!("{}.{host}/24", subnet(case, runtime))}]});
            network.lay(interface, plugin)?;
        }
    }
    let tasks = [sleeping(&networks[0], runtime)?, sleeping(&networks[1], runtime)?];
    Ok(Siblings { tasks, networks, _parents: parents })
});
