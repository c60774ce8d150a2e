//! A RUN step of a Dockerfile as a container: what the builder says, turned into a [`SpecInput`]
//! with Docker's conventions. Knows nothing of Dockerfiles.

use std::path::PathBuf;

use slipway_cdi::ContainerEdits;

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
    /// The devices of the step: edits in the order in which they are applied, completed from the host.
    pub cdi: Vec<ContainerEdits>,
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
            cdi: self.cdi,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate;

    fn step() -> RunStep {
        RunStep {
            args: ["/bin/sh", "-c", "pip install numpy"].map(str::to_owned).into(),
            env: vec![
                ("PATH".into(), "/opt/bin:/bin".into()),
                ("PIP_NO_CACHE_DIR".into(), "1".into()),
            ],
            cwd: "/app".into(),
            user: "app".into(),
            passwd: b"app:x:1000:1000::/home/app:/bin/sh\n".to_vec(),
            network: Namespace::Path("/run/build/net".into()),
            ..RunStep::default()
        }
    }

    #[test]
    fn a_step_runs_with_dockers_capabilities_and_the_environment_in_scope() {
        let out = generate(&step().into_input()).unwrap();
        let process = out.spec.process().as_ref().unwrap();
        let bounding = process
            .capabilities()
            .as_ref()
            .unwrap()
            .bounding()
            .as_ref()
            .unwrap()
            .len();
        assert_eq!(bounding, 14);
        assert_eq!(
            process.env().as_ref().unwrap(),
            &["PATH=/opt/bin:/bin", "PIP_NO_CACHE_DIR=1", "HOME=/home/app"]
        );
        assert_eq!(process.cwd().to_str(), Some("/app"));
        assert_eq!((process.user().uid(), process.user().gid()), (1000, 1000));
        assert_eq!(out.spec.hostname().as_deref(), Some("buildkitsandbox"));
        let linux = out.spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some());
        let network = linux.namespaces().as_ref().unwrap()[0].clone();
        assert_eq!(
            network.path().as_deref(),
            Some(std::path::Path::new("/run/build/net"))
        );
    }

    #[test]
    fn a_steps_devices_change_its_container_as_a_pods_do() {
        let device = slipway_cdi::DeviceEdit {
            path: "/dev/nvidia0".into(),
            kind: "c".into(),
            major: 195,
            ..slipway_cdi::DeviceEdit::default()
        };
        let edits = ContainerEdits {
            env: vec!["PATH=/driver".into(), "NVIDIA_VISIBLE_DEVICES=void".into()],
            device_nodes: vec![device],
            ..ContainerEdits::default()
        };
        let input = RunStep {
            cdi: vec![edits],
            ..step()
        };
        let spec = generate(&input.into_input()).unwrap().spec;
        let env = spec.process().as_ref().unwrap().env().clone().unwrap();
        assert_eq!(env[0], "PATH=/driver");
        assert_eq!(env[3], "NVIDIA_VISIBLE_DEVICES=void");
        let linux = spec.linux().as_ref().unwrap();
        let node = &linux.devices().as_ref().unwrap()[0];
        // The user's of the step, as the file does not say.
        assert_eq!((node.major(), node.uid()), (195, Some(1000)));
        let rules = linux.resources().as_ref().unwrap().devices().clone().unwrap();
        let last = rules.last().unwrap();
        assert_eq!(
            (last.allow(), last.major(), last.minor()),
            (true, Some(195), Some(0))
        );
    }

    #[test]
    fn an_insecure_step_has_everything() {
        let out = generate(
            &RunStep {
                insecure: true,
                ..step()
            }
            .into_input(),
        )
        .unwrap();
        let linux = out.spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none() && linux.masked_paths().as_ref().unwrap().is_empty());
    }
}
