//! Sizes with a unit.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, written with a binary unit: `64KiB`, `256MiB`, `2GiB` (or `Ki`, `Mi`, `Gi`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

/// Text that is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a size such as 64KiB, 256MiB or 2GiB")]
pub struct ParseSizeError;

const UNITS: [(&str, u64); 6] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("Gi", 1 << 30),
    ("Mi", 1 << 20),
    ("Ki", 1 << 10),
];

impl Size {
    /// So many MiB.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// So many bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whole MiB, rounded down.
    pub const fn mib(self) -> u64 {
        self.0 >> 20
    }
}

impl FromStr for Size {
    type Err = ParseSizeError;

    /// A unit is required: whether a bare number means bytes or MiB is anyone's guess.
    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let (number, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
            .ok_or(ParseSizeError)?;
        let number = number.trim_end();
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ParseSizeError);
        }
        let number: u64 = number.parse().map_err(|_| ParseSizeError)?;
        number.checked_mul(unit).map(Self).ok_or(ParseSizeError)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0MiB");
        }
        match UNITS[..3].iter().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in ["64KiB", "256MiB", "2GiB", "1025MiB", "0MiB"] {
            assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
        }
        assert_eq!("512Mi".parse::<Size>(), Ok(Size::from_mib(512)));
        assert_eq!("512 MiB".parse::<Size>(), Ok(Size::from_mib(512)));
    }

    #[test]
    fn refuses_everything_else() {
        for text in
            ["", "256", "MiB", "256MB", "-1MiB", "+1MiB", "1.5GiB", "99999999999999GiB", "é"]
        {
            assert_eq!(text.parse::<Size>(), Err(ParseSizeError), "{text}");
        }
    }
}
