//! What a file system owes a program.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek, mkfifo};

fn fresh(folder: &str, name: &str) -> Result<std::path::PathBuf> {
    let path = Path::new(folder).join(name);
    fs::create_dir_all(&path).with_context(|| format!("{}", path.display()))?;
    Ok(path)
}

/// Creates, lists, renames and removes `count` small files.
pub fn many(folder: &str, count: usize) -> Result<()> {
    let base = fresh(folder, "many")?;
    for number in 0..count {
        fs::write(base.join(format!("file-{number}")), format!("{number}"))?;
    }
    ensure!(fs::read_dir(&base)?.count() == count, "listing after creation");
    for number in 0..count {
        fs::rename(base.join(format!("file-{number}")), base.join(format!("moved-{number}")))?;
    }
    let mut names: Vec<_> =
        fs::read_dir(&base)?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?;
    names.sort();
    names.dedup();
    ensure!(names.len() == count, "{} names after renaming {count}", names.len());
    ensure!(names.iter().all(|n| n.to_string_lossy().starts_with("moved-")), "an old name");
    ensure!(
        fs::read_to_string(base.join(format!("moved-{}", count / 2)))? == format!("{}", count / 2)
    );
    for number in 0..count {
        fs::remove_file(base.join(format!("moved-{number}")))?;
    }
    ensure!(fs::read_dir(&base)?.next().is_none(), "not empty after removal");
    fs::remove_dir(&base)?;
    println!("{count} files");
    Ok(())
}

/// Symbolic links (also dangling and looping ones) and hard links.
pub fn links(folder: &str) -> Result<()> {
    let base = fresh(folder, "links")?;
    fs::write(base.join("file"), "text")?;
    symlink("file", base.join("soft"))?;
    ensure!(fs::read_to_string(base.join("soft"))? == "text");
    ensure!(fs::read_link(base.join("soft"))? == Path::new("file"));
    symlink("nowhere", base.join("dangling"))?;
    ensure!(fs::metadata(base.join("dangling")).is_err());
    symlink("loop", base.join("loop"))?;
    let looped = File::open(base.join("loop")).err().and_then(|e| e.raw_os_error());
    ensure!(looped == Some(libc::ELOOP), "a loop opened with {looped:?}");
    fs::hard_link(base.join("file"), base.join("hard"))?;
    let (a, b) = (fs::metadata(base.join("file"))?, fs::metadata(base.join("hard"))?);
    ensure!(a.ino() == b.ino() && a.nlink() == 2, "{} {} {}", a.ino(), b.ino(), a.nlink());
    fs::remove_file(base.join("file"))?;
    ensure!(fs::metadata(base.join("hard"))?.nlink() == 1);
    ensure!(fs::read_to_string(base.join("hard"))? == "text");
    println!("links");
    Ok(())
}

/// A FIFO between two threads.
pub fn fifo(folder: &str) -> Result<()> {
    let path = fresh(folder, "fifo")?.join("pipe");
    mkfifo(&path, Mode::from_bits_truncate(0o640))?;
    let meta = fs::metadata(&path)?;
    ensure!(meta.file_type().is_fifo() && meta.permissions().mode() & 0o777 == 0o640);
    let writer = {
        let path = path.clone();
        std::thread::spawn(move || fs::write(path, "through"))
    };
    ensure!(fs::read_to_string(&path)? == "through");
    writer.join().map_err(|_| anyhow::anyhow!("writer panicked"))??;
    println!("fifo");
    Ok(())
}

/// A file of 1 GiB with one page at its end: few blocks, and SEEK_HOLE and SEEK_DATA agree.
pub fn sparse(folder: &str) -> Result<()> {
    let path = fresh(folder, "sparse")?.join("file");
    let file = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
    let end = 1_u64 << 30;
    file.set_len(end)?;
    file.write_all_at(b"data", end - 4096)?;
    ensure!(file.metadata()?.len() == end);
    ensure!(file.metadata()?.blocks() < 1024, "{} blocks", file.metadata()?.blocks());
    ensure!(lseek(&file, 0, Whence::SeekData)? == (end - 4096) as i64, "SEEK_DATA");
    ensure!(lseek(&file, 0, Whence::SeekHole)? == 0, "SEEK_HOLE");
    println!("sparse");
    Ok(())
}

