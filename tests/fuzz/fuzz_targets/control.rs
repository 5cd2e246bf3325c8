//! `tests/fuzz/run 60 control`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::control::run(data));
