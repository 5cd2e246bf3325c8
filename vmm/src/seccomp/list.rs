//! What an allow-list is made of.

use syscalls::Sysno;

/// A call that is allowed, and what for.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// The call.
    pub call: Sysno,
    /// With which arguments.
    pub when: When,
    /// What needs it.
    pub why: &'static str,
}

/// With which arguments a call is allowed.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// With any.
    Always,
    /// With any of these combinations.
    Each(&'static [&'static [Argument]]),
}

/// What an argument is to be: its lower 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Argument {
    /// Which one, from 0.
    pub index: u8,
    /// How it is compared.
    pub compare: Compare,
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.compare {
            Compare::Is(value) => write!(f, "{}={value:#x}", self.index),
            Compare::Masked { mask, value } => write!(f, "{}&{mask:#x}={value:#x}", self.index),
        }
    }
}

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// It is this value.
    Is(u64),
    /// Under the mask it is this value.
    Masked {
        /// The bits that count.
        mask: u64,
        /// What they are.
        value: u64,
    },
}

/// Allowed with any arguments.
pub(super) const fn any(call: Sysno, why: &'static str) -> Allowed {
    Allowed { call, when: When::Always, why }
}

/// Allowed with one of these combinations of arguments.
pub(super) const fn with(
    call: Sysno,
    each: &'static [&'static [Argument]],
    why: &'static str,
) -> Allowed {
    Allowed { call, when: When::Each(each), why }
}

/// The argument is that value.
pub(super) const fn is(index: u8, value: i64) -> Argument {
    // The kernel compares 32 bits.
    Argument { index, compare: Compare::Is(value.cast_unsigned() & 0xffff_ffff) }
}

/// The argument has none of those bits.
pub(super) const fn without(index: u8, bits: i64) -> Argument {
    let mask = bits.cast_unsigned() & 0xffff_ffff;
    Argument { index, compare: Compare::Masked { mask, value: 0 } }
}
