//! What is to be run, and how that can fail: OCI's `process` object as types of our own.

use crate::cgroup::Cgroup;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;

/// OCI's `process`; unknown members are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Give it a pseudo-terminal.
    pub terminal: bool,
    /// The terminal's size at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub console_size: Option<ConsoleSize>,
    /// Who it runs as.
    pub user: User,
    /// The program and its arguments; the program is looked up in PATH of `env`, inside the container.
    pub args: Vec<String>,
    /// "NAME=value".
    pub env: Vec<String>,
    /// Absolute; empty is "/".
    pub cwd: String,
    /// Absent: as many as init was given, which is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// no_new_privs.
    pub no_new_privileges: bool,
    /// Taken on at exec, where AppArmor is enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apparmor_profile: Option<String>,
    /// Taken on at exec, where SELinux is enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selinux_label: Option<String>,
    /// Absent: that of the container's init.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_score_adj: Option<i32>,
}

/// Characters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// Ids as seen inside the container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Absent: 022.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub umask: Option<u32>,
    /// Supplementary groups: these and no others.
    pub additional_gids: Vec<u32>,
}

/// Capability names ("CAP_CHOWN") by set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// What can ever be had.
    pub bounding: Vec<String>,
    /// In force.
    pub effective: Vec<String>,
    /// Kept over exec of programs that are marked for it.
    pub inheritable: Vec<String>,
    /// May be put in force.
    pub permitted: Vec<String>,
    /// Kept over exec.
    pub ambient: Vec<String>,
}

/// One limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rlimit {
    /// "RLIMIT_NOFILE".
    #[serde(rename = "type")]
    pub kind: String,
    /// In force.
    pub soft: u64,
    /// Highest it may be raised to.
    pub hard: u64,
}

/// A process to run in the container whose init is `init_pid`.
#[derive(Debug)]
pub struct ExecPlan<'a> {
    /// The container's init, in our PID namespace.
    pub init_pid: u32,
    /// Its pidfd: what is joined is this process's, never another's with the same pid.
    pub pidfd: BorrowedFd<'a>,
    /// The process; the caller has merged the container's config with what was asked.
    pub process: &'a Process,
    /// The bytes of the bundle's `seccomp.bpf`, when the container has a filter.
    pub seccomp_bpf: Option<&'a [u8]>,
    /// The container's cgroup; `None`: stay in the caller's (only for tests).
    pub cgroup: Option<&'a Cgroup>,
    /// stdin, stdout, stderr; `None` is the container's `/dev/null`, or the host's where it has none, through which nothing of
    /// the node itself can be changed. Not used with `process.terminal`.
    pub stdio: [Option<BorrowedFd<'a>>; 3],
}

/// Why a process could not be run. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// A shell would say 127.
    #[error("no such program in the container: {program}")]
    NotFound {
        /// `args[0]`.
        program: String,
    },
    /// A shell would say 126: not executable, a directory, not a program, its interpreter missing.
    #[error("cannot execute {program}")]
    NotExecutable {
        /// `args[0]`.
        program: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The working directory is outside the container (CVE-2024-21626).
    #[error("the working directory {cwd} leads outside the container")]
    CwdOutside {
        /// As asked.
        cwd: String,
    },
    /// The container's init has ended.
    #[error("the container is not running")]
    Gone,
    /// The request itself is wrong.
    #[error("{what} cannot be: {reason}")]
    Invalid {
        /// Which member.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It took longer than [`crate::exec::PATIENCE`]: a file system in the container does not answer.
    #[error("running {program} in the container took too long")]
    Timeout {
        /// `args[0]`.
        program: String,
    },
    /// A step failed.
    #[error("{act}")]
    Io {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl ExecError {
    /// The exit code a shell would give: 127 not found, 126 not executable, else `None`.
    pub fn exit_code(&self) -> Option<u32> {
        match self {
            ExecError::NotFound { .. } => Some(127),
            ExecError::NotExecutable { .. } => Some(126),
            _ => None,
        }
    }
}
