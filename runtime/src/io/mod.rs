//! The streams of a process: containerd's FIFOs on one side, one vsock stream each on the other.
//!
//! Every stream has a copier task of its own that counts what it has delivered. A process's exit is
//! told once as many bytes have been delivered as the agent says were written ([`delivered`]), so
//! that whoever learns of the exit finds all of the output in the FIFO.
//!
//! How FIFOs are opened, so that no open ever waits and no end is seen too early:
//! - output: read-write. The FIFO then never reports a missing reader, and a reader that comes late
//!   or comes again finds what was written; it sees the end when we close.
//! - a logger's: a pipe of our own. If the logger ends, the process's own stream breaks, as it would if the
//!   process had the pipe itself.
//! - input: read-only and non-blocking, plus a writing end that we hold until `CloseIO`. So the end
//!   comes only after both `CloseIO` and the last writer's close, whatever their order.

mod copier;
mod location;
mod logger;
mod streams;

pub use copier::{Patience, Progress, delivered};
pub use location::{Location, LocationError};
pub use logger::{LoggerError, LoggerProgram, Origin};
pub use streams::{StdioPaths, Streams, StreamsError};
