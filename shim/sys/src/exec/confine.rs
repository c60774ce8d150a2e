//! Confining the calling process and becoming the container's program: what the container's init does at the end of its
//! way, by the same means as [`super::spawn`]. The caller is in all namespaces, and already the right user, with its
//! permitted capabilities in force; the caller allocates freely.

use super::caps::{CapSets, Limit};
use super::plan::{ExecError, Process};
use super::prepared;
use crate::fork::{self, CArray, Stage, Sys};
use crate::root::Root;
use crate::seccomp::Filter;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::path::Path;

/// A process's confinement, ready to be taken on.
#[derive(Debug, Clone)]
pub struct Confinement {
    process: Process,
    caps: CapSets,
    limits: Vec<Limit>,
    filter: Option<Filter>,
    candidates: Vec<CString>,
    label: Option<Vec<u8>>,
}

/// Has the next execution take on a label. What lies at /proc may be anything an image put there: it is written only when
/// it is the kernel's, and nothing lies on it.
fn set_exec_label(label: &[u8]) -> Sys<()> {
    const PROC: u64 = 0x9fa0;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let proc = rustix::fs::openat(CWD, c"/proc", flags, Mode::empty())?;
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)] // the type differs between libcs
    if rustix::fs::fstatfs(&proc)?.f_type as u64 != PROC {
        return Err(Errno::NODEV);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(
        &proc,
        c"self/attr/exec",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )?;
    fork::write_all(file.as_raw_fd(), label)
}

fn step(stage: Stage) -> impl FnOnce(Errno) -> ExecError {
    move |errno| ExecError::Io {
        act: stage.to_string(),
        source: errno.into(),
    }
}

impl Confinement {
    /// Checks and prepares; changes nothing.
    ///
    /// # Errors
    /// [`ExecError::Invalid`].
    pub fn new(process: &Process, filter: Option<Filter>) -> Result<Confinement, ExecError> {
        let program = process.args.first().map(String::as_str).unwrap_or_default();
        Ok(Confinement {
            caps: process
                .capabilities
                .as_ref()
                .map_or(Ok(CapSets::default()), CapSets::parse)?,
            limits: process
                .rlimits
                .iter()
                .map(Limit::parse)
                .collect::<Result<_, _>>()?,
            filter,
            candidates: prepared::candidates(program, &process.env)?,
            label: process
                .selinux_label
                .as_ref()
                .filter(|label| !label.is_empty() && prepared::selinux_enabled())
                .map(|label| label.clone().into_bytes()),
            process: process.clone(),
        })
    }

    /// Raises hard limits that are below those wanted, as far as we may, and lowers none: for a process that still has
    /// CAP_SYS_RESOURCE and work to do. Returns the limits that stay lower than wanted.
    pub fn raise_limits(&self) -> Vec<String> {
        let short = self
            .limits
            .iter()
            .zip(&self.process.rlimits)
            .filter(|(limit, _)| !limit.raise());
        short.map(|(_, wanted)| wanted.kind.clone()).collect()
    }

    /// Finds the program, enters the working directory (making it where it is missing) and takes on everything but a
    /// filter that no_new_privs allows to be loaded later.
    ///
    /// # Errors
    /// [`ExecError`]; the process is then good for nothing more.
    pub fn enter(&self) -> Result<(), ExecError> {
        if let Some(label) = &self.label {
            set_exec_label(label).map_err(step(Stage::Label))?;
        }
        self.enter_cwd()?;
        self.find_program()?;
        for limit in &self.limits {
            limit.set().map_err(step(Stage::Rlimits))?;
        }
        self.caps.drop_bounding().map_err(step(Stage::Capabilities))?;
        if self.process.no_new_privileges {
            fork::no_new_privs().map_err(step(Stage::NoNewPrivileges))?;
        } else {
            self.load_filter()?;
        }
        self.caps.set().map_err(step(Stage::Capabilities))
    }

    /// Becomes the program. Returns only when that fails.
    pub fn replace(&self) -> ExecError {
        let (args, env) = match (self.array(&self.process.args), self.array(&self.process.env)) {
            (Ok(args), Ok(env)) => (args, env),
            (Err(e), _) | (_, Err(e)) => return e,
        };
        // Our own runtime ignores SIGPIPE; what is ignored stays so across an exec.
        if let Err(e) = fork::reset_signals().map_err(step(Stage::Signals)) {
            return e;
        }
        if self.process.no_new_privileges
            && let Err(e) = self.load_filter()
        {
            return e;
        }
        super::execution_error(self.program(), fork::execve_first(&self.candidates, &args, &env))
    }

    fn load_filter(&self) -> Result<(), ExecError> {
        self.filter
            .as_ref()
            .map_or(Ok(()), Filter::install)
            .map_err(step(Stage::Seccomp))
    }

    fn array(&self, items: &[String]) -> Result<CArray, ExecError> {
        prepared::c_array("the command or its environment", items)
    }

    fn program(&self) -> String {
        self.process.args.first().cloned().unwrap_or_default()
    }

    fn enter_cwd(&self) -> Result<(), ExecError> {
        let cwd = if self.process.cwd.is_empty() {
            "/"
        } else {
            &self.process.cwd
        };
        let outside = || ExecError::CwdOutside { cwd: cwd.to_string() };
        let act = || format!("enter the working directory {cwd}");
        let path = prepared::c_string("the working directory", cwd)?;
        match fork::chdir(&path) {
            Err(Errno::NOENT) => {
                // Without magic links: one to a directory of the host would have us make directories there.
                Root::open(Path::new("/"))
                    .and_then(|root| root.mkdir_all(Path::new(cwd), 0o755, Some((0, 0))))
                    .map_err(|source| ExecError::Io {
                        act: format!("make the working directory {cwd}"),
                        source,
                    })?;
                fork::chdir(&path)
            }
            other => other,
        }
        .map_err(|e| ExecError::Io {
            act: act(),
            source: e.into(),
        })?;
        super::child::cwd_is_inside().map_err(|_| outside())
    }

    /// Says early, and while nothing is in the way, what exec would say.
    fn find_program(&self) -> Result<(), ExecError> {
        let mut last = Errno::NOENT;
        for candidate in &self.candidates {
            match self.is_program(candidate) {
                Ok(()) => return Ok(()),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(e) => last = e,
            }
        }
        Err(super::execution_error(self.program(), last))
    }

    fn is_program(&self, path: &CString) -> Sys<()> {
        use rustix::fs::{Access, AtFlags, CWD, FileType};
        let stat = rustix::fs::statat(CWD, path, AtFlags::empty())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::ACCESS);
        }
        match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
            Err(Errno::ACCESS) => Err(Errno::ACCESS),
            // Whatever else there is to say about it, exec says better.
            _ => Ok(()),
        }
    }
}
