//! Why a jail could not be entered.

use std::io;

/// Why a jail could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The kernel refused a step. The process must end: it is not where it should be.
    #[error("jail: cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Landlock refused a step.
    #[error("jail: Landlock")]
    Landlock(#[from] landlock::RulesetError),
    /// A kernel without.
    #[error(
        "jail: this host's kernel has no Landlock (Linux 5.19 with CONFIG_SECURITY_LANDLOCK, and \
         \"landlock\" among lsm= of its command line); to do without it, add \"landlock\" to \
         accept_missing in the settings"
    )]
    NoLandlock,
}
