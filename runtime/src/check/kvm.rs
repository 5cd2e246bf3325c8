//! KVM: not whether it is there, but whether it works.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use husk_configuration::Configuration;

use super::Finding;

const DEVICE: &str = "/dev/kvm";

/// `_IO(KVMIO, 0x00)`, from linux/kvm.h.
const GET_API_VERSION: libc::c_ulong = 0xae00;

/// The only version there is.
const API_VERSION: libc::c_int = 12;

/// Whether the device is there and speaks to us.
pub fn device() -> Finding {
    let file = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::bad(
                "kvm",
                format!("there is no {DEVICE}"),
                "load the module kvm_intel or kvm_amd, and turn virtualisation on in the firmware \
                 (in a virtual machine: nested virtualisation on its host)",
            );
        }
        Err(error) => {
            let found = format!("{DEVICE} does not open: {error}");
            return Finding::bad("kvm", found, "run this as root, as containerd runs");
        }
    };
    // SAFETY: the request takes no argument and gives a number.
    let version = unsafe { libc::ioctl(file.as_raw_fd(), GET_API_VERSION) };
    if version == API_VERSION {
        Finding::good("kvm", format!("{DEVICE} opens, API {version}"))
    } else {
        Finding::bad("kvm", format!("{DEVICE} is no KVM"), "load the module kvm_intel or kvm_amd")
    }
}

/// Whether a virtual CPU really runs: some that open do not run a guest's user space.
pub fn runs(configuration: &Configuration) -> Finding {
    let Ok(program) = configuration.vmm_program() else {
        return Finding::bad("vcpu", "not tried", "install husk-vmm first");
    };
    let probed = Command::new(program)
        .arg("probe")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output();
    match probed {
        Ok(output) if output.status.success() => {
            Finding::good("vcpu", "a virtual CPU runs user-space code")
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let why = reason(&said).unwrap_or_else(|| output.status.to_string());
            let found = format!("a virtual CPU does not run ({why})");
            Finding::bad(
                "vcpu",
                found,
                "KVM is here in name only: turn (nested) virtualisation on, or use another host",
            )
        }
        Err(error) => {
            let found = format!("{} does not start: {error}", program.display());
            Finding::bad("vcpu", found, "install it again with `make install`")
        }
    }
}

/// Whether the walls of the jail can be put up: by putting them up.
pub fn walls(configuration: &Configuration) -> Finding {
    let Ok(program) = configuration.vmm_program() else {
        return Finding::bad("jail", "not tried", "install husk-vmm first");
    };
    let mut command = Command::new(program);
    command.arg("walls").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for wall in &configuration.machine.accept_missing {
        command.args(["--accept-missing", wall]);
    }
    match command.output() {
        Ok(output) if output.status.success() => {
            Finding::good("jail", String::from_utf8_lossy(&output.stdout).trim())
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let why = reason(&said).unwrap_or_else(|| output.status.to_string());
            Finding::bad("jail", why, "run this as root, on Linux 5.19 or later")
        }
        Err(error) => {
            let found = format!("{} does not start: {error}", program.display());
            Finding::bad("jail", found, "install it again with `make install`")
        }
    }
}

/// The error in the last line of husk-vmm's log.
fn reason(log: &str) -> Option<String> {
    let line = log.lines().rfind(|line| !line.trim().is_empty())?;
    let record = serde_json::from_str::<serde_json::Value>(line).ok();
    let error = record.as_ref().and_then(|record| record.get("error")?.as_str());
    Some(error.unwrap_or(line).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_logged_error() {
        assert_eq!(reason("x\n{\"msg\":\"m\",\"error\":\"why\"}\n\n").unwrap(), "why");
        assert_eq!(reason("plain words\n").unwrap(), "plain words");
        assert_eq!(reason(""), None);
    }
}
