//! The outer form of FUSE requests: what must hold before anything looks inside.
//!
//! Source: `include/uapi/linux/fuse.h`. All numbers are in the host's byte order.

use std::io;

use crate::fuse::{self, BATCH_FORGET, FORGET, IN_HEADER, LONGEST};

const SYMLINK: u32 = 6;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const IOCTL: u32 = 39;
const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;

/// The major version of the protocol, and the first minor one with a second word of options.
const MAJOR: u32 = 7;
const MINOR_EXTENDED: u32 = 36;

/// Bytes of `struct fuse_init_in` with the second word of options, and the option that says so.
const INIT_EXTENDED: usize = 64;
const INIT_EXT: u32 = 1 << 30;

/// Bytes of `struct fsxattr`.
const FSXATTR: usize = 28;

/// `struct fuse_in_header`, as far as it is used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole request.
    pub length: usize,
    /// What is asked.
    pub opcode: u32,
    /// Chosen by the guest; the answer carries it too.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// The user who asks.
    pub uid: u32,
    /// The user's group.
    pub gid: u32,
}

/// A request that fuse-backend-rs does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// `FUSE_COPY_FILE_RANGE`.
    CopyFileRange {
        /// The handle read from, and where.
        from: (u64, u64),
        /// The handle written to, and where.
        to: (u64, u64),
        /// Bytes.
        length: u64,
    },
    /// `FUSE_SYNCFS`.
    SyncFs,
    /// `FUSE_TMPFILE`.
    TmpFile {
        /// As in open(2).
        flags: u32,
        /// As in open(2).
        mode: u32,
        /// The asking process's umask.
        umask: u32,
    },
    /// `FUSE_INIT` with options that it does not know.
    Init {
        /// Bytes to read ahead, as the guest proposes.
        read_ahead: u32,
        /// All options that the guest's kernel has.
        capable: u64,
    },
    /// `FUSE_STATX`.
    Statx,
    /// `FUSE_IOCTL`.
    Ioctl {
        /// The handle.
        handle: u64,
        /// What is asked of it; `None` for what no file here answers.
        request: Option<InodeFlags>,
    },
}

/// The ioctls that the guest's kernel sends for inode flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InodeFlags {
    /// `FS_IOC_GETFLAGS`.
    Get,
    /// `FS_IOC_SETFLAGS`.
    Set(u32),
    /// `FS_IOC_FSGETXATTR`.
    GetExtended,
    /// `FS_IOC_FSSETXATTR`, with a `struct fsxattr`.
    SetExtended([u8; FSXATTR]),
}

impl InodeFlags {
    /// The request of that ioctl number, with the bytes that come along and the room for an answer.
    fn read(command: u32, input: &[u8], room: u32) -> Option<Self> {
        match (command, room) {
            (0x8008_6601, 4) => Some(Self::Get),
            (0x4008_6602, 0) => Some(Self::Set(u32::from_ne_bytes(input.try_into().ok()?))),
            (0x801c_581f, 28) => Some(Self::GetExtended),
            (0x401c_5820, 0) => Some(Self::SetExtended(input.try_into().ok()?)),
            _ => None,
        }
    }
}

impl Header {
    /// Reads the header at the start of `bytes`, if it is there whole.
    ///
    /// A length no request can have is an error: the stream cannot be followed any further.
    pub fn read(bytes: &[u8]) -> io::Result<Option<Self>> {
        if bytes.len() < IN_HEADER {
            return Ok(None);
        }
        // The length is the guest's word, passed on by the machine.
        let length = number32(bytes, 0) as usize;
        if !(IN_HEADER..=LONGEST).contains(&length) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a FUSE request of {length} bytes"),
            ));
        }
        Ok(Some(Self {
            length,
            opcode: number32(bytes, 4),
            unique: number64(bytes, 8),
            node: number64(bytes, 16),
            uid: number32(bytes, 24),
            gid: number32(bytes, 28),
        }))
    }

    /// Whether the guest waits for an answer.
    pub fn wants_answer(&self) -> bool {
        fuse::wants_answer(self.opcode)
    }

    /// Whether the body has the fixed part and the terminated names that its opcode needs.
    ///
    /// fuse-backend-rs gives up on some of these without answering, and the guest would wait forever.
    pub fn is_well_formed(&self, body: &[u8]) -> bool {
        let Some((fixed, names)) = shape(self.opcode) else { return true };
        let Some(rest) = body.get(fixed..) else { return false };
        let mut ends = rest.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at);
        if self.opcode == SETXATTR {
            // The value follows the name and has exactly the length its fixed part says.
            return ends
                .next()
                .is_some_and(|end| rest.len() - end - 1 == number32(body, 0) as usize);
        }
        ends.nth(names.wrapping_sub(1)).is_some() || names == 0
    }

    /// Takes apart the requests that fuse-backend-rs does not know. `body` is well-formed.
    pub fn extra(&self, body: &[u8]) -> Option<Extra> {
        match self.opcode {
            COPY_FILE_RANGE => Some(Extra::CopyFileRange {
                from: (number64(body, 0), number64(body, 8)),
                to: (number64(body, 24), number64(body, 32)),
                length: number64(body, 40),
            }),
            SYNCFS => Some(Extra::SyncFs),
            TMPFILE => Some(Extra::TmpFile {
                flags: number32(body, 0),
                mode: number32(body, 4),
                umask: number32(body, 8),
            }),
            INIT => init(body),
            STATX => Some(Extra::Statx),
            IOCTL => {
                // The fixed part, then as many bytes as it says.
                let length = number32(body, 24) as usize;
                let input = body.get(32..).filter(|input| input.len() == length);
                let (command, room) = (number32(body, 12), number32(body, 28));
                Some(Extra::Ioctl {
                    handle: number64(body, 0),
                    request: input.and_then(|input| InodeFlags::read(command, input, room)),
                })
            }
            _ => None,
        }
    }
}

