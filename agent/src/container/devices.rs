//! Which devices a container may make, read and write: cgroup v2 asks a BPF program.
//!
//! The spec's rules hold in their order, the last that matches decides, as with runc; then come the
//! devices every container has, and those of the spec that the guest has, under the guest's numbers.
//! Context and return value: `bpf_cgroup_dev_ctx` in `linux/bpf.h`.

use husk_bpf::instruction;
use oci_spec::runtime::{Linux, LinuxDeviceType};

/// `BPF_DEVCG_ACC_*`.
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MAKE | READ | WRITE;
/// `BPF_DEVCG_DEV_*`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// More rules than this are not a container's.
const RULE_LIMIT: usize = 400;

/// Devices that every container may use, as runc has it: null, zero, full, tty, random, urandom,
/// console, ptmx and the terminals of devpts.
const DEFAULT: [(i32, Option<i32>); 9] = [
    (1, Some(3)),
    (1, Some(5)),
    (1, Some(7)),
    (5, Some(0)),
    (1, Some(8)),
    (1, Some(9)),
    (5, Some(1)),
    (5, Some(2)),
    (136, None),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// None is any.
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// The program for the container of `linux`, whose devices have the guest's numbers; none if the
/// spec has no rules at all.
pub fn program(linux: &Linux) -> Option<Vec<u64>> {
    let given = linux.resources().as_ref()?.devices().as_ref()?;
    let mut rules: Vec<Rule> = given
        .iter()
        .take(RULE_LIMIT)
        .map(|rule| Rule {
            allow: rule.allow(),
            kind: rule.typ().and_then(kind),
            major: rule.major().and_then(number),
            minor: rule.minor().and_then(number),
            access: rule.access().as_deref().map_or(ALL, access),
        })
        .collect();
    let make = Rule { allow: true, kind: None, major: None, minor: None, access: MAKE };
    rules.push(make);
    rules.extend(DEFAULT.map(|(major, minor)| Rule {
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: ALL,
        ..make
    }));
    rules.extend(linux.devices().iter().flatten().take(RULE_LIMIT).map(|device| Rule {
        kind: kind(device.typ()),
        major: number(device.major()),
        minor: number(device.minor()),
        access: ALL,
        ..make
    }));
    Some(compile(&rules))
}

fn kind(kind: LinuxDeviceType) -> Option<i32> {
    match kind {
        LinuxDeviceType::B => Some(BLOCK),
        LinuxDeviceType::C | LinuxDeviceType::U => Some(CHARACTER),
        LinuxDeviceType::A | LinuxDeviceType::P => None,
    }
}

/// A negative number is any.
fn number(number: i64) -> Option<i32> {
    i32::try_from(number).ok().filter(|n| *n >= 0)
}

fn access(text: &str) -> i32 {
    text.chars().fold(0, |bits, letter| {
        bits | match letter {
            'm' => MAKE,
            'r' => READ,
            'w' => WRITE,
            _ => 0,
        }
    })
}

const LOAD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbc;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_DIFFERENT: u8 = 0x55;
const JUMP_DIFFERENT_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

// Registers: the answer, scratch (the context at first), and what is asked for.
const ANSWER: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn compile(rules: &[Rule]) -> Vec<u64> {
    let mut program = vec![
        instruction(LOAD, KIND, SCRATCH, 0, 0),
        instruction(LOAD, MAJOR, SCRATCH, 4, 0),
        instruction(LOAD, MINOR, SCRATCH, 8, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
    ];
    // The last rule that matches decides, so it is asked first.
    for rule in rules.iter().rev() {
        let mut tests: Vec<(u8, u8, u8, i32)> = Vec::new();
        for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            tests.extend(wanted.map(|wanted| (JUMP_DIFFERENT, register, 0, wanted)));
        }
        if rule.access != ALL {
            tests.push((MOVE_REGISTER, SCRATCH, ACCESS, 0));
            tests.push((AND, SCRATCH, 0, rule.access));
            // An allowance covers all that is asked, a denial is for any part of it.
            tests.push(match rule.allow {
                true => (JUMP_DIFFERENT_REGISTER, SCRATCH, ACCESS, 0),
                false => (JUMP_EQUAL, SCRATCH, 0, 0),
            });
        }
        // The verifier refuses what cannot be reached: a rule without tests is the last one.
        let unconditional = tests.is_empty();
        let count = tests.len();
        for (index, (code, to, from, constant)) in tests.into_iter().enumerate() {
            let is_jump = matches!(code, JUMP_DIFFERENT | JUMP_DIFFERENT_REGISTER | JUMP_EQUAL);
            // Over the tests that are left and the two instructions of the verdict: at most 8.
            let jump = if is_jump { i16::try_from(count - index + 1).unwrap_or(0) } else { 0 };
            program.push(instruction(code, to, from, jump, constant));
        }
        program.push(instruction(MOVE, ANSWER, 0, 0, i32::from(rule.allow)));
        program.push(instruction(EXIT, 0, 0, 0, 0));
        if unconditional {
            return program;
        }
    }
    program.push(instruction(MOVE, ANSWER, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the kernel would answer.
    fn ask(program: &[u64], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let (mut registers, mut at) = ([0i32; 6], 0usize);
        loop {
            let [code, pair, low, high, a, b, c, d] = program[at].to_le_bytes();
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let jump = usize::try_from(i16::from_le_bytes([low, high])).expect("forward");
            let constant = i32::from_le_bytes([a, b, c, d]);
            at += 1;
            match code {
                LOAD => registers[to] = context[jump / 4],
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = constant,
                AND => registers[to] &= constant,
                SHIFT_RIGHT => registers[to] >>= constant,
                JUMP_EQUAL if registers[to] == constant => at += jump,
                JUMP_DIFFERENT if registers[to] != constant => at += jump,
                JUMP_DIFFERENT_REGISTER if registers[to] != registers[from] => at += jump,
                JUMP_EQUAL | JUMP_DIFFERENT | JUMP_DIFFERENT_REGISTER => {}
                EXIT => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn linux(devices: serde_json::Value) -> Linux {
        let linux = json!({
            "resources": {"devices": devices},
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
        });
        serde_json::from_value(linux).expect("a linux section")
    }

    #[test]
    fn containers_have_the_usual_devices_only() {
        let program = program(&linux(json!([{"allow": false, "access": "rwm"}]))).expect("rules");
        assert!(ask(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(ask(&program, CHARACTER, READ, 136, 77));
        assert!(ask(&program, CHARACTER, READ, 10, 229));
        assert!(ask(&program, BLOCK, MAKE, 8, 0));
        assert!(!ask(&program, BLOCK, READ, 8, 0));
        assert!(!ask(&program, BLOCK, MAKE | READ, 8, 0));
        assert!(!ask(&program, CHARACTER, READ, 1, 1));
        assert!(!ask(&program, BLOCK, READ, 1, 3));
    }

    #[test]
    fn the_last_rule_that_matches_decides() {
        let rules = json!([
            {"allow": true, "type": "a", "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": -1, "access": "w"},
            {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rw"},
        ]);
        let program = program(&linux(rules)).expect("rules");
        assert!(ask(&program, CHARACTER, READ, 1, 1));
        assert!(ask(&program, BLOCK, READ, 8, 0));
        assert!(!ask(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(ask(&program, BLOCK, READ | WRITE, 8, 1));
    }
}
