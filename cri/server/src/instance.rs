//! One slipwayd per root and per state directory: the directories, their modes, and the locks that say who holds them.
//!
//! ```text
//! <root>/  0700   slipwayd.lock   flock held as long as we live; says our pid and socket for whoever finds it taken
//! <state>/ 0700   slipwayd.lock   the same: two instances sharing one would sweep each other's pods away
//!                 slipwayd.sock   0660
//!                 fault/          0700; fault.sock 0600
//!                 pods/ containers/
//! ```
//! It refuses to know what lies in the directories.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt as _, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::config::Config;

const LOCK_FILE: &str = "slipwayd.lock";

/// Why this instance cannot have its directories.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("cannot make {} a directory of mode 0700", path.display())]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("cannot lock {}", path.display())]
    Lock { path: PathBuf, source: std::io::Error },
    #[error("another slipwayd ({holder}) already runs on {}: one instance per root and per state directory", dir.display())]
    Held { dir: PathBuf, holder: String },
    #[error("cannot listen on {}", path.display())]
    Listen { path: PathBuf, source: std::io::Error },
}

/// The directories of this instance, held by their locks until dropped.
#[derive(Debug)]
pub struct Instance {
    _root: File,
    _state: File,
    paths: Paths,
}

/// Where things lie; names only.
#[derive(Debug, Clone)]
pub struct Paths {
    pub root: PathBuf,
    pub state: PathBuf,
    /// Each pod's shim, namespaces, files.
    pub pods: PathBuf,
    /// Each container's bundle.
    pub containers: PathBuf,
    /// Anonymous volumes of containers; on the root, they may be large.
    pub volumes: PathBuf,
}

impl Instance {
    /// Makes the directories and takes both locks.
    ///
    /// # Errors
    /// [`InstanceError::Held`] names the process that has them.
    pub fn acquire(config: &Config) -> Result<Instance, InstanceError> {
        for dir in [&config.root, &config.state] {
            private_dir(dir)?;
        }
        let root = lock(&config.root, &config.socket)?;
        let state = lock(&config.state, &config.socket)?;
        let paths = Paths {
            root: config.root.clone(),
            state: config.state.clone(),
            pods: config.state.join("pods"),
            containers: config.state.join("containers"),
            volumes: config.root.join("volumes"),
        };
        for dir in [&paths.pods, &paths.containers, &paths.volumes] {
            private_dir(dir)?;
        }
        Ok(Instance {
            _root: root,
            _state: state,
            paths,
        })
    }

    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Listens on the CRI socket, 0660. A socket left by a dead instance is replaced: we hold the lock. One that was `kept` is
    /// listened on further, with those who wait there.
    pub fn listen(&self, socket: &Path, kept: Option<UnixListener>) -> Result<UnixListener, InstanceError> {
        let Some(kept) = kept else {
            return listen(socket, 0o755, 0o660);
        };
        kept.set_nonblocking(true)
            .map_err(|source| InstanceError::Listen {
                path: socket.to_owned(),
                source,
            })?;
        Ok(kept)
    }

    /// Listens on the socket of faults, 0600; its directory is made for root alone where it is not there.
    pub fn listen_for_faults(&self, socket: &Path) -> Result<UnixListener, InstanceError> {
        listen(socket, 0o700, 0o600)
    }
}

/// A listening socket of that mode, in a directory of that mode where there is none yet.
fn listen(socket: &Path, dir_mode: u32, mode: u32) -> Result<UnixListener, InstanceError> {
    let failed = |source| InstanceError::Listen {
        path: socket.to_owned(),
        source,
    };
    if let Some(parent) = socket.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(dir_mode)
            .create(parent)
            .map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(failed(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            "somebody else answers there, on another root",
        )));
    }
    remove_socket(socket).map_err(failed)?;
    let listener = UnixListener::bind(socket).map_err(failed)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Removes a socket file, if there is one. Any other file is somebody's.
