//! What is on the host for an attacker to reach.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command};

use tempfile::TempDir;

/// A process, sockets and files; and what a jailed process knows.
pub struct Host {
    pub victim: Child,
    pub secret: CString,
    pub socket: CString,
    pub abstract_name: String,
    /// A key in the session's keyring, where the host lets this process have keys.
    pub key: &'static CStr,
    pub tcp: u16,
    pub udp: u16,
    /// A variable of the environment that this process was started with.
    pub variable: *const libc::c_char,
    /// The file server's `/proc/self/fd`.
    pub descriptors: Option<File>,
    /// The last descriptor that is to be open.
    pub last: RawFd,
    folder: TempDir,
    _listeners: (UnixListener, UnixListener, TcpListener, UdpSocket),
}

impl Host {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("shared")).unwrap();
        fs::write(folder.path().join("shared/own"), "").unwrap();
        let text = |name: &str| CString::new(folder.path().join(name).as_os_str().as_bytes());
        let (secret, socket) = (text("secret").unwrap(), text("socket").unwrap());
        fs::write(folder.path().join("secret"), "secret").unwrap();
        let abstract_name = folder.path().display().to_string();
        let path = UnixListener::bind(folder.path().join("socket")).unwrap();
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let abstracted = UnixListener::bind_addr(&address).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        Self {
            victim: Command::new("sleep").arg("60").spawn().unwrap(),
            secret,
            socket,
            abstract_name,
            key: key_of_a_session(),
            tcp: tcp.local_addr().unwrap().port(),
            udp: udp.local_addr().unwrap().port(),
            variable: first_variable(),
            descriptors: None,
            last: 0,
            folder,
            _listeners: (path, abstracted, tcp, udp),
        }
    }

    /// What the file server serves.
    pub fn shared(&self) -> File {
        File::open(self.folder.path().join("shared")).unwrap()
    }

    pub fn victim(&self) -> u64 {
        self.victim.id().into()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let alive = self.victim.try_wait().unwrap().is_none();
        self.victim.kill().unwrap();
        self.victim.wait().unwrap();
        assert!(alive || std::thread::panicking(), "an attack has ended the victim");
    }
}

/// Begins a session with a key.
fn key_of_a_session() -> &'static CStr {
    let (kind, name) = (c"user", c"husk-secret");
    // SAFETY: numbers and terminated texts. KEYCTL_JOIN_SESSION_KEYRING, of this thread; then
    // KEY_SPEC_SESSION_KEYRING.
    unsafe {
        libc::syscall(libc::SYS_keyctl, 1_u64, 0_usize);
        libc::syscall(
            libc::SYS_add_key,
            kind.as_ptr(),
            name.as_ptr(),
            name.as_ptr(),
            4_usize,
            -3_i64,
        );
    }
    name
}

/// Of those that the kernel put on the stack.
fn first_variable() -> *const libc::c_char {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: tests of this program change no variable; the list ends with null.
    unsafe {
        let first = *environ;
        assert!(!first.is_null() && !CStr::from_ptr(first).is_empty(), "no environment");
        first
    }
}
