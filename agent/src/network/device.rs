//! The guest's network devices, and the bus they come by.

use std::fs;
use std::io;
use std::path::Path;

use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use super::netlink::Netlink;
use crate::machine::rescan;

/// A network device as the guest's kernel has it now.
#[derive(Debug)]
pub struct Device {
    pub index: u32,
    pub name: String,
    pub address: Vec<u8>,
    pub mtu: u32,
    pub up: bool,
}

/// The devices whose hardware addresses, as they were made, are `wanted`; the bus is looked
/// through if one is missing.
pub fn find(
    netlink: &mut Netlink,
    sys: &Path,
    wanted: &[&[u8]],
) -> io::Result<Vec<Option<Device>>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let found = look(netlink, wanted)?;
    if found.iter().all(Option::is_some) {
        return Ok(found);
    }
    rescan(sys)?;
    look(netlink, wanted)
}

fn look(netlink: &mut Netlink, wanted: &[&[u8]]) -> io::Result<Vec<Option<Device>>> {
    let links = netlink.links()?;
    let one = |made: &&[u8]| links.iter().find(|link| was_made_with(link, made)).map(Device::of);
    Ok(wanted.iter().map(one).collect())
}

/// Lets go of the device on the bus behind an interface.
pub fn remove(sys: &Path, name: &str) -> io::Result<()> {
    // The interface's device is the virtio one; its parent is the one on the bus.
    let device = fs::canonicalize(sys.join("class/net").join(name).join("device"))?;
    let function = device.parent().ok_or(io::ErrorKind::NotFound)?;
    fs::write(function.join("remove"), "1")
}

/// Whether that is the address the device came with, whatever it wears now. A device of software
/// that a container makes has none of this kind.
fn was_made_with(link: &LinkMessage, address: &[u8]) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::PermAddress(bytes) => bytes == address,
        _ => false,
    })
}

impl Device {
    pub fn of(link: &LinkMessage) -> Self {
        let mut device = Self {
            index: link.header.index,
            name: String::new(),
            address: Vec::new(),
            mtu: 0,
            up: link.header.flags.contains(netlink_packet_route::link::LinkFlags::Up),
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name.clone_from(name),
                LinkAttribute::Address(bytes) => device.address.clone_from(bytes),
                LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
                _ => {}
            }
        }
        device
    }
}
