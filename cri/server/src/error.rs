//! What can go wrong while a verb does its work. Each variant names the act and its object; `rpc::status` maps them all
//! to gRPC codes in one match, and nobody else knows those codes.

use std::path::PathBuf;
use std::time::Duration;

use slipway_image::{PullError, StoreError};
use slipway_network::CniError;
use slipway_shim_client::Error as ShimError;
use slipway_snapshot::SnapshotError;
use slipway_spec::SpecError;

use crate::fail::Injected;
use crate::op::Busy;
use crate::rpc::decode::Invalid;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Stream(#[from] slipway_stream::RequestError),
    #[error("no {kind} {id:?}")]
    NotFound { kind: &'static str, id: String },
    /// It exists, and what it is cannot be read: nothing is done to it.
    #[error(
        "{kind} {id} is left alone: its {record} record cannot be read ({why}); a slipwayd that knows it takes it over"
    )]
    Unreadable {
        kind: &'static str,
        id: String,
        record: &'static str,
        why: String,
    },
    #[error("{kind} id {id:?} means more than one")]
    Ambiguous { kind: &'static str, id: String },
    /// The name belongs to something that exists, or is being made or removed.
    #[error("the {kind} name {name:?} is taken by {by}")]
    NameTaken {
        kind: &'static str,
        name: String,
        by: String,
    },
    /// The same thing is being done right now.
    #[error("{kind} {id}: {what}")]
    InProgress {
        kind: &'static str,
        id: String,
        what: String,
    },
    #[error("{kind} {id}: try again later")]
    Busy {
        kind: &'static str,
        id: String,
        source: Busy,
    },
    /// The verb makes no sense in the object's state.
    #[error("{kind} {id} is {state}: cannot {verb}")]
    State {
        kind: &'static str,
        id: String,
        state: String,
        verb: &'static str,
    },
    /// One of its name was failed, and whoever did that wants no other for a while.
    #[error("container {name} gets no successor in its pod for {} s: {id} was failed ({reason}): {message}", left.as_secs() + 1)]
    Held {
        name: String,
        id: String,
        left: Duration,
        reason: String,
        message: String,
    },
    /// It has ended without its program having run, and why.
    #[error("{why}")]
    NotStarted { why: String },
    #[error("the host path {} of the mount on {container_path} does not exist", host_path.display())]
    MountSourceMissing {
        host_path: PathBuf,
        container_path: String,
    },
    #[error("the network is not ready: {reason}")]
    NetworkNotReady { reason: String },
    #[error("{what} is not built yet")]
    Unimplemented { what: &'static str },
    #[error("image {name:?} is not on this node; pull it first")]
    ImageMissing { name: String },
    #[error("cannot pull image {name:?}")]
    Pull { name: String, source: Box<PullError> },
    #[error("cannot {act} in the image store")]
    Store {
        act: &'static str,
        source: Box<StoreError>,
    },
    #[error("cannot {act} of container {id}")]
    Snapshot {
        act: &'static str,
        id: String,
        source: Box<SnapshotError>,
    },
    #[error("container {id}: cannot make its runtime specification")]
    Spec { id: String, source: Box<SpecError> },
    #[error("container {id}: CDI devices")]
    Cdi {
        id: String,
        source: Box<slipway_cdi::ResolveError>,
    },
    #[error("{} is not what runtime.blockio_config_file can name", path.display())]
    BlockIo {
        path: PathBuf,
        source: Box<slipway_spec::BlockIoError>,
    },
    #[error("the AppArmor profile {profile:?} cannot be used: {why}")]
    Apparmor { profile: String, why: String },
    #[error("cannot {act} of {id}")]
    Shim {
        act: &'static str,
        id: String,
        source: ShimError,
    },
    #[error("cannot {act} of pod {id}")]
    Network {
        act: &'static str,
        id: String,
        source: Box<CniError>,
    },
    #[error("cannot make a network configuration of the template {}", path.display())]
    NetworkTemplate { path: PathBuf, source: Box<CniError> },
    #[error("cannot let go of the addresses of an earlier boot")]
    OldAddresses { source: Box<CniError> },
    #[error("cannot {act} {}", path.display())]
    Io {
        act: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot make random bytes for an id")]
    Random { source: std::io::Error },
    #[error("cannot write the {what} record of {id} as JSON")]
    Encode {
        what: &'static str,
        id: String,
        source: serde_json::Error,
    },
    #[error("container {id}: {cmd:?} did not end within {} s and was killed", timeout.as_secs())]
    ExecTimeout {
        id: String,
        cmd: String,
        timeout: Duration,
    },
    #[error("{kind} {id} did not {what} within {} s", timeout.as_secs())]
    Timeout {
        kind: &'static str,
        id: String,
        what: &'static str,
        timeout: Duration,
    },
    #[error(transparent)]
    Injected(#[from] Injected),
    #[error("there are {most} {what} already")]
    TooMany { what: &'static str, most: usize },
    #[error("slipwayd is shutting down")]
    ShuttingDown,
    #[error("a task of slipwayd panicked")]
    Panicked,
}

impl Error {
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Error {
        Error::Invalid(Invalid {
            field,
            reason: reason.into(),
        })
    }

    /// A record that could not be written or read; a name that is taken is its own kind of error.
    pub fn from_record(kind: &'static str, what: &str, error: StoreError) -> Error {
        match error {
            StoreError::NameTaken { by, .. } => Error::NameTaken {
                kind,
                name: what.to_owned(),
                by,
            },
            source => Error::Store {
                act: "keep a record",
                source: Box::new(source),
            },
        }
    }

    pub fn io(act: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { act, path, source }
    }

    pub fn shim(act: &'static str, id: &impl ToString) -> impl FnOnce(ShimError) -> Error {
        let id = id.to_string();
        move |source| Error::Shim { act, id, source }
    }

    pub fn store(act: &'static str) -> impl FnOnce(StoreError) -> Error {
        move |source| Error::Store {
            act,
            source: Box::new(source),
        }
    }

    pub fn spec(id: &impl ToString) -> impl FnOnce(SpecError) -> Error {
        let id = id.to_string();
        move |source| Error::Spec {
            id,
            source: Box::new(source),
        }
    }

    /// The error and its causes in one line, for logs and for the client.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let next = error.to_string();
            // Transparent layers repeat their cause.
            if !text.ends_with(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }
}