pub fn remove_socket(path: &Path) -> std::io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if there.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(std::io::Error::new(
            std::io::ErrorKind::AlreadyExists,
            "a file that is no socket is there, which is kept: name another path, or move it away",
        )),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a directory of mode 0700, or makes the one that is there so.
fn private_dir(path: &Path) -> Result<(), InstanceError> {
    let failed = |source| InstanceError::Directory {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed)?;
    let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

fn lock(dir: &Path, socket: &Path) -> Result<File, InstanceError> {
    let path = dir.join(LOCK_FILE);
    let failed = |source| InstanceError::Lock {
        path: path.clone(),
        source,
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            (&file).take(4096).read_to_string(&mut holder).map_err(failed)?;
            let holder = if holder.trim().is_empty() {
                "still starting".to_owned()
            } else {
                holder.trim().to_owned()
            };
            return Err(InstanceError::Held {
                dir: dir.to_owned(),
                holder,
            });
        }
        Err(errno) => return Err(failed(errno.into())),
    }
    let text = format!("pid {}, socket {}\n", std::process::id(), socket.display());
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(text.as_bytes()))
        .map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Flags;

    fn config(root: &Path, state: &Path) -> Config {
        Config::load(&Flags {
            config: Some("/dev/null".into()),
            root: Some(root.to_owned()),
            state: Some(state.to_owned()),
            ..Flags::default()
        })
        .unwrap()
    }

    #[test]
    fn a_second_instance_is_refused_by_the_holders_pid_and_socket() {
        let dir = tempfile::tempdir().unwrap();
        let first = config(&dir.path().join("root"), &dir.path().join("state"));
        let held = Instance::acquire(&first).unwrap();
        let error = Instance::acquire(&first).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(error.contains("slipwayd.sock"), "{error}");

        let same_state = config(&dir.path().join("other"), &dir.path().join("state"));
        assert!(matches!(
            Instance::acquire(&same_state),
            Err(InstanceError::Held { .. })
        ));
        drop(held);
        Instance::acquire(&first).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_not_replaced_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let instance =
            Instance::acquire(&config(&dir.path().join("root"), &dir.path().join("state"))).unwrap();
        let file = dir.path().join("precious");
        std::fs::write(&file, "precious").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            let error = instance.listen(path, None).unwrap_err();
            let why = std::error::Error::source(&error).unwrap().to_string();
            assert!(why.contains("no socket"), "{why}");
        }
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "precious");
        let socket = dir.path().join("socket");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        instance.listen(&socket, None).unwrap();
    }

    #[test]
    fn instances_with_different_directories_run_side_by_side() {
        let dir = tempfile::tempdir().unwrap();
        let one = Instance::acquire(&config(&dir.path().join("r1"), &dir.path().join("s1"))).unwrap();
        let two = Instance::acquire(&config(&dir.path().join("r2"), &dir.path().join("s2"))).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&one.paths().root), 0o700);
        assert_eq!(mode(&two.paths().pods), 0o700);
        let socket = two.paths().state.join("slipwayd.sock");
        let listener = two.listen(&socket, None).unwrap();
        assert_eq!(mode(&socket), 0o660);
        assert!(matches!(
            one.listen(&socket, None),
            Err(InstanceError::Listen { .. })
        ));
        drop(listener);
        one.listen(&socket, None).unwrap();
    }
    #[test]
    fn who_waits_at_a_kept_socket_is_served_by_the_next_instance() {
        use std::io::{Read as _, Write as _};
        let dir = tempfile::tempdir().unwrap();
        let instance = Instance::acquire(&config(&dir.path().join("r"), &dir.path().join("s"))).unwrap();
        let socket = instance.paths().state.join("slipwayd.sock");
        let first = instance.listen(&socket, None).unwrap();
        // As systemd has it.
        let kept = first.try_clone().unwrap();
        drop(first);
        let mut client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let next = instance.listen(&socket, Some(kept.try_clone().unwrap())).unwrap();
        next.accept().unwrap().0.write_all(b"at last").unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "at last");
    }
}
