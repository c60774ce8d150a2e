//! After the shim's death: whatever it left is killed, and seen to be gone, by what its record says. Runs as a program of
//! its own, may wait, and may be run again and again.

use crate::diag::Chain;
use crate::record::{Exit, Record, RecordError};
use crate::worker;
use serde::Serialize;
use slipway_sys::cgroup::{Cgroup, CgroupError};
use slipway_sys::ns;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long all of it may take together: whoever asked for it waits twice as long.
const TIME: Duration = Duration::from_secs(30);
const SIGKILL: i32 = 9;

/// Something that would not go.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// The record is of no use.
    #[error("know what the shim left")]
    Record(#[from] RecordError),
    /// A cgroup does not let go.
    #[error("empty and remove the cgroup of {of}")]
    Cgroup {
        /// Whose.
        of: String,
        /// Why.
        source: CgroupError,
    },
    /// A file, mount or process does not let go.
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

/// A container the shim left.
#[derive(Debug, Serialize)]
pub struct Dead {
    /// Its id.
    pub id: String,
    /// Its exit code as the shim saw it, else 137.
    pub exit_code: u32,
    /// The kernel killed something of it for want of memory.
    pub oom_killed: bool,
    /// When it ended, as far as that is known; nanoseconds since 1970.
    pub at_ns: i64,
    /// Its pid; 0: not known.
    pub pid: u32,
    /// Why it could not be created; empty: it could.
    pub failure: String,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// The containers there were.
    pub containers: Vec<Dead>,
}

/// When all of it has to be over. However many things do not let go, they do not add up.
#[derive(Clone, Copy)]
struct Deadline(Instant);

impl Deadline {
    fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Cleans up after the shim of a state directory. The pod's network namespace and cgroup stay, unless `all`.
///
/// # Errors
/// The first thing that would not go, after everything else was tried.
pub fn run(state_dir: &Path, all: bool) -> Result<Report, CleanupError> {
    run_within(state_dir, all, TIME)
}

fn run_within(state_dir: &Path, all: bool, time: Duration) -> Result<Report, CleanupError> {
    let until = Deadline(Instant::now() + time);
    let Some(mut record) = Record::read(state_dir)? else {
        unpin_all(&state_dir.join("ns"), all)?;
        return Ok(Report::default());
    };
    if slipway_sys::process::boot_id().is_ok_and(|boot| boot == record.boot_id) {
        kill_shim(&record, until)?;
        let mut first = None;
        for result in [
            clean_containers(&mut record, until),
            clean_pod(&mut record, all, until),
        ] {
            first = first.or(result.err());
        }
        if let Err(e) = save(&record, state_dir) {
            crate::diag::warning!("{}", Chain(&e));
        }
        if let Some(error) = first {
            return Err(error);
        }
    }
    unpin_all(&state_dir.join("ns"), all)?;
    let dead = |c: &crate::record::ContainerRecord<Cgroup>| {
        let exit = c.exit.unwrap_or(unseen(false, c.pid));
        Dead {
            id: c.id.clone(),
            exit_code: exit.code,
            oom_killed: exit.oom_killed,
            at_ns: exit.at_ns,
            pid: exit.pid,
            failure: c.failure.clone().unwrap_or_default(),
        }
    };
    Ok(Report {
        containers: record.containers.iter().map(dead).collect(),
    })
}

/// An exit that nobody saw.
fn unseen(oom_killed: bool, pid: u32) -> Exit {
    Exit {
        code: 137,
        at_ns: crate::clock::now(),
        oom_killed,
        pid,
    }
}

/// A shim that is not dead but deaf would make containers faster than they can be killed.
fn kill_shim(record: &Record<Cgroup>, until: Deadline) -> Result<(), CleanupError> {
    let failed = |source| CleanupError::Io {
        act: "kill the shim",
        path: format!("{}", record.shim.pid).into(),
        source,
    };
    let Ok(pidfd) = slipway_sys::process::pidfd_open(record.shim.pid) else {
        return Ok(());
    };
    if !record.shim.exists() {
        return Ok(());
    }
    slipway_sys::process::send_signal(pidfd.as_fd(), SIGKILL).map_err(failed)?;
    if slipway_sys::process::wait_ended(pidfd.as_fd(), until.left()).map_err(failed)? {
        Ok(())
    } else {
        Err(failed(io::ErrorKind::TimedOut.into()))
    }
}

fn clean_containers(record: &mut Record<Cgroup>, until: Deadline) -> Result<(), CleanupError> {
    // All are signalled before any is waited for.
    let cgroups = record.containers.iter().map(|c| &c.cgroup);
    for cgroup in cgroups.chain(&record.init_cgroup) {
        let _ = cgroup.kill();
    }
    let mut first = None;
    for container in &mut record.containers {
        let oom_killed = container.cgroup.oom_kills() > 0;
        container
            .exit
            .get_or_insert_with(|| unseen(oom_killed, container.pid));
        let gone = empty_and_remove(&container.cgroup, until, || format!("container {}", container.id));
        first = first.or(gone.err());
        let state = worker::state_dir(&container.bundle);
        let rootfs = container.bundle.join("rootfs");
        let mounted = [Some(&state), container.rootfs_mounted.then_some(&rootfs)];
        for path in mounted.into_iter().flatten() {
            if let Err(source) = slipway_sys::mount::unmount_all(path) {
                first = first.or(Some(CleanupError::Io {
                    act: "unmount",
                    path: path.clone(),
                    source,
                }));
            }
        }
        if let Err(source) = worker::forget(&container.bundle) {
            first.get_or_insert(CleanupError::Io {
                act: "remove",
                path: state,
                source,
            });
        }
    }
    first.map_or(Ok(()), Err)
}

fn empty_and_remove(cgroup: &Cgroup, until: Deadline, of: impl Fn() -> String) -> Result<(), CleanupError> {
    let gone = cgroup
        .wait_empty(until.left())
        .and_then(|()| cgroup.remove(until.left()));
    gone.map_err(|source| CleanupError::Cgroup { of: of(), source })
}

fn clean_pod(record: &mut Record<Cgroup>, all: bool, until: Deadline) -> Result<(), CleanupError> {
    let mut first = None;
    if let Some(cgroup) = &record.init_cgroup {
        match empty_and_remove(cgroup, until, || "the built-in init".to_owned()) {
            Ok(()) => record.init_cgroup = None,
            Err(e) => first = Some(e),
        }
    }
    let stays = |(kind, path): &(String, PathBuf)| {
        (kind == "net" && !all) || {
            let unpinned = ns::unpin(path);
            let failed = unpinned.is_err();
            if let Err(source) = unpinned {
                first.get_or_insert(CleanupError::Io {
                    act: "unpin",
                    path: path.clone(),
                    source,
                });
            }
            failed
        }
    };
    record.namespaces.retain(stays);
    if all && let Some(own) = record.pod_cgroup.take() {
        own.cgroup.give_back();
    }
    first.map_or(Ok(()), Err)
}

/// Pins that no record knows of.
fn unpin_all(dir: &Path, all: bool) -> Result<(), CleanupError> {
    for kind in ns::Kind::ALL {
        if kind != ns::Kind::Net || all {
            let path = dir.join(kind.name());
            ns::unpin(&path).map_err(|source| CleanupError::Io {
                act: "unpin",
                path,
                source,
            })?;
        }
    }
    Ok(())
}

/// Writes down what is left to do, and the exits, so that a second run says the same.
pub fn save(record: &Record<Cgroup>, state_dir: &Path) -> Result<(), RecordError> {
    record.as_ref().write(state_dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{ContainerRecord, Identity, VERSION};
    use slipway_sys::cgroup::{CgroupPath, Layout};

    #[test]
    fn what_does_not_let_go_costs_one_deadline_however_much_of_it_there_is() {
        let dir = tempfile::tempdir().expect("a directory");
        // No cgroup but looks like one, of a process that does not leave it.
        let layout = Layout::at(&[("pids", dir.path())], None);
        let mut process = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .expect("a process");
        let containers = (0..5).map(|n| {
            let id = format!("c{n}");
            let cgroup = Cgroup::open(&layout, &CgroupPath::Fs(Path::new("/").join(&id))).expect("a path");
            let own = dir.path().join(&id);
            std::fs::create_dir(&own).expect("made");
            std::fs::write(own.join("cgroup.procs"), format!("{}\n", process.id())).expect("written");
            ContainerRecord {
                bundle: dir.path().join("bundle"),
                id,
                cgroup,
                rootfs_mounted: false,
                pid: process.id(),
                exit: None,
                failure: None,
            }
        });
        let record = Record {
            version: VERSION,
            boot_id: slipway_sys::process::boot_id().expect("an id"),
            shim: Identity {
                pid: process.id(),
                start_time: 0,
            },
            pod_id: "p".into(),
            namespaces: Vec::new(),
            pod_cgroup: None,
            init_cgroup: None,
            containers: containers.collect(),
        };
        save(&record, dir.path()).expect("saved");
        let began = Instant::now();
        let result = run_within(dir.path(), false, Duration::from_millis(300));
        let took = began.elapsed();
        process.wait().expect("it was killed");
        let error = result.expect_err("the cgroups are not empty");
        assert!(
            matches!(&error, CleanupError::Cgroup { of, .. } if of == "container c0"),
            "{error}"
        );
        assert!(took < Duration::from_millis(1200), "{took:?}");
        let left = Record::read(dir.path()).expect("read").expect("there");
        assert!(
            left.containers
                .iter()
                .all(|c| c.exit.map(|e| e.code) == Some(137)),
            "how they ended is known all the same"
        );
    }
}
