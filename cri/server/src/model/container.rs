//! A container as asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use slipway_spec::{CapabilityRequest, IdMap, Propagation, SupplementalGroupsPolicy};

use super::{Resources, Scope, StringMap};

/// Everything a ContainerConfig says that means something on Linux.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    pub metadata: ContainerMetadata,
    pub image: ImageSpec,
    pub command: Vec<String>,
    pub args: Vec<String>,
    pub working_dir: String,
    pub envs: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub cdi_devices: Vec<String>,
    pub labels: StringMap,
    pub annotations: StringMap,
    /// Relative to the pod's log directory, without `..`.
    pub log_path: Option<PathBuf>,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    pub resources: Resources,
    /// `None`: the request has no Linux security context, and defaults stand.
    pub security: Option<Security>,
    pub stop_signal: Option<StopSignal>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerMetadata {
    pub name: String,
    pub attempt: u32,
}

/// Which image, as the caller said it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageSpec {
    /// A reference or an image id.
    pub image: String,
    pub annotations: StringMap,
    pub user_specified_image: String,
    pub runtime_handler: String,
    pub image_ref: String,
}

/// One mount; the rootfs, /proc and the like are not among them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub container_path: String,
    pub source: MountSource,
    pub readonly: bool,
    pub recursive_read_only: bool,
    pub propagation: Propagation,
    #[serde(default)]
    pub selinux_relabel: bool,
    #[serde(default)]
    pub uid_mappings: Vec<IdMap>,
    #[serde(default)]
    pub gid_mappings: Vec<IdMap>,
    #[serde(default)]
    pub options: Vec<String>,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountSource {
    /// A path on the host, absolute.
    Host(PathBuf),
    /// The content of an image (an image volume), or a directory in it.
    Image { image: ImageSpec, sub_path: String },
}

/// A device of the host, or a directory of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub container_path: String,
    pub host_path: PathBuf,
    pub permissions: String,
}

/// The Linux security context.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    pub capabilities: CapabilityRequest,
    pub privileged: bool,
    pub network: Scope,
    pub pid: PidNamespace,
    pub ipc: Scope,
    pub selinux: Option<String>,
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    pub run_as_username: Option<String>,
    pub supplemental_groups: Vec<i64>,
    pub supplemental_groups_policy: SupplementalGroupsPolicy,
    pub readonly_rootfs: bool,
    pub no_new_privs: bool,
    pub masked_paths: Vec<String>,
    pub readonly_paths: Vec<String>,
    pub seccomp: Seccomp,
    pub apparmor: Apparmor,
}

/// Whose processes a container sees.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PidNamespace {
    /// The pod's.
    #[default]
    Pod,
    /// Its own.
    Container,
    /// The host's.
    Node,
    /// Those of another container of the pod, by its id.
    Target(String),
}

/// The system call filter asked for; a profile's file is read when the container is created.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    RuntimeDefault,
    #[default]
    Unconfined,
    Localhost(PathBuf),
}

/// The AppArmor profile asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Apparmor {
    #[default]
    RuntimeDefault,
    Unconfined,
    Localhost(String),
}

/// A signal by the CRI's number for it (which is the enum's, not the kernel's) and its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StopSignal(pub String);
