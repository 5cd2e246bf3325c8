//! virtio over PCI (virtio 1.2, section 4.1), modern only, interrupts by MSI-X only.
//!
//! One BAR holds everything ([`layout`]): common configuration, ISR, device configuration, the
//! notification addresses, MSI-X table and pending bits.
//!
//! The device status only moves forward, one step at a time; anything else the driver writes is
//! ignored. What may be configured depends on where it stands:
//!
//! ```text
//!            1              2               8                4
//!   Reset ───────▶ Found ──────▶ Driver ──────────▶ Agreed ──────────▶ Live
//!     ▲                            │ features        │ queues            │ nothing: queues are
//!     │                            │ may be          │ may be            │ the device's now
//!     │                            │ written         │ written           │
//!     └───────────────── 0 ────────┴─────────────────┴───────────────────┘
//! ```
//!
//! The step to Agreed is refused (the bit reads back as zero) unless the features are a subset of
//! those offered with VIRTIO_F_VERSION_1 among them. In the step to Live the queues that are enabled
//! are checked once more and given to the device; if that fails, DEVICE_NEEDS_RESET is set and the
//! driver is interrupted. A queue that has been enabled cannot be changed before the next reset.

mod capabilities;
mod common;
mod function;
pub mod layout;
mod msix;
mod queue;
mod state;
mod status;
#[cfg(test)]
mod tests;
mod vector;

pub use function::{TransportError, VirtioPci};
pub use layout::BAR_SIZE;
pub use state::VirtioPciState;
