//! Makes a filter program out of an allow-list.
//!
//! The kernel checks, translates and compiles each filter when it is entered, which takes it a microsecond
//! an instruction, and a machine enters three as it starts. So the program is short: numbers of calls are
//! found by halving, and each argument is loaded once for all the values it may have.
//!
//! ```text
//!   prologue   another calling convention ──▶ kill
//!   frequent   the list's first call ───────▶ its arguments
//!   tree       number ≥ n ? …
//!   arguments  of each call that has them
//!   answers    forbid, allow, no such call
//! ```

use std::collections::BTreeMap;

use seccompiler::sock_filter;
use syscalls::Sysno;

use super::list::{Allowed, Argument, Compare, When};

/// A list that makes no program. A fault of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// Jumps have 8 bits.
    #[error("a jump over {0} instructions: the list is too long for one program")]
    Long(usize),
    /// An argument of a number that no call has.
    #[error("a call has no argument {0}")]
    Argument(u8),
}

/// `AUDIT_ARCH_X86_64`: the only calling convention; another one's calls have other numbers.
const ARCHITECTURE: u32 = 0xc000_003e;

/// Where `struct seccomp_data` has things.
mod data {
    pub(super) const NUMBER: u32 = 0;
    pub(super) const ARCHITECTURE: u32 = 4;

    /// The lower 32 bits of an argument.
    pub(super) fn argument(index: u8) -> u32 {
        16 + 8 * u32::from(index)
    }
}

/// Operations (`linux/bpf_common.h`).
mod operation {
    pub(super) const LOAD: u16 = 0x20;
    pub(super) const AND: u16 = 0x54;
    pub(super) const JUMP_IF_EQUAL: u16 = 0x15;
    pub(super) const JUMP_IF_AT_LEAST: u16 = 0x35;
    pub(super) const RETURN: u16 = 0x06;
}

/// What the kernel then does with a call (`linux/seccomp.h`).
mod answer {
    pub(super) const KILL: u32 = 0x8000_0000;
    pub(super) const TRAP: u32 = 0x0003_0000;
    pub(super) const ALLOW: u32 = 0x7fff_0000;
    pub(super) const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
}

/// A place to jump to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The next instruction.
    Next,
    Forbid,
    Allow,
    NoSuchCall,
    /// Where the arguments of a call are looked at: its index among those that have them.
    Arguments(usize),
    /// An alternative of them, or a half of the tree: what [`Assembler::label`] gave out.
    Label(usize),
}

/// An instruction, its jumps not yet counted.
struct Step {
    code: u16,
    operand: u32,
    then: Place,
    otherwise: Place,
}

/// The lists' program: a call is carried out if it is on one of them with these arguments, `clone3` is as
/// if the kernel had no such call, and any other is trapped. (`clone3` has its flags in memory, where no
/// filter can look; without it the C library takes `clone`.)
pub(super) fn compile(lists: &[&[Allowed]]) -> Result<Vec<sock_filter>, ProgramError> {
    let mut calls: BTreeMap<u32, Vec<&[Argument]>> = BTreeMap::new();
    for allowed in lists.iter().copied().flatten() {
        let alternatives = calls.entry(number(allowed.call)).or_default();
        if let When::Each(each) = allowed.when {
            alternatives.extend(each);
        }
    }
    let checked: Vec<_> = calls.iter().filter(|(_, each)| !each.is_empty()).collect();
    let place = |number: &u32| match checked.binary_search_by_key(&number, |(number, _)| *number) {
        Ok(index) => Place::Arguments(index),
        Err(_) => Place::Allow,
    };

    let mut assembler = Assembler::default();
    assembler.load(data::ARCHITECTURE);
    let known = assembler.label();
    assembler.push(operation::JUMP_IF_EQUAL, ARCHITECTURE, Place::Label(known), Place::Next);
    assembler.push(operation::RETURN, answer::KILL, Place::Next, Place::Next);
    assembler.put(Place::Label(known));
    assembler.load(data::NUMBER);
    if let Some(first) = lists.iter().copied().flatten().next() {
        let first = number(first.call);
        assembler.push(operation::JUMP_IF_EQUAL, first, place(&first), Place::Next);
    }
    // Each range of numbers with the same answer, by its first number.
    let mut ranges = vec![(0, Place::Forbid)];
    let mut add = |from: u32, place: Place| {
        // One that was empty gives way.
        if ranges.last().is_some_and(|(start, _)| *start == from) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|(_, before)| *before != place) {
            ranges.push((from, place));
        }
    };
    let clone3 = number(Sysno::clone3);
    let numbers = calls.keys().map(|number| (*number, place(number)));
    let mut numbers: Vec<_> = numbers.chain([(clone3, Place::NoSuchCall)]).collect();
    numbers.sort_unstable_by_key(|(number, _)| *number);
    for (number, place) in numbers {
        add(number, place);
        add(number + 1, Place::Forbid);
    }
    assembler.tree(&ranges);
    for (index, (_, alternatives)) in checked.iter().enumerate() {
        assembler.put(Place::Arguments(index));
        assembler.arguments(alternatives)?;
    }
    for (place, answer) in [
        (Place::Forbid, answer::TRAP),
        (Place::Allow, answer::ALLOW),
        (Place::NoSuchCall, answer::NO_SUCH_CALL),
    ] {
        assembler.put(place);
        assembler.push(operation::RETURN, answer, Place::Next, Place::Next);
    }
    assembler.finish()
}

