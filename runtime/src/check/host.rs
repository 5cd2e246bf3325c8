//! The processor and the kernel.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::Finding;

/// Whether the processor has hardware virtualisation, by its flags.
pub fn processor() -> Finding {
    let flag = File::open("/proc/cpuinfo").ok().and_then(|file| {
        let mut lines = BufReader::new(file).lines().map_while(Result::ok);
        let flags = lines.find(|line| line.starts_with("flags"))?;
        virtualisation(&flags)
    });
    match flag {
        Some(flag) => Finding::good("processor", format!("has {flag}")),
        None => Finding::bad(
            "processor",
            "has neither vmx (Intel) nor svm (AMD)",
            "turn virtualisation on in the firmware (in a virtual machine: nested virtualisation \
             on its host)",
        ),
    }
}

fn virtualisation(flags: &str) -> Option<&'static str> {
    ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag))
}

/// Whether network taps can be made.
pub fn tun() -> Finding {
    let device = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Finding::good("tun", format!("{device} opens")),
        Err(error) => Finding::doubtful(
            "tun",
            format!("{device} does not open: {error}"),
            "containers will have no network; load the module tun, run this as root",
        ),
    }
}

/// Which control groups there are.
pub fn cgroup() -> Finding {
    let root = Path::new("/sys/fs/cgroup");
    match statfs(root) {
        Ok(status) if status.filesystem_type() == CGROUP2_SUPER_MAGIC => {
            Finding::good("cgroup", "version 2")
        }
        Ok(_) => Finding::doubtful(
            "cgroup",
            "not version 2",
            "sandboxes will not be limited or counted as a whole; boot with \
             systemd.unified_cgroup_hierarchy=1",
        ),
        Err(error) => Finding::doubtful(
            "cgroup",
            format!("{}: {error}", root.display()),
            "mount cgroup2 there",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_a_whole_word() {
        assert_eq!(virtualisation("flags\t\t: fpu svm sse"), Some("svm"));
        assert_eq!(virtualisation("flags\t\t: fpu vmx"), Some("vmx"));
        assert_eq!(virtualisation("flags\t\t: fpu svm_lock vmxx"), None);
    }
}
