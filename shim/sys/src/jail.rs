//! A program of the host, run on a tree that it must not trust.
//!
//! The tree is all it sees: it is the program's root, with nothing in /proc, /sys and /dev. It has a mount, network, IPC, UTS
//! and PID namespace of its own, no environment, no capability but those to pass over file permissions, and cannot gain any.
//! What the program is for, is the caller's business.

use crate::error::failed;
use crate::exec::{CapSets, Capabilities};
use crate::fork::{self, FdPlan, Report, Stage, Sys};
use crate::process::{self, Exited};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

/// What its capabilities let it do: read and write files whoever owns them.
const CAPABILITIES: [&str; 2] = ["CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"];
/// Directories of the tree that are covered by an empty one.
const COVERED: [&std::ffi::CStr; 3] = [c"/proc", c"/sys", c"/dev"];

/// Runs the host's `program` with `root` as its root directory, which must be a mount point, and waits for its end. Its
/// stderr is ours, and it dies with us.
///
/// The calling process has namespaces of its own for network, IPC, host name and its further children's PIDs afterwards: it
/// can do this once.
///
/// # Errors
/// What the calls say, naming the program and the stage that failed.
pub fn run(program: &Path, args: &[&OsStr], root: &Path) -> io::Result<Exited> {
    let act = || format!("run {} in {}", program.display(), root.display());
    let file = crate::mount::program(program)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root_fd = rustix::fs::openat(CWD, root, flags, Mode::empty()).map_err(failed(act))?;
    let names = CAPABILITIES.map(str::to_owned).to_vec();
    let capabilities = CapSets::parse(&Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..Capabilities::default()
    })
    .map_err(|e| failed(act)(io::Error::other(e)))?;
    let args = fork::CArray::new(args.iter().copied()).map_err(failed(act))?;
    let env = fork::CArray::new(std::iter::empty()).map_err(failed(act))?;
    let null = fork::dev_null().map_err(failed(act))?;
    let (report, theirs) = fork::report_pipe().map_err(failed(act))?;
    let stderr = std::io::stderr();
    let fds = [(stderr.as_fd(), 2), (file.as_fd(), 3)];
    let plan = FdPlan::new(&fds, null.as_fd(), theirs.as_fd()).map_err(failed(act))?;
    let apart = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWPID;
    fork::unshare(apart).map_err(failed(|| format!("{}: get namespaces for it", act())))?;
    let root_number = root_fd.as_raw_fd();
    // SAFETY: the child's closure makes async-signal-safe calls only: it works on what was prepared above.
    let child = unsafe {
        fork::fork(|| {
            let report = Report::of(theirs.as_raw_fd());
            report.check(Stage::Signals, fork::reset_signals());
            // It is the first process of its namespace: nothing else tells it that we are gone.
            let death = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
            report.check(Stage::ParentDeath, death);
            report.check(Stage::Mounts, enter(root_number));
            let report = Report::of(report.check(Stage::Descriptors, plan.apply()));
            fork::umask(0o022);
            report.check(Stage::Capabilities, capabilities.drop_bounding());
            report.check(Stage::Capabilities, capabilities.set());
            report.check(Stage::NoNewPrivileges, fork::no_new_privs());
            report.check(Stage::Descriptors, fork::cloexec(3));
            report.fail(Stage::Exec, fork::execve_file(3, &args, &env))
        })
    }
    .map_err(failed(act))?;
    drop(theirs);
    if let Some(failure) = fork::read_report(report.as_fd(), None).map_err(failed(act))? {
        let _ = process::wait(child.pid);
        return Err(failed(act)(io::Error::from(failure)));
    }
    process::wait(child.pid)
}

/// In the child: leaves the host's tree for the one that the descriptor holds, in a mount namespace of its own.
fn enter(root: RawFd) -> Sys<()> {
    // SAFETY: inherited from the process that forked us, which holds it open.
    rustix::process::fchdir(unsafe { BorrowedFd::borrow_raw(root) })?;
    // The working directory is taken along into the copy of the mounts; a descriptor would not be.
    fork::unshare(libc::CLONE_NEWNS)?;
    rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // Puts the old root on top of the new one, from where it is taken.
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
    fork::chdir(c"/")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    for place in COVERED {
        match rustix::mount::mount(c"none", place, c"tmpfs", flags, None) {
            Ok(()) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