/// `fallocate`: plain, keeping the size, punching a hole.
pub fn fallocate(folder: &str) -> Result<()> {
    let path = fresh(folder, "fallocate")?.join("file");
    let mut file = File::options().create(true).truncate(true).read(true).write(true).open(path)?;
    nix::fcntl::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
    ensure!(file.metadata()?.len() == 1 << 20);
    ensure!(file.metadata()?.blocks() >= 2048, "{} blocks", file.metadata()?.blocks());
    nix::fcntl::fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20)?;
    ensure!(file.metadata()?.len() == 1 << 20, "KEEP_SIZE changed the size");
    file.write_all(&[7; 8192])?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&file, punch, 0, 4096)?;
    file.seek(SeekFrom::Start(0))?;
    let mut start = [1; 8192];
    file.read_exact(&mut start)?;
    ensure!(start[..4096].iter().all(|b| *b == 0) && start[4096..].iter().all(|b| *b == 7), "hole");
    println!("fallocate");
    Ok(())
}

/// A shared mapping: what one mapping writes, another and `read` see.
pub fn mmap(folder: &str) -> Result<()> {
    let path = fresh(folder, "mmap")?.join("file");
    let file = File::options().create(true).truncate(true).read(true).write(true).open(&path)?;
    let length = 64 * 1024;
    file.set_len(length as u64)?;
    let map = |file: &File| -> Result<*mut u8> {
        // SAFETY: a fresh shared mapping of a file we hold open, placed by the kernel.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        ensure!(address != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(address.cast())
    };
    let (one, two) = (map(&file)?, map(&OpenOptions::new().read(true).write(true).open(&path)?)?);
    // SAFETY: both mappings are `length` bytes long and writable.
    unsafe {
        one.add(5000).write_volatile(42);
        ensure!(two.add(5000).read_volatile() == 42, "the other mapping");
    }
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000)?;
    ensure!(byte == [42], "read");
    file.write_all_at(&[43], 6000)?;
    // SAFETY: as above; msync takes the whole mapping.
    unsafe {
        ensure!(two.add(6000).read_volatile() == 43, "written by write");
        ensure!(libc::msync(one.cast(), length, libc::MS_SYNC) == 0, "msync");
    }
    println!("mmap");
    Ok(())
}

/// `renameat2`: over an existing file, without replacing, exchanging; folders too.
pub fn rename(folder: &str) -> Result<()> {
    let base = fresh(folder, "rename")?;
    let (a, b) = (base.join("a"), base.join("b"));
    fs::write(&a, "a")?;
    fs::write(&b, "b")?;
    let refused = renameat2(AT_FDCWD, &a, AT_FDCWD, &b, RenameFlags::RENAME_NOREPLACE);
    ensure!(refused == Err(nix::errno::Errno::EEXIST), "NOREPLACE: {refused:?}");
    renameat2(AT_FDCWD, &a, AT_FDCWD, &b, RenameFlags::RENAME_EXCHANGE)?;
    ensure!(fs::read_to_string(&a)? == "b" && fs::read_to_string(&b)? == "a", "EXCHANGE");
    fs::rename(&a, &b)?;
    ensure!(fs::read_to_string(&b)? == "b" && !a.exists());
    fs::create_dir_all(base.join("x/y"))?;
    fs::write(base.join("x/y/file"), "deep")?;
    fs::rename(base.join("x"), base.join("z"))?;
    ensure!(fs::read_to_string(base.join("z/y/file"))? == "deep");
    println!("rename");
    Ok(())
}

/// A file that is open lives on after its name is gone; appends go to the end.
pub fn unlinked(folder: &str) -> Result<()> {
    let path = fresh(folder, "unlinked")?.join("file");
    let mut file = File::options().create(true).append(true).read(true).open(&path)?;
    file.write_all(b"one ")?;
    fs::remove_file(&path)?;
    file.write_all(b"two")?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "one two", "{text}");
    ensure!(file.metadata()?.nlink() == 0, "{} links", file.metadata()?.nlink());
    println!("unlinked");
    Ok(())
}

/// Leaves a file with mode, owner, extended attribute and time set, for the host to look at.
pub fn attributes(folder: &str) -> Result<()> {
    let path = Path::new(folder).join("attributes");
    fs::write(&path, "seen by the host\n")?;
    std::os::unix::fs::chown(&path, Some(1234), Some(5678))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751))?;
    let name = c"user.husk";
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: both strings end in NUL, and the value is 5 bytes long.
    let set =
        unsafe { libc::setxattr(c_path.as_ptr(), name.as_ptr(), c"value".as_ptr().cast(), 5, 0) };
    ensure!(set == 0, "setxattr: {}", std::io::Error::last_os_error());
    let then = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    File::options().write(true).open(&path)?.set_modified(then)?;
    println!("attributes");
    Ok(())
}
