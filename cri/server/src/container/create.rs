//! CreateContainer, as a story: the image, the name, the intent, the snapshot, the bundle, the hand-over, CREATED.
//!
//! What slipwayd does is done here, and what it refuses is told here. The making of the waiting init is handed to the shim
//! and goes on behind the answer, at the same time as CREATED is written down and kubelet gets to its StartContainer,
//! which waits for it and tells its failure. From the hand-over on the shim knows the container, whatever becomes of us:
//! as one that is being made, waits, or could not be made and why. So CREATED is true after a crash, too: it is written
//! down only when the shim has said that it is at it.
//!
//! Everything a step makes is found from the id alone, so [`remove::undo`] serves a failed create here and an
//! interrupted one at the next start.

use std::sync::Arc;

use slipway_image::Image;
use slipway_shim_client::{CreateContainer, Output, Shim, Stdin};

use super::bundle::Bundle;
use super::{Container, exit, fault, mounts, remove, spec, volumes};
use crate::daemon::Daemon;
use crate::error::Error;
use crate::events::{self, What};
use crate::fail;
use crate::ids::ContainerId;
use crate::model::{ContainerConfig, ImageSpec, PidNamespace, Scope};
use crate::pod::{Pod, describe};
use crate::records::{ContainerPhase, ContainerRecord, ContainerState, Kind, Made, PodPhase};

const VERB: &str = "CreateContainer";

/// Creates a container in a pod; its id.
pub async fn create(
    daemon: &Arc<Daemon>,
    pod_id: &str,
    config: ContainerConfig,
) -> Result<ContainerId, Error> {
    let pod = daemon.registry.pod(pod_id)?;
    let (_inside, shim) = pod.enter(VERB).await?;
    check(daemon, &pod, &config)?;
    fault::check_hold(daemon, &pod, &config.metadata.name)?;
    let image = resolve(daemon, &config.image.image).await?;

    let record = ContainerRecord {
        version: crate::records::version(),
        id: ContainerId::random().map_err(|source| Error::Random { source })?,
        pod: pod.id().clone(),
        created_at_ns: crate::time::now_ns(),
        boot_id: daemon.boot_id.clone(),
        config,
    };
    let id = record.id.clone();
    let name = format!(
        "{}_{}_{}",
        pod.id(),
        record.config.metadata.name,
        record.config.metadata.attempt
    );
    let container = Arc::new(Container::creating(record));
    let _turn = container.try_begin(VERB)?;
    daemon.registry.insert_container(container.clone());
    if let Err(error) = daemon
        .records
        .reserve(Kind::Container, id.as_str(), &name, container.record())
        .await
    {
        daemon.registry.remove_container(&id);
        return Err(name_taken(daemon, &container, error));
    }
    let work = Work {
        daemon: daemon.clone(),
        pod,
        container: container.clone(),
        image,
    };
    match work.set_up(&shim).await {
        Ok(()) => Ok(id),
        Err(error) => {
            remove::undo(daemon, &container).await;
            Err(error)
        }
    }
}

/// What can be refused without having touched anything.
fn check(daemon: &Daemon, pod: &Pod, config: &ContainerConfig) -> Result<(), Error> {
    // Where SELinux is off there is nothing to relabel.
    if config.mounts.iter().any(|mount| mount.selinux_relabel) && slipway_sys::exec::selinux_enabled() {
        let what = "relabelling a mount for SELinux (mounts.selinux_relabel)";
        return Err(Error::Unimplemented { what });
    }
    let Some(security) = &config.security else {
        return Ok(());
    };
    if security.privileged && !pod.record().config.privileged {
        return Err(Error::invalid(
            "config.linux.security_context.privileged",
            "the pod sandbox was not run as privileged",
        ));
    }
    let pod_network = pod.record().config.namespaces.network;
    if security.network != Scope::Pod && security.network != pod_network {
        return Err(Error::invalid(
            "namespace_options.network",
            "a container's network is its pod's",
        ));
    }
    let PidNamespace::Target(target) = &security.pid else {
        return Ok(());
    };
    let refused = |reason: String| Error::invalid("namespace_options.target_id", reason);
    let target = daemon
        .registry
        .container(target)
        .map_err(|error| refused(error.to_string()))?;
    if target.pod() != pod.id() {
        return Err(refused(format!("container {} is in another pod", target.id())));
    }
    match target.phase() {
        ContainerPhase::Running { .. } => Ok(()),
        phase => Err(refused(format!(
            "container {} is {}",
            target.id(),
            super::describe(&phase)
        ))),
    }
}

