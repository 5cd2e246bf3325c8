//! Husk's own files.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use husk_configuration::Configuration;

use super::Finding;

/// The name that containerd makes of `io.containerd.husk.v2`.
const SHIM: &str = "containerd-shim-husk-v2";

/// Where the settings come from.
pub fn settings(configuration: &Configuration) -> Finding {
    let mut files: Vec<_> =
        configuration.values().map(|(key, _)| configuration.origin(key)).collect();
    files.sort_unstable();
    files.dedup();
    files.retain(|origin| *origin != "default");
    if files.is_empty() {
        Finding::good("settings", "all at their defaults")
    } else {
        Finding::good("settings", files.join(", "))
    }
}

/// Whether containerd can find the shim.
pub fn shim() -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(SHIM)).find(|program| {
        program
            .metadata()
            .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    });
    match found {
        Some(program) => Finding::good("shim", program.display().to_string()),
        None => Finding::bad(
            "shim",
            format!("{SHIM} is not on PATH"),
            "install it with `make install` into a folder on containerd's PATH, such as \
             /usr/local/bin",
        ),
    }
}

/// Whether the machine's program is there.
pub fn vmm(configuration: &Configuration) -> Finding {
    match configuration.vmm_program() {
        Ok(path) => Finding::good("husk-vmm", path.display().to_string()),
        Err(error) => Finding::from_error("husk-vmm", &error),
    }
}

/// Whether the guest's kernel is there, and is one.
pub fn kernel(configuration: &Configuration) -> Finding {
    let subject = "kernel";
    let path = &configuration.guest.kernel;
    match configuration.open_kernel() {
        Err(error) => Finding::from_error(subject, &error),
        Ok(file) => judge(subject, path, kernel_kind(&start(file))),
    }
}

/// Whether the guest's initial file system is there, and is one.
pub fn initrd(configuration: &Configuration) -> Finding {
    let subject = "initrd";
    let path = &configuration.guest.initrd;
    match configuration.open_initrd() {
        Err(error) => Finding::from_error(subject, &error),
        Ok(file) => judge(subject, path, initrd_kind(&start(file))),
    }
}

fn judge(subject: &'static str, path: &Path, kind: Result<&str, (&str, &str)>) -> Finding {
    match kind {
        Ok(kind) => Finding::good(subject, format!("{}: {kind}", path.display())),
        Err((kind, remedy)) => {
            Finding::bad(subject, format!("{} is {kind}", path.display()), remedy)
        }
    }
}

/// The first bytes, as many as there are.
fn start(file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What cannot be read is not what it should be, either.
    let _ = file.take(1024).read_to_end(&mut bytes);
    bytes
}

const REBUILD: &str = "build it with `make guest`";

fn kernel_kind(bytes: &[u8]) -> Result<&'static str, (&'static str, &'static str)> {
    // ELF: 64 bits, little-endian, machine 62 (x86-64) at 18.
    if bytes.starts_with(b"\x7fELF\x02\x01") {
        return match bytes.get(18..20) {
            Some([62, 0]) => Ok("ELF, x86-64"),
            _ => Err(("for another processor", REBUILD)),
        };
    }
    // The Linux boot protocol has its mark at 0x202.
    if bytes.get(0x202..0x206) == Some(b"HdrS") {
        return Err((
            "a bzImage",
            "give the uncompressed vmlinux it was made of (the kernel's scripts/extract-vmlinux \
             takes it out)",
        ));
    }
    Err(("no kernel", REBUILD))
}

fn initrd_kind(bytes: &[u8]) -> Result<&'static str, (&'static str, &'static str)> {
    if bytes.starts_with(b"070701") || bytes.starts_with(b"070702") {
        return Ok("cpio");
    }
    let compressed: [&[u8]; 4] =
        [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"\x02\x21\x4c\x18"];
    if compressed.iter().any(|magic| bytes.starts_with(magic)) {
        return Err(("compressed", "unpack it: the guest's kernel does not"));
    }
    Err(("no initial file system (cpio)", REBUILD))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::check::Outcome;

    fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn kernels_are_known_by_their_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64, 0);
        elf[18] = 62;
        let mut other = elf.clone();
        other[18] = 183;
        let mut compressed = vec![0; 0x300];
        compressed[0x202..0x206].copy_from_slice(b"HdrS");
        for (name, bytes, outcome, text) in [
            ("elf", elf, Outcome::Good, "ELF, x86-64"),
            ("arm", other, Outcome::Bad, "another processor"),
            ("bzimage", compressed, Outcome::Bad, "a bzImage; give the uncompressed"),
            ("empty", Vec::new(), Outcome::Bad, "no kernel; build it"),
        ] {
            let mut configuration = Configuration::default();
            configuration.guest.kernel = file(folder.path(), name, &bytes);
            let finding = kernel(&configuration);
            assert_eq!(finding.outcome, outcome, "{finding}");
            assert!(finding.text.contains(text), "{finding}");
        }
    }

    #[test]
    fn initial_file_systems_are_known_by_their_first_bytes() {
        assert!(initrd_kind(b"07070100000000").is_ok());
        assert!(initrd_kind(b"\x1f\x8b\x08").unwrap_err().0 == "compressed");
        assert!(initrd_kind(b"MZ").is_err());
    }

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let mut configuration = Configuration::default();
        configuration.guest.initrd = "/nowhere/initrd.img".into();
        let finding = initrd(&configuration);
        assert_eq!(finding.outcome, Outcome::Bad);
        assert!(finding.text.contains("/nowhere/initrd.img"), "{finding}");
        assert!(finding.text.contains("make guest"), "{finding}");
    }
}
