//! Mount options as text, understood as containerd and runc do.

use nix::mount::MsFlags;

/// The options of one mount, sorted by what the kernel wants where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags of the mount call.
    pub flags: MsFlags,
    /// Propagation, set by a call of its own.
    pub propagation: MsFlags,
    /// Whether the mounts beneath are to be read-only too; the mount itself is.
    pub recursive_read_only: bool,
    /// What is left: the file system's own options.
    pub data: Vec<String>,
}

/// An option that cannot be granted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("mount option `{0}` is not supported")]
pub struct MountOptionsError(String);

impl Default for MountOptions {
    fn default() -> Self {
        let none = MsFlags::empty();
        Self { flags: none, propagation: none, recursive_read_only: false, data: Vec::new() }
    }
}

impl MountOptions {
    /// Understands a list of options; later ones overrule earlier ones.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Result<Self, MountOptionsError> {
        let mut parsed = Self::default();
        for option in options.iter().flat_map(|option| parts(option.as_ref())) {
            if let Some(recursive) = recursive_read_only(option) {
                parsed.recursive_read_only = recursive;
                parsed.flags.set(MsFlags::MS_RDONLY, recursive);
            } else if let Some((set, flags)) = flag(option) {
                parsed.flags.set(flags, set);
            } else if let Some(propagation) = propagation(option) {
                parsed.propagation = propagation;
            } else if option == "loop" || option.starts_with("X-containerd.") {
                return Err(MountOptionsError(option.to_owned()));
            } else if !option.is_empty() && option != "defaults" {
                parsed.data.push(option.to_owned());
            }
        }
        Ok(parsed)
    }

    /// The file system's own options as the kernel takes them.
    pub fn data(&self) -> String {
        self.data.join(",")
    }
}

/// The options in one text. A security context may have commas of its own.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let whole = text.contains("context=");
    let most = if whole { 1 } else { usize::MAX };
    text.splitn(most, ',')
}

/// Whether the option makes the mounts beneath read-only too, or no longer so.
fn recursive_read_only(option: &str) -> Option<bool> {
    match option {
        "rro" => Some(true),
        "rrw" => Some(false),
        _ => None,
    }
}

/// Whether the option sets or clears, and which flags.
fn flag(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "atime" => (false, MsFlags::MS_NOATIME),
        "bind" => (true, MsFlags::MS_BIND),
        "dev" => (false, MsFlags::MS_NODEV),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "mand" => (true, MsFlags::MS_MANDLOCK),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "nodev" => (true, MsFlags::MS_NODEV),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "nomand" => (false, MsFlags::MS_MANDLOCK),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "remount" => (true, MsFlags::MS_REMOUNT),
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "suid" => (false, MsFlags::MS_NOSUID),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<MsFlags> {
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE.union(MsFlags::MS_REC),
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE.union(MsFlags::MS_REC),
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED.union(MsFlags::MS_REC),
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay() {
        let options = ["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"];
        let parsed = MountOptions::parse(&options).unwrap();
        assert_eq!(parsed.flags, MsFlags::empty());
        assert_eq!(parsed.data(), "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b");
    }

    #[test]
    fn a_read_only_bind() {
        let parsed = MountOptions::parse(&["rbind", "rprivate", "ro", "nosuid,nodev"]).unwrap();
        let flags = MsFlags::MS_BIND
            | MsFlags::MS_REC
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        assert_eq!(parsed.flags, flags);
        assert_eq!(parsed.propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
        assert_eq!(parsed.data(), "");
    }

    #[test]
    fn a_read_only_bind_with_what_is_beneath() {
        let parsed = MountOptions::parse(&["rbind", "rro"]).unwrap();
        assert!(parsed.recursive_read_only && parsed.flags.contains(MsFlags::MS_RDONLY));
        let parsed = MountOptions::parse(&["rro,rrw"]).unwrap();
        assert_eq!(parsed, MountOptions::default());
    }

    #[test]
    fn a_security_context_stays_whole() {
        let context = "context=\"system_u:object_r:container_file_t:s0:c1,c2\"";
        let parsed = MountOptions::parse(&["ro", context]).unwrap();
        assert_eq!(parsed.data, [context]);
    }

    #[test]
    fn later_options_overrule() {
        let parsed = MountOptions::parse(&["ro", "noexec", "defaults", "rw", "exec"]).unwrap();
        assert_eq!(parsed, MountOptions::default());
    }

    #[test]
    fn what_cannot_be_granted_is_named() {
        let error = MountOptions::parse(&["ro", "loop"]).unwrap_err();
        assert_eq!(error.to_string(), "mount option `loop` is not supported");
    }
}