/// Finds an image by name or id.
pub async fn resolve(daemon: &Arc<Daemon>, name: &str) -> Result<Image, Error> {
    let (store, name) = (daemon.store.clone(), name.to_owned());
    crate::blocking::run(move || {
        store
            .resolve(&name)
            .map_err(Error::store("look an image up"))?
            .ok_or(Error::ImageMissing { name })
    })
    .await
}

/// Turns "somebody has the name" into who, and what it is doing.
fn name_taken(daemon: &Daemon, asked: &Container, error: Error) -> Error {
    let Error::NameTaken { kind, by, .. } = error else {
        return error;
    };
    let metadata = &asked.record().config.metadata;
    let name = format!(
        "{} (attempt {}) in pod {}",
        metadata.name,
        metadata.attempt,
        asked.pod()
    );
    match daemon.registry.container(&by) {
        Ok(holder) if holder.hidden() => Error::InProgress {
            kind,
            id: by,
            what: format!("{VERB} for the name {name} is in progress"),
        },
        Ok(holder) => {
            let by = format!("container {by}, which is {}", super::describe(&holder.phase()));
            Error::NameTaken { kind, name, by }
        }
        Err(Error::Unreadable { .. }) => Error::NameTaken {
            kind,
            name,
            by: format!("container {by}, whose record cannot be read"),
        },
        Err(_) => Error::NameTaken {
            kind,
            name,
            by: format!("container {by}, which is being removed"),
        },
    }
}

/// What the steps share.
struct Work {
    daemon: Arc<Daemon>,
    pod: Arc<Pod>,
    container: Arc<Container>,
    image: Image,
}

impl Work {
    async fn set_up(self, shim: &Shim) -> Result<(), Error> {
        fail::point("create_container.after_intent").await?;
        let (daemon, container) = (self.daemon.clone(), self.container.clone());
        let sources = mounts::host_sources(&daemon, &container).await?;
        let pod = self.pod.clone();
        let mut made = crate::blocking::run(move || self.make_bundle(sources)).await?;
        if pod.phase() == PodPhase::Stopping {
            return Err(Error::State {
                kind: "pod",
                id: pod.id().to_string(),
                state: describe(&PodPhase::Stopping).to_owned(),
                verb: VERB,
            });
        }
        made.pid = shim
            .begin_create(request(&daemon, &container, &made))
            .await
            .map_err(Error::shim("create the processes", container.id()))?;
        fail::point("create_container.after_create").await?;
        let change = |state: &mut ContainerState| {
            *state = ContainerState {
                phase: match container.take_early_exit() {
                    Some(exit) => ContainerPhase::Exited(exit),
                    None => ContainerPhase::Created,
                },
                made,
                ..state.clone()
            };
            true
        };
        let tell = || {
            events::of_container(&daemon, &container, What::Created);
            if matches!(container.phase(), ContainerPhase::Exited(_)) {
                events::of_container(&daemon, &container, What::Stopped);
            }
        };
        container.transition_then(&daemon.records, change, tell).await?;
        fail::point("create_container.after_record").await?;
        if matches!(container.phase(), ContainerPhase::Exited(_)) {
            exit::settle_later(&daemon, container);
        }
        Ok(())
    }

    /// Everything that is files and mounts, on one blocking thread.
    fn make_bundle(&self, sources: mounts::HostSources) -> Result<Made, Error> {
        let (daemon, id) = (&self.daemon, self.container.id());
        let bundle = daemon.bundle(id);
        let active = self.prepare_snapshot()?;
        fail::blocking_point("create_container.after_snapshot")?;
        let userns = self.user_namespace()?;
        if let (Some(userns), Some(upper)) = (&userns, active.mount.upper()) {
            userns.own(upper)?;
        }
        let pinned = userns.as_ref().map(|userns| userns.path.as_path());
        bundle.mount(&active.mount, pinned)?;
        fail::blocking_point("create_container.after_mount")?;
        let log_path = self.make_log_directory()?;
        let mut binds = mounts::resolve(daemon, &self.container, &bundle, pinned, sources)?;
        let anonymous = volumes::make(
            &daemon.paths.volumes,
            &self.container,
            &self.image,
            &binds,
            &bundle.rootfs(),
            daemon.config.runtime.volume_copy_limit_mib << 20,
        )?;
        if let Some(userns) = &userns {
            // The directory of a volume that the image has nothing for is root's; what was copied has its owners.
            for volume in &anonymous {
                userns.own(&volume.host_path)?;
            }
        }
        binds.extend(anonymous);
        let made = spec::make(&spec::Wanted {
            daemon,
            pod: &self.pod,
            container: &self.container,
            image: &self.image,
            bundle: &bundle,
            binds,
        })?;
        write_config(&bundle, &made.json)?;
        fail::blocking_point("create_container.after_bundle")?;
        for warning in &made.warnings {
            tracing::warn!(container = %id, warning, "not everything the container asked for could be had");
        }
        Ok(Made {
            image_id: self.image.id.to_string(),
            image_name: image_name(&self.container.record().config.image, &self.image),
            image_ref: self
                .image
                .repo_digests
                .first()
                .cloned()
                .unwrap_or_else(|| self.image.id.to_string()),
            log_path,
            stop_signal: made.stop_signal,
            uid: made.user.uid,
            gid: made.user.gid,
            supplemental_groups: made.user.additional_gids,
            pid: 0,
            warnings: made.warnings,
        })
    }

