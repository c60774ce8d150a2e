//! Being a shim of containerd's: `start` makes (or finds) the shim of a container's group, `delete` cleans up after a dead
//! one. What the shim does then is the same for everybody.
//!
//! ```text
//! /run/slipway-shim/<hash of containerd's address, namespace and group>/    shim.sock, shim.json
//! ```

use crate::args::Containerd;
use crate::cleanup::{self, CleanupError};
use crate::record::{Record, RecordError};
use crate::spec::{self, SpecError};
use prost::Message;
use serde::Serialize;
use slipway_shim_api::{task, timestamp, types};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

const BASE: &str = "/run/slipway-shim";

/// A container's group: its pod's sandbox under Kubernetes.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Why containerd gets no shim, or no clean-up.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// The bundle is of no use.
    #[error("find the container's group")]
    Spec(#[from] SpecError),
    /// The dead shim's record is of no use.
    #[error("find the dead shim's record")]
    Record(#[from] RecordError),
    /// Something would not go.
    #[error("clean up after the shim")]
    Cleanup(#[from] CleanupError),
    /// A step failed.
    #[error("{act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn io_error(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ContainerdError {
    let path = path.to_owned();
    move |source| ContainerdError::Io { act, path, source }
}

/// What containerd reads from `start`.
#[derive(Serialize)]
struct Bootstrap {
    version: u32,
    address: String,
    protocol: &'static str,
}

/// A short name for what would be too long for a socket's path. Not a secret: only root writes where it is used.
fn hash(parts: [&str; 3]) -> String {
    let fnv = |seed: u64| {
        let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
        bytes.fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    format!(
        "{:016x}{:016x}",
        fnv(0xcbf2_9ce4_8422_2325),
        fnv(0x9ae1_6a3b_2f90_404f)
    )
}

fn group(flags: &Containerd, bundle: &Path) -> Result<String, SpecError> {
    let mut annotations = spec::annotations(bundle)?;
    let named = GROUPS.iter().find_map(|name| annotations.remove(*name));
    Ok(named
        .filter(|group| !group.is_empty())
        .unwrap_or_else(|| flags.id.clone()))
}

fn bundle(flags: &Containerd) -> Result<PathBuf, ContainerdError> {
    if flags.bundle.is_empty() {
        return std::env::current_dir().map_err(io_error("find", Path::new("the working directory")));
    }
    Ok(PathBuf::from(&flags.bundle))
}

/// `start`: prints where the shim of this container's group listens, starting it if need be.
///
/// # Errors
/// When there is none and none can be started.
pub fn start(flags: &Containerd) -> Result<(), ContainerdError> {
    let bundle = bundle(flags)?;
    let group = group(flags, &bundle)?;
    let state_dir = Path::new(BASE).join(hash([&flags.address, &flags.namespace, &group]));
    let socket = state_dir.join("shim.sock");
    let _lock = lock(&state_dir, true)?;
    if UnixStream::connect(&socket).is_err() {
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &socket)(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&socket).map_err(io_error("listen on", &socket))?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .map_err(io_error("protect", &socket))?;
        launch(flags, &group, &state_dir, &bundle, listener)?;
    }
    let bootstrap = Bootstrap {
        version: 3,
        address: format!("unix://{}", socket.display()),
        protocol: "ttrpc",
    };
    let text = serde_json::to_vec(&bootstrap).map_err(|e| io_error("describe", &socket)(e.into()))?;
    crate::print(&text).map_err(io_error("tell containerd of", &socket))
}

/// Takes a group's directory for the time that `start` or `delete` changes it: containerd calls them side by side.
/// `None`: it is not there, and was not to be made.
fn lock(state_dir: &Path, make: bool) -> Result<Option<OwnedFd>, ContainerdError> {
    use rustix::fs::{FlockOperation, Mode, OFlags};
    loop {
        if make {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(state_dir)
                .map_err(io_error("make", state_dir))?;
        }
        let take = || {
            let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let dir = rustix::fs::open(state_dir, flags, Mode::empty())?;
            rustix::fs::flock(&dir, FlockOperation::LockExclusive)?;
            // Whoever had it before may have removed it.
            let same = rustix::fs::fstat(&dir)?.st_ino == rustix::fs::stat(state_dir)?.st_ino;
            Ok::<_, rustix::io::Errno>(same.then_some(dir))
        };
        match take() {
            Ok(Some(dir)) => return Ok(Some(dir)),
            Err(rustix::io::Errno::NOENT) if !make => return Ok(None),
            Ok(None) | Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(io_error("lock", state_dir)(e.into())),
        }
    }
}

fn launch(
    flags: &Containerd,
    group: &str,
    state_dir: &Path,
    bundle: &Path,
    listener: UnixListener,
) -> Result<(), ContainerdError> {
    let own = std::env::current_exe().map_err(io_error("find", Path::new("this program")))?;
    let beside = own.with_file_name("slipway-runc");
    let worker = if beside.exists() {
        beside
    } else {
        PathBuf::from("/usr/libexec/slipway/slipway-runc")
    };
    // containerd reads the fifo `log` of the bundle; its write end holds nothing up.
    let log = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(bundle.join("log"))
        .or_else(|_| {
            let log = state_dir.join("shim.log");
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(log)
        })
        .map_err(io_error("open a log in", state_dir))?;
    let events = std::env::var_os("TTRPC_ADDRESS").unwrap_or_default();
    // As slipwayd starts one: from a copy that nobody can write through.
    let program = slipway_sys::mount::program(&own).map_err(io_error("open", &own))?;
    std::process::Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
        .arg0(&own)
        .args(["pod".as_ref(), "--id".as_ref(), std::ffi::OsStr::new(group)])
        .args(["--state-dir".as_ref(), state_dir.as_os_str()])
        .args(["--worker".as_ref(), worker.as_os_str()])
        .args(["--containerd", &flags.namespace])
        .args(["--log-level", if flags.debug { "debug" } else { "info" }])
        .env_clear()
        .env("TTRPC_ADDRESS", events)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        // Ours is containerd's pipe, which has to end with us.
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .map(drop)
        .map_err(io_error("run", &own))
}

/// `delete`: cleans up after the dead shim of a container, and prints how the container ended.
///
/// # Errors
/// When something would not go.
pub fn delete(flags: &Containerd) -> Result<(), ContainerdError> {
    let bundle = bundle(flags)?;
    // A bundle that is half gone says nothing about its group; then the container is its own.
    let group = group(flags, &bundle).unwrap_or_else(|_| flags.id.clone());
    let state_dir = Path::new(BASE).join(hash([&flags.address, &flags.namespace, &group]));
    let mut response = task::DeleteResponse {
        exit_status: 137,
        exited_at: Some(timestamp(crate::clock::now())),
        ..Default::default()
    };
    let lock = lock(&state_dir, false)?;
    // A live shim takes care of its containers itself: containerd asks after a failed start, too.
    if lock.is_some() && UnixStream::connect(state_dir.join("shim.sock")).is_err() {
        let report = cleanup::run(&state_dir, true)?;
        if let Some(dead) = report.containers.iter().find(|dead| dead.id == flags.id) {
            response.pid = dead.pid;
            response.exit_status = dead.exit_code;
            response.exited_at = Some(timestamp(dead.at_ns));
        }
        forget(&state_dir, &flags.id)?;
    }
    let answer = response.encode_to_vec();
    crate::print(&answer).map_err(io_error("answer containerd about", &bundle))
}

/// Takes a container out of a dead shim's record, and the record away with the last.
fn forget(state_dir: &Path, id: &str) -> Result<(), ContainerdError> {
    let Some(mut record) = Record::read(state_dir)? else {
        return Ok(());
    };
    record.containers.retain(|container| container.id != id);
    if !record.containers.is_empty() {
        return Ok(cleanup::save(&record, state_dir)?);
    }
    slipway_sys::mount::remove_tree(state_dir).map_err(io_error("remove", state_dir))
}

/// `-info`: who this is.
///
/// # Errors
/// When nobody listens.
pub fn info() -> io::Result<()> {
    let version = types::RuntimeVersion {
        version: crate::VERSION.to_owned(),
        revision: String::new(),
    };
    let info = types::RuntimeInfo {
        name: "io.containerd.slipway.v1".to_owned(),
        version: Some(version),
    };
    crate::print(&info.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_one_directory_and_another_group_another() {
        let a = hash(["/run/c.sock", "k8s.io", "pod"]);
        assert_eq!(a, hash(["/run/c.sock", "k8s.io", "pod"]));
        assert_ne!(a, hash(["/run/c.sock", "k8s.iop", "od"]));
        assert_eq!(a.len(), 32);
    }

    #[test]
    fn containers_of_a_sandbox_share_its_group() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#;
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        let flags = Containerd {
            id: "c".into(),
            ..Containerd::default()
        };
        assert_eq!(group(&flags, dir.path()).expect("a group"), "pod");
        std::fs::write(dir.path().join("config.json"), "{}").expect("written");
        assert_eq!(group(&flags, dir.path()).expect("a group"), "c");
    }
}
