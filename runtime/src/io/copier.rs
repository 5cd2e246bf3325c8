//! Copying one stream, with a count of what has been delivered.

use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::location::Sink;
use crate::apart::{CLEAR, Purpose, alongside};

/// As much as a FIFO holds by default.
const BUFFER: usize = 64 * 1024;

/// How often a wait looks whether it is time to give up.
const LOOK: Duration = Duration::from_millis(100);

/// How far a stream of output has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes written to where containerd wants them.
    pub bytes: u64,
    /// Nothing comes any more.
    pub done: bool,
    /// The reader takes nothing at the moment.
    pub blocked: bool,
}

/// Bytes that a process can have written and the host not yet have got: a guest that claims more of
/// them makes them up. Pipe and buffers hold less.
const MOST_ON_THE_WAY: u64 = 16 << 20;

/// Bytes for which a guest is given a second more.
const BYTES_PER_SECOND: f64 = 1_048_576.0;

/// How long output is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// If it is the reader on the host that takes nothing, since it last took something.
    pub reader: Duration,
    /// If it is the guest that sends nothing, in all: a byte now and then gains it no time.
    pub guest: Duration,
}

/// Waits until `wanted` bytes have been delivered, the stream has ended, or patience has: neither a
/// reader that is stuck nor a guest that claims what it does not send holds up the news of the exit
/// for ever.
pub async fn delivered(
    progress: &mut watch::Receiver<Progress>,
    wanted: u64,
    patience: Patience,
) -> bool {
    let first = progress.borrow().bytes;
    let most = first.saturating_add(MOST_ON_THE_WAY);
    let (mut seen, mut since) = (first, Instant::now());
    let (mut of_reader, mut of_guest) = (Duration::ZERO, Duration::ZERO);
    loop {
        let now = *progress.borrow_and_update();
        if now.bytes >= wanted.min(most) || now.done {
            return now.bytes >= wanted;
        }
        let passed = since.elapsed();
        since += passed;
        if now.blocked {
            of_reader += passed;
        } else {
            of_guest += passed;
        }
        if now.bytes != seen {
            (seen, of_reader) = (now.bytes, Duration::ZERO);
        }
        #[expect(clippy::cast_precision_loss, reason = "below the bytes on the way")]
        let earned = Duration::from_secs_f64((seen - first) as f64 / BYTES_PER_SECOND);
        if of_reader >= patience.reader || of_guest >= patience.guest + earned {
            return false;
        }
        let limit = if now.blocked { patience.reader } else { patience.guest };
        if let Ok(Err(_)) = timeout(limit.min(LOOK), progress.changed()).await {
            return false;
        }
    }
}

/// Guest to host, until the guest closes.
///
/// If the sink fails, the rest is read and dropped: the process must neither block nor be killed
/// for it, and counts as delivered what nobody can take. With a logger the process's stream breaks instead.
pub(super) async fn copy_out(stream: UnixStream, sink: Sink, progress: watch::Sender<Progress>) {
    let mut sink = Some(sink);
    while let Some(bytes) = read_for(sink.as_ref(), &stream).await {
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let written = match &mut sink {
                None => left.len(),
                Some(open) => match write(open, left, &progress).await {
                    Ok(written) => written,
                    Err(_) if matches!(open, Sink::Logger(_)) => {
                        progress.send_modify(|progress| progress.done = true);
                        return;
                    }
                    Err(_) => {
                        sink = None;
                        continue;
                    }
                },
            };
            left = &left[written..];
            progress.send_modify(|progress| progress.bytes += written as u64);
        }
    }
    // The reader must see the end before anyone hears that we are done.
    match sink {
        // That it takes too long is nobody's error any more.
        Some(Sink::File(file)) => drop(file.end(CLEAR).await),
        sink => drop(sink),
    }
    progress.send_modify(|progress| progress.done = true);
}

