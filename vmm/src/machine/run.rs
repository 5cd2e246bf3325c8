//! From the first request to the end.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::SubscriberOps;
use husk_control::{
    BootConfig, EndReason, Event, MachineRequest, Packet, PacketError, Reply, Request,
};
use slog::{Logger, debug, error, info, o, warn};

use super::build::{BuildError, Resources, build};
use super::control::{Control, ControlHandler};
use super::streams::ControlStreams;
use super::{EndSignal, EventLoop, Machine, terminate};
use crate::devices::virtio::vsock::{Listener, Vsock};
use crate::seccomp::{self, SeccompError};
use crate::vcpu::VcpuError;

/// How long a machine that has ended waits for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why there was no machine, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The control socket failed.
    #[error("the machine's control socket")]
    Control(#[from] PacketError),
    /// The first request could not be carried out; the text is the whole answer to it.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The event loop could not be confined.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The vCPUs did not start.
    #[error("the machine could not be started")]
    Start(#[source] VcpuError),
    /// The event loop failed.
    #[error("the machine's event loop")]
    Events(#[source] event_manager::Error),
    /// A descriptor could not be had.
    #[error("the machine's own descriptors")]
    Descriptor(#[from] std::io::Error),
    /// It ended by a failure of its own.
    #[error("{0}")]
    Failed(EndReason),
}

/// Waits for the configuration on the control socket, runs the machine, and returns when it has
/// ended. The shim has been told why by then.
pub fn run(socket: OwnedFd, logger: &Logger) -> Result<(), MachineError> {
    let control = Arc::new(Control::new(socket, logger.clone()));
    let end = Arc::new(EndSignal::new()?);
    let mut events = EventLoop::new().map_err(MachineError::Events)?;
    let streams = Box::new(ControlStreams::new(control.clone()));
    let vsock = Vsock::new(streams, logger.new(o!("device" => "vsock")))?;
    let vsock = Arc::new(Mutex::new(vsock));
    let Some(mut boot) = first_request(&control, &vsock)? else {
        debug!(logger, "machine: not wanted any more");
        return Ok(());
    };
    let machine = match start(&mut boot, vsock, control.clone(), &end, logger) {
        Ok(machine) => Rc::new(machine),
        Err(error) => {
            control.reply(boot.id, Err(chain(&error)), &[]);
            control.finish();
            return Err(error);
        }
    };
    control.reply(boot.id, Ok(Reply::Done), &[]);
    let handler =
        ControlHandler::new(control.clone(), machine.clone(), end.clone(), logger.clone());
    events.add_subscriber(Box::new(handler));
    terminate::wake(end.event());
    let reason = wait(&mut events, &machine, &end, logger);
    terminate::wake_nobody();
    deliver(&mut events, &machine, logger);
    // Its vCPUs end, and the console's last line is written.
    drop(events);
    drop(machine);
    info!(logger, "machine: ended"; "reason" => %reason);
    control.event(Event::Ended { reason: reason.clone() }, &[]);
    control.finish();
    match reason {
        EndReason::Failed { .. } => Err(MachineError::Failed(reason)),
        _ => Ok(()),
    }
}

/// The request to boot, and what came with it.
struct Boot {
    id: u64,
    packet: Packet<Request>,
    config: BootConfig,
}

/// Waits for the request to boot. Ports can be opened before.
fn first_request(control: &Control, vsock: &Mutex<Vsock>) -> Result<Option<Boot>, MachineError> {
    while let Some(mut packet) = control.next()? {
        let id = packet.message.id;
        let mut vsock = vsock.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match &packet.message.request {
            MachineRequest::Boot(config) => {
                let config = BootConfig::clone(config);
                return Ok(Some(Boot { id, packet, config }));
            }
            MachineRequest::Listen { port } => {
                vsock.listen(*port, Listener::pairs());
                Ok(Reply::Done)
            }
            &MachineRequest::Accept { port, from, stream } => {
                let taken = packet.take(stream).map_err(chain);
                let listener = taken.map(|stream| Listener::over(stream, from));
                listener.map(|listener| vsock.listen(port, listener)).map(|()| Reply::Done)
            }
            MachineRequest::Unlisten { port } => {
                vsock.unlisten(*port);
                Ok(Reply::Done)
            }
            _ => Err("the machine has not been booted yet".to_owned()),
        };
        control.reply(id, result, &[]);
    }
    Ok(None)
}

fn start(
    boot: &mut Boot,
    vsock: Arc<Mutex<Vsock>>,
    control: Arc<Control>,
    end: &Arc<EndSignal>,
    logger: &Logger,
) -> Result<Machine, MachineError> {
    let resources = Resources::take(&mut boot.packet, &boot.config).map_err(BuildError::from)?;
    let machine = build(&boot.config, resources, vsock, control, end.clone(), logger)?;
    // From here on there is a guest.
    seccomp::narrow(seccomp::Thread::Events)?;
    machine.resume().map_err(MachineError::Start)?;
    Ok(machine)
}

fn wait(events: &mut EventLoop, machine: &Machine, end: &EndSignal, logger: &Logger) -> EndReason {
    loop {
        if terminate::asked() {
            end.end(EndReason::Terminated);
        }
        if let Some(reason) = end.reason() {
            return reason;
        }
        if let Err(error) = turn(events, machine, None) {
            error!(logger, "machine: event loop failed"; "error" => %error);
            end.end(EndReason::Failed { error: format!("event loop: {error}") });
        }
    }
}

/// What the guest has sent before its end reaches the shim, if somebody reads it.
fn deliver(events: &mut EventLoop, machine: &Machine, logger: &Logger) {
    if let Err(error) = machine.pause() {
        warn!(logger, "machine: vCPUs not paused at the end"; "error" => %error);
    }
    let mut left = 0;
    let mut progress = Instant::now();
    loop {
        let served = match turn(events, machine, Some(if left == 0 { 0 } else { 10 })) {
            Ok(served) => served,
            Err(error) => return warn!(logger, "machine: event loop failed"; "error" => %error),
        };
        let now = machine.vsock().unsent();
        if now < left {
            progress = Instant::now();
        }
        left = now;
        if (left == 0 && served == 0) || progress.elapsed() > PATIENCE {
            return;
        }
    }
}

/// One turn of the event loop, of at most so many milliseconds; how many events there were.
fn turn(
    events: &mut EventLoop,
    machine: &Machine,
    limit: Option<i32>,
) -> Result<usize, event_manager::Error> {
    machine.settle(events);
    match events.run_with_timeout(limit.unwrap_or(-1)) {
        Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => Ok(1),
        other => other,
    }
}

/// An error and what it came from, in one line.
pub(crate) fn chain(error: impl Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        // Transparent errors would say it twice.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}
