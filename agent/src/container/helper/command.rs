//! The last step of every process: find the command, and execute it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::Spec;

use crate::container::helper::lookup;
use crate::container::helper::report::{Failure, Report};
use crate::init::calls;

/// A command, found and ready to be executed.
#[derive(Debug, Clone)]
struct Ready {
    file: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

/// Finds and executes the command; for libcontainer too, which calls it as its executor.
#[derive(Debug, Clone)]
pub struct Command {
    environment: Vec<String>,
    /// Made and entered first.
    directory: Option<PathBuf>,
    report: Report,
    ready: Rc<RefCell<Option<Ready>>>,
}

impl Command {
    /// A command with `environment`, whose failures go to `report`.
    pub fn new(environment: Vec<String>, directory: Option<PathBuf>, report: Report) -> Self {
        Self { environment, directory, report, ready: Rc::default() }
    }

    /// Finds the command inside the container, as the user that will execute it.
    pub fn prepare(&self, arguments: &[String], uid: u32) -> Result<(), Failure> {
        if let Some(directory) = &self.directory {
            enter(directory).map_err(|error| {
                Failure::other(format!("chdir {}: {}", directory.display(), lookup::say(&error)))
            })?;
        }
        let name = arguments.first().map_or("", String::as_str);
        let file = lookup::find(name, &self.environment).map_err(Failure::command)?;
        let environment = lookup::complete(&self.environment, uid);
        *self.ready.borrow_mut() = Some(Ready {
            file: terminated(file.as_os_str().as_bytes())?,
            arguments: all_terminated(arguments)?,
            environment: all_terminated(&environment)?,
        });
        Ok(())
    }

    /// Executes the prepared command; comes back only if that fails.
    pub fn execute(&self) -> Failure {
        let ready = self.ready.borrow();
        let Some(ready) = ready.as_ref() else {
            return Failure::other("the command was not prepared");
        };
        calls::default_signals();
        let error = match nix::unistd::execve(&ready.file, &ready.arguments, &ready.environment) {
            Err(error) => io::Error::from(error),
            Ok(never) => match never {},
        };
        Failure::command(format!("exec {}: {}", ready.file.to_string_lossy(), lookup::say(&error)))
    }
}

fn enter(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    std::env::set_current_dir(directory)
}

fn terminated(bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure::other("NUL in the command or its environment"))
}

fn all_terminated(texts: &[String]) -> Result<Vec<CString>, Failure> {
    texts.iter().map(|text| terminated(text.as_bytes())).collect()
}

impl Executor for Command {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let arguments = process.and_then(|p| p.args().as_deref()).unwrap_or_default();
        let uid = process.map_or(0, |p| p.user().uid());
        self.prepare(arguments, uid).map_err(|failure| {
            // libcontainer would wrap the text; the agent takes the first report.
            self.report.failed(&failure);
            ExecutorValidationError::ArgValidationError(failure.text)
        })
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The environment is given to execve.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let failure = self.execute();
        // For who starts the container; and, as with runc, its own stderr tells.
        self.report.failed(&failure);
        eprintln!("{}", failure.text);
        std::process::exit(1)
    }
}
