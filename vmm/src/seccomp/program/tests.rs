//! The programs do what seccompiler's do for the same lists.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::*;
use crate::seccomp::Thread;

/// What a filter is asked about: `struct seccomp_data`.
#[derive(Debug, Clone, Copy)]
struct Call {
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            data::NUMBER => self.number,
            data::ARCHITECTURE => self.architecture,
            offset => {
                let (at, high) = ((offset - 16) / 8, (offset - 16) % 8 == 4);
                let value = self.arguments[usize::try_from(at).unwrap()];
                low(if high { value >> 32 } else { value })
            }
        }
    }
}

/// Runs a program as the kernel does.
fn run(program: &[sock_filter], call: &Call) -> u32 {
    let (mut accumulator, mut at) = (0, 0);
    loop {
        let step = &program[at];
        let skip = |yes: bool| usize::from(if yes { step.jt } else { step.jf });
        at += 1 + match step.code {
            operation::LOAD => {
                accumulator = call.word(step.k);
                0
            }
            operation::AND => {
                accumulator &= step.k;
                0
            }
            operation::JUMP_IF_EQUAL => skip(accumulator == step.k),
            operation::JUMP_IF_AT_LEAST => skip(accumulator >= step.k),
            0x25 => skip(accumulator > step.k),
            0x05 => usize::try_from(step.k).unwrap(),
            operation::RETURN => return step.k,
            code => panic!("operation {code:#x}"),
        };
    }
}

fn reference(thread: Thread) -> BpfProgram {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for allowed in thread.lists().iter().copied().flatten() {
        let of_call = rules.entry(i64::from(allowed.call.id())).or_default();
        let When::Each(alternatives) = allowed.when else { continue };
        for arguments in alternatives {
            let conditions = arguments.iter().map(|argument| {
                let (operator, value) = match argument.compare {
                    Compare::Is(value) => (SeccompCmpOp::Eq, value),
                    Compare::Masked { mask, value } => (SeccompCmpOp::MaskedEq(mask), value),
                };
                let length = SeccompCmpArgLen::Dword;
                SeccompCondition::new(argument.index, length, operator, value).unwrap()
            });
            of_call.push(SeccompRule::new(conditions.collect()).unwrap());
        }
    }
    let (no, yes) = (SeccompAction::Trap, SeccompAction::Allow);
    SeccompFilter::new(rules, no, yes, TargetArch::x86_64).unwrap().try_into().unwrap()
}

/// Every value that a rule names for an argument, and its neighbours.
fn values(thread: Thread, call: u32, index: u8) -> Vec<u64> {
    let mut values = vec![0, 1, u64::MAX];
    for allowed in thread.lists().iter().copied().flatten() {
        let When::Each(alternatives) = allowed.when else { continue };
        let named = alternatives.iter().copied().flatten();
        for argument in named.filter(|named| number(allowed.call) == call && named.index == index) {
            let (Compare::Is(value) | Compare::Masked { mask: value, .. }) = argument.compare;
            // The upper half does not count.
            values.extend([value, value ^ 1, !value, value | 0x5_0000_0000]);
        }
    }
    values
}

#[test]
fn each_answers_as_the_reference() {
    for thread in Thread::ALL {
        let (program, reference) = (compile(thread.lists()).unwrap(), reference(thread));
        let edges = [0x3fff_ffff, 0x4000_0000, 0x4000_0010, u32::MAX];
        for number in (0..600).chain(edges).filter(|number| *number != 435) {
            for first in values(thread, number, 0) {
                for second in values(thread, number, 1) {
                    for third in values(thread, number, 2) {
                        let arguments = [first, second, third, 0, 0, 0];
                        let call = Call { architecture: ARCHITECTURE, number, arguments };
                        let (ours, theirs) = (run(&program, &call), run(&reference, &call));
                        assert_eq!(ours, theirs, "{thread:?}: {call:x?}");
                    }
                }
            }
        }
    }
}

#[test]
fn other_conventions_and_clone3() {
    for thread in Thread::ALL {
        let program = compile(thread.lists()).unwrap();
        for architecture in [0x4000_0003, 0, u32::MAX] {
            let call = Call { architecture, number: 0, arguments: [0; 6] };
            assert_eq!(run(&program, &call), answer::KILL);
        }
        let call = Call { architecture: ARCHITECTURE, number: 435, arguments: [0; 6] };
        assert_eq!(run(&program, &call), answer::NO_SUCH_CALL);
    }
}

#[test]
fn they_are_short() {
    for thread in Thread::ALL {
        let length = compile(thread.lists()).unwrap().len();
        assert!((50..256).contains(&length), "{thread:?}: {length}");
    }
}

#[test]
fn an_argument_that_no_call_has() {
    static LIST: &[Allowed] = &[Allowed {
        call: Sysno::read,
        when: When::Each(&[&[Argument { index: 6, compare: Compare::Is(0) }]]),
        why: "a mistake",
    }];
    assert_eq!(compile(&[LIST]).unwrap_err(), ProgramError::Argument(6));
}
