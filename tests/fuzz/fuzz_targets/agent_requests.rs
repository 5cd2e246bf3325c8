//! `tests/fuzz/run 60 agent_requests`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::agent_requests::run(data));
