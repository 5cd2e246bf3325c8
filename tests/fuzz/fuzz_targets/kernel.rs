//! `tests/fuzz/run 60 kernel`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::kernel::run(data));
