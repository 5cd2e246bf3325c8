//! What a guest that has been taken over does to its devices, as far as root in it can by hand.
//!
//! Each attack goes on for some seconds with the numbers that its seed gives. It touches no file once it
//! has begun: the folder's device is among what it breaks.

mod device;
mod floods;
mod memory;
mod numbers;
mod queues;
mod registers;
mod vsock;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::mman::{MlockAllFlags, mlockall};

use numbers::Numbers;

/// How long it goes on.
struct Until(Instant);

impl Until {
    fn seconds(seconds: u64) -> Self {
        Self(Instant::now() + Duration::from_secs(seconds))
    }

    fn goes_on(&self) -> bool {
        Instant::now() < self.0
    }
}

/// Carries out the attack of this name.
pub fn run(name: &str, seconds: u64, seed: u64) -> Result<()> {
    let (until, mut numbers) = (Until::seconds(seconds), Numbers::new(seed));
    // Its own code comes from the shared folder, whose device may answer no more.
    if name != "memory" {
        mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;
    }
    println!("{name}, seed {seed}");
    match name {
        "configuration" => registers::configuration(&until, &mut numbers)?,
        "bars" => registers::bars(&until, &mut numbers)?,
        "queues" => queues::all(&until, &mut numbers)?,
        "ports" => registers::ports(&until, &mut numbers)?,
        "vsock-ports" => vsock::ports(&until, &mut numbers)?,
        "vsock-streams" => vsock::streams(&until)?,
        "vsock-flood" => vsock::flood(&until, &mut numbers)?,
        "log" => floods::log(&until)?,
        "interrupts" => floods::interrupts(&until, &mut numbers)?,
        "memory" => memory::fill(&until),
        _ => bail!("unknown attack: {name}"),
    }
    println!("done");
    Ok(())
}
