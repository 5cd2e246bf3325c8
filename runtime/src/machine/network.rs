//! The network namespace that the machine process is in, by which others find the sandbox's.

use std::fs::File;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

/// The network namespace that the machine process is in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// Our own.
    #[default]
    Inherited,
    /// A new one.
    New,
    /// One that is there.
    At(PathBuf),
}

impl NetworkNamespace {
    /// Moves the calling thread into the namespace.
    pub(super) fn enter(&self) -> Result<(), Errno> {
        match self {
            Self::Inherited => Ok(()),
            Self::New => unshare(CloneFlags::CLONE_NEWNET),
            Self::At(path) => {
                let namespace = File::open(path)
                    .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
                setns(namespace, CloneFlags::CLONE_NEWNET)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apart::apart;

    fn namespace() -> Result<PathBuf, Errno> {
        std::fs::read_link("/proc/thread-self/ns/net").map_err(|_| Errno::ENOENT)
    }

    fn after(namespaces: &NetworkNamespace) -> Result<PathBuf, Errno> {
        apart(|| {
            namespaces.enter()?;
            namespace()
        })
    }

    #[test]
    fn a_new_namespace_is_another_one_and_stays_inside() {
        let own = namespace().unwrap();
        assert_eq!(after(&NetworkNamespace::Inherited).unwrap(), own);
        match after(&NetworkNamespace::New) {
            Err(Errno::EPERM) => eprintln!("skipped: namespaces need root"),
            new => assert_ne!(new.unwrap(), own),
        }
        assert_eq!(namespace().unwrap(), own);
        let gone = NetworkNamespace::At("/nowhere".into());
        assert_eq!(after(&gone), Err(Errno::ENOENT));
    }
}
