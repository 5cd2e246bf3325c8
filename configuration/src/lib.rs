//! The only reader of Husk's settings.
//!
//! A setting comes from, each overruling the one before: the default in [`Configuration`], the main
//! file (`$HUSK_CONFIG` or [`DEFAULT_FILE`]), the files `*.toml` of the folder beside it (`husk.toml.d`,
//! in the order of their names), and the container's annotations `io.husk.…` as far as
//! `annotations.allow` lets them.
//!
//! Nothing is ignored silently: an unknown key or annotation, a value of the wrong type and a file
//! that is not there are errors which name the file, the key and the remedy.

mod annotation;
mod configuration;
mod error;
mod load;
mod resource;
mod setting;
mod size;

pub use annotation::ANNOTATION_PREFIX;
pub use configuration::{
    AnnotationSettings, Configuration, FileSettings, GuestSettings, LogLevel, LogSettings,
    MachineSettings, NetworkSettings,
};
pub use error::ConfigurationError;
pub use load::{CONFIGURATION_VARIABLE, DEFAULT_FILE};
pub use setting::setting_names;
pub use size::{ParseSizeError, Size};