    /// The pod's user namespace, when it has one of its own.
    fn user_namespace(&self) -> Result<Option<OwnUsers>, Error> {
        let pod = &self.pod;
        let Some(user) = &pod.record().config.namespaces.user else {
            return Ok(None);
        };
        let root = |maps: &[slipway_spec::IdMap]| {
            let map = maps.iter().find(|map| map.container == 0);
            map.map(|map| map.host).ok_or_else(|| {
                Error::invalid(
                    "namespace_options.userns_options",
                    "root of the container is not mapped",
                )
            })
        };
        Ok(Some(OwnUsers {
            path: pod.namespace(&self.daemon, "user"),
            uid: root(&user.uids)?,
            gid: root(&user.gids)?,
        }))
    }

    /// A writable snapshot on the image's layers, held by a lease that has the container's name.
    fn prepare_snapshot(&self) -> Result<slipway_image::Active, Error> {
        let id = self.container.id().as_str();
        let lease = self
            .daemon
            .store
            .persistent_lease(id)
            .map_err(Error::store("make a container's lease"))?;
        self.daemon
            .store
            .prepare(id, self.image.chain.as_ref(), &lease)
            .map_err(Error::store("prepare a container's snapshot"))
    }

    /// The log file's path, its directory made.
    fn make_log_directory(&self) -> Result<Option<std::path::PathBuf>, Error> {
        let logs = self.pod.record().config.log_directory.as_ref();
        let (Some(logs), Some(path)) = (logs, &self.container.record().config.log_path) else {
            return Ok(None);
        };
        let path = logs.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        Ok(Some(path))
    }
}

/// A pod's user namespace and who its root is on the host.
struct OwnUsers {
    path: std::path::PathBuf,
    uid: u32,
    gid: u32,
}

impl OwnUsers {
    /// Gives a directory that is the host's root's to the pod's.
    fn own(&self, dir: &std::path::Path) -> Result<(), Error> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = dir.symlink_metadata().map_err(Error::io("look at", dir))?;
        let mine = |id: u32, root: u32| if id == 0 { Some(root) } else { None };
        std::os::unix::fs::lchown(dir, mine(meta.uid(), self.uid), mine(meta.gid(), self.gid))
            .map_err(Error::io("change the owner of", dir))
    }
}

/// What people call the image: what the user said, else the name asked for, else a name of the id asked for.
fn image_name(asked: &ImageSpec, image: &Image) -> String {
    if !asked.user_specified_image.is_empty() {
        return asked.user_specified_image.clone();
    }
    let digits = asked.image.trim_start_matches("sha256:");
    let by_id = digits.len() >= 12
        && image
            .id
            .to_string()
            .trim_start_matches("sha256:")
            .starts_with(digits);
    match image.names.first().filter(|_| by_id) {
        Some(name) => name.to_string(),
        None => asked.image.clone(),
    }
}

fn write_config(bundle: &Bundle, json: &[u8]) -> Result<(), Error> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = bundle.config();
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(json))
        .map_err(Error::io("write", path))
}

fn request(daemon: &Daemon, container: &Container, made: &Made) -> CreateContainer {
    let config = &container.record().config;
    CreateContainer {
        id: container.id().to_string(),
        bundle: daemon.bundle(container.id()).path().to_owned(),
        stdin: match (config.stdin, config.stdin_once) {
            (false, _) => Stdin::Null,
            (true, false) => Stdin::Keep,
            (true, true) => Stdin::KeepOnce,
        },
        stdout: made.log_path.clone().map_or(Output::Discard, Output::CriLog),
        terminal: config.tty,
        pid_target: match config.security.as_ref().map(|security| &security.pid) {
            Some(PidNamespace::Target(target)) => Some(target.clone()),
            _ => None,
        },
    }
}
