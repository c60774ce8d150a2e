//! Hearing of the OOM killer: v1 by an eventfd registered with the memory controller, v2 by inotify on `memory.events`.

use super::{Cgroup, CgroupError, Result, stats};
use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Becomes readable when the OOM killer has been at work in the cgroup, and when the cgroup goes away.
#[derive(Debug)]
pub struct OomWatch {
    event: OwnedFd,
    early: bool,
    /// v1 keeps the registration as long as the event descriptor; the control file may be closed.
    seen: u64,
    /// v2: where it is, and how many were killed below its parent when it was last looked at.
    dir: Option<PathBuf>,
    seen_above: u64,
    /// There was an event: the cgroup has come up against a limit.
    wanted: bool,
}

impl OomWatch {
    pub(crate) fn new(cgroup: &Cgroup) -> Result<OomWatch> {
        let event = match (cgroup.v1("memory"), cgroup.v2()) {
            (Some(dir), _) => eventfd_v1(dir),
            (None, Some(dir)) => inotify_v2(dir),
            (None, None) => Err(io::ErrorKind::Unsupported.into()),
        };
        let act = || format!("watch cgroup {} for the OOM killer", cgroup.path().display());
        let event = event.map_err(|source| CgroupError::Io { act: act(), source })?;
        Ok(OomWatch {
            event,
            early: cgroup.v1("memory").is_some(),
            seen: stats::oom_kills(cgroup),
            seen_above: above(cgroup.v2()),
            dir: cgroup.v2().map(Path::to_owned),
            wanted: false,
        })
    }

    /// Whether the event comes before the killing is counted (v1), so that one has to look again.
    pub fn is_early(&self) -> bool {
        self.early
    }

    /// Takes note of the event, so that the descriptor is quiet again, and returns how many processes were killed
    /// since the last time (0 when it was for another reason; also once the cgroup is gone).
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn take(&mut self, cgroup: &Cgroup) -> io::Result<u64> {
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::io::read(&self.event, &mut buffer) {
                Ok(n) if n == buffer.len() => self.wanted = true,
                Ok(_) => {
                    self.wanted = true;
                    break;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let now = stats::oom_kills(cgroup).max(self.seen);
        let fresh = now - self.seen;
        self.seen = now;
        if self.dir.as_deref().is_some_and(Path::exists) {
            self.seen_above = above(self.dir.as_deref());
        }
        Ok(fresh)
    }

    /// Whether the cgroup is gone with what it had counted since the last look, which was a killing by all signs: it had come up
    /// against a limit, and its parent, which counts what happens below (cgroups(7), `memory.events`), has counted one since.
    ///
    /// systemd removes a scope as soon as nothing is in it, and the kernel puts off events that follow others within ten
    /// milliseconds: of a process that is killed after a struggle one may hear too late.
    pub fn lost_one(&self) -> bool {
        let gone = self.dir.as_deref().is_some_and(|dir| !dir.exists());
        gone && self.wanted && above(self.dir.as_deref()) > self.seen_above
    }
}

/// How many were killed in all that is below the parent of a directory of v2.
fn above(dir: Option<&Path>) -> u64 {
    dir.and_then(Path::parent)
        .and_then(stats::oom_kills_in)
        .unwrap_or(0)
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

fn eventfd_v1(dir: &Path) -> io::Result<OwnedFd> {
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let control = rustix::fs::openat(CWD, dir.join("memory.oom_control"), flags, Mode::empty())?;
    let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    super::write::try_write(&dir.join("cgroup.event_control"), &line)?;
    Ok(event)
}

fn inotify_v2(dir: &Path) -> io::Result<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let event = inotify::init(flags)?;
    inotify::add_watch(&event, dir.join("memory.events"), inotify::WatchFlags::MODIFY)?;
    Ok(event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_killing_is_told_by_the_parent_when_its_cgroup_is_gone() {
        let top = tempfile::tempdir().unwrap();
        let (dir, events) = (top.path().join("scope"), top.path().join("memory.events"));
        let killed = |n: u64| fs::write(&events, format!("low 0\noom 9\noom_kill {n}\n")).unwrap();
        fs::create_dir(&dir).unwrap();
        killed(3);
        let watch = |wanted| OomWatch {
            event: rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            early: false,
            seen: 0,
            seen_above: above(Some(&dir)),
            dir: Some(dir.clone()),
            wanted,
        };
        let (struggled, calm) = (watch(true), watch(false));
        killed(4);
        assert!(!struggled.lost_one(), "it is there to be asked itself");
        fs::remove_dir(&dir).unwrap();
        assert!(struggled.lost_one());
        assert!(!calm.lost_one(), "that was a neighbour");
        assert!(!watch(true).lost_one(), "nothing was killed since");
    }
}
