//! A terminal for the process to be, opened where its pseudo terminals are.

use std::fs::{File, OpenOptions};
use std::io;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::container::helper::console::Sender;

/// Opens one of `(rows, columns)`, 0 leaving the kernel's default; sends its master end through
/// `console`, and makes its other end the standard streams of this process, which leads a session.
pub fn open((rows, columns): (u16, u16), console: &Sender) -> io::Result<()> {
    let master = OpenOptions::new().read(true).write(true).open("/dev/ptmx")?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave: File = ioctl_tiocgptpeer(&master, flags)?.into();
    if rows != 0 && columns != 0 {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size)?;
    }
    console.send(&master)?;
    rustix::process::ioctl_tiocsctty(&slave)?;
    rustix::stdio::dup2_stdin(&slave)?;
    rustix::stdio::dup2_stdout(&slave)?;
    rustix::stdio::dup2_stderr(&slave)?;
    Ok(())
}
