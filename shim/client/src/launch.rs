//! Starting a shim, finding a running one, and cleaning up after a dead one.
//!
//! The listening socket `<state-dir>/shim.sock` is bound here and is the shim's stdin: it can be connected to before the
//! shim has run its first instruction, and nothing races. The shim starts a session of its own and never reads our
//! environment; what it says goes to `<state-dir>/shim.log`, whose size it bounds.

use crate::connection::Connection;
use crate::{Error, Result, Shim};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::process::Command;

/// How long a fresh shim may take to answer for the first time.
const COME_UP: Duration = Duration::from_secs(10);
/// How long cleaning up may take: cgroups have to become empty.
const CLEAN_UP: Duration = Duration::from_secs(60);
/// The longest path a unix socket's address can hold, its final zero included.
const SUN_PATH: usize = 108;

const SHIM: &str = "containerd-shim-slipway-v1";
const WORKER: &str = "slipway-runc";

/// Where the shim's programs are.
#[derive(Clone, Debug)]
pub struct Launcher {
    /// containerd-shim-slipway-v1
    pub shim: PathBuf,
    /// slipway-runc
    pub worker: PathBuf,
}

/// A container whose shim died, as the clean-up found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadContainer {
    /// Its id.
    pub id: String,
    /// Its exit code: its own when the shim had seen it, else 137.
    pub exit_code: u32,
    /// The kernel killed something of it for want of memory.
    pub oom_killed: bool,
    /// When it ended as far as its shim or the clean-up saw it, in nanoseconds since 1970; 0: not told.
    pub at_ns: i64,
    /// Why it could not be created; empty: it could.
    pub failure: String,
}

impl Launcher {
    /// Finds the programs: those named, else beside this program, in `../libexec/slipway`, and on PATH.
    ///
    /// # Errors
    /// When one is nowhere to be found.
    pub fn find(explicit_shim: Option<&Path>, explicit_worker: Option<&Path>) -> Result<Launcher> {
        Ok(Launcher {
            shim: find(SHIM, explicit_shim)?,
            worker: find(WORKER, explicit_worker)?,
        })
    }

    /// Starts the shim of a pod and waits until it answers. `state_dir` exists and belongs to the pod.
    ///
    /// # Errors
    /// When the socket cannot be made, the program cannot be run, or it does not answer.
    pub async fn start(&self, pod_id: &str, state_dir: &Path) -> Result<Shim> {
        let socket = state_dir.join("shim.sock");
        let listener = listen(state_dir).map_err(|source| Error::Io {
            act: "listen on",
            path: socket.clone(),
            source,
        })?;
        let log_path = state_dir.join("shim.log");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&log_path)
            .map_err(|source| Error::Io {
                act: "open",
                path: log_path.clone(),
                source,
            })?;
        // What runs for as long as the pod does, and forks into its containers, is a copy that nobody can write through.
        let program = slipway_sys::mount::program(&self.shim).map_err(|source| Error::Io {
            act: "open",
            path: self.shim.clone(),
            source,
        })?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .arg0(&self.shim)
            .args(["pod".as_ref(), "--id".as_ref(), OsStr::new(pod_id)])
            .args(["--state-dir".as_ref(), state_dir.as_os_str()])
            .args(["--worker".as_ref(), self.worker.as_os_str()])
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            .kill_on_drop(false);
        let mut child = command.spawn().map_err(|source| Error::Io {
            act: "run",
            path: self.shim.clone(),
            source,
        })?;
        // The command holds a copy of the listening socket: while it lives, a dead shim would look busy, not gone.
        drop(command);
        let asked = tokio::time::timeout(COME_UP, async {
            let shim = self.connect(state_dir).await?;
            shim.info().await?;
            Ok::<_, Error>(shim)
        });
        let up = tokio::select! {
            up = asked => up,
            ended = child.wait() => {
                let how = ended.map_or_else(|e| e.to_string(), |status| status.to_string());
                return Err(Error::Spawn { pod: pod_id.to_owned(), why: format!("{how}; {}", last_words(&log_path)) });
            }
        };
        match up {
            Ok(Ok(shim)) => {
                tokio::spawn(async move { child.wait().await });
                Ok(shim)
            }
            failed => {
                let _ = child.kill().await;
                let why = match failed {
                    Ok(Err(error)) => format!("{error}; {}", last_words(&log_path)),
                    _ => format!("no answer within {COME_UP:?}; {}", last_words(&log_path)),
                };
                Err(Error::Spawn {
                    pod: pod_id.to_owned(),
                    why,
                })
            }
        }
    }

    /// Connects to the running shim of a pod.
    ///
    /// # Errors
    /// `Gone` when nobody listens.
    pub async fn connect(&self, state_dir: &Path) -> Result<Shim> {
        let (_dir, address) = address(state_dir).map_err(|source| Error::Io {
            act: "open",
            path: state_dir.to_owned(),
            source,
        })?;
        match UnixStream::connect(&address).await {
            Ok(stream) => Ok(Shim::new(Connection::new(stream))),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(Error::Gone)
            }
            Err(source) => Err(Error::Io {
                act: "connect to",
                path: state_dir.join("shim.sock"),
                source,
            }),
        }
    }

    /// Cleans up after a shim that is dead: kills what it left, waits until it is gone, unmounts and unpins. The network
    /// namespace and the pod's cgroup stay, unless `all`. Idempotent.
    ///
    /// # Errors
    /// When something would not go.
    pub async fn cleanup(&self, state_dir: &Path, all: bool) -> Result<Vec<DeadContainer>> {
        let failed = |why: String| Error::Cleanup {
            state_dir: state_dir.to_owned(),
            why,
        };
        let mut command = Command::new(&self.shim);
        command
            .args(["cleanup".as_ref(), "--state-dir".as_ref(), state_dir.as_os_str()])
            .args(all.then_some("--all"))
            .env_clear()
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(CLEAN_UP, command.output())
            .await
            .map_err(|_| failed(format!("not done within {CLEAN_UP:?}")))?
            .map_err(|source| Error::Io {
                act: "run",
                path: self.shim.clone(),
                source,
            })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("{}: {}", output.status, said.trim())));
        }
        dead_containers(&output.stdout)
            .ok_or_else(|| failed("its report is not what it should be".to_owned()))
    }
}

