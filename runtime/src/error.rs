//! Errors as text.

use std::error::Error;
use std::io;

use nix::errno::Errno;

use crate::printable;

/// Returns an error with its causes, outermost first, for the person at the terminal. Parts of it may come
/// from a guest: control characters are escaped.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&one(error));
        cause = error.source();
    }
    printable::lines(&text).into_owned()
}

/// What the operating system says is worded as runc words it: people search for that text, and
/// clients compare it.
fn one(error: &(dyn Error + 'static)) -> String {
    let errno = match (error.downcast_ref::<io::Error>(), error.downcast_ref::<Errno>()) {
        (Some(error), _) => error.raw_os_error().map(Errno::from_raw),
        (_, Some(errno)) => Some(*errno),
        _ => None,
    };
    let Some(errno) = errno else { return error.to_string() };
    let mut letters = errno.desc().chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot use it")]
    struct Outer<E: Error + 'static>(#[source] E);

    #[test]
    fn the_systems_errors_read_as_runcs() {
        let missing = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(chain(&Outer(missing)), "cannot use it: no such file or directory");
        assert_eq!(chain(&Outer(Errno::EPERM)), "cannot use it: operation not permitted");
        let other = Outer(Outer(io::Error::other("Not the system's")));
        assert_eq!(chain(&other), "cannot use it: cannot use it: Not the system's");
    }

    #[test]
    fn a_terminal_obeys_no_error() {
        let error = Outer(io::Error::other("\x1b[2Jgone\nline"));
        assert_eq!(chain(&error), "cannot use it: \\u{1b}[2Jgone\nline");
    }
}
