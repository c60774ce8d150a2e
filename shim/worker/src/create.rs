//! The story of one create: read, put right, prepare what is ours, let libcontainer do the rest, say how it went.

use crate::executor::{Confined, parse_mark};
use crate::hook;
use crate::normalise::{self, Facts, SpecError};
use crate::report::{Report, chain};
use crate::seccomp::{self, SeccompError};
use crate::stage::{Stage, StageError};
use crate::trace::Trace;
use crate::{Asked, passwd, points};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use libcontainer::syscall::syscall::SyscallType;
use serde::Deserialize;
use slipway_sys::exec::{Confinement, ExecError, Process};
use slipway_sys::root::Root;
use slipway_sys::seccomp::Filter;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// A config.json larger than this is not one.
const MAX_CONFIG: u64 = 16 << 20;

/// A created container.
#[derive(Debug)]
pub struct Created {
    /// Its init, as we see it.
    pub pid: u32,
    /// Its terminal's master.
    pub terminal: Option<OwnedFd>,
    /// What could not be had exactly as asked.
    pub warnings: Vec<String>,
}

/// Why it could not be created. Nothing of it is left then, but its cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A step of ours.
    #[error("{act}")]
    Io {
        /// What was attempted.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// config.json is no specification.
    #[error("parse {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// It cannot be created.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The image has something else where a directory has to be (CVE-2025-31133 and the like).
    #[error("/{0} in the image is no directory: refused, since it could lead outside the container")]
    NoDirectory(&'static str),
    /// The filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// What libcontainer is to see.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// The process is one that cannot be run.
    #[error(transparent)]
    Process(#[from] ExecError),
    /// Our part in the container's init.
    #[error("{error}")]
    Init {
        /// In its words.
        error: String,
        /// As a shell would.
        exit_code: Option<u32>,
    },
    /// A hook of the specification.
    #[error("{said}")]
    Hook {
        /// Which, how it failed, and what it said.
        said: String,
    },
    /// libcontainer, with what it logged.
    #[error("create the container: {error}")]
    Libcontainer {
        /// All it said.
        error: String,
    },
}

impl CreateError {
    /// 127 and 126 as a shell says them.
    pub fn exit_code(&self) -> Option<u32> {
        match self {
            CreateError::Process(e) => e.exit_code(),
            CreateError::Init { exit_code, .. } => *exit_code,
            _ => None,
        }
    }
}

fn step(act: impl Into<String>) -> impl FnOnce(io::Error) -> CreateError {
    let act = act.into();
    move |source| CreateError::Io { act, source }
}

/// The parts of config.json that are ours.
#[derive(Deserialize)]
struct Ours {
    #[serde(default)]
    process: Process,
}

/// Creates the container; it waits to be started.
pub fn create(asked: &Asked, report: &Report) -> Result<Created, CreateError> {
    let mut trace = Trace::start().map_err(step("make a log"))?;
    slipway_sys::process::own_session_keyring().map_err(step("separate the container's keys from ours"))?;
    let (mut spec, mut process) = load(&asked.bundle)?;
    let _pid_namespace = join_pid_namespace(&mut spec, asked.pid_namespace_fd)?;
    let rootfs = rootfs(&spec, &asked.bundle)?;
    let root = Root::open(&rootfs).map_err(step("open the rootfs"))?;
    check_directories(&root)?;
    normalise::check_cwd(&process.cwd)?;
    let filter = filter(&spec, &asked.bundle)?;
    make_cwd(&root, &spec, &process)?;
    points::make(&root, &spec);
    spec.root_mut().get_or_insert_default().set_path(rootfs.clone());
    let stage = Stage::build(&mut spec, asked, &rootfs)?;
    let facts = Facts {
        apparmor: slipway_sys::exec::apparmor_enabled(),
        cgroup: stage.cgroup.clone(),
        home: passwd::home(&root, process.user.uid),
    };
    normalise::normalise(&mut spec, &mut process, &facts)?;
    let confinement = Confinement::new(&process, filter)?;
    let warnings = prepare_self(&process, &confinement)?;
    hook::guard(&mut spec, &stage.dir).map_err(step("make ready for hooks"))?;
    let work = Work::new(stage, &spec, process.terminal)?;
    let executor = Confined::new(
        confinement,
        report.share().map_err(step("share the report socket"))?,
    );
    let built = build(asked, &work, executor);
    let pid = built.map_err(|e| match hook::failures(&work.stage.dir) {
        said if said.is_empty() => explain(&e, &mut trace),
        said => CreateError::Hook { said },
    })?;
    let terminal = work.terminal()?;
    Ok(Created {
        pid,
        terminal,
        warnings,
    })
}

fn load(bundle: &Path) -> Result<(Spec, Process), CreateError> {
    let path = bundle.join("config.json");
    let mut text = String::new();
    fs::File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG).read_to_string(&mut text))
        .map_err(step(format!("read {}", path.display())))?;
    let parse = |source| CreateError::Parse {
        path: path.clone(),
        source,
    };
    let spec = serde_json::from_str(&text).map_err(parse)?;
    let ours: Ours = serde_json::from_str(&text).map_err(parse)?;
    Ok((spec, ours.process))
}

