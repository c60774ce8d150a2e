//! One cgroup: a directory in every hierarchy. Making, joining, emptying and removing it.

use super::layout::{CgroupPath, Layout};
use super::systemd::{self, Systemd};
use super::{CgroupError, OomWatch, Resources, Result, Stats, bpf, device, stats, v1, v2, write};
use crate::fork::{self, Sys};
use crate::process;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Sub-cgroups a container made are walked to this depth and number at most.
const MAX_DEPTH: usize = 32;
const MAX_DIRS: usize = 10_000;

/// How often a cgroup is made from the top when those above it vanish meanwhile.
const MAKE_TRIES: u32 = 3;
/// The extended attribute of directories that a shim made to be shared; the kernel keeps it in memory.
const MARK: &str = "trusted.slipway";

/// A directory of the cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dir {
    /// v1: the hierarchy's controllers; v2: empty.
    pub(crate) controllers: Vec<String>,
    pub(crate) v2: bool,
    pub(crate) path: PathBuf,
    /// How many directories at the end of `path` this `Cgroup` made.
    pub(crate) made: usize,
}

/// A cgroup. Its JSON (serde) is what another process needs to kill and remove it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Cgroup {
    path: PathBuf,
    pub(crate) dirs: Vec<Dir>,
    pub(crate) unit: Option<String>,
    /// Keeps a fresh systemd scope from ending before its first process has joined.
    #[serde(skip)]
    pub(crate) placeholder: Option<process::Child>,
}

/// What a forked child needs to be in the cgroup.
///
/// Moving a process by `cgroup.procs` takes a lock of all processes of the machine, whose first taker waits for an RCU grace
/// period: 5 to 12 ms, more than all else of a start. Two ways do without it: to be born in a v2 cgroup
/// (CLONE_INTO_CGROUP), and, in v1, a thread that moves itself by writing 0 to `tasks`.
#[derive(Debug)]
pub struct Join {
    /// The v2 directory, to be born in.
    v2: Option<OwnedFd>,
    /// v2's `cgroup.procs`, for kernels before 5.7.
    v2_procs: Option<OwnedFd>,
    /// v1's `tasks`.
    tasks: Vec<OwnedFd>,
}

impl Join {
    /// The v2 directory to be born in.
    pub(crate) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.v2.as_ref().map(AsFd::as_fd)
    }

    /// Moves the calling process, which has one thread; `born` says that it was born in v2's. Async-signal-safe.
    pub(crate) fn enter(&self, born: bool) -> Sys<()> {
        for file in &self.tasks {
            fork::write_all(file.as_raw_fd(), b"0")?;
        }
        match &self.v2_procs {
            Some(file) if !born => fork::write_all(file.as_raw_fd(), b"0"),
            _ => Ok(()),
        }
    }
}

impl Dir {
    /// Makes it below `mount`, and what is missing above it.
    fn make(&mut self, mount: &Path, is_v2: bool) -> Result<()> {
        let below = self.path.strip_prefix(mount).unwrap_or(Path::new(""));
        let depth = below.components().count();
        let mut at = mount.to_path_buf();
        for (n, name) in below.components().enumerate() {
            // On a hybrid machine v2's root is the administrator's, and v1 does the limiting.
            if self.v2 && is_v2 {
                hand_down_controllers(&at);
            }
            at.push(name);
            match std::fs::create_dir(&at) {
                Ok(()) => {
                    self.made = self.made.max(depth - n);
                    mark(&at);
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io_error(|| format!("make cgroup {}", at.display()))(e)),
            }
            if self.controllers.iter().any(|c| c == "cpuset") {
                fill_cpuset(&at)?;
            }
        }
        Ok(())
    }

    /// Removes it, and those above it, while they were made with it and are empty. `shared`: or by another of our shims.
    fn remove_made(&self, shared: bool) {
        for (n, path) in self.path.ancestors().enumerate() {
            let ours = n < self.made || (shared && is_marked(path));
            if !ours || rmdir(path).is_err() {
                break;
            }
        }
    }
}

/// Notes that a directory is of our making, whichever process of ours is the last to need it.
fn mark(dir: &Path) {
    // Without it, it is only removed by whoever made it.
    let _ = rustix::fs::setxattr(dir, MARK, b"1", rustix::fs::XattrFlags::empty());
}

