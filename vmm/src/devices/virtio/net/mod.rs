//! Network device (virtio 1.2, section 5.1) over a tap of the host's.
//!
//! Frames take one of two ways. In user space they go by `readv` and `writev` straight between the
//! tap and the guest's buffers, without a copy ([`receive`], [`send`]); rate limits and counters are
//! there. In the kernel (vhost-net, [`vhost`]) they never come to this process; only the control
//! queue does.
//!
//! ```text
//!                      kick, or the tap is readable
//!   waits for frames ───────────────────────────────▶ runs ──── 256 frames ───▶ has another turn
//!   waits for buffers                                  │ tap empty; no buffers; tap full; no tokens
//!   waits for the tap  ◀───────────────────────────────┘
//!   waits for the timer
//! ```
//!
//! The header before each frame of the guest's is copied, checked ([`header`]) and sent from the
//! copy. What is malformed is dropped and counted; the chain is given back.
//!
//! With several queue pairs the tap hands frames only to those that the driver has said it uses.
//!
//! System calls beside those of all devices: `readv`, `writev`, `ioctl` (`TUN*`, `VHOST_*`),
//! `timerfd_create`, `timerfd_settime`, `fcntl` (`F_SETFL`).

mod control;
mod device;
mod event_handler;
mod features;
mod header;
mod limiter;
mod metrics;
mod receive;
mod send;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

pub use device::{MAX_PAIRS, Net, NetConfig, NetError};
pub use metrics::{Counters, Direction};
pub use state::NetState;
pub use tap::{Tap, TapError};

/// Why one side of a pair has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// There is nothing to do: it goes on when somebody tells of news.
    Idle,
    /// There is more, but others have their turn first.
    More,
    /// The tap has no room.
    Blocked,
    /// There are no tokens; the timer runs.
    Limited,
}