fn dead_containers(report: &[u8]) -> Option<Vec<DeadContainer>> {
    let report: serde_json::Value = serde_json::from_slice(report).ok()?;
    let dead = |c: &serde_json::Value| {
        Some(DeadContainer {
            id: c.get("id")?.as_str()?.to_owned(),
            exit_code: u32::try_from(c.get("exit_code")?.as_u64()?).ok()?,
            oom_killed: c
                .get("oom_killed")
                .and_then(serde_json::Value::as_bool)
                .unwrap_or(false),
            at_ns: c.get("at_ns").and_then(serde_json::Value::as_i64).unwrap_or(0),
            failure: c
                .get("failure")
                .and_then(serde_json::Value::as_str)
                .unwrap_or_default()
                .to_owned(),
        })
    };
    report.get("containers")?.as_array()?.iter().map(dead).collect()
}

fn find(program: &'static str, explicit: Option<&Path>) -> Result<PathBuf> {
    let mut looked = Vec::new();
    if let Some(path) = explicit {
        looked.push(path.to_owned());
    } else {
        if let Ok(own) = std::env::current_exe()
            && let Some(dir) = own.parent()
        {
            looked.push(dir.join(program));
            looked.push(dir.join("../libexec/slipway").join(program));
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        looked.extend(
            std::env::split_paths(&path)
                .filter(|d| d.is_absolute())
                .map(|d| d.join(program)),
        );
    }
    let runnable =
        |p: &PathBuf| std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    match looked.iter().find(|p| runnable(p)) {
        Some(found) => std::path::absolute(found).map_err(|source| Error::Io {
            act: "resolve",
            path: found.clone(),
            source,
        }),
        None => Err(Error::NotInstalled { program, looked }),
    }
}

/// The socket's address: its path, or a short way to it through an open directory when the path is too long for one.
/// The directory has to stay open while the address is used.
fn address(state_dir: &Path) -> io::Result<(Option<OwnedFd>, PathBuf)> {
    use rustix::fs::{Mode, OFlags};
    let socket = state_dir.join("shim.sock");
    if socket.as_os_str().len() < SUN_PATH {
        return Ok((None, socket));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(state_dir, flags, Mode::empty())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/shim.sock", dir.as_raw_fd()));
    Ok((Some(dir), short))
}

fn listen(state_dir: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let (_dir, address) = address(state_dir)?;
    match std::fs::remove_file(&address) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(&address)?;
    // The directory is 0700; this is for one that is not.
    std::fs::set_permissions(&address, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The end of what the shim wrote before it died.
fn last_words(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(1024)..];
    let said = String::from_utf8_lossy(tail).trim().to_owned();
    if said.is_empty() {
        "it said nothing".to_owned()
    } else {
        said
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_a_clean_up_names_the_dead() {
        let report =
            br#"{"containers":[{"id":"a","exit_code":137,"oom_killed":true,"at_ns":7},{"id":"b","exit_code":0,"failure":"no"}]}"#;
        let dead = dead_containers(report).expect("a report");
        assert_eq!(
            dead[0],
            DeadContainer {
                id: "a".into(),
                exit_code: 137,
                oom_killed: true,
                at_ns: 7,
                failure: String::new(),
            }
        );
        assert_eq!(
            dead[1],
            DeadContainer {
                id: "b".into(),
                exit_code: 0,
                oom_killed: false,
                at_ns: 0,
                failure: "no".into(),
            }
        );
        assert!(dead_containers(b"{}").is_none());
    }

    #[test]
    fn a_program_named_and_missing_is_an_error_that_says_where() {
        let error = find(SHIM, Some(Path::new("/nonexistent/shim"))).expect_err("nothing there");
        assert!(error.to_string().contains("/nonexistent/shim"), "{error}");
    }

    #[test]
    fn a_socket_can_be_bound_under_a_path_too_long_for_an_address() {
        let top = tempfile::tempdir().expect("a directory");
        let deep = top.path().join("d".repeat(90)).join("e".repeat(90));
        std::fs::create_dir_all(&deep).expect("made");
        let _listener = listen(&deep).expect("bound");
        assert!(deep.join("shim.sock").exists());
    }

    #[tokio::test]
    async fn a_socket_nobody_listens_on_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let launcher = Launcher {
            shim: "/nonexistent".into(),
            worker: "/nonexistent".into(),
        };
        assert!(matches!(launcher.connect(dir.path()).await, Err(Error::Gone)));
        drop(listen(dir.path()).expect("bound"));
        assert!(matches!(launcher.connect(dir.path()).await, Err(Error::Gone)));
    }
}
