//! `RUN --mount=type=…,key=value`: its grammar, its keys, its defaults.

use serde::Serialize;

/// A mount as written: any value but `from` may hold variables, so that its type is known only after expansion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountText {
    /// The flag's value.
    pub text: String,
    /// `from=`: a stage, a named context or an image.
    pub from: Option<String>,
}

/// A mount after expansion. Targets are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    /// Where in the container; None for secrets that are only in the environment and for ssh without a target.
    pub target: Option<String>,
    /// No writes. (Writes to a bind mount are possible where this is false, and are thrown away.)
    pub read_only: bool,
    /// What is mounted.
    pub kind: MountKind,
}

/// The five types of mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// Files of the context, a stage or an image.
    Bind {
        /// Whose files.
        from: crate::step::Source,
        /// The path in it, absolute there.
        source: String,
    },
    /// A directory that outlives the build.
    Cache {
        /// Which: the same id is the same directory.
        id: String,
        /// How two builds share it.
        sharing: Sharing,
        /// What it starts with.
        from: crate::step::Source,
        /// The path in `from`, absolute there.
        source: String,
        /// Permission bits of the directory when it is new.
        mode: Option<u32>,
        /// Its owner.
        uid: Option<u32>,
        /// Its group.
        gid: Option<u32>,
    },
    /// Memory.
    Tmpfs {
        /// Bytes; None: the kernel's limit.
        size: Option<u64>,
    },
    /// A secret of the build, as a file, or in the environment, or both.
    Secret {
        /// Which.
        id: String,
        /// The environment variable that gets it.
        env: Option<String>,
        /// Fail where the build has no such secret.
        required: bool,
        /// Permission bits of the file (0400).
        mode: Option<u32>,
        /// Its owner (0).
        uid: Option<u32>,
        /// Its group (0).
        gid: Option<u32>,
    },
    /// An ssh agent's socket.
    Ssh {
        /// Which agent; `default`.
        id: String,
        /// Fail where the build has no such agent.
        required: bool,
        /// Permission bits of the socket (0600).
        mode: Option<u32>,
        /// Its owner (0).
        uid: Option<u32>,
        /// Its group (0).
        gid: Option<u32>,
    },
}

/// How builds share a cache mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// All at once.
    #[default]
    Shared,
    /// Another directory where the first is in use.
    Private,
    /// One after the other.
    Locked,
}
