//! Volumes that have the same files: a folder, its subfolder, the folder again and read-only, one file of it.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// What is made by one of them is the same by the others. `part` is the folder `part` of `whole`,
/// `read_only` is `whole` as well, and `file` is `part/file`.
pub fn same(whole: &str, part: &str, read_only: &str, file: &str) -> Result<()> {
    let inside = Path::new(whole).join("part");
    let (part, read_only) = (Path::new(part), Path::new(read_only));
    one_file(&[
        &inside.join("file"),
        &part.join("file"),
        &read_only.join("part/file"),
        file.as_ref(),
    ])?;
    lock(&inside.join("file"), &part.join("file"))?;
    socket(&inside.join("socket"), &part.join("socket"))?;
    socket(&part.join("another"), &read_only.join("part/another"))?;
    fifo(&inside.join("fifo"), &part.join("fifo"))?;
    names(&inside, part)?;
    println!("volumes");
    Ok(())
}

/// Written to by each, and seen by all.
fn one_file(paths: &[&Path; 4]) -> Result<()> {
    let known = paths.map(|path| fs::metadata(path).map(|found| (found.dev(), found.ino())));
    let known = known.into_iter().collect::<Result<Vec<_>, _>>()?;
    ensure!(known.iter().all(|one| *one == known[0]), "{known:?}");
    let readers = paths.map(File::open).into_iter().collect::<Result<Vec<_>, _>>()?;
    for (number, path) in [(0_u32, paths[0]), (1, paths[1]), (3, paths[3])] {
        let text = format!("written by {number}");
        let writer = File::options().write(true).open(path)?;
        writer.write_all_at(text.as_bytes(), 0)?;
        writer.set_len(100 + u64::from(number))?;
        let mode = 0o600 + number;
        writer.set_permissions(Permissions::from_mode(mode))?;
        for reader in &readers {
            let mut seen = vec![0; text.len()];
            reader.read_exact_at(&mut seen, 0)?;
            ensure!(seen == text.as_bytes(), "{path:?}: {seen:?}");
            let status = reader.metadata()?;
            ensure!(status.len() == 100 + u64::from(number), "{path:?}: {}", status.len());
            ensure!(status.mode() & 0o777 == mode, "{path:?}: {:o}", status.mode());
        }
    }
    let refused = File::options().write(true).open(paths[2]).err();
    let refused = refused.and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EROFS), "read-only: {refused:?}");
    Ok(())
}

fn lock(one: &Path, other: &Path) -> Result<()> {
    let open = |path| File::options().read(true).write(true).open(path);
    let (held, tried) = (open(one)?, open(other)?);
    held.lock()?;
    ensure!(tried.try_lock().is_err(), "a held lock was given again");
    held.unlock()?;
    tried.try_lock()?;
    let range = libc::flock {
        l_type: 1,   /* F_WRLCK */
        l_whence: 0, /* SEEK_SET */
        l_start: 0,
        l_len: 10,
        l_pid: 0,
    };
    let set = |file: &File| nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&range));
    set(&held)?;
    ensure!(set(&tried).is_err(), "a held range was given again");
    Ok(())
}

fn socket(one: &Path, other: &Path) -> Result<()> {
    let listener = UnixListener::bind(one).with_context(|| one.display().to_string())?;
    let mut client = UnixStream::connect(other).with_context(|| other.display().to_string())?;
    client.write_all(b"through")?;
    let mut text = [0; 7];
    listener.accept()?.0.read_exact(&mut text)?;
    ensure!(&text == b"through");
    Ok(())
}

fn fifo(one: &Path, other: &Path) -> Result<()> {
    mkfifo(one, Mode::S_IRWXU)?;
    let open = |path: &Path, write: bool| {
        let mut options = File::options();
        options.read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(path)
    };
    let mut reader = open(one, false)?;
    // ENXIO if nobody reads.
    open(other, true).context("the FIFO is another")?.write_all(b"through")?;
    let mut text = [0; 7];
    reader.read_exact(&mut text)?;
    ensure!(&text == b"through");
    Ok(())
}

/// Names stay in their mount; one that goes by one way is gone by the other.
fn names(inside: &Path, part: &Path) -> Result<()> {
    fs::write(inside.join("name"), "text")?;
    let error = |result: std::io::Result<()>| result.err().and_then(|error| error.raw_os_error());
    let across = error(fs::hard_link(inside.join("name"), part.join("across")));
    ensure!(across == Some(libc::EXDEV), "link: {across:?}");
    let across = error(fs::rename(inside.join("name"), part.join("across")));
    ensure!(across == Some(libc::EXDEV), "rename: {across:?}");
    fs::hard_link(part.join("name"), part.join("linked"))?;
    let open = File::open(inside.join("linked"))?;
    ensure!(open.metadata()?.nlink() == 2, "{} links", open.metadata()?.nlink());
    fs::rename(inside.join("name"), inside.join("moved"))?;
    ensure!(fs::read_to_string(part.join("moved"))? == "text" && !part.join("name").exists());
    fs::remove_file(part.join("moved"))?;
    fs::remove_file(part.join("linked"))?;
    ensure!(!inside.join("linked").exists() && !inside.join("moved").exists());
    ensure!(open.metadata()?.nlink() == 0, "{} links", open.metadata()?.nlink());
    Ok(())
}
