//! `process`: of a container's init, and of processes added later.

use oci_spec::runtime::Process;

use super::error::{SpecError, refuse_if};

/// Translates a process in place; `field` is its name in messages.
pub fn translate_process(process: &mut Process, field: &str) -> Result<(), SpecError> {
    let empty = process.args().as_ref().is_none_or(Vec::is_empty);
    refuse_if(empty, &format!("{field}.args"), "there is no command to run")?;
    let affinity = process.exec_cpu_affinity().is_some();
    let reason = "the host's CPU numbers mean nothing in the guest";
    refuse_if(affinity, &format!("{field}.execCPUAffinity"), reason)?;
    // The guest's kernel has no security modules; the machine is the boundary.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    Ok(())
}
