//! How a container comes to be: cgroup, streams, worker, init. Each step that leaves something outside
//! the shim is written down before; a failure anywhere goes through `ending`, which takes all of it back.

use crate::conn::Reply;
use crate::diag::{Chain, info, warning};
use crate::fault::Fault;
use crate::log::Source as From;
use crate::reactor::{Interest, Source, Timer};
use crate::record::Exit;
use crate::shim::Shim;
use crate::spec;
use crate::stdio::{self, Output, Stdin};
use crate::task::{Asked, Asker, Container, Creating, Outcome, Phase, Streams};
use crate::worker::{self, Job, Said, WorkerError};
use prost::Message;
use slipway_shim_api::names::{CREATE_OPTIONS, topic};
use slipway_shim_api::status::Code;
use slipway_shim_api::{events, pod, task, types};
use slipway_sys::cgroup::{Cgroup, CgroupPath};
use slipway_sys::process::{Child, Status};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Containers in one pod.
const MAX_CONTAINERS: usize = 1000;
const SIGKILL: i32 = 9;

impl Shim {
    /// Task.Create: answered when the worker has reported, or with pid 0 when it is at work, as the options say.
    ///
    /// # Errors
    /// When the request is wrong, or something fails before there is anything to take back.
    pub fn create(
        &mut self,
        reply: Reply,
        request: task::CreateTaskRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let id = request.id.clone();
        check_id(&id)?;
        if self.containers.values().any(|c| c.id == id) {
            return Err(Fault::new(
                Code::AlreadyExists,
                format_args!("container {id} exists"),
            ));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            return Err(Fault::new(
                Code::ResourceExhausted,
                "the pod has too many containers",
            ));
        }
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(Fault::new(
                Code::Unimplemented,
                "containers cannot be restored from a checkpoint",
            ));
        }
        let during = |fault: Fault| fault.during(format_args!("create container {id}"));
        let options = options(&request).map_err(during)?;
        let key = self.prepare(request, &options, fds).map_err(during)?;
        let asker = if options.begin {
            Asker::Start(None)
        } else {
            Asker::Create(reply)
        };
        match self.start_worker(key, asker) {
            Ok(()) if options.begin => Ok(Some(task::CreateTaskResponse { pid: 0 }.encode_to_vec())),
            Ok(()) => Ok(None),
            Err(fault) => {
                self.fail(key, Asker::Create(reply), fault);
                Ok(None)
            }
        }
    }

    /// Everything that needs no cgroup: the container is in the table and on record after this.
    fn prepare(
        &mut self,
        request: task::CreateTaskRequest,
        options: &pod::CreateOptions,
        fds: Vec<OwnedFd>,
    ) -> Result<u32, Fault> {
        let bundle = std::path::PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(Fault::invalid(format_args!(
                "the bundle {:?} is no absolute path",
                request.bundle
            )));
        }
        let spec = spec::for_create(&bundle)?;
        let path = match &spec.cgroups_path {
            Some(path) => CgroupPath::parse(path)?,
            None => spec::default_cgroup(&request.id),
        };
        let cgroup = Cgroup::open(&self.layout, &path)?;
        if !cgroup.is_empty()? {
            // Whatever lives there is not ours, and must not come to belong to a container that is killed one day.
            return Err(Fault::precondition(format_args!(
                "cgroup {} is in use",
                cgroup.path().display()
            )));
        }
        let stdin = Stdin::parse(&request.stdin)?;
        let outputs = outputs(&request.stdout, &request.stderr)?;
        // Opened before there is anything to take back: a wrong path is a plain error.
        let (theirs, ours) = if request.terminal {
            (
                stdio::Theirs::default(),
                stdio::open_for_terminal(&stdin, &outputs[0])?,
            )
        } else {
            stdio::open(&stdin, [&outputs[0], &outputs[1]], fds, spec.owner)?
        };
        let pid_namespace = self.pid_target(&options.pid_target)?;
        let key = self.number();
        let asked_terminal = request.terminal;
        let streams = Streams {
            log: ours.log,
            stdin: ours.stdin,
            stdin_fifo: ours.stdin_fifo,
            discards: outputs[0] == Output::Discard,
            stdin_once: stdin == Stdin::Keep { once: true },
            fifos: ours.fifos,
            ..Streams::default()
        };
        let container = Container {
            id: request.id,
            bundle,
            cgroup,
            cgroup_made: false,
            phase: Phase::Moving,
            start_report: None,
            rootfs_mounted: !request.rootfs.is_empty(),
            asked: Asked {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
            streams,
            theirs,
            pid_namespace,
            rootfs: request.rootfs,
            resources: spec.resources,
            cgroup_path: path,
            oom: None,
            oom_killed: false,
            oom_looks: crate::oom::Looks::default(),
            execs: Vec::new(),
            waiters: Vec::new(),
            deleters: Vec::new(),
            remove_tries: 0,
            created_at: 0,
            started_at: 0,
            failure: None,
        };
        self.containers.insert(key, container);
        if let Some(fd) = ours.stdout {
            self.read_output(key, From::Stdout, fd);
        }
        if let Some(fd) = ours.stderr {
            self.read_output(key, From::Stderr, fd);
        }
        if !asked_terminal {
            self.use_stdin_fifo(key);
        }
        if let Err(e) = self.save() {
            self.close_streams(key);
            self.containers.remove(&key);
            return Err(e.into());
        }
        Ok(key)
    }

    /// The PID namespace that a container is to join, of another one of the pod.
    fn pid_target(&self, id: &str) -> Result<Option<OwnedFd>, Fault> {
        if id.is_empty() {
            return Ok(None);
        }
        let target = &self.containers[&self.find(id)?];
        let init = target.init("join the PID namespace of")?;
        // Not reaped as long as it is in the table: so this pid is nobody else's.
        let path = format!("/proc/{}/ns/pid", init.pid);
        slipway_sys::ns::open(Path::new(&path)).map(Some).map_err(|e| {
            Fault::failed(
                format_args!("join the PID namespace of container {}", target.id),
                &e,
            )
        })
    }

    fn start_worker(&mut self, key: u32, asker: Asker) -> Result<(), Fault> {
        if self.worker.is_none() {
            let path = &self.config.worker;
            let opened = slipway_sys::mount::program(path).map_err(|source| WorkerError::Start {
                path: path.clone(),
                source,
            })?;
            self.worker = Some(opened);
        }
        let Some(container) = self.containers.get_mut(&key) else {
            return Ok(());
        };
        mount_rootfs(&container.bundle, &container.rootfs)?;
        container.cgroup = Cgroup::create(&self.layout, &container.cgroup_path)?;
        container.cgroup_made = true;
        let resources = std::mem::take(&mut container.resources);
        container.cgroup.apply(&resources)?;
        match container.cgroup.oom_watch(&resources) {
            Ok(watch) => {
                if self
                    .reactor
                    .watch(&watch, Source::Oom(key), Interest::Read)
                    .is_ok()
                {
                    container.oom = Some(watch);
                }
            }
            Err(e) => warning!("watch container {} for kills: {}", container.id, Chain(&e)),
        }
        // Again: now it says which directories were made.
        self.save()?;
        let Some(container) = self.containers.get_mut(&key) else {
            return Ok(());
        };
        let theirs = std::mem::take(&mut container.theirs);
        let pid_namespace = container.pid_namespace.take();
        let [stdin, stdout, stderr] = &theirs.fds;
        let job = Job {
            program: &self.config.worker,
            file: self.worker.as_ref().map(AsFd::as_fd),
            pid_namespace: pid_namespace.as_ref().map(AsFd::as_fd),
            id: &container.id,
            bundle: &container.bundle,
            stdio: [stdin, stdout, stderr].map(|fd| fd.as_ref().map(AsFd::as_fd)),
            cgroup: &container.cgroup,
        };
        // The shim is spared by the OOM killer; what it starts is not, unless its own spec says so.
        self.oom_score.as_inherited();
        let started = worker::start(&job);
        self.oom_score.as_wanted();
        let (worker, report) = started?;
        let deadline = self.reactor.after(worker::DEADLINE, Timer::Worker(key));
        self.reactor
            .watch(report.fd(), Source::Worker(key), Interest::Read)
            .map_err(|e| Fault::failed("watch the worker", &e))?;
        container.phase = Phase::Creating(Creating {
            worker,
            report,
            deadline,
            asker,
        });
        Ok(())
    }

    /// A worker, or an init on its way to its program, has said something.
    pub fn on_report(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        if let Phase::Creating(creating) = &mut container.phase {
            match creating.report.read() {
                Ok(Said::Nothing) => {}
                Ok(Said::Created { pid, terminal }) => self.created(key, pid, terminal),
                // Its exit says how; the deadline is there for a worker that closes its socket and stays.
                Ok(Said::End) => self.reactor.forget(creating.report.fd()),
                Err(error) => self.creation_failed(key, error),
            }
            return;
        }
        let Some(report) = &mut container.start_report else {
            return;
        };
        match report.read() {
            Ok(Said::Nothing) => {}
            Ok(Said::End | Said::Created { .. }) => {
                self.reactor.forget(report.fd());
                container.start_report = None;
                self.started(key);
            }
            Err(error) => self.start_failed(key, error),
        }
    }

    /// The worker reported the container's init.
    fn created(&mut self, key: u32, pid: u32, terminal: Option<OwnedFd>) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let lacks_terminal = container.asked.terminal && terminal.is_none();
        if lacks_terminal {
            return self.creation_failed(key, WorkerError::NoTerminal);
        }
        container.cgroup.settle();
        let init = match slipway_sys::process::pidfd_open(pid) {
            Ok(pidfd) => Child { pid, pidfd },
            Err(_) => return self.created_and_gone(key, pid),
        };
        // Whoever can trace the init may have got hold of the socket, and name a process that is none of the container's.
        let Phase::Creating(creating) = &container.phase else {
            return;
        };
        let (worker, asker) = (creating.worker.pid, creating.asker);
        let own = match container.cgroup.procs() {
            Ok(own) => own,
            Err(e) => return self.fail(key, asker, e.into()),
        };
        if !own.contains(&pid) && !crate::tree::is_ended_child(pid, [worker, std::process::id()]) {
            return self.creation_failed(key, WorkerError::Stranger { pid });
        }
        let creating = match container.created(init) {
            Ok(creating) => creating,
            Err(illegal) => return warning!("{illegal}"),
        };
        self.reactor.cancel(creating.deadline, Timer::Worker(key));
        container.start_report = Some(creating.report);
        let terminal = terminal.map_or(Ok(()), |master| self.use_terminal(key, master));
        self.forget_early();
        if let Err(e) = terminal {
            let fault = Fault::failed("use the container's terminal", &e);
            return self.fail(key, asker, fault);
        }
        self.answer_created(key, asker, pid);
        if let Asker::Start(Some(start)) = asker
            && let Err(fault) = self.start_created(start, key)
        {
            self.answer(start, Err(fault));
        }
    }

    fn answer_created(&mut self, key: u32, asker: Asker, pid: u32) {
        self.save_or_warn();
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        info!("container {} is created, pid {pid}", container.id);
        let event = events::TaskCreate {
            container_id: container.id.clone(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            rootfs: container.rootfs.clone(),
            io: Some(events::TaskIo {
                stdin: container.asked.stdin.clone(),
                stdout: container.asked.stdout.clone(),
                stderr: container.asked.stderr.clone(),
                terminal: container.asked.terminal,
            }),
            checkpoint: String::new(),
            pid,
        };
        self.publish(topic::CREATE, "containerd.events.TaskCreate", &event);
        if let Asker::Create(reply) = asker {
            self.answer(reply, Ok(task::CreateTaskResponse { pid }.encode_to_vec()));
        }
    }

    /// The init was reaped before its pid was known: it was created, and has ended.
    fn created_and_gone(&mut self, key: u32, pid: u32) {
        let Some((status, at_ns)) = self.early.remove(pid) else {
            return self.creation_failed(key, WorkerError::Nonsense);
        };
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        container.created_at = crate::clock::now();
        let exit = Exit {
            code: status.exit_code(),
            at_ns,
            oom_killed: false,
            pid,
        };
        if let Phase::Creating(creating) = container.ending(Outcome::Exited(exit)) {
            self.reactor.cancel(creating.deadline, Timer::Worker(key));
            self.reactor.forget(creating.report.fd());
            self.answer_created(key, creating.asker, pid);
            self.not_started(key, creating.asker, status);
        }
        self.look_at_ending(key);
    }

    /// Tells whoever waits for the start of a container that it has ended before.
    fn not_started(&mut self, key: u32, asker: Asker, status: Status) {
        let (Asker::Start(Some(reply)), Some(container)) = (asker, self.containers.get(&key)) else {
            return;
        };
        let how = worker::in_words(status);
        let fault = Fault::precondition(format_args!(
            "start container {}: it ended before ({how})",
            container.id
        ));
        self.answer(reply, Err(fault));
    }

    /// Ends a creation that is under way, as if the init had been killed that there may not be yet.
    pub fn end_creating(&mut self, key: u32) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let Phase::Creating(creating) = &container.phase else {
            return;
        };
        let asker = creating.asker;
        if let Asker::Create(_) = asker {
            return self.fail(key, asker, Fault::precondition("it was killed meanwhile"));
        }
        container.cgroup.settle();
        let status = Status::Signal(SIGKILL);
        let exit = Exit {
            code: status.exit_code(),
            at_ns: crate::clock::now(),
            oom_killed: false,
            pid: 0,
        };
        if let Phase::Creating(creating) = container.ending(Outcome::Exited(exit)) {
            self.give_up(key, &creating);
        }
        self.not_started(key, asker, status);
        self.forget_early();
        self.look_at_ending(key);
    }

    fn give_up(&mut self, key: u32, creating: &Creating) {
        self.reactor.cancel(creating.deadline, Timer::Worker(key));
        self.reactor.forget(creating.report.fd());
        kill(&creating.worker);
    }

    /// A worker has ended; its report may still be unread.
    pub fn worker_exited(&mut self, key: u32, status: Status) {
        self.on_report(key);
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        let Phase::Creating(creating) = &container.phase else {
            return;
        };
        let error = match creating.report.not_launched() {
            Some(source) => WorkerError::Start {
                path: self.config.worker.clone(),
                source,
            },
            None => WorkerError::Died {
                how: worker::in_words(status),
            },
        };
        self.creation_failed(key, error);
    }

    pub(crate) fn creation_failed(&mut self, key: u32, error: WorkerError) {
        let Some(container) = self.containers.get(&key) else {
            return;
        };
        let Phase::Creating(creating) = &container.phase else {
            return;
        };
        let asker = creating.asker;
        let fault = Fault::from(error);
        self.fail(key, asker, fault);
    }

    /// Takes back a container that could not be created; who asked is answered when nothing is left of it.
    pub fn fail(&mut self, key: u32, asker: Asker, fault: Fault) {
        let Some(container) = self.containers.get_mut(&key) else {
            return;
        };
        let fault = fault.during(format_args!("create container {}", container.id));
        warning!("{fault}");
        container.cgroup.settle();
        match container.ending(Outcome::Failed { asker, fault }) {
            Phase::Creating(creating) => self.give_up(key, &creating),
            Phase::Created(init) => kill(&init),
            _ => {}
        }
        self.forget_early();
        self.look_at_ending(key);
    }
}

