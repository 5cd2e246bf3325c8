//! What the process itself was given.

use std::io::Write;

use anyhow::Result;

/// Prints each argument in Rust's quoted form.
pub fn arguments(words: &[&str]) {
    for word in words {
        println!("{word:?}");
    }
}

/// Writes numbered lines of 64 bytes, then ends at once.
pub fn pattern(mebibytes: u64) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut block = Vec::with_capacity(1 << 16);
    for block_number in 0..mebibytes * 16 {
        block.clear();
        for line in 0..1024 {
            writeln!(block, "{:063}", block_number * 1024 + line)?;
        }
        out.write_all(&block)?;
    }
    out.flush()?;
    Ok(())
}

/// Writes to where nothing is.
pub fn crash() {
    // SAFETY: none: the kernel is to end the process.
    unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
}

/// Prints the real and the effective user.
pub fn identity() {
    println!("{} {}", nix::unistd::getuid(), nix::unistd::geteuid());
}
