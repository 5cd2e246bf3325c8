//! What a machine is booted with, all as descriptors.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use husk_agent_protocols::agent::NetworkState;
use husk_configuration::Configuration;
use husk_control::{BootConfig, Console, DEFAULT_COMMAND_LINE, SharedFolder};

use super::SandboxError;
use super::network::BootNetwork;
use crate::container::SizePlan;
use crate::printable;

/// The virtio-fs tag of the shared folder.
pub(super) const SHARE_TAG: &str = "husk";

/// Bytes at the end of a console's log that are looked at for an error message.
const CONSOLE_TAIL: usize = 8 * 1024;

/// Characters of them that are shown.
const LONGEST_WORDS: usize = 500;

/// The parts of a machine, opened.
pub(super) struct BootParts {
    kvm: File,
    kernel: File,
    initrd: File,
    console: Option<File>,
    /// The machine's ends of the courier channels.
    channels: Vec<OwnedFd>,
    network: Vec<OwnedFd>,
    config: BootConfig,
    /// Where the console is logged.
    pub(super) console_log: Option<PathBuf>,
}

impl BootParts {
    /// Opens everything; returns also the file server's ends of the channels.
    pub(super) fn open(
        configuration: &Configuration,
        plan: &SizePlan,
        folder: &Path,
    ) -> Result<(Self, Vec<OwnedFd>), SandboxError> {
        let kernel = configuration.open_kernel()?;
        let initrd = configuration.open_initrd()?;
        let kvm = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(SandboxError::Kvm)?;
        let console_log = configuration.guest.console.then(|| folder.join("console.log"));
        let console = console_log.as_deref().map(open_console).transpose()?;
        let mut channels = Vec::new();
        let mut server = Vec::new();
        for _ in 0..configuration.files.threads {
            let (ours, theirs) = UnixStream::pair().map_err(|source| SandboxError::Folder {
                path: "a courier channel".into(),
                source,
            })?;
            channels.push(OwnedFd::from(ours));
            server.push(OwnedFd::from(theirs));
        }
        let (size, room) = (plan.booted, plan.rules.room(plan.booted));
        let first_channel = if console.is_some() { 4 } else { 3 };
        let config = BootConfig {
            kvm: 0,
            kernel: 1,
            initrd: Some(2),
            command_line: command_line(configuration),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            max_vcpus: room.vcpus,
            max_memory_mib: room.memory_mib,
            console: console
                .is_some()
                .then(|| Console { log: 3, limit: configuration.guest.console_limit.bytes() }),
            shared_folder: Some(SharedFolder {
                tag: SHARE_TAG.to_owned(),
                channels: (first_channel..first_channel + channels.len()).collect(),
            }),
            network: Vec::new(),
        };
        let network = Vec::new();
        Ok((Self { kvm, kernel, initrd, console, channels, network, config, console_log }, server))
    }

    /// Takes in the devices of the network that was found.
    pub(super) fn connect(&mut self, boot: BootNetwork) -> NetworkState {
        self.config.network = boot.devices_from(self.descriptors().len());
        self.network = boot.descriptors;
        boot.state
    }

    /// How many virtual CPUs the machine gets.
    pub(super) fn vcpus(&self) -> u8 {
        self.config.vcpus
    }

    pub(super) fn config(&self) -> BootConfig {
        self.config.clone()
    }

    /// In the order that [`BootConfig`] names them by.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut list = vec![self.kvm.as_fd(), self.kernel.as_fd(), self.initrd.as_fd()];
        list.extend(self.console.iter().map(AsFd::as_fd));
        list.extend(self.channels.iter().map(AsFd::as_fd));
        list.extend(self.network.iter().map(AsFd::as_fd));
        list
    }
}

fn command_line(configuration: &Configuration) -> String {
    let extra = configuration.guest.command_line_extra.trim();
    let console =
        if configuration.guest.console { " console=ttyS0 8250.nr_uarts=1 loglevel=6" } else { "" };
    let space = if extra.is_empty() { "" } else { " " };
    format!("{DEFAULT_COMMAND_LINE}{console}{space}{extra}")
}

fn open_console(path: &Path) -> Result<File, SandboxError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| SandboxError::Folder { path: path.to_path_buf(), source })
}

/// The last lines of a console's log, for an error message. They are the guest's words: cut, and
/// with control characters escaped.
pub(super) fn last_words(console_log: Option<&Path>) -> String {
    let Some(path) = console_log else {
        return "; set guest.console = true to see its console".to_owned();
    };
    let text = std::fs::read(path).unwrap_or_default();
    let text =
        String::from_utf8_lossy(&text[text.len().saturating_sub(CONSOLE_TAIL)..]).into_owned();
    let lines: Vec<String> = text
        .lines()
        .map(|line| printable::line(line).into_owned())
        .filter(|line| !line.trim().is_empty())
        .collect();
    // Behind the panic stand only addresses.
    let tail = match lines.iter().position(|line| line.contains("Kernel panic")) {
        Some(panic) => lines[panic].clone(),
        None => lines[lines.len().saturating_sub(5)..].join(" | "),
    };
    let tail: String = tail.chars().take(LONGEST_WORDS).collect();
    if tail.is_empty() {
        "; its console is empty".to_owned()
    } else {
        format!("; its console ends with: {tail}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::{Limits, SizingRules};

    #[test]
    fn the_command_line_takes_what_the_settings_add() {
        let mut configuration = Configuration::default();
        assert_eq!(command_line(&configuration), DEFAULT_COMMAND_LINE);
        configuration.guest.console = true;
        configuration.guest.command_line_extra = " debug ".to_owned();
        let line = command_line(&configuration);
        assert!(line.starts_with(DEFAULT_COMMAND_LINE), "{line}");
        assert!(line.contains(" console=ttyS0 ") && line.ends_with(" debug"), "{line}");
    }

    #[test]
    fn the_consoles_last_words_are_printable() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console.log");
        std::fs::write(&log, "one\r\n\n\x1b[31mKernel panic\x1b[0m\n").unwrap();
        assert_eq!(
            last_words(Some(&log)),
            r"; its console ends with: \u{1b}[31mKernel panic\u{1b}[0m"
        );
        std::fs::write(&log, "one\r\n\ntwo\n").unwrap();
        assert_eq!(last_words(Some(&log)), "; its console ends with: one | two");
        assert!(last_words(None).contains("guest.console"));
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let mut configuration = Configuration::default();
        configuration.guest.kernel = "/nowhere/vmlinux".into();
        let rules = SizingRules::new(&configuration, Limits::default());
        let plan = SizePlan { booted: rules.size([]), rules };
        let error = BootParts::open(&configuration, &plan, Path::new("/")).err().unwrap();
        let SandboxError::Configuration(error) = error else { panic!("{error}") };
        assert!(error.to_string().contains("/nowhere/vmlinux"), "{error}");
    }
}
