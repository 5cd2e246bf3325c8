//! `tests/fuzz/run 60 courier`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::courier::run(data));
