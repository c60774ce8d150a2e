//! `shim.json`: what the shim's death must not make anyone forget. Written before each effect outside the shim, by rename,
//! so that it is always whole; `cleanup` reads it when the shim is gone.
//!
//! ```text
//! <state-dir>/shim.json      this
//! <state-dir>/shim.sock      where the shim listens
//! <state-dir>/shim.log       what it says about itself
//! <state-dir>/ns/<kind>      the pod's namespaces, pinned
//! <bundle>/state             the worker's own record of a container
//! ```

use crate::spec::GIVEN_BACK;
use serde::{Deserialize, Serialize};
use slipway_sys::cgroup::Cgroup;
use std::io;
use std::path::{Path, PathBuf};

/// Written into every record; another number is refused.
pub const VERSION: u32 = 1;

/// A record that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system does not let us.
    #[error("{act} {}", path.display())]
    Io {
        /// What was attempted.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// It is no record.
    #[error("decode {}", path.display())]
    Decode {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It is of a shim whose records this one does not know.
    #[error("{} has version {version}, and this program knows version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
}

/// A process, so that another one with its pid is not mistaken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// On the host.
    pub pid: u32,
    /// In clock ticks since boot.
    pub start_time: u64,
}

impl Identity {
    /// Of a process that runs; the start time is 0 when it cannot be read.
    pub fn of(pid: u32) -> Identity {
        Identity {
            pid,
            start_time: slipway_sys::process::start_time(pid).unwrap_or(0),
        }
    }

    /// Whether that process is there still (or is dead and not yet reaped).
    pub fn exists(&self) -> bool {
        slipway_sys::process::start_time(self.pid).is_ok_and(|t| t == self.start_time)
    }
}

/// How a container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 128 + signal when killed by one.
    pub code: u32,
    /// In nanoseconds since 1970.
    pub at_ns: i64,
    /// The kernel killed something of it for want of memory.
    pub oom_killed: bool,
    /// Its init's pid when it had one.
    pub pid: u32,
}

/// A container, as far as cleaning up needs it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerRecord<C> {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its cgroup.
    pub cgroup: C,
    /// The shim mounted bundle/rootfs.
    pub rootfs_mounted: bool,
    /// Its init's pid; 0: none yet.
    pub pid: u32,
    /// How it ended, when it has.
    pub exit: Option<Exit>,
    /// Why it could not be created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A cgroup that may or may not have been made here.
#[derive(Debug, Serialize, Deserialize)]
pub struct PodCgroup<C> {
    /// It.
    pub cgroup: C,
    /// Made here, so removed here.
    pub made: bool,
}

/// The whole of it. `C` is [`Cgroup`] when read and a reference when written.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record<C> {
    /// [`VERSION`]
    pub version: u32,
    /// Another boot means that no process here is ours.
    pub boot_id: String,
    /// The shim itself.
    pub shim: Identity,
    /// The pod; empty under containerd.
    pub pod_id: String,
    /// Where its namespaces are pinned, by kind.
    pub namespaces: Vec<(String, PathBuf)>,
    /// The pod's cgroup.
    pub pod_cgroup: Option<PodCgroup<C>>,
    /// The built-in init's cgroup.
    pub init_cgroup: Option<C>,
    /// The containers.
    pub containers: Vec<ContainerRecord<C>>,
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("shim.json")
}

impl Record<&Cgroup> {
    /// Replaces the record in a state directory.
    ///
    /// # Errors
    /// [`RecordError::Io`]; the old one stays.
    pub fn write(&self, state_dir: &Path) -> Result<(), RecordError> {
        let path = path(state_dir);
        let new = state_dir.join("shim.json.new");
        // Of a size that the allocator gives back: this is written often, and read after the shim's death only.
        let mut text = Vec::with_capacity(GIVEN_BACK);
        serde_json::to_writer(&mut text, self).map_err(|e| RecordError::Io {
            act: "encode",
            path: path.clone(),
            source: e.into(),
        })?;
        std::fs::write(&new, text).map_err(|source| RecordError::Io {
            act: "write",
            path: new.clone(),
            source,
        })?;
        std::fs::rename(&new, &path).map_err(|source| RecordError::Io {
            act: "replace",
            path,
            source,
        })
    }
}

impl Record<Cgroup> {
    /// Reads the record in a state directory; `None` when there is none: the shim did nothing yet.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(state_dir: &Path) -> Result<Option<Record<Cgroup>>, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let path = path(state_dir);
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RecordError::Io {
                    act: "read",
                    path,
                    source,
                });
            }
            Ok(text) => text,
        };
        let decode = |source| RecordError::Decode {
            path: path.clone(),
            source,
        };
        let Version { version } = serde_json::from_slice(&text).map_err(decode)?;
        if version != VERSION {
            return Err(RecordError::Version { path, version });
        }
        serde_json::from_slice(&text).map(Some).map_err(decode)
    }

    /// The same, to be written.
    pub fn as_ref(&self) -> Record<&Cgroup> {
        Record {
            version: self.version,
            boot_id: self.boot_id.clone(),
            shim: self.shim,
            pod_id: self.pod_id.clone(),
            namespaces: self.namespaces.clone(),
            pod_cgroup: self.pod_cgroup.as_ref().map(|p| PodCgroup {
                cgroup: &p.cgroup,
                made: p.made,
            }),
            init_cgroup: self.init_cgroup.as_ref(),
            containers: self
                .containers
                .iter()
                .map(|c| ContainerRecord {
                    id: c.id.clone(),
                    bundle: c.bundle.clone(),
                    cgroup: &c.cgroup,
                    rootfs_mounted: c.rootfs_mounted,
                    pid: c.pid,
                    exit: c.exit,
                    failure: c.failure.clone(),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_sys::cgroup::{CgroupPath, Layout};

    #[test]
    fn what_is_written_is_read_again_and_another_version_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(Record::read(dir.path()).expect("nothing there").is_none());
        let layout = Layout::at(&[("cpu", Path::new("/sys/fs/cgroup/cpu"))], None);
        let cgroup = Cgroup::open(&layout, &CgroupPath::Fs("/slipway-test/none".into())).expect("a path");
        let mut record = Record {
            version: VERSION,
            boot_id: "b".into(),
            shim: Identity::of(std::process::id()),
            pod_id: "p".into(),
            namespaces: vec![("net".into(), "/x/net".into())],
            pod_cgroup: Some(PodCgroup {
                cgroup: &cgroup,
                made: true,
            }),
            init_cgroup: None,
            containers: vec![ContainerRecord {
                id: "c".into(),
                bundle: "/b".into(),
                cgroup: &cgroup,
                rootfs_mounted: false,
                pid: 7,
                exit: Some(Exit {
                    code: 137,
                    at_ns: 5,
                    oom_killed: true,
                    pid: 7,
                }),
                failure: None,
            }],
        };
        record.write(dir.path()).expect("written");
        let read = Record::read(dir.path()).expect("read").expect("there");
        assert_eq!(read.containers[0].exit.map(|e| e.code), Some(137));
        assert_eq!(read.containers[0].cgroup.path(), cgroup.path());
        assert!(read.shim.exists());
        record.version = VERSION + 1;
        record.write(dir.path()).expect("written");
        assert!(matches!(
            Record::read(dir.path()),
            Err(RecordError::Version { .. })
        ));
    }
}
