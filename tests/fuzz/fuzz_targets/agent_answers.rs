//! `tests/fuzz/run 60 agent_answers`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::agent_answers::run(data));