/// Host to guest, until the last writer has closed; then the guest sees the end too.
pub(super) async fn copy_in(fifo: pipe::Receiver, mut stream: UnixStream) {
    while fifo.readable().await.is_ok() {
        let mut buffer = Vec::with_capacity(BUFFER);
        match fifo.try_read_buf(&mut buffer) {
            Ok(0) => break,
            // The process has closed its input: the FIFO is closed so that writers learn it.
            Ok(_) => {
                if stream.write_all(&buffer).await.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    let _ = stream.shutdown().await;
    // Held open until the peer closes: a stream that is gone would be a reset, not an end.
    let _ = read(&stream).await;
}

/// Reads for a sink; nothing more comes for a logger that has ended.
async fn read_for(sink: Option<&Sink>, stream: &UnixStream) -> Option<Vec<u8>> {
    let Some(Sink::Logger(pipe)) = sink else { return read(stream).await };
    tokio::select! {
        biased;
        _ = pipe.ready(Interest::ERROR) => None,
        bytes = read(stream) => bytes,
    }
}

/// Returns the next bytes; `None` at the end. There is no buffer while a stream is silent, as most are.
async fn read(stream: &UnixStream) -> Option<Vec<u8>> {
    loop {
        stream.readable().await.ok()?;
        let mut buffer = Vec::with_capacity(BUFFER);
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return None,
            Ok(_) => return Some(buffer),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return None,
        }
    }
}

async fn write(
    sink: &mut Sink,
    bytes: &[u8],
    progress: &watch::Sender<Progress>,
) -> io::Result<usize> {
    match sink {
        Sink::File(file) => {
            // A file system that does not answer holds up this stream only.
            let file = file.get().ok_or(ErrorKind::BrokenPipe)?;
            let (file, bytes) = (file.try_clone()?, bytes.to_vec());
            alongside(Purpose::Write, move || (&file).write(&bytes)).await?
        }
        Sink::Fifo(fifo) | Sink::Logger(fifo) => loop {
            match fifo.try_write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            // Told to nobody: only bytes are news.
            let blocked = |value| {
                progress.send_if_modified(|progress| {
                    progress.blocked = value;
                    false
                })
            };
            blocked(true);
            fifo.writable().await?;
            blocked(false);
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Location;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::io::Read;
    use std::path::PathBuf;

    const PATIENCE: Patience =
        Patience { reader: Duration::from_secs(5), guest: Duration::from_secs(60) };

    struct Out {
        _folder: tempfile::TempDir,
        path: PathBuf,
        guest: UnixStream,
        progress: watch::Receiver<Progress>,
    }

    async fn out() -> Out {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdout");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let sink = Location::Path(path.clone()).open_sink().await.unwrap().unwrap();
        let (host, guest) = UnixStream::pair().unwrap();
        let (sender, progress) = watch::channel(Progress::default());
        tokio::spawn(copy_out(host, sink, sender));
        Out { _folder: folder, path, guest, progress }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|i| u8::try_from((i / 7 + i) % 251).unwrap()).collect()
    }

    fn read_all(path: PathBuf, pause: Duration) -> Vec<u8> {
        let mut file = std::fs::File::open(path).unwrap();
        let (mut all, mut piece) = (Vec::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut piece).unwrap() {
                0 => return all,
                length => all.extend_from_slice(&piece[..length]),
            }
            std::thread::sleep(pause);
        }
    }

    #[tokio::test]
    async fn sixty_four_mebibytes_arrive_whole_and_in_order() {
        let mut out = out().await;
        let path = out.path.clone();
        let reader = tokio::task::spawn_blocking(move || read_all(path, Duration::ZERO));
        let data = pattern(64 << 20);
        out.guest.write_all(&data).await.unwrap();
        drop(out.guest);
        assert!(delivered(&mut out.progress, 64 << 20, PATIENCE).await);
        assert!(reader.await.unwrap() == data);
        assert_eq!(out.progress.borrow().bytes, 64 << 20);
    }

    #[tokio::test]
    async fn a_slow_reader_loses_nothing() {
        let mut out = out().await;
        let path = out.path.clone();
        let reader = tokio::task::spawn_blocking(move || read_all(path, Duration::from_millis(5)));
        let data = pattern(4 << 20);
        out.guest.write_all(&data).await.unwrap();
        drop(out.guest);
        assert!(delivered(&mut out.progress, 4 << 20, PATIENCE).await);
        assert!(reader.await.unwrap() == data);
    }

    #[tokio::test]
    async fn a_stuck_reader_does_not_hold_up_the_exit_for_ever() {
        let mut out = out().await;
        let data = pattern(200 << 10);
        let writer = tokio::spawn(async move {
            out.guest.write_all(&data).await.unwrap();
            out.guest
        });
        let patience = Patience { reader: Duration::from_millis(100), ..PATIENCE };
        assert!(!delivered(&mut out.progress, 200 << 10, patience).await);
        // The reader comes after all: everything is still there.
        let path = out.path.clone();
        let reader = tokio::task::spawn_blocking(move || read_all(path, Duration::ZERO));
        drop(writer.await.unwrap());
        assert_eq!(reader.await.unwrap().len(), 200 << 10);
    }

    #[tokio::test]
    async fn a_slow_guest_is_given_more_time_than_a_stuck_reader() {
        let mut out = out().await;
        let patience = Patience { reader: Duration::from_millis(50), ..PATIENCE };
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(400)).await;
            out.guest.write_all(b"seed").await.unwrap();
            tokio::time::sleep(Duration::from_secs(60)).await;
        });
        assert!(delivered(&mut out.progress, 4, patience).await);
    }

    #[tokio::test]
    async fn a_guest_that_sends_a_byte_now_and_then_gains_no_time() {
        let mut out = out().await;
        tokio::spawn(async move {
            while out.guest.write_all(b".").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let patience = Patience { guest: Duration::from_millis(300), ..PATIENCE };
        let waited = delivered(&mut out.progress, u64::MAX, patience);
        assert!(!timeout(Duration::from_secs(5), waited).await.unwrap());
    }

    #[tokio::test]
    async fn a_guest_cannot_claim_more_than_can_be_on_the_way() {
        let mut out = out().await;
        let path = out.path.clone();
        let reader = tokio::task::spawn_blocking(move || read_all(path, Duration::ZERO));
        let flood = tokio::spawn(async move {
            let data = pattern(1 << 20);
            while out.guest.write_all(&data).await.is_ok() {}
        });
        let waited = delivered(&mut out.progress, u64::MAX, PATIENCE);
        assert!(!timeout(Duration::from_secs(30), waited).await.unwrap());
        flood.abort();
        assert!(reader.await.unwrap().len() as u64 >= MOST_ON_THE_WAY);
    }

    #[tokio::test]
    async fn an_end_without_the_promised_bytes_is_no_wait() {
        let mut out = out().await;
        drop(out.guest);
        assert!(!delivered(&mut out.progress, 1, PATIENCE).await);
    }

    #[tokio::test]
    async fn a_full_disk_does_not_block_the_process() {
        let sink = Location::Path("/dev/full".into()).open_sink().await.unwrap().unwrap();
        let (host, mut guest) = UnixStream::pair().unwrap();
        let (sender, mut progress) = watch::channel(Progress::default());
        tokio::spawn(copy_out(host, sink, sender));
        guest.write_all(&pattern(1 << 20)).await.unwrap();
        drop(guest);
        assert!(delivered(&mut progress, 1 << 20, PATIENCE).await);
    }

    #[tokio::test]
    async fn the_end_of_a_logger_breaks_the_stream() {
        for writes in [false, true] {
            let (reader, writer) = nix::unistd::pipe().unwrap();
            let sink = Sink::Logger(pipe::Sender::from_owned_fd(writer).unwrap());
            let (host, mut guest) = UnixStream::pair().unwrap();
            let (sender, mut progress) = watch::channel(Progress::default());
            tokio::spawn(copy_out(host, sink, sender));
            guest.write_all(b"one").await.unwrap();
            assert!(delivered(&mut progress, 3, PATIENCE).await);
            drop(reader);
            if writes {
                let _ = guest.write_all(b"two").await;
            }
            let mut end = [0];
            let end = tokio::io::AsyncReadExt::read(&mut guest, &mut end);
            // What was written meanwhile is lost with it, which the socket says too.
            let end = timeout(PATIENCE.reader, end).await.unwrap();
            assert!(end.is_ok_and(|length| length == 0) || writes);
            assert!(!delivered(&mut progress, u64::MAX, PATIENCE).await);
        }
    }

    #[tokio::test]
    async fn input_ends_after_both_close_io_and_the_last_writer() {
        use tokio::io::AsyncReadExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdin");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        // Nobody writes yet: neither open waits.
        let source = Location::Path(path.clone()).open_source().await.unwrap().unwrap();
        let (host, mut guest) = UnixStream::pair().unwrap();
        tokio::spawn(copy_in(source.reading, host));
        let mut writer = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut writer, b"seed").unwrap();
        drop(writer);
        let mut four = [0; 4];
        guest.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"seed");
        // The writer has gone, another may come: no end yet.
        let early = timeout(Duration::from_millis(50), guest.read(&mut four)).await;
        assert!(early.is_err());
        drop(source.writing);
        assert_eq!(guest.read(&mut four).await.unwrap(), 0);
    }
}
