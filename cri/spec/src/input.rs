//! What a container is asked to be: every wish of CRI's ContainerConfig, the image's defaults and
//! the facts of the host, as plain Rust values.
//!
//! This file refuses to know where the wishes came from (gRPC, a Dockerfile) and what the runtime
//! makes of them. Everything in it is untrusted until [`crate::generate`] has looked at it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::host::HostFacts;

/// Everything [`crate::generate`] needs to know about one container.
///
/// `Default` is a container that runs nothing, in new namespaces, with the default capabilities
/// and no seccomp profile; fill in what is asked and leave the rest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpecInput {
    /// What the image's configuration says; see [`ImageDefaults::from_config`].
    pub image: ImageDefaults,
    /// Replaces the image's entrypoint *and* its cmd.
    pub command: Vec<String>,
    /// Replaces the image's cmd.
    pub args: Vec<String>,
    /// Environment of the container; later entries win over earlier ones and over the image's.
    pub envs: Vec<(String, String)>,
    /// Working directory; empty: the image's, else `/`.
    pub working_dir: String,
    /// Bind mounts asked for, image volumes and anonymous volumes included (sources exist already).
    pub mounts: Vec<Mount>,
    /// Where the pod's /dev/shm is mounted on the host; `None`: a private tmpfs of 64 MiB.
    pub shm: Option<PathBuf>,
    /// The pod's generated files, bind-mounted where no mount of the container's own covers them.
    pub pod_files: PodFiles,
    /// Device nodes to make, already looked up on the host (`slipway_cdi::host`).
    pub devices: Vec<Device>,
    /// What a privileged container gets on top: every device node of the host.
    pub host_devices: Vec<Device>,
    /// Who the process is.
    pub user: UserSpec,
    /// The image's /etc/passwd (bounded by the reader: see [`crate::user::FILE_LIMIT`]).
    #[serde(with = "text")]
    pub passwd: Vec<u8>,
    /// The image's /etc/group (bounded by the reader: see [`crate::user::FILE_LIMIT`]).
    #[serde(with = "text")]
    pub group: Vec<u8>,
    /// Capabilities to add, drop and make ambient.
    pub capabilities: CapabilityRequest,
    /// Capabilities before add and drop; `None`: [`crate::capability::DEFAULT`].
    pub default_capabilities: Option<Vec<String>>,
    /// All capabilities and devices, nothing masked, no seccomp, writable /sys.
    pub privileged: bool,
    /// Set the no_new_privs bit.
    pub no_new_privs: bool,
    /// Mount the root file system read-only.
    pub readonly_rootfs: bool,
    /// Paths to hide; `None`: the defaults; an empty list hides nothing (procMount: Unmasked).
    ///
    /// CRI cannot tell "unset" from "empty": give `Some` when the request has a Linux security
    /// context (kubelet always fills it), else `None`.
    pub masked_paths: Option<Vec<String>>,
    /// Paths to make read-only; as `masked_paths`.
    pub readonly_paths: Option<Vec<String>>,
    /// The system call filter.
    pub seccomp: Seccomp,
    /// The AppArmor profile.
    pub apparmor: Apparmor,
    /// SELinux labels, already composed ("user:role:type:level").
    pub selinux: Option<SelinuxLabels>,
    /// Resource limits of the process.
    pub rlimits: Vec<Rlimit>,
    /// oom_score_adj of the process, -1000..=1000.
    pub oom_score_adj: Option<i64>,
    /// Cgroup limits.
    pub resources: Resources,
    /// What its class of block IO comes to (not CRI: annotations name the class).
    pub block_io: Option<crate::BlockIo>,
    /// `linux.cgroupsPath`: an absolute path, or `slice:prefix:name` for the systemd driver.
    pub cgroups_path: String,
    /// Which namespaces are new, shared or the host's.
    pub namespaces: Namespaces,
    /// Sysctls to set when the container starts (only for namespaces that are new in it: those of
    /// a pod's shared namespaces are set when they are made; check them with [`crate::sysctl::check`]).
    pub sysctls: BTreeMap<String, String>,
    /// Give the process a terminal.
    pub tty: bool,
    /// Size of the terminal in characters (width, height), when known.
    pub console_size: Option<(u64, u64)>,
    /// Host name: the UTS namespace's when that is new, and the variable HOSTNAME.
    pub hostname: Option<String>,
    /// Leave HOSTNAME out of the environment (the builder: as BuildKit does).
    pub omit_hostname_env: bool,
    /// Annotations of the user (pod or container); see `annotation_passthrough`.
    pub annotations: BTreeMap<String, String>,
    /// Which of the user's annotations reach the runtime: exact keys, or prefixes ending in `*`.
    /// Those that would change the runtime's own doing never do.
    pub annotation_passthrough: Vec<String>,
    /// Annotations of slipwayd's own, written as they are.
    pub runtime_annotations: BTreeMap<String, String>,
    /// CDI edits in the order they are to be applied, device nodes completed from the host
    /// (`slipway_cdi::Cache::resolve` gives them so).
    pub cdi: Vec<slipway_cdi::ContainerEdits>,
    /// What the CRI request says the container is to be stopped with; a name or a number.
    pub stop_signal: Option<String>,
    /// Where the root file system is mounted, relative to the bundle or absolute; empty: `rootfs`.
    pub rootfs: PathBuf,
    /// What the host can do.
    pub host: HostFacts,
}