fn is_marked(dir: &Path) -> bool {
    rustix::fs::getxattr(dir, MARK, &mut [0u8; 1][..]).is_ok()
}

/// Gone is fine.
fn rmdir(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir(dir) {
        Err(e) if !matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Err(e),
        _ => Ok(()),
    }
}

fn io_error(act: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> CgroupError {
    move |source| CgroupError::Io { act: act(), source }
}

impl Cgroup {
    /// Makes the cgroup in every hierarchy, with the directories above it that are missing; fills v1's
    /// `cpuset.cpus` and `cpuset.mems` from the parents, and hands down v2's controllers. One that is there and
    /// empty (left by a crash) is removed first, so that no old limit stays.
    ///
    /// A [`CgroupPath::Scope`] is asked of systemd over D-Bus (Delegate=yes); call [`Cgroup::settle`] once its first
    /// process has joined.
    ///
    /// # Errors
    /// [`CgroupError::NotEmpty`] when processes are in it; nothing made here stays after an error.
    pub fn create(layout: &Layout, path: &CgroupPath) -> Result<Cgroup> {
        if !matches!(path, CgroupPath::Fs(_)) && !layout.is_v2() {
            return Err(CgroupError::SystemdOnV1);
        }
        let mut old = Cgroup::open(layout, path)?;
        if old.exists() {
            let pids = old.procs()?;
            if !pids.is_empty() {
                return Err(CgroupError::NotEmpty {
                    path: old.path.clone(),
                    pids: pids.into_iter().take(8).collect(),
                });
            }
            old.dirs.iter_mut().for_each(|d| d.made = 1);
            old.remove(Duration::from_secs(1))?;
        }
        Cgroup::make(layout, path)
    }

    /// Makes the cgroup unless it is there, whatever is in it: for parents. Second value: whether it was made here.
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn ensure(layout: &Layout, path: &CgroupPath) -> Result<(Cgroup, bool)> {
        if !matches!(path, CgroupPath::Fs(_)) && !layout.is_v2() {
            return Err(CgroupError::SystemdOnV1);
        }
        let cgroup = Cgroup::make(layout, path)?;
        let made = cgroup.dirs.iter().any(|d| d.made > 0);
        Ok((cgroup, made))
    }

    /// The cgroup as it would be, touching nothing; it may not exist.
    ///
    /// # Errors
    /// [`CgroupError::Path`].
    pub fn open(layout: &Layout, path: &CgroupPath) -> Result<Cgroup> {
        let dir = path.dir()?;
        let dirs = layout.hierarchies.iter().map(|h| {
            let own = h.own.strip_prefix("/").unwrap_or(&h.own);
            let base = if dir.is_absolute() {
                h.mount.clone()
            } else {
                h.mount.join(own)
            };
            let below = dir.strip_prefix("/").unwrap_or(&dir);
            Dir {
                controllers: h.controllers.clone(),
                v2: h.v2,
                path: base.join(below),
                made: 0,
            }
        });
        Ok(Cgroup {
            path: dir.clone(),
            dirs: dirs.collect(),
            unit: path.unit(),
            placeholder: None,
        })
    }

    fn make(layout: &Layout, path: &CgroupPath) -> Result<Cgroup> {
        let mut cgroup = Cgroup::open(layout, path)?;
        let result = match path {
            CgroupPath::Fs(_) => cgroup.make_dirs(layout),
            CgroupPath::Scope { .. } => cgroup
                .make_scope()
                .inspect(|()| cgroup.hand_down_past_systemd(layout)),
            CgroupPath::Slice(name) => cgroup.make_slice(name),
        };
        if result.is_err() {
            // A scope goes with its placeholder.
            cgroup.settle();
            cgroup.remove_made(false);
        }
        result.map(|()| cgroup)
    }

    fn make_dirs(&mut self, layout: &Layout) -> Result<()> {
        let is_v2 = layout.is_v2();
        for (dir, h) in self.dirs.iter_mut().zip(&layout.hierarchies) {
            let mut tries = 1;
            // Whoever shared a cgroup above may have removed it while it was empty: then from the top again.
            while let Err(e) = dir.make(&h.mount, is_v2) {
                if tries == MAKE_TRIES || !e.is_not_found() {
                    return Err(e);
                }
                tries += 1;
            }
        }
        Ok(())
    }

    /// A scope has to have a process from the start: one that only waits, until [`Cgroup::settle`].
    fn make_scope(&mut self) -> Result<()> {
        let unit = self.unit.clone().unwrap_or_default();
        let child = waiting_child().map_err(io_error(|| format!("fork the first process of {unit}")))?;
        let pid = child.pid;
        self.placeholder = Some(child);
        let turn = systemd::turn_to_start();
        Systemd::connect_to_start()?.start_scope(&unit, &systemd::slice_of(&self.path), pid)?;
        drop(turn);
        let found = systemd::cgroup_of(pid);
        if found.as_deref() != Some(self.path.as_path()) {
            let reason = format!("it is in {found:?}, not in {}", self.path.display());
            return Err(CgroupError::Systemd {
                act: format!("find unit {unit}"),
                reason,
            });
        }
        self.dirs.iter_mut().filter(|d| d.v2).for_each(|d| d.made = 1);
        Ok(())
    }

    /// systemd hands down the controllers that it knows; the others (hugetlb, rdma, misc) it leaves to whoever wants them.
    fn hand_down_past_systemd(&self, layout: &Layout) {
        for (dir, h) in self.dirs.iter().zip(&layout.hierarchies).filter(|(d, _)| d.v2) {
            let below = dir.path.strip_prefix(&h.mount).unwrap_or(Path::new(""));
            let mut at = h.mount.clone();
            for name in below.components() {
                hand_down(&at, |controller| !OF_SYSTEMD.contains(&controller));
                at.push(name);
            }
        }
    }

    fn make_slice(&mut self, name: &str) -> Result<()> {
        if !self.exists() {
            let turn = systemd::turn_to_start();
            Systemd::connect_to_start()?.start_slice(name)?;
            drop(turn);
            for dir in self.dirs.iter_mut().filter(|d| d.v2) {
                dir.made = 1;
                mark(&dir.path);
            }
        }
        Ok(())
    }

    /// The path below each hierarchy's mount (or below the caller's cgroup, when relative).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first process has joined: a systemd scope no longer needs its placeholder. Does nothing with cgroupfs.
    pub fn settle(&mut self) {
        if let Some(child) = self.placeholder.take() {
            // Not waited for: it may have no time to die in. Whoever reaps children finds it.
            let _ = process::send_signal(child.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    /// Whether it is there in any hierarchy.
    pub fn exists(&self) -> bool {
        self.dirs.iter().any(|d| d.path.exists())
    }

    /// Opens what a forked child needs to join: for [`crate::process::Program::cgroup`] and [`crate::exec`].
    ///
    /// # Errors
    /// `NotFound` inside [`CgroupError::Io`] when the cgroup is gone.
    pub fn join(&self) -> Result<Join> {
        self.open_join(None)
    }

    /// As [`Cgroup::join`], but in v2 into that cgroup at or below this one where process `pid` is. A container that has
    /// made cgroups of its own and handed controllers down to them has no processes in its cgroup itself (cgroups(7), "no
    /// internal processes"), and lets none in.
    ///
    /// # Errors
    /// As [`Cgroup::join`]; `NotFound` also when the process is somewhere else.
    pub fn join_where(&self, pid: u32) -> Result<Join> {
        let Some(top) = self.v2() else { return self.join() };
        let act = || format!("find process {pid} in cgroup {}", top.display());
        let path = format!("/proc/{pid}/cgroup");
        let own = std::fs::read_to_string(&path).map_err(io_error(act))?;
        let below = own
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .and_then(|at| below(Path::new(at), &self.path))
            .map(|sub| top.join(sub));
        match below {
            Some(dir) if read_pids(&dir).map_err(io_error(act))?.contains(&pid) => self.open_join(Some(dir)),
            _ => Err(io_error(act)(io::ErrorKind::NotFound.into())),
        }
    }

    /// With `v2` in the place of the v2 directory.
    fn open_join(&self, v2: Option<PathBuf>) -> Result<Join> {
        let open = |path: &Path, flags: OFlags| {
            rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty())
                .map_err(|e| io_error(|| format!("open {}", path.display()))(e.into()))
        };
        let mut join = Join {
            v2: None,
            v2_procs: None,
            tasks: Vec::with_capacity(self.dirs.len()),
        };
        for dir in &self.dirs {
            if dir.v2 {
                let path = v2.as_deref().unwrap_or(&dir.path);
                join.v2 = Some(open(path, OFlags::RDONLY | OFlags::DIRECTORY)?);
                join.v2_procs = Some(open(&path.join("cgroup.procs"), OFlags::WRONLY)?);
            } else {
                join.tasks.push(open(&dir.path.join("tasks"), OFlags::WRONLY)?);
            }
        }
        Ok(join)
    }

    /// Applies limits: those given; the others stay as they are.
    ///
    /// # Errors
    /// [`CgroupError::Unsupported`], [`CgroupError::Write`]: naming the key. Limits before it stay applied.
    pub fn apply(&self, resources: &Resources) -> Result<()> {
        if let Some(unit) = &self.unit {
            let memory = write::read_limit(self.v2(), "memory.max").filter(|n| *n != u64::MAX);
            Systemd::connect()?.set_limits(unit, resources, memory, v2::has_bfq(self.v2()))?;
        }
        if self.is_v2_only() {
            v2::apply(self, resources)
        } else {
            v1::apply(self, resources)
        }?;
        match resources.devices.as_deref() {
            None | Some([]) => Ok(()),
            Some(rules) => self.apply_devices(&device::parse(rules)?),
        }
    }

    fn is_v2_only(&self) -> bool {
        self.v2().is_some()
            && self
                .dirs
                .iter()
                .all(|d| d.v2 || d.controllers[0].starts_with("name="))
    }

    fn apply_devices(&self, rules: &[device::Rule]) -> Result<()> {
        let v1 = self.v1("devices");
        if let Some(dir) = v1 {
            return device::v1_lines(rules)
                .into_iter()
                .try_for_each(|(file, line)| write::set("devices", Some(dir), file, &line, false));
        }
        match self.v2() {
            Some(dir) => bpf::attach(dir, &device::program(rules)).map_err(io_error(|| {
                format!("attach the device program to {}", dir.display())
            })),
            None => Err(write::missing("devices", "devices.allow")),
        }
    }

    /// What it uses.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn stats(&self) -> Result<Stats> {
        if !self.exists() {
            let missing = io::ErrorKind::NotFound.into();
            return Err(io_error(|| format!("measure cgroup {}", self.path.display()))(
                missing,
            ));
        }
        let mut stats = stats::stats(self);
        stats.processes = self.main_procs().len() as u64;
        stats.threads = if stats.pids > 0 {
            stats.pids
        } else {
            stats.processes
        };
        Ok(stats)
    }

    /// Processes the OOM killer has killed in here so far; 0 once the cgroup is gone.
    pub fn oom_kills(&self) -> u64 {
        stats::oom_kills(self)
    }

    /// Watches for the OOM killer: a descriptor for epoll. The limits that were applied say what [`OomWatch`] keeps.
    ///
    /// # Errors
    /// When the kernel offers no such event.
    pub fn oom_watch(&self, resources: &Resources) -> Result<OomWatch> {
        OomWatch::new(self, self.unit.is_some(), resources)
    }

    /// The processes by one hierarchy alone, for counting.
    fn main_procs(&self) -> BTreeSet<u32> {
        let mut pids = BTreeSet::new();
        if let Some(dir) = self
            .v2()
            .or(self.v1("pids"))
            .or(self.dirs.first().map(|d| d.path.as_path()))
        {
            let _ = collect_pids(dir, &mut pids);
        }
        pids
    }

    /// The processes in it and in the cgroups below, sorted.
    ///
    /// # Errors
    /// When a list cannot be read; a cgroup that is gone has none.
    pub fn procs(&self) -> Result<Vec<u32>> {
        let mut pids = BTreeSet::new();
        for dir in &self.dirs {
            collect_pids(&dir.path, &mut pids)
                .map_err(io_error(|| format!("list {}", dir.path.display())))?;
        }
        Ok(pids.into_iter().collect())
    }

    /// Whether no process is left in it and below.
    ///
    /// # Errors
    /// As [`Cgroup::procs`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.procs()?.is_empty())
    }

    /// Sends SIGKILL to everything in it, also to what forks meanwhile, and thaws it so that the signal arrives. Does
    /// not wait for the end of the processes: [`Cgroup::wait_empty`] does.
    ///
    /// # Errors
    /// When a list cannot be read.
    pub fn kill(&self) -> Result<()> {
        self.signal_until_no_new(libc::SIGKILL)
    }

    /// Sends a signal to everything in it, also to what forks meanwhile.
    ///
    /// # Errors
    /// When a list cannot be read.
    pub fn signal_all(&self, signal: i32) -> Result<()> {
        self.signal_until_no_new(signal)
    }

    fn signal_until_no_new(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            for dir in self.dirs.iter().filter(|d| d.v2) {
                let _ = std::fs::write(dir.path.join("cgroup.kill"), "1");
            }
        }
        let mut signalled = BTreeSet::new();
        // A fork bomb can stay ahead of one pass, not of many: what was signalled forks no more.
        for _ in 0..100 {
            let fresh: Vec<u32> = self
                .procs()?
                .into_iter()
                .filter(|p| !signalled.contains(p))
                .collect();
            if fresh.is_empty() {
                break;
            }
            let held: Vec<(u32, OwnedFd)> = fresh
                .iter()
                .filter_map(|p| process::pidfd_open(*p).ok().map(|fd| (*p, fd)))
                .collect();
            // Whoever is still listed now, is the process the descriptor names: a pid freed and taken by another
            // process after the first list would not be in here.
            let still: BTreeSet<u32> = self.procs()?.into_iter().collect();
            for (pid, fd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
                let _ = process::send_signal(fd.as_fd(), signal);
                signalled.insert(*pid);
            }
            signalled.extend(fresh);
        }
        if signal == libc::SIGKILL {
            self.thaw_all();
        }
        Ok(())
    }

    /// Thaws it and every cgroup below. In v1 nothing frozen dies, and a container that may write its cgroups can freeze
    /// one of its own, which stays frozen whatever happens to those above.
    fn thaw_all(&self) {
        let top = self.v1("freezer").or(self.v2());
        let file = if self.v1("freezer").is_some() {
            ("freezer.state", "THAWED")
        } else {
            ("cgroup.freeze", "0")
        };
        if let Some(top) = top {
            let _ = walk(top, |dir| {
                let _ = std::fs::write(dir.join(file.0), file.1);
                Ok(())
            });
        }
    }

    /// Kills what is in it, again and again, until nothing is left; the caller reaps its own children.
    ///
    /// # Errors
    /// [`CgroupError::NotEmpty`] when the time has passed.
    pub fn wait_empty(&self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        let mut pause = Duration::from_micros(200);
        loop {
            let pids = self.procs()?;
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                let pids = pids.into_iter().take(8).collect();
                return Err(CgroupError::NotEmpty {
                    path: self.path.clone(),
                    pids,
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
            self.kill()?;
        }
    }

    /// Stops every process in it, and waits until they are (2 s at most).
    ///
    /// # Errors
    /// When there is no freezer, or it does not come to rest; it is thawed then.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)?;
        let until = Instant::now() + Duration::from_secs(2);
        while !self.is_frozen() {
            if Instant::now() >= until {
                let _ = self.thaw();
                return Err(io_error(|| format!("freeze cgroup {}", self.path.display()))(
                    Errno::TIMEDOUT.into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets them run again.
    ///
    /// # Errors
    /// When there is no freezer.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    /// The v1 directory with this controller.
    pub(crate) fn v1(&self, controller: &str) -> Option<&Path> {
        self.dirs
            .iter()
            .find(|d| d.controllers.iter().any(|c| c == controller))
            .map(|d| d.path.as_path())
    }

    /// The v2 directory.
    pub(crate) fn v2(&self) -> Option<&Path> {
        self.dirs.iter().find(|d| d.v2).map(|d| d.path.as_path())
    }

    /// The directory above the v2 one, which counts what happens in all that is below it.
    pub fn v2_parent(&self) -> Option<PathBuf> {
        self.v2().and_then(Path::parent).map(Path::to_owned)
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let (file, value) = match (self.v1("freezer"), self.v2()) {
            (Some(dir), _) => (
                dir.join("freezer.state"),
                if frozen { "FROZEN" } else { "THAWED" },
            ),
            (None, Some(dir)) => (dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (None, None) => {
                let reason = "there is no freezer".to_string();
                return Err(CgroupError::Unsupported {
                    key: "freezer".into(),
                    reason,
                });
            }
        };
        std::fs::write(&file, value).map_err(io_error(|| format!("write {value} to {}", file.display())))
    }

    fn is_frozen(&self) -> bool {
        let read = |p: PathBuf| std::fs::read_to_string(p).unwrap_or_default();
        match (self.v1("freezer"), self.v2()) {
            (Some(dir), _) => read(dir.join("freezer.state")).trim_end() == "FROZEN",
            (None, Some(dir)) => read(dir.join("cgroup.events")).lines().any(|l| l == "frozen 1"),
            (None, None) => false,
        }
    }

    /// Removes it with the cgroups below, and then those above that were made with it, as far as they are empty; not
    /// there is fine. Retries while the kernel is still letting go of the last processes.
    ///
    /// # Errors
    /// [`CgroupError::NotEmpty`], or what `rmdir(2)` says when the time has passed.
    pub fn remove(&self, at_most: Duration) -> Result<()> {
        let until = Instant::now() + at_most;
        if let Some(unit) = &self.unit
            && self.exists()
        {
            // It goes by itself when its last process does, or now. Where systemd does not answer, rmdir must do.
            if unit.ends_with(".scope") {
                let _ = Systemd::connect().and_then(|mut s| s.stop(unit));
            } else {
                self.stop_vacant(unit);
            }
        }
        for dir in &self.dirs {
            loop {
                match remove_below(&dir.path, 0) {
                    Ok(()) => break,
                    Err(e) if Instant::now() >= until => {
                        let pids = self.procs().unwrap_or_default();
                        if pids.is_empty() {
                            return Err(io_error(|| format!("remove cgroup {}", dir.path.display()))(e));
                        }
                        return Err(CgroupError::NotEmpty {
                            path: self.path.clone(),
                            pids,
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            dir.remove_made(false);
        }
        Ok(())
    }

    /// Says, before it is made, that it will have been: so that whoever reads that after a crash removes it.
    pub fn claim(&mut self) {
        self.dirs.iter_mut().for_each(|dir| dir.made = dir.made.max(1));
    }

    /// Lets go of a cgroup that others may share: removes its directories that are of our making and empty, and never what
    /// is in them. Whoever lets go last leaves nothing.
    pub fn give_back(&self) {
        let leaf = self.unit.as_ref().filter(|_| {
            let ours = |d: &Dir| d.v2 && (d.made > 0 || is_marked(&d.path));
            self.dirs.iter().any(ours) && self.is_vacant()
        });
        if let Some(unit) = leaf {
            self.stop_vacant(unit);
        }
        self.remove_made(true);
    }

    /// A unit with members is never stopped: that would end them. Where systemd does not answer, rmdir must do.
    fn stop_vacant(&self, unit: &str) {
        if let Some(_turn) = systemd::turn_to_let_go()
            && self.is_vacant()
        {
            let _ = Systemd::connect().and_then(|mut s| s.stop(unit));
        }
    }

    /// No process and no cgroup is in it.
    fn is_vacant(&self) -> bool {
        self.is_empty().unwrap_or(false) && self.dirs.iter().all(|d| sub_dirs(&d.path).is_empty())
    }

    fn remove_made(&self, shared: bool) {
        self.dirs.iter().for_each(|dir| dir.remove_made(shared));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.settle();
    }
}

/// A child that does nothing, holds nothing, and does not outlive us.
fn waiting_child() -> io::Result<process::Child> {
    let parent = rustix::process::getpid();
    // SAFETY: the child makes async-signal-safe calls only.
    unsafe {
        fork::fork(move || {
            let _ = fork::close_from(0);
            // systemd ends it by SIGTERM, which whoever forked it may block.
            if fork::reset_signals()
                .and_then(|()| fork::die_with(parent))
                .is_err()
            {
                fork::exit(0);
            }
            loop {
                rustix::event::pause();
            }
        })
    }
}

/// What of a process's path in `/proc/<pid>/cgroup` lies below a container's: the container's path is somewhere in it,
/// behind that of a cgroup namespace or of the shim's own.
fn below<'a>(at: &'a Path, own: &Path) -> Option<&'a Path> {
    let own = own.strip_prefix("/").unwrap_or(own);
    let mut rest = at.strip_prefix("/").unwrap_or(at);
    loop {
        if let Ok(sub) = rest.strip_prefix(own) {
            return Some(sub);
        }
        let mut components = rest.components();
        components.next()?;
        rest = components.as_path();
    }
}

fn read_pids(dir: &Path) -> io::Result<Vec<u32>> {
    match std::fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => Ok(text
            .lines()
            .filter_map(|l| l.parse().ok())
            .filter(|p| *p > 0)
            .collect()),
        // Gone, or going (ENODEV); a threaded cgroup lists its processes at its domain (EOPNOTSUPP).
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

fn collect_pids(top: &Path, pids: &mut BTreeSet<u32>) -> io::Result<()> {
    walk(top, |dir| {
        pids.extend(read_pids(dir)?);
        Ok(())
    })
}

/// Visits a cgroup and those below it, each before its own.
fn walk(top: &Path, mut visit: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    let mut stack = vec![(top.to_path_buf(), 0)];
    let mut seen = 0;
    while let Some((dir, depth)) = stack.pop() {
        visit(&dir)?;
        seen += 1;
        if depth < MAX_DEPTH && seen < MAX_DIRS {
            stack.extend(sub_dirs(&dir).into_iter().map(|d| (d, depth + 1)));
        }
    }
    Ok(())
}

fn sub_dirs(dir: &Path) -> Vec<PathBuf> {
    // Two links: "." and the name; none below. Saves reading a directory of forty files on the common path.
    if rustix::fs::stat(dir).is_ok_and(|s| s.st_nlink <= 2) {
        return Vec::new();
    }
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

fn remove_below(dir: &Path, depth: usize) -> io::Result<()> {
    match rmdir(dir) {
        Ok(()) => return Ok(()),
        Err(e) if depth >= MAX_DEPTH => return Err(e),
        Err(_) => {}
    }
    for sub in sub_dirs(dir) {
        remove_below(&sub, depth + 1)?;
    }
    rmdir(dir)
}

/// v1: a new cpuset is empty, and takes no process until it has CPUs and memory nodes.
fn fill_cpuset(dir: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(file);
        let read =
            |p: &Path| std::fs::read_to_string(p).map_err(io_error(|| format!("read {}", p.display())));
        if !read(&path)?.trim().is_empty() {
            continue;
        }
        let from = dir.parent().unwrap_or(dir).join(file);
        let value = read(&from)?;
        std::fs::write(&path, value.trim()).map_err(io_error(|| format!("fill {}", path.display())))?;
    }
    Ok(())
}

/// v2: children of `dir` get every controller `dir` has. What cannot be handed down shows when a limit needs it.
///
/// A cgroup that has processes itself, the caller's of a build say, hands down nothing: the kernel would make it a threaded domain,
/// and no process could enter its children (cgroups(7), "no internal processes"; only the root, which has no type, is excused).
fn hand_down_controllers(dir: &Path) {
    hand_down(dir, |_| true);
}

/// Those of v2 that systemd hands down itself, and takes back where no unit has a use for them.
const OF_SYSTEMD: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

fn hand_down(dir: &Path, wanted: impl Fn(&str) -> bool) {
    let read = |file: &str| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    if dir.join("cgroup.type").exists() && !read("cgroup.procs").is_empty() {
        return;
    }
    let down = read("cgroup.subtree_control");
    let have: BTreeSet<&str> = down.split_ascii_whitespace().collect();
    for controller in read("cgroup.controllers")
        .split_ascii_whitespace()
        .filter(|c| !have.contains(c) && wanted(c))
    {
        let _ = std::fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_process_is_below_a_container_is_found_behind_other_cgroups() {
        let sub = |at: &str, own: &str| below(Path::new(at), Path::new(own)).map(|p| p.display().to_string());
        assert_eq!(
            sub("/kubepods/pod1/c/init", "/kubepods/pod1/c").as_deref(),
            Some("init")
        );
        assert_eq!(sub("/kubepods/pod1/c", "/kubepods/pod1/c").as_deref(), Some(""));
        assert_eq!(
            sub("/docker/x/kubepods/pod1/c/a/b", "/kubepods/pod1/c").as_deref(),
            Some("a/b")
        );
        assert_eq!(sub("/own/relative/a", "relative").as_deref(), Some("a"));
        assert_eq!(sub("/kubepods/pod1/other", "/kubepods/pod1/c"), None);
        assert_eq!(sub("/kubepods/pod1/cc", "/kubepods/pod1/c"), None);
    }
}
