//! `tests/fuzz/run 60 spec`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::spec::run(data));
