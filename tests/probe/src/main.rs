//! Runs inside test containers, on runc as on Husk, and reports what it finds.
//!
//! Each check prints one line; a check that fails says so and exits with 1. Static, so that it runs
//! in any image.

mod attack;
mod attributes;
mod files;
mod judged;
mod locks;
mod logger;
mod names;
mod process;
mod sockets;
mod together;
mod volumes;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["arguments", rest @ ..] => process::arguments(rest),
        ["pattern", mebibytes] => process::pattern(mebibytes.parse()?)?,
        ["many", folder, count] => files::many(folder, count.parse()?)?,
        ["links", folder] => files::links(folder)?,
        ["fifo", folder] => files::fifo(folder)?,
        ["sparse", folder] => files::sparse(folder)?,
        ["fallocate", folder] => files::fallocate(folder)?,
        ["mmap", folder] => files::mmap(folder)?,
        ["rename", folder] => files::rename(folder)?,
        ["unlinked", folder] => files::unlinked(folder)?,
        ["attributes", folder] => files::attributes(folder)?,
        ["odd-names", folder] => names::odd(folder)?,
        ["seek", folder] => names::seek(folder)?,
        ["temporary", folder] => names::temporary(folder)?,
        ["extended", folder] => attributes::extended(folder)?,
        ["times", folder] => attributes::times(folder)?,
        ["statistics", folder] => attributes::statistics(folder)?,
        ["groups", folder] => judged::groups(folder)?,
        ["append-only", folder] => judged::append_only(folder)?,
        ["birth", path] => judged::birth(path)?,
        ["trusted", folder] => judged::trusted(folder)?,
        ["append", folder] => together::append(folder)?,
        ["copy", folder] => together::copy(folder)?,
        ["watch", folder] => together::watch(folder)?,
        ["events", path, last, file] => together::events(path, last, file)?,
        ["identity"] => process::identity(),
        ["crash"] => process::crash(),
        ["flock", folder] => locks::flock(folder)?,
        ["posix-lock", folder] => locks::posix(folder)?,
        ["volumes", whole, part, read_only, file] => {
            volumes::same(whole, part, read_only, file)?;
        }
        ["hold-lock", path] => locks::hold(path)?,
        ["try-lock", path] => locks::try_once(path)?,
        ["log", path] => logger::run(path)?,
        ["listen", path] => sockets::listen(path)?,
        ["connect", path, text] => sockets::connect(path, text)?,
        ["attack", name, seconds, seed] => attack::run(name, seconds.parse()?, seed.parse()?)?,
        _ => bail!("unknown check: {words:?}"),
    }
    Ok(())
}
