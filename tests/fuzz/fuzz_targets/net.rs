//! `tests/fuzz/run 60 net`

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| husk_fuzz::net::run(data));
