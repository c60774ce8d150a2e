//! The build engine: a Dockerfile's program becomes an image in the node's store.
//!
//! ```text
//! build ─▶ context, dockerfile::{parse, plan, evaluate}, base ─▶ solve ─▶ steps ─▶ layer ─▶ commit
//!                                                                 a task    │        └ hashed, synced, cached behind
//!                                                                 a stage   └ key → cache | snapshot → run | copy
//! ```
//! It knows no terminal (it tells [`Progress`] what happens) and no command line ([`BuildRequest`] is what is asked).
//! Whatever it makes outside the store is written down first ([`estate`]), so that who comes after a killed build can
//! undo it.
#![forbid(unsafe_code)]

mod base;
mod build;
mod cache_mount;
mod cancel;
mod clamp;
mod config;
mod context;
mod copy;
mod devices;
mod error;
pub mod estate;
mod key;
mod layer;
mod loader_cache;
mod output;
mod progress;
mod pulling;
mod request;
mod sandbox;
mod solve;
mod steps;
#[cfg(test)]
mod tests_as_root;

use std::fmt;

pub use build::{Builder, Built, build_args, own_platform};
pub use cache_mount::{PrunedMounts, prune_cache_mounts};
pub use cancel::Cancel;
pub use context::ContextError;
pub use copy::CopyError;
pub use devices::DeviceGrants;
pub use error::{BaseError, BuildError, DeviceError, Excerpt, StepError, StepFailure};
pub use estate::{Estate, EstateError, sweep};
pub use layer::SealError;
pub use output::printable;
pub use progress::{Event, Outcome, Progress, Silent, StepId, StepLabel};
pub use request::{BuildRequest, ContextSource, DockerfileSource, Interruptible, Network, Secret, Stream};
pub use sandbox::Surroundings;
pub use slipway_dockerfile::instruction::{DeviceName, DeviceNameError};

/// An error with its causes on one line.
#[must_use]
pub fn chain<'a>(error: &'a (dyn std::error::Error + 'a)) -> impl fmt::Display + 'a {
    Chain(error)
}

struct Chain<'a>(&'a (dyn std::error::Error + 'a));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}
