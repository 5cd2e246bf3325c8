//! Packet filter rules of the namespace on the host, carried out by the guest's kernel.
//!
//! Each table is told as a whole. One that has not changed is left as it is, with whatever a container has done
//! to it.

pub mod nftables;
pub mod xtables;

use std::io;

use nftables::Nftables;

/// Tables that the guest is to have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub nftables: Vec<nftables::Table>,
    pub xtables: Vec<xtables::Table>,
}

/// A table that the kernel did not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Position of the table: those of nftables first.
    pub table: usize,
    /// Position of the refused message; the number of messages if none is to blame.
    pub message: usize,
    /// The error's number.
    pub error: i32,
}

/// Brings about what `wanted` has and `told`, which is what the guest has of the host, has not. Afterwards, `told`
/// is what the kernel has taken.
pub fn apply(told: &mut Filter, wanted: Filter) -> io::Result<Vec<Refusal>> {
    let mut refusals = Vec::new();
    if *told == wanted {
        return Ok(refusals);
    }
    let mut nftables = Nftables::open()?;
    told.nftables.retain(|old| {
        let stays = wanted.nftables.iter().any(|table| table.is(old));
        // One that a container has removed is made anew for it, and removed again.
        stays || nftables.remove(old).is_err()
    });
    let first_of_xtables = wanted.nftables.len();
    for (position, table) in wanted.nftables.into_iter().enumerate() {
        let old = told.nftables.iter_mut().find(|old| old.is(&table));
        if old.as_ref().is_some_and(|old| **old == table) {
            continue;
        }
        match (nftables.make(&table, old.is_some())?, old) {
            (Some((message, error)), _) => {
                refusals.push(Refusal { table: position, message, error });
            }
            (None, Some(old)) => *old = table,
            (None, None) => told.nftables.push(table),
        }
    }
    told.xtables.retain(|old| wanted.xtables.iter().any(|table| table.is(old)));
    for (position, table) in wanted.xtables.into_iter().enumerate() {
        let old = told.xtables.iter_mut().find(|old| old.is(&table));
        if old.as_ref().is_some_and(|old| **old == table) {
            continue;
        }
        match (xtables::replace(&table), old) {
            (Err(error), _) => refusals.push(Refusal {
                table: first_of_xtables + position,
                message: 0,
                error: error.raw_os_error().unwrap_or(libc::EINVAL),
            }),
            (Ok(()), Some(old)) => *old = table,
            (Ok(()), None) => told.xtables.push(table),
        }
    }
    Ok(refusals)
}
