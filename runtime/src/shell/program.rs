//! The program that becomes the shell: a static one, because the guest has no libraries.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `PT_INTERP` of elf(5): the program needs a loader.
const INTERPRETER: u32 = 3;
/// `EM_X86_64`.
const MACHINE: u16 = 62;

/// Why a program cannot be the shell.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It cannot be read.
    #[error(
        "cannot read {path}: install the package busybox-static, or name another static program by \
         `guest.debug_shell_program` in husk.toml"
    )]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error(
        "{path} is no static program for x86-64: install the package busybox-static, or name another \
         program by `guest.debug_shell_program` in husk.toml"
    )]
    NotStatic {
        /// Which.
        path: PathBuf,
    },
}

/// Opens the program at `path` if the guest can execute it by itself.
pub(super) fn open(path: &Path) -> Result<File, ProgramError> {
    let unreadable = |source| ProgramError::Open { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let is_file = file.metadata().map_err(unreadable)?.is_file();
    if is_file && is_static(&file) == Some(true) {
        return Ok(file);
    }
    Err(ProgramError::NotStatic { path: path.to_owned() })
}

/// None if it is no program for this processor.
fn is_static(file: &File) -> Option<bool> {
    let mut head = [0; 64];
    file.read_exact_at(&mut head, 0).ok()?;
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    // 64 bits, least significant byte first.
    if &head[..6] != b"\x7fELF\x02\x01" || half(18) != MACHINE {
        return None;
    }
    let place = head[32..40].try_into().map(u64::from_le_bytes).ok()?;
    let (size, count) = (u64::from(half(54)), u64::from(half(56)));
    for number in 0..count {
        let mut kind = [0; 4];
        // Both are 16 bits wide, so only the sum can be too large.
        let at = place.checked_add(number * size)?;
        file.read_exact_at(&mut kind, at).ok()?;
        if u32::from_le_bytes(kind) == INTERPRETER {
            return Some(false);
        }
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_are_taken() {
        let missing = open(Path::new("/no/such/program")).unwrap_err().to_string();
        assert!(missing.contains("busybox-static") && missing.contains("debug_shell_program"));
        let dynamic = Path::new("/usr/bin/env");
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        std::fs::write(&text, "#!/bin/sh\n").unwrap();
        for path in [dynamic, &text, folder.path(), Path::new("/dev/null")] {
            let refused = open(path).unwrap_err();
            assert!(matches!(refused, ProgramError::NotStatic { .. }), "{path:?}: {refused}");
        }
        let mut image = vec![0; 64 + 56];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (image[18], image[32], image[54], image[56]) = (62, 64, 56, 1);
        // PT_LOAD.
        image[64] = 1;
        let made = folder.path().join("made");
        std::fs::write(&made, &image).unwrap();
        open(&made).unwrap();
        // A table beyond the end.
        image[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&made, &image).unwrap();
        open(&made).unwrap_err();
    }
}
