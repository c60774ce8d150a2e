//! What can go wrong between a caller and its shim.

use slipway_shim_api::status::Code;
use std::{io, path::PathBuf, time::Duration};

/// A failed act on a shim.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers on the pod's socket: the shim is dead, or the connection was closed.
    #[error("the shim is gone")]
    Gone,
    /// The shim answered with an error.
    #[error("{message}")]
    Status {
        /// A code of google.rpc.Code.
        code: i32,
        /// What was attempted, on what, and why it failed.
        message: String,
    },
    /// The shim did not answer in time; whether the act happened is unknown.
    #[error("the shim did not answer {method} within {after:?}")]
    Timeout {
        /// The method called.
        method: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The answer does not decode: the shim speaks another protocol.
    #[error("decode the shim's answer to {method}")]
    Decode {
        /// The method called.
        method: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
    /// The request is larger than a frame may be.
    #[error("send {method} to the shim")]
    TooLong {
        /// The method called.
        method: &'static str,
        /// How long it is.
        source: slipway_shim_api::frame::TooLong,
    },
    /// A program this needs is not installed.
    #[error("{program} was not found; looked at {}", list(.looked))]
    NotInstalled {
        /// The program's file name.
        program: &'static str,
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// An act on a file or process failed before the shim could be asked anything.
    #[error("{act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The shim was started and did not come up.
    #[error("the shim of pod {pod} did not come up: {why}")]
    Spawn {
        /// The pod.
        pod: String,
        /// The last lines it wrote, or how it ended.
        why: String,
    },
    /// The clean-up program failed.
    #[error("clean up after the shim in {}: {why}", state_dir.display())]
    Cleanup {
        /// The dead shim's state directory.
        state_dir: PathBuf,
        /// What the program said.
        why: String,
    },
}

fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|p| p.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

impl Error {
    /// The shim said that the object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.is(Code::NotFound)
    }

    /// The shim answered with this code.
    pub fn is(&self, wanted: Code) -> bool {
        matches!(self, Error::Status { code, .. } if *code == wanted as i32)
    }
}