/// Points the specification to the PID namespace that was passed, which has to stay open for as long.
fn join_pid_namespace(spec: &mut Spec, number: Option<i32>) -> Result<Option<OwnedFd>, CreateError> {
    let Some(number) = number else { return Ok(None) };
    let fd = slipway_sys::fd::inherited(number).map_err(step("take the PID namespace to join"))?;
    let namespaces = spec
        .linux_mut()
        .as_mut()
        .and_then(|l| l.namespaces_mut().as_mut());
    let own = namespaces
        .into_iter()
        .flatten()
        .find(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none())
        .ok_or(SpecError::Missing(
            "PID namespace without a path, and one to join was passed",
        ))?;
    own.set_path(Some(format!("/proc/self/fd/{}", fd.as_raw_fd()).into()));
    Ok(Some(fd))
}

fn rootfs(spec: &Spec, bundle: &Path) -> Result<PathBuf, CreateError> {
    let path = spec.root().as_ref().ok_or(SpecError::Missing("root"))?.path();
    let path = bundle.join(path);
    fs::canonicalize(&path).map_err(step(format!("find the rootfs {}", path.display())))
}

/// libcontainer makes links and devices below these by plain paths, before it changes root: a link there would lead it
/// into the host.
fn check_directories(root: &Root) -> Result<(), CreateError> {
    for name in ["dev", "proc", "sys"] {
        let stat = root
            .symlink_metadata(Path::new(name))
            .map_err(step("look into the rootfs"))?;
        let is_dir = |mode| rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::Directory;
        if stat.is_some_and(|s| !is_dir(s.st_mode)) {
            return Err(CreateError::NoDirectory(name));
        }
    }
    Ok(())
}

/// Compiles the filter and keeps it in the bundle for exec.
fn filter(spec: &Spec, bundle: &Path) -> Result<Option<Filter>, CreateError> {
    let path = bundle.join("seccomp.bpf");
    let Some(object) = spec.linux().as_ref().and_then(|l| l.seccomp().as_ref()) else {
        return Ok(None);
    };
    if seccomp::has_listener(object) {
        return Ok(None);
    }
    let filter = seccomp::compile(object)?;
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(&filter.to_bytes()))
        .map_err(step(format!("write {}", path.display())))?;
    Ok(Some(filter))
}

/// A missing working directory is made while the rootfs is still writable. One on a mount is made by the container's init.
fn make_cwd(root: &Root, spec: &Spec, process: &Process) -> Result<(), CreateError> {
    if process.cwd.is_empty() || normalise::is_on_a_mount(spec, &process.cwd) {
        return Ok(());
    }
    let zero = |maps: &Option<Vec<libcontainer::oci_spec::runtime::LinuxIdMapping>>| {
        let root = maps.iter().flatten().find(|m| m.container_id() == 0);
        root.map_or(0, |m| m.host_id())
    };
    let owner = spec
        .linux()
        .as_ref()
        .map_or((0, 0), |l| (zero(l.uid_mappings()), zero(l.gid_mappings())));
    root.mkdir_all(Path::new(&process.cwd), 0o755, Some(owner))
        .map_err(step(format!("make the working directory {}", process.cwd)))?;
    Ok(())
}

