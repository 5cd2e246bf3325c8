//! Whether this host can run Husk: `husk check`.
//!
//! Each question is answered by one [`Finding`], with the remedy if the answer is bad. Nothing is
//! changed, and nothing is believed that can be tried: a `/dev/kvm` that opens proves nothing.

mod containerd;
mod finding;
mod host;
mod installed;
mod kvm;

use std::path::Path;

use husk_configuration::Configuration;

pub use finding::{Finding, Outcome};

/// Asks every question, under the settings of `file` (or wherever they are by default).
pub fn run(file: Option<&Path>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let configuration = match Configuration::load(file) {
        Ok(configuration) => {
            findings.push(installed::settings(&configuration));
            configuration
        }
        Err(error) => {
            findings.push(Finding::from_error("settings", &error));
            Configuration::default()
        }
    };
    findings.push(host::processor());
    findings.push(kvm::device());
    findings.push(kvm::runs(&configuration));
    findings.push(kvm::walls(&configuration));
    findings.push(host::tun());
    findings.push(host::cgroup());
    findings.push(containerd::version());
    findings.push(installed::shim());
    findings.push(installed::vmm(&configuration));
    findings.push(installed::kernel(&configuration));
    findings.push(installed::initrd(&configuration));
    findings
}
