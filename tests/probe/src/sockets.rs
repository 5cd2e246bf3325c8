//! A socket in a folder that two containers share.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Sends back what each client sends, for ever.
pub fn listen(path: &str) -> Result<()> {
    let listener = UnixListener::bind(path).with_context(|| path.to_owned())?;
    loop {
        let (mut client, _) = listener.accept()?;
        let mut text = Vec::new();
        client.read_to_end(&mut text)?;
        client.write_all(&text)?;
    }
}

/// Sends `text` once somebody listens, and prints what comes back.
pub fn connect(path: &str, text: &str) -> Result<()> {
    let since = Instant::now();
    let mut server = loop {
        match UnixStream::connect(path) {
            Err(_) if since.elapsed() < Duration::from_secs(20) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            result => break result.with_context(|| path.to_owned())?,
        }
    };
    server.write_all(text.as_bytes())?;
    server.shutdown(Shutdown::Write)?;
    let mut back = String::new();
    server.read_to_string(&mut back)?;
    println!("{back}");
    Ok(())
}
