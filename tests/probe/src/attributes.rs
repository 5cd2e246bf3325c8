//! What is known of a file beside its contents.

use std::ffi::{CStr, CString};
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Result, ensure};
use nix::sys::statvfs::{FsFlags, statvfs};

/// One file whose extended attributes are asked for.
pub struct Attributes(CString);

impl Attributes {
    /// Names the file.
    pub fn of(path: &Path) -> Result<Self> {
        Ok(Self(CString::new(path.as_os_str().as_encoded_bytes())?))
    }

    /// Sets an attribute; the error's number.
    pub fn set(&self, name: &CStr, value: &[u8], flags: i32) -> Option<i32> {
        // SAFETY: both strings end in NUL, and the length is the value's.
        let done = unsafe {
            libc::setxattr(
                self.0.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                flags,
            )
        };
        (done != 0).then(|| std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// Returns the value of an attribute, or the error's number.
    pub fn get(&self, name: &CStr, room: usize) -> Result<Vec<u8>, i32> {
        let mut value = vec![0_u8; room];
        // SAFETY: both strings end in NUL, and the buffer is as large as it says.
        let count = unsafe {
            libc::getxattr(self.0.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room)
        };
        let count = usize::try_from(count)
            .map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap_or(0))?;
        if room == 0 {
            return Ok(vec![0; count]);
        }
        value.truncate(count);
        Ok(value)
    }

    /// Removes an attribute; the error's number.
    pub fn remove(&self, name: &CStr) -> Option<i32> {
        // SAFETY: both strings end in NUL.
        let done = unsafe { libc::removexattr(self.0.as_ptr(), name.as_ptr()) };
        (done != 0).then(|| std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    /// Returns the names of all attributes.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut list = vec![0_u8; 4096];
        // SAFETY: the string ends in NUL, and the buffer is as large as it says.
        let count =
            unsafe { libc::listxattr(self.0.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
        let count = usize::try_from(count)
            .map_err(|_| anyhow::anyhow!("list: {}", std::io::Error::last_os_error()))?;
        let names = list[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty());
        Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
    }
}

/// Extended attributes: set, read, listed, removed; sizes and refusals as the kernel has them.
pub fn extended(folder: &str) -> Result<()> {
    let path = Path::new(folder).join("extended");
    fs::write(&path, "")?;
    let file = Attributes::of(&path)?;
    ensure!(file.get(c"user.one", 100) == Err(libc::ENODATA));
    ensure!(file.set(c"user.one", b"first", libc::XATTR_REPLACE) == Some(libc::ENODATA));
    ensure!(file.set(c"user.one", b"first", libc::XATTR_CREATE).is_none(), "create");
    ensure!(file.set(c"user.one", b"other", libc::XATTR_CREATE) == Some(libc::EEXIST));
    ensure!(file.set(c"user.two", b"", 0).is_none(), "empty");
    ensure!(file.set(c"user.large", &[7; 2000], 0).is_none(), "large");
    ensure!(file.get(c"user.one", 0).map(|v| v.len()) == Ok(5), "size");
    ensure!(file.get(c"user.one", 3) == Err(libc::ERANGE), "too small a buffer");
    ensure!(file.get(c"user.one", 100) == Ok(b"first".to_vec()));
    ensure!(file.get(c"user.two", 100) == Ok(Vec::new()));
    ensure!(file.get(c"user.large", 4096) == Ok(vec![7; 2000]));
    let mut names = file.names()?;
    names.retain(|name| name.starts_with("user."));
    names.sort();
    ensure!(names == ["user.large", "user.one", "user.two"], "{names:?}");
    ensure!(file.remove(c"user.two").is_none());
    ensure!(file.get(c"user.two", 100) == Err(libc::ENODATA));
    ensure!(file.set(c"nosuch.space", b"x", 0) == Some(libc::EOPNOTSUPP));
    fs::remove_file(&path)?;
    println!("extended");
    Ok(())
}

/// Modes and times, to the nanosecond and before the epoch; what a change of contents does to them.
pub fn times(folder: &str) -> Result<()> {
    let path = Path::new(folder).join("times");
    fs::write(&path, "text")?;
    let file = File::options().write(true).open(&path)?;
    let accessed = UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    let modified = UNIX_EPOCH - Duration::from_secs(1000);
    file.set_times(FileTimes::new().set_accessed(accessed).set_modified(modified))?;
    let seen = fs::metadata(&path)?;
    ensure!(seen.accessed()? == accessed && seen.modified()? == modified, "{seen:?}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755))?;
    let before = fs::metadata(&path)?;
    ensure!(before.mode() & 0o7777 == 0o6755, "{:o}", before.mode());
    std::os::unix::fs::chown(&path, Some(1000), Some(1000))?;
    let after = fs::metadata(&path)?;
    ensure!(after.mode() & 0o6000 == 0, "chown keeps the privileges: {:o}", after.mode());
    file.set_len(2)?;
    let after = fs::metadata(&path)?;
    ensure!(after.modified()? > modified && after.len() == 2, "{after:?}");
    ensure!(after.ino() == before.ino() && fs::read_to_string(&path)? == "te");
    fs::remove_file(&path)?;
    println!("times");
    Ok(())
}

/// What `statfs` says is what a file system would.
pub fn statistics(folder: &str) -> Result<()> {
    let seen = statvfs(folder)?;
    ensure!(seen.name_max() == 255, "names of {}", seen.name_max());
    ensure!((512..=1 << 20).contains(&seen.block_size()), "blocks of {}", seen.block_size());
    ensure!(seen.blocks() > 0 && seen.blocks_free() <= seen.blocks(), "{seen:?}");
    ensure!(seen.blocks_available() <= seen.blocks_free(), "{seen:?}");
    ensure!(seen.files_free() <= seen.files(), "{seen:?}");
    ensure!(!seen.flags().contains(FsFlags::ST_RDONLY), "{seen:?}");
    println!("statistics");
    Ok(())
}
