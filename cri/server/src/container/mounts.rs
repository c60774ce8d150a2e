//! The mounts a container asks for: their sources found, made where the configuration says so, image volumes mounted.
//!
//! A host path that is missing is an error, as the CRI says; `runtime.create_missing_mount_sources` makes a directory of
//! it instead, as containerd does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use slipway_spec::Propagation;

use super::Container;
use super::bundle::Bundle;
use crate::daemon::Daemon;
use crate::error::Error;
use crate::model::{ImageSpec, Mount, MountSource};

/// How long looking at a container's host paths may take, one that waits for a thread included.
const HOST_PATHS: Duration = Duration::from_secs(10);

/// The real paths of a container's host mounts, in their order.
#[derive(Debug, Default)]
pub struct HostSources(Vec<PathBuf>);

/// Finds the host paths that a container asks for. Any of them may be on a file system that answers no more: what hangs
/// holds one of a few threads, and the verb is told.
///
/// # Errors
/// [`Error::MountSourceMissing`]; [`Error::Timeout`] naming the path that does not answer.
pub async fn host_sources(daemon: &Daemon, container: &Container) -> Result<HostSources, Error> {
    let mut asked = Vec::new();
    for mount in &container.record().config.mounts {
        if let MountSource::Host(path) = &mount.source {
            asked.push((path.clone(), mount.container_path.clone()));
        }
    }
    if asked.is_empty() {
        return Ok(HostSources::default());
    }
    let create_missing = daemon.config.runtime.create_missing_mount_sources;
    let asked = Arc::new(asked);
    let at = Arc::new(AtomicUsize::new(usize::MAX));
    let (paths, counter) = (asked.clone(), at.clone());
    let looked = async {
        let turn = daemon.host_paths.clone().acquire_owned().await;
        crate::blocking::run(move || {
            let _turn = turn;
            let look = |(n, (path, target)): (usize, &(PathBuf, String))| {
                counter.store(n, Ordering::Relaxed);
                host_source(path, target, create_missing)
            };
            paths.iter().enumerate().map(look).collect::<Result<_, _>>()
        })
        .await
    };
    let Ok(found) = tokio::time::timeout(HOST_PATHS, looked).await else {
        let (what, path) = match asked.get(at.load(Ordering::Relaxed)) {
            Some((path, _)) => ("answer", path),
            None => (
                "be looked at: others that do not answer are in the way",
                &asked[0].0,
            ),
        };
        return Err(Error::Timeout {
            kind: "the mount source",
            id: path.display().to_string(),
            what,
            timeout: HOST_PATHS,
        });
    };
    found.map(HostSources)
}

/// The container's mounts with sources that exist.
pub fn resolve(
    daemon: &Daemon,
    container: &Container,
    bundle: &Bundle,
    userns: Option<&Path>,
    sources: HostSources,
) -> Result<Vec<slipway_spec::Mount>, Error> {
    let mut sources = sources.0.into_iter();
    let mut resolved = Vec::new();
    for (number, mount) in container.record().config.mounts.iter().enumerate() {
        let host_path = match &mount.source {
            MountSource::Host(path) => sources.next().unwrap_or_else(|| path.clone()),
            MountSource::Image { image, sub_path } => {
                let target = image_volume(daemon, container, bundle, number, image, userns)?;
                inside(target, image, sub_path)?
            }
        };
        resolved.push(bind(mount, host_path));
    }
    check_propagation(container, &resolved)?;
    Ok(resolved)
}

/// A mount can only propagate from one that does.
fn check_propagation(container: &Container, mounts: &[slipway_spec::Mount]) -> Result<(), Error> {
    const MOUNTINFO: &str = "/proc/self/mountinfo";
    if mounts
        .iter()
        .all(|mount| mount.propagation == Propagation::Private)
    {
        return Ok(());
    }
    // A mount point elsewhere on the node may have any bytes.
    let mountinfo = std::fs::read(MOUNTINFO).map_err(Error::io("read", MOUNTINFO))?;
    slipway_spec::check_propagation(&String::from_utf8_lossy(&mountinfo), mounts)
        .map_err(Error::spec(container.id()))
}

fn bind(mount: &Mount, host_path: PathBuf) -> slipway_spec::Mount {
    let of_image = matches!(mount.source, MountSource::Image { .. });
    slipway_spec::Mount {
        container_path: mount.container_path.clone(),
        host_path,
        // The image's layers are everybody's.
        readonly: mount.readonly || of_image,
        recursive_read_only: mount.recursive_read_only,
        propagation: mount.propagation,
        uid_mappings: mount.uid_mappings.clone(),
        gid_mappings: mount.gid_mappings.clone(),
        options: mount.options.clone(),
    }
}

/// The source with its symbolic links resolved: what is mounted is what was looked at.
fn host_source(path: &Path, container_path: &str, create_missing: bool) -> Result<PathBuf, Error> {
    match std::fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && create_missing => {
            std::fs::create_dir_all(path).map_err(Error::io("create the mount source", path))?;
            Ok(path.to_owned())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::MountSourceMissing {
            host_path: path.to_owned(),
            container_path: container_path.to_owned(),
        }),
        Err(error) => Err(Error::io("resolve the mount source", path)(error)),
    }
}

/// Mounts an image read-only in the bundle.
fn image_volume(
    daemon: &Daemon,
    container: &Container,
    bundle: &Bundle,
    number: usize,
    image: &ImageSpec,
    userns: Option<&Path>,
) -> Result<PathBuf, Error> {
    let store = &daemon.store;
    let found = store
        .resolve(&image.image)
        .map_err(Error::store("look an image up"))?
        .ok_or_else(|| Error::ImageMissing {
            name: image.image.clone(),
        })?;
    let id = container.id().as_str();
    let lease = store
        .persistent_lease(id)
        .map_err(Error::store("make a container's lease"))?;
    let view = store
        .view(&format!("{id}-volume-{number}"), found.chain.as_ref(), &lease)
        .map_err(Error::store("make a view of an image"))?;
    bundle.mount_volume(number, &view.mount, userns)
}

/// Finds the directory asked for in a mounted image, without leaving it.
fn inside(target: PathBuf, image: &ImageSpec, sub_path: &str) -> Result<PathBuf, Error> {
    if sub_path.is_empty() {
        return Ok(target);
    }
    let root = slipway_snapshot::Root::open(&target).map_err(Error::io("open", &target))?;
    let inside = root.resolve(Path::new(sub_path)).map_err(|error| {
        Error::invalid(
            "config.mounts.image_sub_path",
            format!("{sub_path:?} in image {:?}: {error}", image.image),
        )
    })?;
    Ok(target.join(inside.strip_prefix("/").unwrap_or(&inside)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_source_is_an_error_unless_the_configuration_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("a/b");
        let error = host_source(&missing, "/data", false).unwrap_err().to_string();
        assert!(error.contains("a/b") && error.contains("/data"), "{error}");
        assert!(!missing.exists());
        assert_eq!(host_source(&missing, "/data", true).unwrap(), missing);
        assert!(missing.is_dir());
    }

    #[test]
    fn a_source_that_is_a_link_is_mounted_as_what_it_leads_to() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
        assert_eq!(host_source(&dir.path().join("link"), "/x", false).unwrap(), real);
    }
}
