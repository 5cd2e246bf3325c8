//! Each body on its seeds, then on new inputs made from them for a while, without a fuzzer.
//!
//! `HUSK_FUZZ_SECONDS` says how long each takes (20). An input that breaks one is left in
//! `tests/fuzz/artifacts`; put it among the seeds once its cause is mended.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

/// One input takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);
const LONGEST: usize = 4096;

/// Numbers without a pattern (xorshift64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 16).expect("64 bits") % end.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    /// One that often means something.
    fn telling(&mut self) -> u8 {
        match self.below(4) {
            0 => [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'"'][self.below(8)],
            _ => self.byte(),
        }
    }
}

/// An input made from seeds, or from nothing.
fn invent(seeds: &[Vec<u8>], noise: &mut Noise) -> Vec<u8> {
    let mut input = match noise.below(8) {
        0 => (0..noise.below(2000)).map(|_| noise.byte()).collect(),
        _ => seeds[noise.below(seeds.len())].clone(),
    };
    for _ in 0..1 + noise.below(8) {
        let at = noise.below(input.len() + 1);
        let end = (at + 1 + noise.below(16)).min(input.len());
        match noise.below(8) {
            0 => drop(input.drain(at..end)),
            1 => input.insert(at, noise.telling()),
            2 => {
                let other = &seeds[noise.below(seeds.len())];
                let from = noise.below(other.len() + 1);
                let to = (from + noise.below(64)).min(other.len());
                input.splice(at..at, other[from..to].iter().copied());
            }
            3 => {
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            4 => input.extend((0..noise.below(16)).map(|_| noise.byte())),
            _ if at < input.len() => input[at] = noise.telling(),
            _ => {}
        }
    }
    input.truncate(LONGEST);
    input
}

fn folder(kind: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(name)
}

/// Leaves an input for whoever has to mend what it breaks.
fn keep(name: &str, input: &[u8]) {
    let file = folder("artifacts", name).join("last");
    let written = std::fs::create_dir_all(folder("artifacts", name))
        .and_then(|()| std::fs::write(&file, input));
    let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
    eprintln!("fuzz: {name} does not survive {} ({written:?}), which is {hex}", file.display());
}

type Watched = Arc<Mutex<(Instant, Vec<u8>)>>;

/// Ends the process if an input takes too long.
fn watch(name: &'static str) -> Watched {
    let watched: Watched = Arc::new(Mutex::new((Instant::now(), Vec::new())));
    let weak = Arc::downgrade(&watched);
    std::thread::spawn(move || {
        while let Some(watched) = weak.upgrade() {
            let (since, input) = watched.lock().expect("a lock").clone();
            if since.elapsed() > PATIENCE {
                keep(name, &input);
                eprintln!("fuzz: {name} takes longer than {PATIENCE:?}");
                std::process::abort();
            }
            drop(watched);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    watched
}

fn drive(name: &'static str, body: fn(&[u8])) {
    if name == "states" && File::options().read(true).write(true).open("/dev/kvm").is_err() {
        husk_skip::skipped("no /dev/kvm: states of KVM's own are not restored");
    }
    let mut seeds = Vec::new();
    for entry in std::fs::read_dir(folder("seeds", name)).expect("seeds") {
        seeds.push(std::fs::read(entry.expect("a seed").path()).expect("a seed"));
    }
    let watched = watch(name);
    let survive = |input: Vec<u8>| {
        *watched.lock().expect("a lock") = (Instant::now(), input.clone());
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(&input))) {
            keep(name, &input);
            resume_unwind(panic);
        }
    };
    seeds.iter().cloned().for_each(survive);
    let seconds =
        std::env::var("HUSK_FUZZ_SECONDS").map_or(20, |text| text.parse().expect("seconds"));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
    let mut noise = Noise(u64::try_from(now.as_nanos()).unwrap_or(1) | 1);
    let begin = Instant::now();
    let mut count = seeds.len();
    while begin.elapsed() < Duration::from_secs(seconds) {
        survive(invent(&seeds, &mut noise));
        count += 1;
    }
    println!("fuzz: {name}: {count} inputs");
}

/// A test for each module of that name.
macro_rules! bodies {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            drive(stringify!($name), husk_fuzz::$name::run);
        }
    )*};
}

bodies! {
    agent_answers agent_requests bus configuration control courier kernel net spec states vsock
}
