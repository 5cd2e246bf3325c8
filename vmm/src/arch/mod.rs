//! What the processor architecture prescribes: where things lie at boot and how they look.

pub mod x86_64;
