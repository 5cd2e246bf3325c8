//! Users and capabilities.

use super::JailError;
use super::system::plain;
use crate::capabilities::{self, Sets};

/// `SECBIT_NO_SETUID_FIXUP`: capabilities stay when the user changes.
const KEEP_OVER_USER_CHANGE: libc::c_ulong = 1 << 2;

/// The sets have room for no more.
const MOST: u32 = 64;

/// The capabilities that a jail may leave, as in `linux/capability.h`.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub(super) enum Capability {
    Chown = 0,
    DacOverride = 1,
    FileOwner = 3,
    FileSetId = 4,
    SetGroup = 6,
    SetUser = 7,
    LinuxImmutable = 9,
    ChangeRoot = 18,
    MakeNode = 27,
    SetFileCapabilities = 31,
}

/// Lets this thread, and those it starts, keep capabilities when it changes its user.
pub(super) fn keep_over_user_change() -> Result<(), JailError> {
    // SAFETY: plain numbers.
    plain("keep rights over a change of user", unsafe {
        libc::prctl(libc::PR_SET_SECUREBITS, KEEP_OVER_USER_CHANGE, 0, 0, 0)
    })
}

/// Becomes that user in the group of the same number, and in no other group.
pub(super) fn become_user(id: libc::uid_t) -> Result<(), JailError> {
    // SAFETY: no groups are read.
    plain("leave its groups", unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: plain numbers.
    plain("change its group", unsafe { libc::setresgid(id, id, id) })?;
    // SAFETY: plain numbers.
    plain("change its user", unsafe { libc::setresuid(id, id, id) })
}

fn mask(kept: &[Capability]) -> u32 {
    kept.iter().fold(0, |mask, capability| mask | 1 << (*capability as u32))
}

/// Lets no program that is executed have more than `kept`. The right to do so goes with the others.
pub(super) fn bound(kept: &[Capability]) -> Result<(), JailError> {
    let mask = mask(kept);
    // SAFETY: plain numbers.
    plain("drop ambient rights", unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    })?;
    for number in 0..MOST {
        let stays = number < u32::BITS && mask & 1 << number != 0;
        // SAFETY: plain numbers.
        let there = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) };
        // Less than nothing: this kernel does not know of it.
        if !stays && there > 0 {
            // SAFETY: plain numbers.
            plain("bound its rights", unsafe {
                libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0)
            })?;
        }
    }
    Ok(())
}

/// Drops every capability but `kept`.
pub(super) fn keep_only(kept: &[Capability]) -> Result<(), JailError> {
    let mask = mask(kept);
    let low = Sets { effective: mask, permitted: mask, inheritable: 0 };
    let dropped = capabilities::set(&[low, Sets::default()]);
    dropped.map_err(|source| JailError::Step { step: "drop its rights", source })
}
