//! `tests/fuzz/run 60 configuration`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::configuration::run(data));
