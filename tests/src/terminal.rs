//! A `ctr` at a terminal, and the person who sits before it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::wait::{PATIENCE, until};

/// A command at a terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: File,
    shown: Receiver<Vec<u8>>,
    text: String,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// Starts `ctr` at a terminal of that many rows and columns.
    pub fn start(words: &[&str], rows: u16, columns: u16) -> Result<Self> {
        Self::start_as("ctr", words, rows, columns)
    }

    /// The same with another program.
    pub fn start_as(program: &str, words: &[&str], rows: u16, columns: u16) -> Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        tcsetwinsize(&master, size(rows, columns))?;
        let path = ptsname(&master, Vec::new())?.into_string()?;
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NOCTTY)
            .open(path)?;
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", program])
            .args(words)
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave)
            .spawn()
            .context("setsid cannot be started")?;
        let master = File::from(master);
        let (showing, shown) = channel();
        let mut reader = master.try_clone()?;
        std::thread::spawn(move || {
            let mut block = [0; 4096];
            // The last slave's end is an error on Linux.
            while let Ok(count @ 1..) = reader.read(&mut block) {
                if showing.send(block[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, master, shown, text: String::new() })
    }

    /// Types.
    pub fn types(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Waits until `wanted` is shown after what was waited for before.
    pub fn shows(&mut self, wanted: &str) -> Result<()> {
        let since = Instant::now();
        loop {
            if let Some(at) = self.text.find(wanted) {
                self.text.drain(..at + wanted.len());
                return Ok(());
            }
            let left = PATIENCE.saturating_sub(since.elapsed());
            match self.shown.recv_timeout(left) {
                // Both terminals, the outer and the inner, add returns of their own.
                Ok(more) => self.text += &String::from_utf8_lossy(&more).replace('\r', ""),
                Err(error) => bail!("{wanted:?} is not shown ({error}): {:?}", self.text),
            }
        }
    }

    /// Draws the window larger or smaller.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(tcsetwinsize(&self.master, size(rows, columns))?)
    }

    /// Waits for the end of the command; its exit code.
    pub fn ends(mut self) -> Result<i32> {
        let ended = until("it ends", PATIENCE, || Ok(self.child.try_wait()?));
        let ended = ended.with_context(|| format!("it shows {:?}", self.text))?;
        ended.code().context("ended by a signal")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
