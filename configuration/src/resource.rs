//! The files that settings name.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::{Configuration, ConfigurationError};

impl Configuration {
    /// Opens the guest kernel for reading.
    pub fn open_kernel(&self) -> Result<File, ConfigurationError> {
        self.open(
            "guest.kernel",
            &self.guest.kernel,
            "build it with `make guest` and install it with `make install`, or correct the path",
        )
    }

    /// Opens the initial RAM file system for reading.
    pub fn open_initrd(&self) -> Result<File, ConfigurationError> {
        self.open(
            "guest.initrd",
            &self.guest.initrd,
            "build it with `make guest` and install it with `make install`, or correct the path",
        )
    }

    /// The program `husk-vmm`, known to be an executable file.
    pub fn vmm_program(&self) -> Result<&Path, ConfigurationError> {
        let path = &self.machine.vmm;
        let usable = std::fs::metadata(path).and_then(|metadata| {
            if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
                Ok(path.as_path())
            } else {
                Err(std::io::Error::new(ErrorKind::PermissionDenied, "not an executable file"))
            }
        });
        usable.map_err(|source| {
            let remedy = "install it with `make install`, or correct the path";
            self.unusable("machine.vmm", path, remedy, source)
        })
    }

    fn open(
        &self,
        key: &'static str,
        path: &Path,
        remedy: &'static str,
    ) -> Result<File, ConfigurationError> {
        let open = || {
            // A FIFO would block the open, a folder fails only at the first read.
            if !std::fs::metadata(path)?.is_file() {
                return Err(std::io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
            }
            File::open(path)
        };
        open().map_err(|source| self.unusable(key, path, remedy, source))
    }

    fn unusable(
        &self,
        key: &'static str,
        path: &Path,
        remedy: &'static str,
        source: std::io::Error,
    ) -> ConfigurationError {
        let origin = match self.origin(key) {
            "default" => "default".to_owned(),
            origin => format!("set in {origin}"),
        };
        ConfigurationError::Resource { key, origin, path: path.to_path_buf(), remedy, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named_with_key_and_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("husk.toml");
        std::fs::write(&main, "[guest]\nkernel = \"/nowhere/vmlinux\"\n").unwrap();
        let configuration = Configuration::load(Some(&main)).unwrap();
        let error = configuration.open_kernel().unwrap_err();
        let expected = format!(
            "guest.kernel (set in {}): cannot use /nowhere/vmlinux; build it with `make guest`",
            main.display()
        );
        assert!(error.to_string().starts_with(&expected), "{error}");
    }

    #[test]
    fn a_folder_is_no_kernel_and_a_text_no_program() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("text");
        std::fs::write(&text, "").unwrap();
        let mut configuration = Configuration::default();
        configuration.guest.initrd = folder.path().to_path_buf();
        configuration.machine.vmm.clone_from(&text);
        assert!(configuration.open_initrd().unwrap_err().to_string().starts_with("guest.initrd"));
        assert!(configuration.vmm_program().is_err());
        configuration.guest.initrd = text;
        configuration.open_initrd().unwrap();
    }
}