/// Kills a process that is ours; it is reaped when it ends.
pub fn kill(child: &Child) {
    if let Err(e) = slipway_sys::process::send_signal(child.pidfd.as_fd(), SIGKILL) {
        warning!("kill process {}: {}", child.pid, Chain(&e));
    }
}

/// An id becomes part of paths.
pub fn check_id(id: &str) -> Result<(), Fault> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.bytes().all(fits) {
        return Err(Fault::invalid(format_args!(
            "{id:?} is no id: letters, digits, and any of -_. after the first"
        )));
    }
    Ok(())
}

/// What slipwayd and the builder ask for beyond containerd's request.
fn options(request: &task::CreateTaskRequest) -> Result<pod::CreateOptions, Fault> {
    let ours = request.options.as_ref().filter(|o| o.type_url == CREATE_OPTIONS);
    let Some(options) = ours else {
        return Ok(pod::CreateOptions::default());
    };
    pod::CreateOptions::decode(options.value.as_slice())
        .map_err(|e| Fault::invalid(format_args!("decode the options: {e}")))
}

fn outputs(stdout: &str, stderr: &str) -> Result<[Output; 2], Fault> {
    let out = Output::parse(stdout, "stdout")?;
    let err = match (&out, stderr) {
        (Output::CriLog(_) | Output::Discard | Output::Sent, "") => out.clone(),
        _ => Output::parse(stderr, "stderr")?,
    };
    Ok([out, err])
}

/// Mounts what containerd wants as the container's root. slipwayd and the builder have mounted it themselves.
fn mount_rootfs(bundle: &Path, mounts: &[types::Mount]) -> Result<(), Fault> {
    let target = bundle.join("rootfs");
    for mount in mounts {
        let act = || format!("mount {} {} on {}", mount.r#type, mount.source, target.display());
        crate::mounts::mount(mount, &target).map_err(|e| Fault::failed(act(), &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_cannot_lead_out_of_its_directory() {
        for good in ["a", "pod-1_x.y", &"f".repeat(64)] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", "..", ".a", "a/b", "a b", "a\0", &"f".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn stderr_follows_stdout_into_the_log() {
        let both = outputs("cri-log:///a/0.log", "").expect("a log");
        assert_eq!(both[0], both[1]);
        assert_eq!(outputs("/f/out", "").expect("a fifo")[1], Output::Null);
    }
}
