//! Runs inside test containers, on runc as on Husk, and reports what it finds.
//!
//! Each check prints one line; a check that fails says so and exits with 1. Static, so that it runs
//! in any image.

mod files;
mod locks;
mod process;
mod sockets;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["arguments", rest @ ..] => process::arguments(rest),
        ["pattern", mebibytes] => process::pattern(mebibytes.parse()?)?,
        ["limits"] => process::limits()?,
        ["many", folder, count] => files::many(folder, count.parse()?)?,
        ["links", folder] => files::links(folder)?,
        ["fifo", folder] => files::fifo(folder)?,
        ["sparse", folder] => files::sparse(folder)?,
        ["fallocate", folder] => files::fallocate(folder)?,
        ["mmap", folder] => files::mmap(folder)?,
        ["rename", folder] => files::rename(folder)?,
        ["unlinked", folder] => files::unlinked(folder)?,
        ["attributes", folder] => files::attributes(folder)?,
        ["flock", folder] => locks::flock(folder)?,
        ["posix-lock", folder] => locks::posix(folder)?,
        ["listen", path] => sockets::listen(path)?,
        ["connect", path, text] => sockets::connect(path, text)?,
        _ => bail!("unknown check: {words:?}"),
    }
    Ok(())
}
