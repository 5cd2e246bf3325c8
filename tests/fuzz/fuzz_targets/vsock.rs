//! `tests/fuzz/run 60 vsock`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::vsock::run(data));
