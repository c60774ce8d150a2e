//! A RUN step of a Dockerfile as a container: what the builder says, turned into a [`SpecInput`]
//! with Docker's conventions. Knows nothing of Dockerfiles.

use std::path::PathBuf;

use crate::capability;
use crate::host::HostFacts;
use crate::input::{
    ImageDefaults, Mount, Namespace, Namespaces, PodFiles, Resources, Rlimit, Seccomp, SpecInput, UserSpec,
};

/// One RUN step.
#[derive(Debug, Clone, Default)]
pub struct RunStep {
    /// The whole argument vector, shell included.
    pub args: Vec<String>,
    /// The environment in scope (ENV and ARG); PATH and HOME are added when missing.
    pub env: Vec<(String, String)>,
    /// WORKDIR in scope; the builder has made it.
    pub cwd: String,
    /// USER in scope, in any of its forms; empty: root.
    pub user: String,
    /// /etc/passwd of the step's root file system.
    pub passwd: Vec<u8>,
    /// /etc/group of the step's root file system.
    pub group: Vec<u8>,
    /// Mounts of the step (`--mount`, CA bundles …).
    pub mounts: Vec<Mount>,
    /// Generated resolv.conf and hosts.
    pub files: PodFiles,
    /// The step's network namespace: a pinned one, a new (empty) one, or the host's.
    pub network: Namespace,
    /// Host name inside; empty: `buildkitsandbox`, which BuildKit's users know.
    pub hostname: String,
    /// `RUN --security=insecure`.
    pub insecure: bool,
    /// ulimits given to the build.
    pub rlimits: Vec<Rlimit>,
    /// Limits given to the build.
    pub resources: Resources,
    /// `linux.cgroupsPath` of the step.
    pub cgroups_path: String,
    /// Where the step's root file system is mounted; empty: `rootfs` in the bundle.
    pub rootfs: PathBuf,
    /// What the host can do.
    pub host: HostFacts,
}

impl RunStep {
    /// The container that runs this step: Docker's fourteen capabilities, the default seccomp
    /// profile, a private /dev/shm, every namespace but the network's new.
    pub fn into_input(self) -> SpecInput {
        let hostname = if self.hostname.is_empty() {
            "buildkitsandbox".to_owned()
        } else {
            self.hostname
        };
        SpecInput {
            image: ImageDefaults::default(),
            command: self.args,
            envs: self.env,
            working_dir: self.cwd,
            mounts: self.mounts,
            pod_files: self.files,
            user: UserSpec {
                image_user: self.user,
                ..UserSpec::default()
            },
            passwd: self.passwd,
            group: self.group,
            default_capabilities: Some(capability::BUILD.iter().map(|c| (*c).to_owned()).collect()),
            privileged: self.insecure,
            seccomp: if self.insecure {
                Seccomp::Unconfined
            } else {
                Seccomp::RuntimeDefault
            },
            rlimits: self.rlimits,
            resources: self.resources,
            cgroups_path: self.cgroups_path,
            namespaces: Namespaces {
                network: self.network,
                ..Namespaces::default()
            },
            hostname: Some(hostname),
            omit_hostname_env: true,
            rootfs: self.rootfs,
            host: self.host,
            ..SpecInput::default()
        }
    }
}
