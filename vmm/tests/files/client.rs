//! A file server in this process, and the machine's side of a channel to it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;

use husk_control::{
    FilesConfig, FilesMessage, FilesRequest, VolumeRules, receive, send, socket_pair,
};
use husk_vmm::files::{FilesError, run};

/// A served folder.
pub struct Server {
    /// Dropped to end the server.
    pub control: Option<OwnedFd>,
    pub thread: Option<JoinHandle<Result<(), FilesError>>>,
    pub channels: Vec<UnixStream>,
}

impl Server {
    pub fn start(folder: &Path, channels: usize) -> Self {
        Self::start_with(folder, channels, None)
    }

    pub fn start_with(folder: &Path, channels: usize, volumes: Option<VolumeRules>) -> Self {
        let (control, theirs) = socket_pair().unwrap();
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let thread = std::thread::spawn(move || run(theirs, &logger));
        let folder = File::open(folder).unwrap();
        let (ours, their_ends): (Vec<_>, Vec<_>) =
            (0..channels).map(|_| UnixStream::pair().unwrap()).unzip();
        let request = FilesRequest::Serve(FilesConfig {
            folder: 0,
            channels: (1..=channels).collect(),
            vhost_user: None,
            volumes,
        });
        let mut descriptors = vec![folder.as_fd()];
        descriptors.extend(their_ends.iter().map(AsFd::as_fd));
        send(&control, &request, &descriptors).unwrap();
        let answer = receive::<FilesMessage>(&control).unwrap().unwrap();
        assert_eq!(answer.message, FilesMessage::Serving);
        Self { control: Some(control), thread: Some(thread), channels: ours }
    }

    /// A client on the first channel, past INIT.
    pub fn client(&mut self) -> Client {
        Client::on(self.channels.remove(0))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.control.take());
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

/// Whoever would be the guest's kernel.
pub struct Client {
    pub stream: UnixStream,
    unique: u64,
    pub uid: u32,
    pub gid: u32,
}

pub fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn longs(list: &[u64]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What a lookup gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub inode: u64,
    pub size: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub flags: u32,
}

impl Entry {
    pub fn read(bytes: &[u8]) -> Self {
        // struct fuse_entry_out: five times 8 bytes, then struct fuse_attr.
        let attributes = &bytes[40..];
        Self {
            node: long(bytes, 0),
            inode: long(attributes, 0),
            size: long(attributes, 8),
            mode: word(attributes, 60),
            uid: word(attributes, 68),
            gid: word(attributes, 72),
            flags: word(attributes, 84),
        }
    }
}

impl Client {
    /// A client on a channel, past INIT.
    pub fn on(stream: UnixStream) -> Self {
        let mut client = Self { stream, unique: 0, uid: 0, gid: 0 };
        client.init();
        client
    }

    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 2;
        let length = u32::try_from(40 + body.len()).unwrap();
        let mut message = words(&[length, opcode]);
        message.extend(longs(&[self.unique, node]));
        message.extend(words(&[self.uid, self.gid, 1, 0]));
        message.extend_from_slice(body);
        self.stream.write_all(&message).unwrap();
        self.unique
    }

    pub fn receive(&mut self) -> (u64, Result<Vec<u8>, i32>) {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).unwrap();
        let mut payload = vec![0; word(&header, 0) as usize - 16];
        self.stream.read_exact(&mut payload).unwrap();
        let error = word(&header, 4).cast_signed();
        (long(&header, 8), if error == 0 { Ok(payload) } else { Err(-error) })
    }

    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let unique = self.send(opcode, node, body);
        let (answered, result) = self.receive();
        assert_eq!(answered, unique);
        result
    }

    pub fn init(&mut self) -> Vec<u8> {
        // Version 7.39; everything a kernel could offer, of the second word too.
        let mut body = words(&[7, 39, 1 << 20, u32::MAX, u32::MAX]);
        body.extend([0; 44]);
        self.call(26, 0, &body).unwrap()
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(1, parent, &terminated(name)).map(|bytes| Entry::read(&bytes))
    }

    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(Entry, u64), i32> {
        let mut body = words(&[flags.cast_unsigned(), mode, umask, 0]);
        body.extend(terminated(name));
        self.call(35, parent, &body).map(|bytes| (Entry::read(&bytes), long(&bytes, 128)))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        let mut body = words(&[mode, 0]);
        body.extend(terminated(name));
        self.call(9, parent, &body).map(|bytes| Entry::read(&bytes))
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Result<Entry, i32> {
        let mut body = words(&[mode, device, 0, 0]);
        body.extend(terminated(name));
        self.call(8, parent, &body).map(|bytes| Entry::read(&bytes))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(14, node, &words(&[flags.cast_unsigned(), 0])).map(|bytes| long(&bytes, 0))
    }

    pub fn write(
        &mut self,
        (node, handle): (u64, u64),
        offset: u64,
        data: &[u8],
        flags: i32,
        write_flags: u32,
    ) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, write_flags, 0, 0, flags.cast_unsigned(), 0]));
        body.extend_from_slice(data);
        self.call(16, node, &body).map(|bytes| word(&bytes, 0))
    }

    pub fn read(
        &mut self,
        (node, handle): (u64, u64),
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, i32> {
        let mut body = longs(&[handle, offset]);
        body.extend(words(&[size, 0, 0, 0, 0, 0]));
        self.call(15, node, &body)
    }

    /// READDIRPLUS (44) until the end: names with their entries.
    pub fn list(&mut self, node: u64) -> Vec<(String, Entry)> {
        let handle = long(&self.call(27, node, &words(&[0, 0])).unwrap(), 0);
        let mut list = Vec::new();
        let mut offset = 0;
        loop {
            let mut body = longs(&[handle, offset]);
            body.extend(words(&[4096, 0, 0, 0, 0, 0]));
            let bytes = self.call(44, node, &body).unwrap();
            if bytes.is_empty() {
                break;
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let length = word(rest, 144) as usize;
                offset = long(rest, 136);
                let name = String::from_utf8(rest[152..152 + length].to_vec()).unwrap();
                list.push((name, Entry::read(rest)));
                rest = &rest[(152 + length).next_multiple_of(8)..];
            }
        }
        let mut body = longs(&[handle]);
        body.extend(words(&[0, 0, 0, 0]));
        self.call(29, node, &body).unwrap();
        list
    }
}

pub fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// Whether the tests may act as other users and mount; said aloud if not.
pub fn is_root() -> bool {
    // SAFETY: takes nothing, gives a number.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        husk_skip::skipped("needs root");
    }
    root
}