fn number(call: Sysno) -> u32 {
    // All are below 2^10.
    u32::try_from(call.id()).unwrap_or(u32::MAX)
}

#[derive(Default)]
struct Assembler {
    steps: Vec<Step>,
    /// What has been put where.
    places: Vec<(Place, usize)>,
    labels: usize,
}

impl Assembler {
    fn push(&mut self, code: u16, operand: u32, then: Place, otherwise: Place) {
        self.steps.push(Step { code, operand, then, otherwise });
    }

    fn load(&mut self, offset: u32) {
        self.push(operation::LOAD, offset, Place::Next, Place::Next);
    }

    fn label(&mut self) -> usize {
        self.labels += 1;
        self.labels
    }

    /// The place is here.
    fn put(&mut self, place: Place) {
        self.places.push((place, self.steps.len()));
    }

    /// Finds the range that the number is in. There is one at least.
    fn tree(&mut self, ranges: &[(u32, Place)]) {
        let (lower, upper) = ranges.split_at(ranges.len() / 2);
        let Some((from, _)) = upper.first() else { return };
        // A half of one range needs no steps of its own.
        let only = |half: &[(u32, Place)]| match half {
            [(_, place)] => Some(*place),
            _ => None,
        };
        let then = only(upper).unwrap_or_else(|| Place::Label(self.label()));
        self.push(operation::JUMP_IF_AT_LEAST, *from, then, only(lower).unwrap_or(Place::Next));
        if only(lower).is_none() {
            self.tree(lower);
        }
        if let Place::Label(_) = then {
            self.put(then);
            self.tree(upper);
        }
    }

    /// Compares the arguments with each combination.
    fn arguments(&mut self, alternatives: &[&[Argument]]) -> Result<(), ProgramError> {
        let mut loaded = None;
        // Those of one value come first, so that an argument is loaded once; otherwise in the list's order.
        for alternative in alternatives {
            let [Argument { index, compare: Compare::Is(value) }] = alternative else { continue };
            if loaded != Some(*index) {
                self.load_argument(*index)?;
                loaded = Some(*index);
            }
            self.push(operation::JUMP_IF_EQUAL, low(*value), Place::Allow, Place::Next);
        }
        for alternative in alternatives {
            if matches!(alternative, [Argument { compare: Compare::Is(_), .. }]) {
                continue;
            }
            let next = Place::Label(self.label());
            for (position, Argument { index, compare }) in alternative.iter().enumerate() {
                self.load_argument(*index)?;
                let value = match *compare {
                    Compare::Is(value) => value,
                    Compare::Masked { mask, value } => {
                        self.push(operation::AND, low(mask), Place::Next, Place::Next);
                        value
                    }
                };
                let last = position + 1 == alternative.len();
                let then = if last { Place::Allow } else { Place::Next };
                self.push(operation::JUMP_IF_EQUAL, low(value), then, next);
            }
            self.put(next);
        }
        self.push(operation::RETURN, answer::TRAP, Place::Next, Place::Next);
        Ok(())
    }

    fn load_argument(&mut self, index: u8) -> Result<(), ProgramError> {
        if index > 5 {
            return Err(ProgramError::Argument(index));
        }
        self.load(data::argument(index));
        Ok(())
    }

    fn finish(self) -> Result<Vec<sock_filter>, ProgramError> {
        let distance = |place: Place, from: usize| {
            if place == Place::Next {
                return Ok(0);
            }
            let put = self.places.iter().find(|(put, _)| *put == place);
            // Every place is put, after all jumps to it.
            let over = put.and_then(|(_, at)| at.checked_sub(from + 1)).unwrap_or(usize::MAX);
            u8::try_from(over).map_err(|_| ProgramError::Long(over))
        };
        let steps = self.steps.iter().enumerate();
        steps
            .map(|(at, step)| {
                let (jt, jf) = (distance(step.then, at)?, distance(step.otherwise, at)?);
                Ok(sock_filter { code: step.code, jt, jf, k: step.operand })
            })
            .collect()
    }
}

/// The lower 32 bits: all that is compared.
fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
