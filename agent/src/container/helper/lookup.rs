//! Finds the command as runc does, with its words for what is wrong.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::unistd::{AccessFlags, faccessat};

/// An error as runc would say it: Go begins them in lower case.
pub fn say(error: &io::Error) -> String {
    let text = error.to_string();
    // Rust adds the number to the C library's text.
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// The file that the command `name` stands for, with the search path of `environment`.
pub fn find(name: &str, environment: &[String]) -> Result<PathBuf, String> {
    let quoted = |reason: &str| format!("exec: {name:?}: {reason}");
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Err(quoted(&format!("stat {name}: {}", say(&error))))
            }
            Err(error) => Err(quoted(&say(&error))),
        };
    }
    // Of repeated variables the last one counts.
    let path = environment.iter().rev().find_map(|v| v.strip_prefix("PATH=")).unwrap_or_default();
    let mut directories = env::split_paths(path).filter(|_| !path.is_empty() && !name.is_empty());
    let found = directories.find_map(|directory| {
        let directory = if directory.as_os_str().is_empty() { ".".into() } else { directory };
        let file = directory.join(name);
        executable(&file).is_ok().then_some(file)
    });
    match found {
        Some(file) if file.is_absolute() => Ok(file),
        Some(_) => Err(quoted("cannot run executable found relative to current directory")),
        None => Err(quoted("executable file not found in $PATH")),
    }
}

fn executable(file: &Path) -> io::Result<()> {
    let metadata = fs::metadata(file)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    match faccessat(nix::fcntl::AT_FDCWD, file, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // A seccomp profile may not know the call.
        Err(Errno::EPERM | Errno::ENOSYS) if metadata.permissions().mode() & 0o111 != 0 => Ok(()),
        Err(Errno::EPERM | Errno::ENOSYS) => Err(Errno::EACCES.into()),
        other => Ok(other?),
    }
}

/// The environment as it will be: of repeated variables the last value, at the first's place; and
/// a home directory.
pub fn complete(environment: &[String], uid: u32) -> Vec<String> {
    let mut complete: Vec<String> = Vec::with_capacity(environment.len() + 1);
    let mut places = std::collections::HashMap::new();
    for variable in environment {
        let name = variable.split('=').next().unwrap_or_default();
        match places.get(name) {
            Some(&place) => complete[place] = variable.clone(),
            None => {
                places.insert(name, complete.len());
                complete.push(variable.clone());
            }
        }
    }
    let homeless = complete.iter().all(|v| v.strip_prefix("HOME=").is_none_or(str::is_empty));
    if homeless {
        complete.retain(|variable| !variable.starts_with("HOME="));
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        complete.push(format!("HOME={}", home(&users, uid).unwrap_or("/")));
    }
    complete
}

/// The home of `uid` in the text of `/etc/passwd`.
fn home(users: &str, uid: u32) -> Option<&str> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse::<u32>().ok()? == uid;
        fields.nth(2).filter(|home| found && !home.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(path: &str) -> Vec<String> {
        vec![format!("PATH={path}")]
    }

    #[test]
    fn commands_are_found_or_refused_as_by_runc() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let plain = dir.path().join("plain");
        fs::write(&plain, "text").expect("file");
        let here = dir.path().display().to_string();
        assert!(find("sh", &path("/nowhere:/bin")).is_ok());
        for (name, search, text) in [
            ("nosuch", "/bin", "exec: \"nosuch\": executable file not found in $PATH"),
            ("sh", "", "exec: \"sh\": executable file not found in $PATH"),
            ("", "/bin", "exec: \"\": executable file not found in $PATH"),
            ("/no/such", "/bin", "exec: \"/no/such\": stat /no/such: no such file or directory"),
            ("/etc", "/bin", "exec: \"/etc\": is a directory"),
            ("plain", &here, "exec: \"plain\": executable file not found in $PATH"),
        ] {
            assert_eq!(find(name, &path(search)), Err(text.to_owned()));
        }
        let refused = find(&plain.display().to_string(), &[]).expect_err("not executable");
        assert!(refused.ends_with("\": permission denied"), "{refused}");
    }

    #[test]
    fn errors_are_said_in_lower_case() {
        let say = |code| say(&io::Error::from_raw_os_error(code));
        assert_eq!(say(libc::ENOENT), "no such file or directory");
        assert_eq!(say(libc::EIO), "input/output error");
        assert_eq!(say(libc::ENOEXEC), "exec format error");
    }

    #[test]
    fn environments_are_completed() {
        let given = ["A=1", "B=2", "A=3", "HOME="].map(str::to_owned);
        assert_eq!(complete(&given, u32::MAX), ["A=3", "B=2", "HOME=/"]);
        let kept = ["HOME=/x".to_owned()];
        assert_eq!(complete(&kept, 0), kept);
        let users = "root:x:0:0:root:/root:/bin/sh\nbroken\nu:x:1000:1000::/home/u:/bin/sh\n";
        assert_eq!(home(users, 1000), Some("/home/u"));
        assert_eq!(home(users, 0), Some("/root"));
        assert_eq!(home(users, 7), None);
    }
}
