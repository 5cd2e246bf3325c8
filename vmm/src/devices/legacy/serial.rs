//! The serial console, output only: what the guest writes goes to a log with a size limit.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::LegacyStateError;
use crate::bus::BusDevice;

const STATE_VERSION: u16 = 1;
const LINE: usize = 512;

/// A file that takes `limit` bytes and drops the rest, written by the line.
pub struct LimitedLog {
    file: File,
    left: u64,
    line: Vec<u8>,
}

impl LimitedLog {
    /// A log into `file` of at most `limit` bytes from now on.
    pub fn new(file: File, limit: u64) -> Self {
        Self { file, left: limit, line: Vec::new() }
    }
}

impl Write for LimitedLog {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let fit = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
        self.left -= fit as u64;
        self.line.extend_from_slice(&data[..fit]);
        if self.line.len() >= LINE || self.line.last() == Some(&b'\n') {
            self.flush()?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let line = std::mem::take(&mut self.line);
        self.file.write_all(&line)
    }
}

impl Drop for LimitedLog {
    fn drop(&mut self) {
        let _ = self.flush();
    }
}

/// The UART's interrupt: an eventfd wired to its line.
pub struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl Deref for Line {
    type Target = EventFd;

    fn deref(&self) -> &EventFd {
        &self.0
    }
}

/// A 16550A at the first PC port.
pub struct Serial {
    uart: Uart<Line, NoEvents, LimitedLog>,
}

/// What a guest can have changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    version: u16,
    baud_divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl Serial {
    /// The first port.
    pub const BASE: u64 = 0x3f8;
    /// How many ports there are.
    pub const LENGTH: u64 = 8;
    /// The interrupt line.
    pub const LINE: u32 = 4;

    /// A port that raises `line` and writes to `log`.
    pub fn new(line: EventFd, log: LimitedLog) -> Self {
        Self { uart: Uart::new(Line(line), log) }
    }

    /// The state.
    pub fn save(&self) -> SerialState {
        let state = self.uart.state();
        SerialState {
            version: STATE_VERSION,
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// A port with a saved state.
    pub fn restore(
        state: &SerialState,
        line: EventFd,
        log: LimitedLog,
    ) -> Result<Self, LegacyStateError> {
        let refused = LegacyStateError { device: "serial", version: state.version };
        if state.version != STATE_VERSION {
            return Err(refused);
        }
        let registers = vm_superio::serial::SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let uart = Uart::from_state(&registers, Line(line), NoEvents, log).map_err(|_| refused)?;
        Ok(Self { uart })
    }

    /// Writes out the line that is not complete yet.
    pub fn flush(&mut self) -> io::Result<()> {
        self.uart.writer_mut().flush()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [byte]) = (u8::try_from(offset), data) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data) {
            // A full disk must not stop the guest; there is nobody to tell it to.
            let _ = self.uart.write(offset, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    fn serial(limit: u64) -> (Serial, File, EventFd) {
        let file = tempfile::tempfile().unwrap();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let log = LimitedLog::new(file.try_clone().unwrap(), limit);
        (Serial::new(line.try_clone().unwrap(), log), file, line)
    }

    fn content(mut file: File) -> String {
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn logs_up_to_the_limit() {
        let (mut serial, file, _) = serial(7);
        for byte in b"hello\nworld\n" {
            serial.write(0, &[*byte]);
        }
        serial.write(0, b"wide");
        serial.flush().unwrap();
        assert_eq!(content(file), "hello\nw");
    }

    #[test]
    fn an_incomplete_line_is_kept_until_the_end() {
        let (mut serial, file, _) = serial(100);
        for byte in b"panic" {
            serial.write(0, &[*byte]);
        }
        drop(serial);
        assert_eq!(content(file), "panic");
    }

    #[test]
    fn raises_its_line_when_asked() {
        let (mut serial, _file, line) = serial(100);
        serial.write(1, &[2]);
        serial.write(0, b"x");
        assert!(line.read().is_ok());
    }

    #[test]
    fn state_survives_a_round_trip() {
        let (mut one, _file, _) = serial(100);
        one.write(3, &[0x80]);
        one.write(0, &[0x0c]);
        one.write(3, &[3]);
        one.write(7, &[0x5a]);
        let text = serde_json::to_string(&one.save()).unwrap();
        let mut state: SerialState = serde_json::from_str(&text).unwrap();
        let make = |state: &SerialState| {
            let log = LimitedLog::new(tempfile::tempfile().unwrap(), 10);
            Serial::restore(state, EventFd::new(0).unwrap(), log)
        };
        assert_eq!(make(&state).unwrap().save(), one.save());
        state.version = 2;
        assert!(make(&state).is_err());
    }
}
