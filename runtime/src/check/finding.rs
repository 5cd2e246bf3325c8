//! One answer.

use std::error::Error;
use std::fmt;

use crate::printable;

/// How good an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Good,
    /// Husk runs, but something is missing that may be wanted.
    Doubtful,
    /// Husk does not run.
    Bad,
}

/// One answer, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was asked about.
    pub subject: &'static str,
    /// How good it is.
    pub outcome: Outcome,
    /// What was found and, unless that is good, the remedy.
    pub text: String,
}

impl Finding {
    /// As it should be.
    pub fn good(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, outcome: Outcome::Good, text: text.into() }
    }

    /// Something is missing that may be wanted.
    pub fn doubtful(subject: &'static str, found: impl fmt::Display, remedy: &str) -> Self {
        Self { subject, outcome: Outcome::Doubtful, text: format!("{found}; {remedy}") }
    }

    /// Husk does not run.
    pub fn bad(subject: &'static str, found: impl fmt::Display, remedy: &str) -> Self {
        Self { subject, outcome: Outcome::Bad, text: format!("{found}; {remedy}") }
    }

    /// An error that brings its remedy with it.
    pub fn from_error(subject: &'static str, error: &dyn Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text = format!("{text} ({error})");
            source = error.source();
        }
        Self { subject, outcome: Outcome::Bad, text: text.replace('\n', " ") }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.outcome {
            Outcome::Good => "ok  ",
            Outcome::Doubtful => "warn",
            Outcome::Bad => "FAIL",
        };
        write!(f, "{mark}  {:<10}  {}", self.subject, printable::line(&self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_that_no_terminal_obeys() {
        let finding = Finding::bad("vmm", "said \x1b[2J\n", "install it");
        assert_eq!(finding.to_string(), r"FAIL  vmm         said \u{1b}[2J\n; install it");
    }
}