fn init(body: &[u8]) -> Option<Extra> {
    let extended = body.len() >= INIT_EXTENDED
        && number32(body, 0) == MAJOR
        && number32(body, 4) >= MINOR_EXTENDED
        && number32(body, 12) & INIT_EXT != 0;
    extended.then(|| Extra::Init {
        read_ahead: number32(body, 8),
        capable: u64::from(number32(body, 12)) | u64::from(number32(body, 16)) << 32,
    })
}

/// `struct fuse_out_header` and what follows it.
pub fn answer(unique: u64, result: Result<Vec<u8>, i32>) -> Vec<u8> {
    let (error, payload) = match result {
        Ok(payload) => (0, payload),
        Err(errno) => (-errno, Vec::new()),
    };
    // Payloads are ours and at most some hundred bytes.
    let length = u32::try_from(16 + payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(16 + payload.len());
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&error.to_ne_bytes());
    bytes.extend_from_slice(&unique.to_ne_bytes());
    bytes.extend_from_slice(&payload);
    bytes
}

/// Bytes of the fixed part of a body, and how many names terminated by NUL follow it.
fn shape(opcode: u32) -> Option<(usize, usize)> {
    Some(match opcode {
        1 | 10 | 11 | 24 => (0, 1), // LOOKUP, UNLINK, RMDIR, REMOVEXATTR
        FORGET | BATCH_FORGET => (8, 0),
        3 => (16, 0), // GETATTR
        4 => (88, 0), // SETATTR
        SYMLINK => (0, 2),
        8 => (16, 1),                 // MKNOD
        9 | 13 => (8, 1),             // MKDIR, LINK
        12 => (8, 2),                 // RENAME
        14 | 27 | SYNCFS => (8, 0),   // OPEN, OPENDIR
        15 | 16 | 28 | 44 => (40, 0), // READ, WRITE, READDIR, READDIRPLUS
        18 | 25 | 29 => (24, 0),      // RELEASE, FLUSH, RELEASEDIR
        20 | 30 | 37 => (16, 0),      // FSYNC, FSYNCDIR, BMAP
        SETXATTR => (8, 1),
        22 => (8, 1), // GETXATTR
        23 => (8, 0), // LISTXATTR
        INIT => (16, 0),
        31..=33 => (48, 0),    // GETLK, SETLK, SETLKW
        34 => (8, 0),          // ACCESS
        35 => (16, 1),         // CREATE
        IOCTL | 43 => (32, 0), // and FALLOCATE
        40 | 46 => (24, 0),    // POLL, LSEEK
        45 => (16, 2),         // RENAME2
        COPY_FILE_RANGE => (56, 0),
        TMPFILE => (16, 0),
        STATX => (24, 0),
        _ => return None,
    })
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn number64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(opcode: u32) -> Header {
        Header { length: 0, opcode, unique: 1, node: 1, uid: 0, gid: 0 }
    }

    #[test]
    fn a_header_needs_all_its_bytes_and_a_possible_length() {
        let mut bytes = [0; IN_HEADER];
        assert_eq!(Header::read(&bytes[..39]).unwrap(), None);
        Header::read(&bytes).unwrap_err();
        bytes[..4].copy_from_slice(&40_u32.to_ne_bytes());
        assert_eq!(Header::read(&bytes).unwrap().unwrap().length, 40);
        bytes[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        Header::read(&bytes).unwrap_err();
    }

    #[test]
    fn names_must_end() {
        assert!(header(1).is_well_formed(b"name\0"));
        assert!(!header(1).is_well_formed(b"name"));
        assert!(!header(1).is_well_formed(b""));
        assert!(header(SYMLINK).is_well_formed(b"name\0target\0"));
        assert!(!header(SYMLINK).is_well_formed(b"name\0target"));
        assert!(!header(45).is_well_formed(&[0; 15]));
        assert!(header(17).is_well_formed(b""));
        assert!(header(9999).is_well_formed(b""));
    }

    #[test]
    fn a_value_has_the_length_it_says() {
        let mut body = 3_u32.to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(b"user.x\0abc");
        assert!(header(SETXATTR).is_well_formed(&body));
        body.push(b'd');
        assert!(!header(SETXATTR).is_well_formed(&body));
    }
}
