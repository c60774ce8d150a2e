//! Hearing of the OOM killer: v1 by an eventfd registered with the memory controller, v2 by inotify on `memory.events`.

use super::{Cgroup, CgroupError, Result, stats};
use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Becomes readable when the OOM killer has been at work in the cgroup, and when the cgroup goes away.
#[derive(Debug)]
pub struct OomWatch {
    event: OwnedFd,
    early: bool,
    /// v1 keeps the registration as long as the event descriptor; the control file may be closed.
    seen: u64,
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
                Ok(n) if n == buffer.len() => {}
                Ok(_) | Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let now = stats::oom_kills(cgroup).max(self.seen);
        let fresh = now - self.seen;
        self.seen = now;
        Ok(fresh)
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

fn eventfd_v1(dir: &std::path::Path) -> io::Result<OwnedFd> {
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let control = rustix::fs::openat(CWD, dir.join("memory.oom_control"), flags, Mode::empty())?;
    let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    super::write::try_write(&dir.join("cgroup.event_control"), &line)?;
    Ok(event)
}

fn inotify_v2(dir: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let event = inotify::init(flags)?;
    inotify::add_watch(&event, dir.join("memory.events"), inotify::WatchFlags::MODIFY)?;
    Ok(event)
}
