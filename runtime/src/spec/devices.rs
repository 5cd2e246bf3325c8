//! `linux.devices`: the guest has its own.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use super::error::{SpecError, refused};

/// Devices whose numbers mean the same in the guest: (major, minor).
const SAME_IN_GUEST: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 229), // fuse
    (10, 200), // net/tun
];

/// Keeps the devices that the guest has. Others are refused, unless the container may use all
/// devices there are: then the host's list is dropped for the guest's.
pub(super) fn translate(
    devices: &mut Vec<LinuxDevice>,
    rules: &[LinuxDeviceCgroup],
) -> Result<(), SpecError> {
    if rules.iter().any(allows_all) {
        devices.retain(is_guest);
        return Ok(());
    }
    match devices.iter().position(|device| !is_guest(device)) {
        None => Ok(()),
        Some(number) => {
            let path = devices[number].path().display();
            let reason = format!("{path} is a device of the host's");
            Err(refused(format!("linux.devices[{number}]"), reason))
        }
    }
}

fn is_guest(device: &LinuxDevice) -> bool {
    match device.typ() {
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            SAME_IN_GUEST.contains(&(device.major(), device.minor()))
        }
        _ => false,
    }
}

fn allows_all(rule: &LinuxDeviceCgroup) -> bool {
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && rule.major().is_none_or(|major| major < 0)
        && rule.minor().is_none_or(|minor| minor < 0)
}
