//! The OCI spec, from the host's point of view to the guest's.
//!
//! Every field has a rule: it is passed on, translated, ignored because it means nothing in a
//! machine of its own, or refused with an error that names it. `docs/spec.md` is the table of the
//! rules; a change here is a change there.

mod devices;
mod error;
mod linux;
mod membership;
mod mounts;
mod process;
mod resources;
mod translate;
mod unknown;

pub use error::SpecError;
pub use linux::is_sandbox_sysctl;
pub use membership::{Membership, sandbox_of};
pub use process::translate_process;
pub use resources::translate_resources;
pub use translate::{GuestSpec, PlacedVolume, translate};
pub use unknown::parse;
