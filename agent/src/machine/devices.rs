//! Devices that have come onto the bus since the guest started.

use std::fs;
use std::io;
use std::path::Path;

use super::MachineError;

/// Memory that is plugged goes to where it can be taken away again, three parts of four: the fourth
/// is for what the kernel itself needs the more of the more memory there is (Linux
/// `Documentation/admin-guide/mm/memory-hotplug.rst`).
const POLICY: (&str, &str) = ("module/memory_hotplug/parameters/online_policy", "auto-movable");

/// Has the kernel look at its PCI bus again; `sys` is where sysfs is. The drivers of what it finds
/// are at work when this returns.
pub fn look_for_devices(sys: &Path) -> Result<(), MachineError> {
    let (policy, value) = POLICY;
    let refused =
        |what: &'static str| move |source| MachineError::Refused { what: what.to_owned(), source };
    fs::write(sys.join(policy), value).map_err(refused("choose where plugged memory goes"))?;
    rescan(sys).map_err(refused("look at the PCI bus again"))
}

/// The same without a word on memory: drivers bind before the write returns.
pub fn rescan(sys: &Path) -> io::Result<()> {
    fs::write(sys.join("bus/pci/rescan"), "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_comes_before_the_memory() {
        let sys = tempfile::tempdir().unwrap();
        let error = look_for_devices(sys.path()).unwrap_err().to_string();
        assert!(error.starts_with("choose where plugged memory goes: "), "{error}");
        for folder in ["module/memory_hotplug/parameters", "bus/pci"] {
            fs::create_dir_all(sys.path().join(folder)).unwrap();
        }
        look_for_devices(sys.path()).unwrap();
        let read = |file: &str| fs::read_to_string(sys.path().join(file)).unwrap();
        assert_eq!(read(POLICY.0), "auto-movable");
        assert_eq!(read("bus/pci/rescan"), "1");
    }
}
