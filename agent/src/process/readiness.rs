//! What a relay waits for when a splice between a pipe and a socket says "later".
//!
//! The call does not say which of the two it means, and either may have changed by the time one asks.
//! So both are asked; only a side that is not ready now is waited for.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The side that a splice has to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The one that bytes come from.
    Source,
    /// The one that they go to.
    Sink,
    /// Neither any more: the splice is to be tried again.
    Neither,
}

/// Which side of a splice is not ready; fails if nobody reads a sink that is a pipe.
pub fn wait(source: impl AsFd, sink: impl AsFd) -> io::Result<Wait> {
    let mut fds = [
        PollFd::new(source.as_fd(), PollFlags::POLLIN),
        PollFd::new(sink.as_fd(), PollFlags::POLLOUT),
    ];
    poll(&mut fds, PollTimeout::ZERO)?;
    let [source, sink] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
    if sink.contains(PollFlags::POLLERR) {
        return Err(Errno::EPIPE.into());
    }
    // An end or an error is something that the splice will tell.
    Ok(match (source.is_empty(), sink.is_empty()) {
        (_, true) => Wait::Sink,
        (true, false) => Wait::Source,
        (false, false) => Wait::Neither,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::{pipe2, write};

    #[test]
    fn only_the_side_that_is_not_ready_is_waited_for() {
        let pair = || pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).expect("pipe");
        let ((from, feed), (drain, to)) = (pair(), pair());
        let now = || wait(&from, &to).expect("poll");
        assert_eq!(now(), Wait::Source);
        write(&feed, b"x").expect("room");
        assert_eq!(now(), Wait::Neither);
        while write(&to, &[0; 4096]).is_ok() {}
        assert_eq!(now(), Wait::Sink);
        let mut all = vec![0; 1 << 20];
        nix::unistd::read(&drain, &mut all).expect("full");
        assert_eq!(now(), Wait::Neither);
        nix::unistd::read(&from, &mut all).expect("one byte");
        drop(feed);
        assert_eq!(now(), Wait::Neither, "the end is news");
        drop(drain);
        wait(&from, &to).expect_err("nobody reads");
    }
}
