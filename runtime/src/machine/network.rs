//! The network namespace that the machine process is in, by which others find the sandbox's.

use std::fs::File;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::apart::apart;

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
    /// Does `work` in the namespace; what it starts stays there.
    pub(super) fn within<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, Errno> + Send,
    ) -> Result<T, Errno> {
        if *self == Self::Inherited {
            return work();
        }
        apart(|| {
            match self {
                Self::Inherited => {}
                Self::New => unshare(CloneFlags::CLONE_NEWNET)?,
                Self::At(path) => {
                    let namespace = File::open(path).map_err(|error| {
                        Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
                    })?;
                    setns(namespace, CloneFlags::CLONE_NEWNET)?;
                }
            }
            work()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace() -> Result<PathBuf, Errno> {
        std::fs::read_link("/proc/thread-self/ns/net").map_err(|_| Errno::ENOENT)
    }

    #[test]
    fn a_new_namespace_is_another_one_and_stays_inside() {
        let own = namespace().unwrap();
        assert_eq!(NetworkNamespace::Inherited.within(namespace).unwrap(), own);
        match NetworkNamespace::New.within(namespace) {
            Err(Errno::EPERM) => eprintln!("skipped: namespaces need root"),
            new => assert_ne!(new.unwrap(), own),
        }
        assert_eq!(namespace().unwrap(), own);
        let gone = NetworkNamespace::At("/nowhere".into());
        assert_eq!(gone.within(namespace), Err(Errno::ENOENT));
    }
}
