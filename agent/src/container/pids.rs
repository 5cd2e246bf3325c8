//! The PID namespace that containers of a pod share: that of the sandbox's own container, or, in a
//! sandbox that has none, one that is made when the first container asks for it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::{Mutex, oneshot};

use crate::container::error::{ContainerError, Tried};
use crate::container::helper::Helper;
use crate::init::reaper::{Exit, Reaper};
use crate::process::Stdio;

/// Who the namespace is asked of.
#[derive(Clone, Copy)]
pub enum SharedPids<'a> {
    /// The sandbox's own container; none while that does not run.
    Own(Option<u32>),
    /// A process that does nothing else.
    Holder(&'a Holder),
}

/// A process that is the first of its PID namespace.
#[derive(Debug, Default)]
pub struct Holder(Mutex<Option<Held>>);

#[derive(Debug)]
struct Held {
    pid: u32,
    exit: oneshot::Receiver<Exit>,
}

impl Holder {
    /// Its process id; started if it does not run.
    pub async fn pid(&self, reaper: &Arc<Reaper>) -> Result<u32, ContainerError> {
        let mut held = self.0.lock().await;
        if let Some(held) = held.as_mut()
            && matches!(held.exit.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        {
            return Ok(held.pid);
        }
        let hold = reaper.hold();
        let stdio = nothing().tried("open /dev/null")?;
        let mut helper =
            Helper::spawn("pids", Path::new("/"), stdio).tried("execute the helper")?;
        let pid = helper.pid().await?;
        let exit = reaper.watch(pid);
        drop(hold);
        // Not negative: the helper's answer has been checked.
        let pid = pid.unsigned_abs();
        *held = Some(Held { pid, exit });
        Ok(pid)
    }
}

fn nothing() -> io::Result<Stdio> {
    let null = || File::options().read(true).write(true).open("/dev/null");
    Ok(Stdio { input: null()?.into(), output: null()?.into(), error: null()?.into() })
}