/// The part of an image's configuration that containers inherit. Labels are deliberately absent:
/// they never become anything at run time (CVE-2026-53488).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageDefaults {
    /// `User`: `user`, `uid`, `user:group` in any mix.
    pub user: String,
    /// `Env`, as `NAME=value`.
    pub env: Vec<String>,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `WorkingDir`.
    pub working_dir: String,
    /// `StopSignal`.
    pub stop_signal: String,
    /// `Volumes`, as written in the image, sorted.
    pub volumes: Vec<String>,
}

impl ImageDefaults {
    /// Takes what containers inherit from an image's configuration.
    pub fn from_config(config: &oci_spec::image::ImageConfiguration) -> Self {
        config.config().as_ref().map(Self::from).unwrap_or_default()
    }
}

impl From<&oci_spec::image::Config> for ImageDefaults {
    fn from(c: &oci_spec::image::Config) -> Self {
        let mut volumes = c.volumes().clone().unwrap_or_default();
        volumes.sort();
        volumes.dedup();
        ImageDefaults {
            user: c.user().clone().unwrap_or_default(),
            env: c.env().clone().unwrap_or_default(),
            entrypoint: c.entrypoint().clone().unwrap_or_default(),
            cmd: c.cmd().clone().unwrap_or_default(),
            working_dir: c.working_dir().clone().unwrap_or_default(),
            stop_signal: c.stop_signal().clone().unwrap_or_default(),
            volumes,
        }
    }
}

/// One bind mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mount {
    /// Where in the container: absolute, without `..`.
    pub container_path: String,
    /// What on the host: absolute; exists already.
    pub host_path: PathBuf,
    /// Read-only at its top.
    pub readonly: bool,
    /// Read-only all the way down (`rro`, kernel ≥ 5.12); needs `readonly` and private propagation.
    pub recursive_read_only: bool,
    /// Which mounts are seen across.
    pub propagation: Propagation,
    /// Ids of an idmapped mount.
    pub uid_mappings: Vec<IdMap>,
    /// Ids of an idmapped mount.
    pub gid_mappings: Vec<IdMap>,
    /// Further options: of `noexec`, `nosuid`, `nodev`, `noatime`, `nodiratime`, `relatime`,
    /// `strictatime`, `nosymfollow` and their opposites only.
    pub options: Vec<String>,
}

/// Which mount events cross between host and container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// None.
    #[default]
    Private,
    /// Those made on the host afterwards are seen in the container (`rslave`).
    HostToContainer,
    /// Both ways (`rshared`).
    Bidirectional,
}

/// The pod's generated files on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodFiles {
    /// For /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// For /etc/hosts.
    pub hosts: Option<PathBuf>,
    /// For /etc/hostname.
    pub hostname: Option<PathBuf>,
}

/// One device node to make and to allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Where in the container: absolute, without `..`.
    pub container_path: String,
    /// Kind and numbers, as found on the host.
    pub node: slipway_cdi::DeviceNode,
    /// Of `r`, `w`, `m`; empty: all three.
    #[serde(default)]
    pub permissions: String,
}

