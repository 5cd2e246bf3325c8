//! The steps that the part `files` measures, run inside a container: each by itself, so that the caller can time
//! it from outside.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Small files, and the length of each in bytes.
const FILES: usize = 5000;
const SMALL: usize = 1000;
/// Files whose status is asked for, and how often for each.
const LOOKED_AT: usize = 2000;
const LOOKS: usize = 3;
/// Length of the large file, and of one read or write of it, in bytes.
const LARGE: u64 = 64 << 20;
const STRETCH: usize = 128 << 10;
/// Reads or writes at random places, and the length of each in bytes.
const PLACES: u64 = 4096;
const PAGE: usize = 4096;

/// One step of the part `files`.
#[derive(Debug, Args)]
pub struct Step {
    /// The step.
    step: Kind,
    /// The folder it is done in.
    folder: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Nothing: what it costs to be started.
    Nothing,
    /// Creates 5,000 files of 1,000 bytes.
    Create,
    /// Lists them, with the size of each.
    List,
    /// Asks for the status of 2,000 of them by name, three times over.
    Status,
    /// Reads them.
    Read,
    /// Removes them.
    Remove,
    /// Writes 64 MiB from beginning to end, and syncs them.
    Write,
    /// Reads the 64 MiB from beginning to end, not from this kernel's page cache.
    ReadAll,
    /// Reads 4,096 pages of 4 KiB at random places, not from this kernel's page cache.
    ReadRandom,
    /// Writes 4,096 pages of 4 KiB at random places, and syncs them.
    WriteRandom,
    /// Removes the large file.
    RemoveLarge,
}

/// Carries a step out.
pub fn run(step: &Step) -> Result<()> {
    let small = step.folder.join("small");
    let large = step.folder.join("large");
    match step.step {
        Kind::Nothing => Ok(()),
        Kind::Create => create(&small),
        Kind::List => list(&small),
        Kind::Status => status(&small),
        Kind::Read => read(&small),
        Kind::Remove => remove(&small),
        Kind::Write => write(&large),
        Kind::ReadAll => read_all(&large),
        Kind::ReadRandom => read_random(&large),
        Kind::WriteRandom => write_random(&large),
        Kind::RemoveLarge => Ok(fs::remove_file(&large)?),
    }
    .with_context(|| format!("{:?} in {}", step.step, step.folder.display()))
}

fn create(folder: &Path) -> Result<()> {
    // What an attempt that failed has left.
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => fs::create_dir_all(folder)?,
    }
    for number in 0..FILES {
        fs::write(folder.join(format!("file-{number}")), [b'x'; SMALL])?;
    }
    Ok(())
}

fn list(folder: &Path) -> Result<()> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        bytes += entry?.metadata()?.len();
    }
    ensure!(bytes == (FILES * SMALL) as u64, "the files have {bytes} bytes");
    Ok(())
}

fn status(folder: &Path) -> Result<()> {
    for number in (0..LOOKS).flat_map(|_| 0..LOOKED_AT) {
        let length = fs::symlink_metadata(folder.join(format!("file-{number}")))?.len();
        ensure!(length == SMALL as u64, "file-{number} has {length} bytes");
    }
    Ok(())
}

fn read(folder: &Path) -> Result<()> {
    for number in 0..FILES {
        let length = fs::read(folder.join(format!("file-{number}")))?.len();
        ensure!(length == SMALL, "file-{number} has {length} bytes");
    }
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    for number in 0..FILES {
        fs::remove_file(folder.join(format!("file-{number}")))?;
    }
    Ok(fs::remove_dir(folder)?)
}

fn write(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let stretch = vec![b'x'; STRETCH];
    for _ in 0..LARGE / STRETCH as u64 {
        file.write_all(&stretch)?;
    }
    Ok(file.sync_all()?)
}

fn read_all(path: &Path) -> Result<()> {
    let mut file = uncached(path)?;
    let mut stretch = vec![0; STRETCH];
    let mut left = LARGE;
    while left > 0 {
        let length = file.read(&mut stretch)?;
        ensure!(length > 0, "{left} bytes are missing");
        left = left.saturating_sub(length as u64);
    }
    Ok(())
}

fn read_random(path: &Path) -> Result<()> {
    let file = uncached(path)?;
    let mut page = [0; PAGE];
    places().try_for_each(|place| file.read_exact_at(&mut page, place))?;
    Ok(())
}

fn write_random(path: &Path) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    places().try_for_each(|place| file.write_all_at(&[b'y'; PAGE], place))?;
    Ok(file.sync_all()?)
}

/// Opens the large file, none of which is in this kernel's page cache. Where that is the file itself, as on
/// a tmpfs, the advice changes nothing.
fn uncached(path: &Path) -> Result<File> {
    let file = File::open(path)?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(file)
}

/// The same random places each time: multiples of a page within the large file.
fn places() -> impl Iterator<Item = u64> {
    let mut state = 1_u64;
    (0..PLACES).map(move |_| {
        // Knuth's MMIX generator, of which the high bits are used.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % (LARGE / PAGE as u64) * PAGE as u64
    })
}
