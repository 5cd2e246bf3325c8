//! x86-64: the 64-bit Linux boot protocol and the tables it wants in guest memory.
//!
//! Source: Linux `Documentation/arch/x86/{boot,zero-page}.rst`, Intel's MultiProcessor
//! Specification 1.4, Intel SDM volume 3A.

mod boot_params;
pub mod layout;
mod mp_table;
mod segments;

pub use boot_params::{
    BootParams, CommandLineError, Initrd, check_command_line, write_boot_params,
};
pub use mp_table::{MpTableError, write_mp_table};
pub use segments::{boot_segments, write_boot_tables};
