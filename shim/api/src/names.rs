//! What services, methods and events are called on the wire.

/// containerd's task service, version 3.
pub const TASK: &str = "containerd.task.v3.Task";
/// Our own service, beside it on the same socket.
pub const POD: &str = "slipway.pod.v1.Pod";
/// containerd's service that takes a shim's events, and its only method.
pub const EVENTS: &str = "containerd.services.events.ttrpc.v1.Events";
/// See [`EVENTS`].
pub const FORWARD: &str = "Forward";

/// The key in a request's metadata that says how many descriptors its frame carries.
pub const FDS: &str = "fds";
/// More descriptors than this with one request are refused.
pub const MAX_FDS: usize = 8;

/// The type URL of `CreateTaskRequest.options` that are ours.
pub const CREATE_OPTIONS: &str = "slipway.pod.v1.CreateOptions";

/// `CreateTaskRequest.stdout`: a CRI log file, by its absolute path.
pub const CRI_LOG: &str = "cri-log://";
/// `CreateTaskRequest.stdout`: read and dropped, both streams; Attach sees them.
pub const DISCARD: &str = "discard:";
/// `CreateTaskRequest.stdout`: a file that both streams are appended to, as they are.
pub const FILE: &str = "file://";
/// `CreateTaskRequest.{stdin,stdout,stderr}`: a fifo by its path; the prefix may be left out.
pub const FIFO: &str = "fifo://";
/// `CreateTaskRequest.stdout`: two descriptors travel with the request, stdout and stderr.
pub const PIPE: &str = "pipe:";
/// `CreateTaskRequest.stdin`: a pipe that the shim keeps for Attach.
pub const KEEP: &str = "keep:";
/// The same, closed when the first attached stdin has ended.
pub const KEEP_ONCE: &str = "keep-once:";

/// Topics of events, as containerd subscribes to them.
pub mod topic {
    #![allow(missing_docs)]
    pub const CREATE: &str = "/tasks/create";
    pub const START: &str = "/tasks/start";
    pub const OOM: &str = "/tasks/oom";
    pub const EXIT: &str = "/tasks/exit";
    pub const DELETE: &str = "/tasks/delete";
    pub const EXEC_ADDED: &str = "/tasks/exec-added";
    pub const EXEC_STARTED: &str = "/tasks/exec-started";
    pub const PAUSED: &str = "/tasks/paused";
    pub const RESUMED: &str = "/tasks/resumed";
}