/// Who the process is to be. Precedence: `username`, `uid`, the image's user, root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserSpec {
    /// run_as_user.
    pub uid: Option<i64>,
    /// run_as_group: only with one of `uid` and `username`.
    pub gid: Option<i64>,
    /// run_as_username.
    pub username: Option<String>,
    /// The image's `User`; [`crate::generate`] fills it in from the image.
    pub image_user: String,
    /// supplemental_groups (fsGroup among them).
    pub supplemental_groups: Vec<i64>,
    /// Whether the image's /etc/group adds to them.
    pub policy: SupplementalGroupsPolicy,
}

/// Where supplementary groups come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SupplementalGroupsPolicy {
    /// Those asked for and those of the user in the image's /etc/group.
    #[default]
    Merge,
    /// Those asked for only.
    Strict,
}

/// Capabilities to add and drop, with or without `CAP_`, `ALL` included.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapabilityRequest {
    /// Added to the defaults.
    pub add: Vec<String>,
    /// Dropped from the defaults; by name they win over `add`.
    pub drop: Vec<String>,
    /// Added to every set, the ambient one too.
    pub ambient: Vec<String>,
}

/// The system call filter asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// The profile of [`crate::seccomp::runtime_default`].
    RuntimeDefault,
    /// None (also what CRI means by saying nothing).
    #[default]
    Unconfined,
    /// A profile file's content (JSON in OCI's or Docker's form).
    Localhost(#[serde(with = "text")] Vec<u8>),
}

/// The AppArmor profile asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Apparmor {
    /// The runtime's own, where AppArmor is on and one is loaded ([`HostFacts::apparmor_default`]).
    #[default]
    RuntimeDefault,
    /// None.
    Unconfined,
    /// A loaded profile by name; an error where AppArmor is off.
    Localhost(String),
}

/// SELinux labels of the process and of what is mounted for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SelinuxLabels {
    /// Label of the process.
    pub process: String,
    /// Label of its root file system and tmpfs mounts.
    pub mount: String,
}

/// One resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// `RLIMIT_NOFILE`, or `nofile` as Docker spells it.
    pub name: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// Cgroup limits as CRI gives them; zero and empty mean "not asked".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// CFS period in µs.
    pub cpu_period: i64,
    /// CFS quota in µs; -1: none.
    pub cpu_quota: i64,
    /// Relative weight, 2..=262144.
    pub cpu_shares: i64,
    /// Bytes; -1: none.
    pub memory_limit: i64,
    /// Memory and swap together, bytes; -1: none.
    pub memory_swap_limit: i64,
    /// Soft limit in bytes (not CRI; the builder's and Docker's).
    pub memory_reservation: i64,
    /// CPUs, in list form ("0-3,7").
    pub cpuset_cpus: String,
    /// Memory nodes, in list form.
    pub cpuset_mems: String,
    /// Processes; -1: none (slipwayd's configuration, not CRI).
    pub pids_limit: i64,
    /// Limits by page size ("2MB"), bytes. Zeroes are kept: the cgroup code drops them where there
    /// is no controller.
    pub hugepage_limits: Vec<(String, u64)>,
    /// Cgroup v2 files and their values.
    pub unified: BTreeMap<String, String>,
}

/// Where one namespace comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// A new one for this container.
    #[default]
    New,
    /// An existing one, by its (pinned) file.
    Path(PathBuf),
    /// The host's.
    Host,
}

/// All namespaces; the mount namespace is always new.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Namespaces {
    /// Network.
    pub network: Namespace,
    /// Processes.
    pub pid: Namespace,
    /// System V IPC and POSIX queues.
    pub ipc: Namespace,
    /// Host name.
    pub uts: Namespace,
    /// Cgroup root.
    pub cgroup: Namespace,
    /// User ids; `None`: the host's.
    pub user: Option<UserNamespace>,
}

/// A user namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNamespace {
    /// The pinned one to join; `None`: a new one.
    pub path: Option<PathBuf>,
    /// Its uid map.
    pub uids: Vec<IdMap>,
    /// Its gid map.
    pub gids: Vec<IdMap>,
}

/// A range of ids mapped from container to host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdMap {
    /// First id inside.
    pub container: u32,
    /// First id outside.
    pub host: u32,
    /// How many.
    pub length: u32,
}

/// The set of capabilities by name, as `CAP_…`.
pub type CapabilitySet = BTreeSet<String>;

/// Bytes that are nearly always text, written as text (lossily) in golden files and records.
mod text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&String::from_utf8_lossy(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        String::deserialize(d).map(String::into_bytes)
    }
}
