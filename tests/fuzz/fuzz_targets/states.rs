//! `tests/fuzz/run 60 states`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::states::run(data));