/// What the container's init inherits from this process.
fn prepare_self(process: &Process, confinement: &Confinement) -> Result<Vec<String>, CreateError> {
    let mut warnings = Vec::new();
    if let Some(wanted) = process.oom_score_adj {
        let got = slipway_sys::process::set_oom_score_adj(wanted).map_err(step("set oom_score_adj"))?;
        if got != wanted {
            warnings.push(format!(
                "oom_score_adj is {got}, since we may not lower it to {wanted}"
            ));
        }
    }
    for kind in confinement.raise_limits() {
        warnings.push(format!(
            "{kind} stays lower than asked, since we may not raise it"
        ));
    }
    // libcontainer leaves the groups of its caller to a container that has none.
    slipway_sys::process::clear_groups().map_err(step("give up supplementary groups"))?;
    slipway_sys::fd::cloexec_from(3).map_err(step("close descriptors at exec"))?;
    Ok(warnings)
}

/// What libcontainer reads, and the socket it sends a terminal over.
struct Work {
    stage: Stage,
    console: Option<(UnixListener, PathBuf)>,
}

impl Work {
    fn new(stage: Stage, spec: &Spec, terminal: bool) -> Result<Work, CreateError> {
        let path = stage.dir.join("config.json");
        serde_json::to_vec(spec)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&path, text))
            .map_err(step(format!("write {}", path.display())))?;
        let console = if terminal {
            let listener = bind(&stage.dir, "console.sock").map_err(step("listen for the terminal"))?;
            Some((listener, stage.dir.join("console.sock")))
        } else {
            None
        };
        Ok(Work { stage, console })
    }

    /// The terminal's master, which libcontainer has sent.
    fn terminal(&self) -> Result<Option<OwnedFd>, CreateError> {
        let Some((listener, _)) = &self.console else {
            return Ok(None);
        };
        let receive = || {
            listener.set_nonblocking(true)?;
            let (stream, _) = listener.accept()?;
            stream.set_nonblocking(true)?;
            let mut fds = Vec::new();
            slipway_sys::fd::recv_fds(&stream, &mut [0u8; 64], &mut fds)?;
            fds.pop().ok_or_else(|| io::ErrorKind::NotFound.into())
        };
        receive().map(Some).map_err(step("receive the terminal"))
    }
}

/// Through a descriptor: the path may be longer than a socket's address can be.
fn bind(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let dir = fs::File::open(dir)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

fn build(asked: &Asked, work: &Work, executor: Confined) -> Result<u32, LibcontainerError> {
    let console = work.console.as_ref().map(|(_, path)| path);
    let container = ContainerBuilder::new(asked.id.clone(), SyscallType::Linux)
        .with_root_path(&asked.state)?
        .with_console_socket(console)
        .with_executor(executor)
        .as_init(&work.stage.dir)
        .with_systemd(false)
        .build()?;
    let pid = container
        .pid()
        .ok_or(LibcontainerError::Other("it has no process".into()))?;
    u32::try_from(pid.as_raw()).map_err(|_| LibcontainerError::Other("it has no process".into()))
}

/// libcontainer's error, our own in it, or what it logged about it.
fn explain(e: &LibcontainerError, trace: &mut Trace) -> CreateError {
    // That it cannot remove the cgroup it was given for a toy says nothing to anybody.
    let toy = |s: &str| s.contains("/idle") || s.contains("cgroup manager");
    let text = chain(e);
    let text = match text.split_once(". error during cleanup: ") {
        Some((before, cleanup)) if toy(cleanup) => before.to_string(),
        _ => text,
    };
    let lines: Vec<String> = trace.lines().into_iter().filter(|line| !toy(line)).collect();
    for said in std::iter::once(&text).chain(&lines) {
        if let Some((exit_code, error)) = parse_mark(said) {
            return CreateError::Init {
                error: error.to_string(),
                exit_code,
            };
        }
    }
    let mut error = text;
    for line in lines {
        if !error.contains(&line) {
            error.push_str("; ");
            error.push_str(&line);
        }
    }
    CreateError::Libcontainer { error }
}
