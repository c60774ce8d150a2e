//! The built-in pid 1 of a shared PID namespace: nothing in it is worth looking at for who can look at it.

use crate::cgroup::Cgroup;
use crate::ns::Kind;
use crate::process::Child;
use std::io;
use std::path::Path;

/// How the built-in init is to be started.
#[derive(Debug)]
pub struct InitPlan<'a> {
    /// The pod's pinned namespaces, which it enters: user, net, ipc, uts (those there are).
    pub join: &'a [(Kind, &'a Path)],
    /// A leaf cgroup of its own; `None`: stay in the caller's (only for tests).
    pub cgroup: Option<&'a Cgroup>,
    /// Its `oom_score_adj`, or as near to it as may be.
    pub oom_score_adj: i32,
}

/// Why it could not be started. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
#[error("start the built-in init: {act}")]
pub struct InitError {
    /// What was attempted.
    pub act: String,
    /// Why not.
    #[source]
    pub source: io::Error,
}

/// Starts it as pid 1 of a new PID namespace and as our child. It reaps what is orphaned in the namespace and ends on
/// SIGTERM from outside, or SIGKILL. Pin the namespace with `ns::pin_of(child.pid, Kind::Pid, path)`.
///
/// # Errors
/// [`InitError`].
pub fn spawn(plan: &InitPlan<'_>) -> Result<Child, InitError> {
    let _ = plan;
    Err(InitError {
        act: "start".into(),
        source: io::ErrorKind::Unsupported.into(),
    })
}
