//! Work in a thread of its own.

use nix::errno::Errno;

/// Does `work` in a thread that ends with it: the namespaces and the working folder that it changes are
/// its own, and what it starts keeps them.
pub(crate) fn apart<T: Send, E: From<Errno> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|_| Err(Errno::EIO.into())))
}
